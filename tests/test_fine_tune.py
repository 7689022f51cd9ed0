"""What is learned of a plan, from what, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from emitted import CONSTANTS, HEAD, IMAGE, decided
from graphs import build, exactly, normal, prepared, run

from calib.affine import IntFormat, QParams, dequantize
from calib.session import open_session
from calib.session import run as run_session
from converter.emit.qdq import emit
from converter.graph.files import serialized
from converter.job import Watch
from converter.learn.blocks import blocks_of
from converter.learn.checkpoint import Checkpoint, State
from converter.learn.fine_tune import (
    Lesson,
    Options,
    Samples,
    Training,
    WholeSupply,
    fine_tuned,
    learned_again,
    outputs_alike,
)
from converter.learn.losses import is_distribution, tells_classes
from converter.learn.pictures import varied
from converter.learn.restored import as_stored, restored, with_integers
from converter.learn.steps import Adam
from converter.learn.student import Learnable, Student
from converter.plan.plan import (
    NodePlan,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantizedWeight,
    QuantPlan,
    WeightPlan,
)
from converter.weights.stored import Storage, fitted_alone

NET = """g (float[N,4,8,8] x) => (float[N,6] y) {
    a = Conv <pads=[1,1,1,1]> (x, w1, b1)  r = Relu (a)
    c = Conv <pads=[1,1,1,1]> (r, w2, b2)  s = Add (c, x)  t = Relu (s)
    p = GlobalAveragePool (t)  f = Flatten (p)  m = Gemm (f, w3, b3)  y = Softmax (m) }"""
WEIGHTS = {
    "w1": normal(4, 4, 3, 3) / 3,
    "b1": normal(4, seed=1) / 3,
    "w2": normal(4, 4, 3, 3, seed=2) / 3,
    "b2": normal(4, seed=3) / 3,
    "w3": normal(4, 6, seed=4) * 2,
    "b3": normal(6, seed=5) / 3,
}
AXES = {"w1": 0, "w2": 0, "w3": 1}
GRAINS = {"tensor": PerTensor(), "channel": PerAxis(1), "blocks of 4": PerBlock(1, 4)}


def fitted(bits, trellis=False, weight=None, granularity=None):
    """A matrix in few bits, on a grid of any zero."""
    array = normal(32, 16) if weight is None else weight
    grain = granularity or PerAxis(1)
    wanted = WeightPlan("w", 1, IntFormat(bits, signed=False), grain)
    if trellis or weight is not None or grain != PerAxis(1):
        return fitted_alone(array, wanted, Storage(correct=False))
    low, high = array.min(axis=0), array.max(axis=0)
    scale = (high - low) / (2**bits - 1)
    codes = np.rint((array - low) / scale).astype(np.uint8)
    return QuantizedWeight(codes, QParams(scale, -low / scale, wanted.format, 1))


def matrix(stored, weight=None):
    """A product with a stored weight, and its plan."""
    array = normal(32, 16) if weight is None else weight
    model = prepared(
        "g (float[N,32] x) => (float[N,16] y) { m = MatMul (x, w) y = Relu (m) }", w=array
    )
    name = model.graph[0].name
    unit = NodePlan(
        name,
        "MatMul",
        True,
        "",
        ("x",),
        weight=WeightPlan("w", 1, stored.qparams.format, PerAxis(1)),
    )
    return model, QuantPlan({name: unit}, {}, stored={(name, 1): stored})


def classifier(bits=2, text=NET):
    """The net with all weights in few bits, not fitted to anything."""
    model = prepared(text, **WEIGHTS)
    nodes, stored = {}, {}
    for node in model.graph:
        name = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] else ""
        if name in AXES and node.op_type in {"Conv", "Gemm"}:
            wanted = WeightPlan(name, 1, IntFormat(bits, signed=False), PerAxis(AXES[name]))
            nodes[node.name] = NodePlan(
                node.name, node.op_type, True, "", (node.inputs[0].name,), weight=wanted
            )
            stored[node.name, 1] = fitted_alone(WEIGHTS[name], wanted, Storage(correct=False))
    return model, QuantPlan(nodes, {}, stored=stored)


def samples(fit=24, held=8):
    rows = [{"x": normal(1, 4, 8, 8, seed=10 + i)} for i in range(fit + held)]
    return Samples(rows[:fit], rows[fit:], ["y"])


OPTIONS = Options(epochs=10, batch=8, rate=1e-3, threads=1)


def tuned(options=OPTIONS, watch=None, checkpoint=None, keep=lambda plan: None, bits=2):
    model, plan = classifier(bits)
    kept = checkpoint or Checkpoint(None, "")
    training = Training(options, kept, watch or Watch(), keep)
    return plan, fine_tuned(model, plan, samples(), training)


def bytes_of(plan):
    return [
        (place, w.codes.tobytes(), w.qparams.scale.tobytes(), w.qparams.zero_point.tobytes())
        for place, w in sorted(plan.stored.items())
    ] + [(name, bias.tobytes()) for name, bias in sorted(plan.biases.items())]


# --- the student


@pytest.mark.parametrize("granularity", GRAINS.values(), ids=GRAINS)
@pytest.mark.parametrize("trellis", [False, True], ids=["uniform", "trellis"])
def test_a_student_begins_with_what_the_plan_stores(granularity, trellis):
    if trellis and not isinstance(granularity, PerAxis):
        pytest.skip("a trellis runs along the axis of the scales")
    model, plan = matrix(fitted(3, trellis, granularity=granularity))
    student = Student(model, plan)
    learned = student.start()
    rounded = student.rounded(learned)
    ((name, value),) = student.values(learned, rounded).items()
    ((_, stored),) = plan.stored.items()
    wanted = dequantize(stored.codes, stored.qparams)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(student.values_of(plan)[name], wanted)
    assert bytes_of(student.plan_with(learned)) == bytes_of(plan)


@pytest.mark.parametrize("granularity", GRAINS.values(), ids=GRAINS)
def test_grids_have_the_slopes_of_differences(granularity):
    model, plan = matrix(fitted(4, granularity=granularity))
    student, cost = Student(model, plan, Learnable(points=False)), normal(32, 16, seed=9)
    learned, step = student.start(), 1e-4

    def loss():
        ((_, value),) = student.values(learned, student.rounded(learned)).items()
        return float((cost.astype(np.float64) * value).sum())

    name = student.constants[0]
    slopes = student.slopes({name: cost}, student.rounded(learned))
    for key, array in learned.items():
        for index in np.ndindex(array.shape):
            array[index] += step
            above = loss()
            array[index] -= 2 * step
            below = loss()
            array[index] += step
            difference = (above - below) / (2 * step)
            assert slopes[key][index] == pytest.approx(difference, rel=2e-2, abs=2e-2)


def rotated(bits):
    """A matrix in levels of a trellis that are rotated."""
    stored = fitted(bits, trellis=True)
    q = stored.qparams
    middle = np.full(16, (2**bits - 1) / 2, np.float32)
    return replace(
        stored, qparams=replace(q, zero_point=middle, format=replace(q.format, rotated=True))
    )


def test_a_rotated_weight_is_learned_as_it_is_stored():
    model, plan = matrix(rotated(4))
    student, cost = Student(model, plan), normal(32, 16, seed=9)
    learned, step = student.start(), 1e-4
    name = student.constants[0]
    assert set(learned) == {f"{name} scale", f"{name} point"}  # zeros stay

    def loss(points=0.0):
        rounded = student.rounded(learned)
        moved = replace(rounded[name], points=rounded[name].points + points)
        (value,) = student.values(learned, {name: moved}).values()
        return float((cost.astype(np.float64) * value).sum())

    value = student.values(learned, student.rounded(learned))[name]
    np.testing.assert_allclose(value, student.values_of(plan)[name], rtol=1e-5, atol=1e-5)
    assert bytes_of(student.plan_with(learned)) == bytes_of(plan)
    slopes = student.slopes({name: cost}, student.rounded(learned))
    scale = learned[f"{name} scale"]
    for index in range(16):
        scale[index] = step
        above = loss()
        scale[index] = -step
        difference = (above - loss()) / (2 * step)
        scale[index] = 0
        assert slopes[f"{name} scale"][index] == pytest.approx(difference, rel=2e-2, abs=2e-2)
    for place in [(0, 0), (31, 15), (7, 3)]:
        moved = np.zeros((32, 16), np.float32)
        moved[place] = 0.1
        difference = (loss(moved) - loss(-moved)) / 0.2
        assert slopes[f"{name} point"][place] == pytest.approx(difference, rel=2e-2, abs=2e-2)


def test_points_are_rounded_and_their_slope_passes_through():
    model, plan = matrix(fitted(4))
    student = Student(model, plan)
    learned = student.start()
    (key,) = (key for key in learned if key.endswith(" point"))
    before = student.rounded(learned)[student.constants[0]]
    learned[key] += 0.4
    assert np.array_equal(student.rounded(learned)[student.constants[0]].codes, before.codes)
    learned[key] += 0.2
    student.bounded(learned)
    moved = student.rounded(learned)[student.constants[0]].codes.astype(int)
    np.testing.assert_array_equal(moved, np.minimum(before.codes.astype(int) + 1, 15))
    cost = normal(32, 16, seed=9)
    slopes = student.slopes({student.constants[0]: cost}, {student.constants[0]: before})
    np.testing.assert_allclose(slopes[key], cost * before.scale, rtol=1e-6)


def test_a_trellis_is_learned_as_any_rounding():
    model, plan = matrix(fitted(3, trellis=True))
    student = Student(model, plan)
    learned = student.start()
    (key,) = (key for key in learned if key.endswith(" point"))
    learned[key] += normal(32, 16, seed=3)
    learned_plan = student.plan_with(learned)
    ((_, stored),) = learned_plan.stored.items()
    rounded = student.rounded(learned)
    ((_, value),) = student.values(learned, rounded).items()
    assert stored.qparams.format.trellis
    assert stored.codes.max() < 8
    np.testing.assert_allclose(
        dequantize(stored.codes, stored.qparams), value, rtol=1e-5, atol=1e-6
    )


def test_weights_that_are_zero_on_purpose_stay_zero():
    weight = normal(32, 16)
    weight[np.random.default_rng(0).random(weight.shape) < 0.6] = 0
    model, plan = matrix(fitted(4, weight=weight), weight)
    student = Student(model, plan)
    learned = student.start()
    (key,) = (key for key in learned if key.endswith(" point"))
    learned[key] += 3
    ((_, stored),) = student.plan_with(learned).stored.items()
    assert not dequantize(stored.codes, stored.qparams)[weight == 0].any()
    assert dequantize(stored.codes, stored.qparams)[weight != 0].any()


def test_codes_of_few_values_stay():
    weight = np.sign(normal(32, 16))
    model, plan = matrix(fitted(4, weight=weight), weight)
    assert not [key for key in Student(model, plan).start() if key.endswith(" point")]


# --- integers


@pytest.mark.parametrize("bits", [8, 3])
def test_what_is_restored_computes_what_is_emitted(bits):
    graph = f"""{HEAD} {{ a = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu (a)
        d = Conv <pads=[1,1,1,1]> (r, v, b) y = Add (d, r) }}"""
    model = prepared(graph, **CONSTANTS)
    plan = decided(model, IMAGE)
    tensors = {
        name: replace(t, format=replace(t.format, bits=bits)) for name, t in plan.tensors.items()
    }
    scales = {
        group: replace(
            q,
            format=replace(q.format, bits=bits),
            scale=q.scale * np.float32(255 / (2**bits - 1)),
            zero_point=np.asarray(
                np.rint(float(q.zero_point) * (2**bits - 1) / 255), q.zero_point.dtype
            ),
        )
        for group, q in plan.qparams.items()
    }
    plan = replace(plan, tensors=tensors, qparams=scales)
    emitted = model.clone()
    emit(emitted, plan)
    wanted = run(emitted, IMAGE)["y"]
    floats = restored(model, as_stored(plan))
    session = open_session(serialized(floats))
    found = run_session(session, [floats.graph.outputs[0].name], IMAGE)
    (y,) = found.values()
    step = float(plan.params(next(iter(plan.tensors))).scale)
    # A bias is rounded in the file: a code may differ by one where a product is near a half.
    assert np.abs(y - wanted).max() <= 2.5 * max(float(q.scale) for q in scales.values())
    assert np.mean(np.abs(y - wanted) > 1e-4) < 0.05, step


def test_integers_are_learned_as_stored_weights_and_are_integers_again():
    model = prepared(f"{HEAD} {{ a = Conv <pads=[1,1,1,1]> (x, w, b) y = Relu (a) }}", **CONSTANTS)
    plan = decided(model, IMAGE)
    student = Student(model, as_stored(plan), Learnable(points=False, ranges=True))
    learned = student.start()
    assert sum(key.endswith("_scale_learned") for key in learned) == len(plan.groups())
    for key in learned:
        learned[key] += 0.01
    found = with_integers(plan, student.plan_with(learned))
    (name,) = found.weights
    np.testing.assert_array_equal(found.weights[name].codes, plan.weights[name].codes)
    np.testing.assert_allclose(
        found.weights[name].qparams.scale, plan.weights[name].qparams.scale * 1.01, rtol=1e-6
    )
    for group, q in plan.qparams.items():
        np.testing.assert_allclose(found.qparams[group].scale, q.scale * 1.01, rtol=1e-6)
        assert found.qparams[group].zero_point == q.zero_point
    assert not found.stored


# --- blocks


def test_blocks_in_a_row_are_the_model():
    layers = " ".join(f"c{i} = MatMul (r{i}, w{i}) r{i + 1} = Relu (c{i})" for i in range(8))
    text = f"g (float[N,4] x, float[N,4] m) => (float[N,4] y) {{ r0 = Mul (x, m) {layers} "
    model = prepared(
        text + "y = Mul (r8, m) }", **{f"w{i}": normal(4, 4, seed=i) for i in range(8)}
    )
    units = {
        node.name: NodePlan(node.name, "MatMul", True, "")
        for node in model.graph
        if node.op_type == "MatMul"
    }
    blocks = blocks_of(model, QuantPlan(units, {}), ["y"])
    assert len(blocks) == 2
    assert [node.name for block in blocks for node in block.model.graph] == [
        node.name for node in model.graph
    ]
    feeds = {"x": normal(3, 4), "m": normal(3, 4, seed=1)}
    values, entered = dict(feeds), {}
    for block in blocks:
        known = {name: values[name] for name in block.beside}
        entered = run(block.model, {**known, **entered})
    np.testing.assert_allclose(entered["y"], run(model, feeds)["y"], rtol=1e-5)


def test_a_residual_ends_no_block_inside():
    model, plan = classifier()
    (block,) = blocks_of(model, plan, ["y"])
    assert block.start == ""
    assert block.ends == ("y",)


# --- learning


@pytest.mark.parametrize(("blocks", "whole"), [(True, False), (False, True), (True, True)])
def test_learning_brings_outputs_nearer_to_the_float_model(blocks, whole):
    kept = []
    options = replace(OPTIONS, blocks=blocks, whole=whole)
    plan, found = tuned(options, keep=kept.append)
    assert found.after < 0.8 * found.before
    assert bytes_of(found.plan) != bytes_of(plan)
    assert found.held == 8
    assert bytes_of(kept[-1]) == bytes_of(found.plan)

    # Independently of what the learner says of itself.
    model, _ = classifier()
    x = np.concatenate([normal(1, 4, 8, 8, seed=500 + i) for i in range(64)])
    wanted = run(model, {"x": x})["y"]

    def divergence(some):
        y = run(restored(model, some), {"x": x})["y"]
        return float((wanted * np.log(wanted / y)).sum(axis=1).mean())

    assert divergence(found.plan) < divergence(plan)


def test_what_is_no_better_is_not_kept():
    plan, found = tuned(replace(OPTIONS, rate=0.9, epochs=1, blocks=False), bits=8)
    assert bytes_of(found.plan) == bytes_of(plan)
    assert found.after == found.before


def test_steps_that_lead_astray_begin_again_smaller():
    _, found = tuned(replace(OPTIONS, rate=0.9, blocks=False))
    assert found.after < 0.8 * found.before


def test_the_same_seed_gives_the_same_plan_on_any_number_of_threads():
    _, one = tuned()
    _, again = tuned(replace(OPTIONS, threads=2))
    _, other = tuned(replace(OPTIONS, seed=1))
    assert bytes_of(one.plan) == bytes_of(again.plan)
    assert bytes_of(one.plan) != bytes_of(other.plan)


class Stopped(Watch):
    """Is interrupted after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def track(self, items, label, total):
        for item in items:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield item


@pytest.mark.parametrize("steps", [12, 35])
def test_an_interrupted_learning_goes_on_where_it_was(tmp_path, steps):
    # In the middle of the only block, and of learning end to end.
    _, whole = tuned()
    with pytest.raises(KeyboardInterrupt):
        tuned(watch=Stopped(steps), checkpoint=Checkpoint(tmp_path / "c", "job"))
    assert list((tmp_path / "c").iterdir())
    counted = Stopped(1000)
    _, resumed = tuned(watch=counted, checkpoint=Checkpoint(tmp_path / "c", "job"))
    assert 1000 - counted.left < 60 - steps + 3
    assert bytes_of(resumed.plan) == bytes_of(whole.plan)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)


def test_a_checkpoint_of_another_job_or_a_broken_one_does_not_count(tmp_path):
    first = Checkpoint(tmp_path / "c", "one job")
    first.save("stage", State({"done": 3}, {"learned/a": np.ones(3)}))
    state = first.load("stage")
    assert state.numbers == {"done": 3}
    np.testing.assert_array_equal(state.group("learned")["a"], np.ones(3))
    assert Checkpoint(tmp_path / "c", "another").load("stage") is None
    (tmp_path / "c" / "stage.learned.npz").write_bytes(b"PK\x03\x04 broken")
    assert first.load("stage") is None
    first.close()
    assert not (tmp_path / "c").exists()


def test_a_folder_that_was_there_keeps_what_is_not_learned(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("precious")
    checkpoint = Checkpoint(tmp_path / "c", "job")
    checkpoint.save("stage", State({}, {}))
    checkpoint.close()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine.txt"]


def test_time_ends_learning_and_is_told():
    clock = iter(range(10_000))
    model, plan = classifier()
    options = replace(OPTIONS, seconds=20, blocks=False)
    training = Training(options, Checkpoint(None, ""), Watch(), clock=lambda: float(next(clock)))
    found = fine_tuned(model, plan, samples(), training)
    # Each step takes a second of this clock, and so does the first look; a tenth of the time is
    # kept for others.
    assert found.steps == 17
    assert found.wanted == 30


@pytest.mark.parametrize("blocks", [False, True])
def test_what_was_best_is_learned_again_from_all_samples(blocks):
    model, plan = classifier()
    training = Training(replace(OPTIONS, blocks=blocks), Checkpoint(None, ""), Watch())
    found = fine_tuned(model, plan, samples(), training)
    stages = {"end to end"} | ({"block 1 of 1"} if blocks else set())
    assert set(found.reached) <= stages
    assert 0 < found.reached["end to end"] <= found.steps
    again = learned_again(model, plan, samples(), replace(training, repeated=found.reached))
    judge = Lesson(Student(model, plan), outputs_alike(model, ["y"]), 1)
    supply = WholeSupply(model, samples().all(), OPTIONS)
    assert judge.judged(again, supply.held) < judge.judged(plan, supply.held)


def test_a_stage_that_gained_nothing_is_not_repeated():
    model, plan = classifier()
    training = Training(OPTIONS, Checkpoint(None, ""), Watch(), repeated={})
    assert bytes_of(learned_again(model, plan, samples(), training)) == bytes_of(plan)


def test_where_no_gradient_goes_is_known_once():
    model, plan = classifier(text=NET.replace("t = Relu (s)", "q = Asinh (s) t = Relu (q)"))
    training = Training(replace(OPTIONS, epochs=1, blocks=True), Checkpoint(None, ""), Watch())
    fine_tuned(model, plan, samples(), training)
    assert [gap.op_type for gap in training.gaps.values()] == ["Asinh"]


def test_samples_of_several_sizes_are_learned_from():
    model, plan = classifier(text=NET.replace("N,4,8,8", "N,4,H,W"))
    rows = [{"x": normal(1, 4, 6 + i % 3, 8, seed=i)} for i in range(30)]
    training = Training(replace(OPTIONS, epochs=4), Checkpoint(None, ""), Watch())
    found = fine_tuned(model, plan, Samples(rows[:24], rows[24:], ["y"]), training)
    assert found.after < found.before


# --- parts


def test_adam_takes_the_steps_of_its_paper():
    gradients = [np.array([1.0, -2.0]), np.array([3.0, 0.5])]
    learned, adam = {"a": np.array([1.0, 1.0])}, Adam()
    mean, square, wanted = np.zeros(2), np.zeros(2), np.array([1.0, 1.0])
    for t, gradient in enumerate(gradients, 1):
        adam.step(learned, {"a": gradient}, {"a": 0.1})
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        wanted = wanted - 0.1 * (mean / (1 - 0.9**t)) / np.sqrt(square / (1 - 0.999**t))
    np.testing.assert_allclose(learned["a"], wanted, rtol=1e-9)


def test_alike_numbers_share_a_step_by_their_gradients():
    learned, adam = {"a": np.zeros(2)}, Adam(["a"])
    adam.step(learned, {"a": np.array([3.0, 1.0])}, {"a": 0.1})
    np.testing.assert_allclose(learned["a"], -0.1 * np.array([3, 1]) / np.sqrt(5), rtol=1e-9)


@pytest.mark.parametrize("axes", ["NCHW", "NHWC", "NHW"])
def test_views_are_of_the_picture_whatever_its_axes(axes):
    picture = normal(4, 3, 12, 10)
    given = {"NCHW": picture, "NHWC": np.moveaxis(picture, 1, -1), "NHW": picture[:, 0]}[axes]
    views = varied(given, axes, np.random.default_rng(0))
    wanted = varied(picture, "NCHW", np.random.default_rng(0))
    wanted = {"NCHW": wanted, "NHWC": np.moveaxis(wanted, 1, -1), "NHW": wanted[:, 0]}[axes]
    np.testing.assert_array_equal(views, wanted)
    assert views.min() >= given.min()
    assert views.max() <= given.max()
    assert not np.array_equal(views, given)


def test_even_pictures_stay_what_they_are():
    grey = np.full((4, 1, 9, 9), 0.25, np.float32)
    views = varied(grey, "NCHW", np.random.default_rng(0))
    np.testing.assert_allclose(views, grey, rtol=1e-6)


ENDS = {
    "m = Gemm (x, w) y = Softmax (m)": (True, True),
    "y = Gemm (x, w)": (True, False),
    "m = Gemm (x, w) y = Sigmoid (m)": (False, False),
    "m = MatMul (x, w) n = ReduceL2 <axes=[1]> (m) y = Div (m, n)": (False, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_scores_of_classes_are_known_by_their_makers(end):
    model = build(f"g (float[N,4] x) => (float[N,6] y) {{ {end} }}", w=normal(4, 6))
    output = model.graph.outputs[0]
    assert (tells_classes(output), is_distribution(output)) == ENDS[end]
    assert isinstance(model, ir.Model)
    assert exactly(model)
