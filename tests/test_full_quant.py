"""Full quantization as a whole: every target's rules, every option, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from command_line import CONFIG, MODEL, changed, digits
from graphs import build, frozen, normal, run, types, uneven
from running import Ear, job, resources
from simulation import pairs_of

from calib.affine import Array, dequantize
from converter.calibrate.data import resources_of
from converter.config import load_config
from converter.errors import ConfigError, DataError
from converter.graph.edit import constant
from converter.graph.files import load
from converter.job import Job
from converter.measure.results import Outcome
from converter.modes import full_quant
from converter.pipeline.convert import convert, make_plan
from converter.plan.targets import TARGETS

IMAGES, LABELS = digits("calib")
FEW = {"image": IMAGES[:12]}
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}


def at(folder, section, key):
    """What a message about a key of the config begins with."""
    lines = (folder / "c.cfg").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith(f"{key} ="))
    return f"{folder / 'c.cfg'}:{number}: [{section}] {key}"


def converted(folder, model, data, common=None, **options):
    """The quantized model, the outcome and what was said."""
    ear = Ear()
    task = job(folder, model, data, common, **options)
    outcome = convert(task, ear)
    return ir.load(task.output), outcome, ear


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The example quantized for every target, converted when first asked for."""
    found = {}

    def of(target):
        if target not in found:
            folder = tmp_path_factory.mktemp(target)
            found[target] = converted(folder, load(MODEL), FEW, target_device=target)[:2]
        return found[target]

    return of


def parameters(model):
    """(codes or activation, scale, zero point or None) of every conversion."""
    for node in model.graph:
        if node.op_type in CONVERSIONS:
            zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            yield node, constant(node.inputs[1]), zero_point


def activations(model):
    """The zero points of what is quantized at run time."""
    return [zero for node, _, zero in parameters(model) if node.op_type == "QuantizeLinear"]


def stored(model, dtype):
    """The constants of a type that stand behind a DequantizeLinear."""
    codes = [
        constant(node.inputs[0])
        for node, *_ in parameters(model)
        if node.op_type == "DequantizeLinear"
    ]
    return [array for array in codes if array is not None and array.dtype == dtype]


# --- targets


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_keeps_the_examples_answers(examples, target):
    model, outcome = examples(target)
    images, labels = IMAGES[12:], LABELS[12:]
    before = run(load(MODEL), {"image": images})["probs"]
    after = run(model, {"image": images})["probs"]
    assert np.mean(after.argmax(1) == before.argmax(1)) >= 0.97
    assert np.mean(after.argmax(1) == labels) >= np.mean(before.argmax(1) == labels) - 0.03
    # Ten classes are too few for a product on a GPU.
    assert len(stored(model, np.int8)) == (7 if target == "NVGPU" else 8)
    assert [error.sqnr_db for error in outcome.errors] == sorted(
        error.sqnr_db for error in outcome.errors
    )


@pytest.mark.parametrize("target", ["CPU", "CPU_VNNI", "ARM", "OPENVINO", "DSP"])
def test_activations_are_unsigned(examples, target):
    zero_points = activations(examples(target)[0])
    assert {zero.dtype for zero in zero_points} == {np.dtype(np.uint8)}
    assert any(zero.item() for zero in zero_points)


def test_a_gpu_gets_symmetric_integers(examples):
    model, _ = examples("NVGPU")
    zero_points = [zero for _, _, zero in parameters(model) if zero is not None]
    assert {zero.dtype for zero in zero_points} == {np.dtype(np.int8)}
    assert not any(zero.any() for zero in zero_points)


@pytest.mark.parametrize(
    ("target", "count"), [("CPU", 8), ("ARM", 8), ("DSP", 8), ("OPENVINO", 0), ("NVGPU", 0)]
)
def test_biases_are_integers_where_the_target_adds_them_so(examples, target, count):
    assert len(stored(examples(target)[0], np.int32)) == count


def reads_through_conversion(node):
    """For each input, whether it comes out of a DequantizeLinear."""
    return [
        value.producer() is not None and value.producer().op_type == "DequantizeLinear"
        for value in node.inputs
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("CPU", [True, True]), ("OPENVINO", [True, False]), ("NVGPU", [True, False])],
)
def test_the_branch_that_is_added_to_inside_a_convolution_is_not_converted(
    examples, target, expected
):
    (add,) = (node for node in examples(target)[0].graph if node.op_type == "Add")
    assert reads_through_conversion(add) == expected
    if not expected[1]:
        assert add.inputs[1].producer().op_type == "Conv"


def test_a_dsp_gets_the_softmax_too(examples):
    model, outcome = examples("DSP")
    assert outcome.plan.nodes["/softmax/Softmax"].quantized
    assert types(model)[-1] == "DequantizeLinear"
    assert not examples("CPU")[1].plan.nodes["/softmax/Softmax"].quantized


def test_pairs_of_the_stored_codes(examples):
    sums = {}
    for target in ("CPU", "CPU_VNNI"):
        model, _ = examples(target)
        convs = [
            node
            for node in model.graph
            if node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1
        ]
        codes = [constant(node.inputs[1].producer().inputs[0]) for node in convs]
        (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
        codes.append(constant(gemm.inputs[1].producer().inputs[0]))
        sums[target] = max(np.abs(pairs_of(array)).max() for array in codes)
    assert sums["CPU"] <= 128 < sums["CPU_VNNI"]


# --- options

WIDE = (
    "g (float[1,4,6,6] x) => (float[] y) { [one] a = Conv (x, w)  r = Relu (a)  [two] y = Conv "
    "(r, v) }"
)
WIDE_DATA = {"x": normal(6, 4, 6, 6)}


def wide(**weights):
    return build(WIDE, **{"w": normal(6, 4, 3, 3), "v": normal(3, 6, 3, 3), **weights})


def test_without_overflow_safety_all_codes_may_be_used(tmp_path):
    heavy = {"w": np.abs(normal(6, 4, 3, 3)) + 1}
    most = {}
    for safe in ("true", "false"):
        model, _, _ = converted(tmp_path, wide(**heavy), WIDE_DATA, overflow_safe=safe)
        most[safe] = max(np.abs(pairs_of(codes)).max() for codes in stored(model, np.int8))
    assert most["true"] <= 128 < most["false"]


@pytest.mark.parametrize("method", ["MAX_MIN", "KL"])
@pytest.mark.parametrize("target", ["CPU", "NVGPU"])
def test_every_scale_is_a_power_of_two(tmp_path, target, method):
    model, _, _ = converted(
        tmp_path,
        load(MODEL),
        FEW,
        power_of_two_scale="true",
        target_device=target,
        activation_quant_method=method,
    )
    # A bias's scale is the product of two others.
    scales = [scale for _, scale, _ in parameters(model)]
    assert len(scales) > 20
    for scale in scales:
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)


def test_equalized_weights_share_a_scale_better(tmp_path):
    # Channels that the first weight makes small are those that the second hears best.
    sizes = np.geomspace(0.03, 30, 6, dtype=np.float32)
    weights = {
        "w": normal(6, 4, 3, 3) * sizes.reshape(6, 1, 1, 1),
        "v": normal(3, 6, 3, 3) / sizes.reshape(1, 6, 1, 1),
    }
    noise = {}
    for equalize in ("true", "false"):
        _, outcome, _ = converted(
            tmp_path,
            wide(**weights),
            WIDE_DATA,
            per_channel="false",
            equalize=equalize,
            only_where_it_pays="false",
        )
        (output,) = outcome.verification.outputs
        noise[equalize] = output.sqnr_db
    assert noise["true"] > noise["false"] + 10


def test_per_channel_weights_need_no_equalization(tmp_path):
    weights = {"w": uneven(6, 4, 3, 3), "v": normal(3, 6, 3, 3)}
    written = []
    for equalize in ("true", "false"):
        task = job(tmp_path, wide(**weights), WIDE_DATA, equalize=equalize)
        convert(task)
        quantized = load(task.output)
        quantized.metadata_props.clear()  # it tells of the key
        written.append(frozen(quantized))
    assert written[0] == written[1]


def test_outlier_ratio_narrows_the_range(tmp_path):
    scales = []
    for ratio in (0.0001, 0.1):
        method = {"activation_quant_method": "REMOVAL_OUTLIER", "outlier_ratio": ratio}
        _, outcome, _ = converted(tmp_path, wide(), WIDE_DATA, **method)
        scales.append(float(outcome.plan.params("x").scale))
    x = np.sort(WIDE_DATA["x"].ravel())
    kept = x[int(0.1 * x.size) : int(0.9 * x.size)]
    np.testing.assert_allclose(
        scales, [(x[-1] - x[0]) / 255, (kept[-1] - kept[0]) / 255], rtol=0.02
    )


@pytest.mark.parametrize("memory", [200_000, 1 << 30])
def test_threads_and_memory_do_not_change_a_byte(tmp_path, monkeypatch, memory):
    written = set()
    for threads in (1, 3):
        monkeypatch.setattr(
            full_quant, "resources_of", lambda _, threads=threads: resources(threads, memory)
        )
        task = job(tmp_path, load(MODEL), FEW, activation_quant_method="KL")
        convert(task)
        written.add(task.output.read_bytes())
    monkeypatch.undo()
    reference = job(tmp_path, load(MODEL), FEW, activation_quant_method="KL")
    convert(reference)
    assert written == {reference.output.read_bytes()}


# --- nodes that stay float

TWO_BRANCHES = """g (float[1,4,6,6] x) => (float[] y) {
    [small] a = Conv (x, w)  [large] b = Conv (x, u)  [join] c = Concat <axis=1> (a, b)
      [last] y = Conv (c, v)
}"""


@pytest.mark.parametrize(("factor", "quantized"), [(4, True), (100, False)])
def test_a_concat_of_mixed_ranges_stays_float(tmp_path, factor, quantized):
    weight = normal(3, 4, 3, 3)
    model = build(TWO_BRANCHES, w=weight, u=weight * np.float32(factor), v=normal(2, 6, 1, 1))
    _, outcome, _ = converted(tmp_path, model, WIDE_DATA)
    join = outcome.plan.nodes["join"]
    assert join.quantized == quantized
    if not quantized:
        assert join.reason == "the ranges of its inputs differ 100 times"
        assert all(outcome.plan.nodes[name].quantized for name in ("small", "large", "last"))


def test_require_full_integer_names_every_float_node(tmp_path):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, load(MODEL), FEW, require_full_integer="true")
    message = str(caught.value)
    assert message.startswith(f"{at(tmp_path, 'full_quant_param', 'require_full_integer')}: ")
    assert "/softmax/Softmax (Softmax): " in message
    assert "node(s) would stay float: " in message
    assert not (tmp_path / "quantized.onnx").exists()


def test_require_full_integer_is_content_without_float_nodes(tmp_path):
    _, outcome, _ = converted(
        tmp_path, load(MODEL), FEW, require_full_integer="true", target_device="DSP"
    )
    assert all(node.quantized or node.inside for node in outcome.plan.nodes.values())


# --- max_drop

# A channel of the input that is large and says little leaves few codes to the others, which the
# first layer reads.
CHAIN = """g (float[1,4,6,6] x) => (float[] y) {
    [one] a = Conv (x, w)  [pool] p = MaxPool <kernel_shape=[2,2]> (a)  [two] c = Conv (p, k)
      [three] y = Conv (c, v)
}"""
SIZES = np.array([1000, 1, 1, 1], np.float32).reshape(1, 4, 1, 1)
UNEVEN_DATA = {"x": normal(6, 4, 6, 6) * SIZES}


def chain():
    return build(
        CHAIN, w=normal(6, 4, 3, 3) / (10 * SIZES), k=normal(6, 6, 1, 1), v=normal(3, 6, 1, 1)
    )


def drop_of(model, data):
    """1 - cosine similarity of the output over all samples, in float64."""
    x, y = (
        [run(m, {"x": one[None]})["y"].astype(np.float64) for one in data["x"]]
        for m in (chain(), model)
    )
    x, y = np.stack(x).ravel(), np.stack(y).ravel()
    return 1 - x @ y / np.sqrt((x @ x) * (y @ y))


def kept_for_the_drop(outcome):
    return [node.name for node in outcome.plan.nodes.values() if "max_drop" in node.reason]


def test_the_worst_node_stays_float_for_max_drop(tmp_path):
    all_of_it = {"only_where_it_pays": "false"}
    free, _, _ = converted(tmp_path, chain(), UNEVEN_DATA, **all_of_it)
    bound = drop_of(free, UNEVEN_DATA) / 4
    model, outcome, ear = converted(tmp_path, chain(), UNEVEN_DATA, max_drop=bound, **all_of_it)
    assert kept_for_the_drop(outcome) == ["one"]
    assert drop_of(model, UNEVEN_DATA) <= bound
    assert len([text for text in ear.said if text.startswith("With ")]) >= 2
    reason = outcome.plan.nodes["one"].reason
    assert reason.startswith("kept float for max_drop: alone it leaves ")
    assert reason.endswith(" dB")


@pytest.mark.parametrize("bound", [1e-2, 1e-4, 3e-5, 1e-12])
def test_the_bound_is_kept_whatever_it_takes(tmp_path, bound):
    model, outcome, _ = converted(tmp_path, chain(), UNEVEN_DATA, max_drop=bound)
    assert drop_of(model, UNEVEN_DATA) <= bound
    assert "pool" not in kept_for_the_drop(outcome)
    assert bool(outcome.plan.units()) == (bound > 1e-6)


@pytest.mark.parametrize("bound", [1e-3, 1e-6, 1e-9])
def test_a_pool_that_two_nodes_read_is_not_kept_by_itself(tmp_path, bound):
    # What both read loses more than what either loses.
    graph = """g (float[1,4,6,6] x) => (float[] y) {
        [one] a = Conv (x, w)  [pool] p = MaxPool <kernel_shape=[2,2]> (a)
        [two] c = Conv (p, k)  [three] d = Conv (p, v)
        e = Neg (c)  f = Neg (d)  y = Concat <axis=1> (e, f)
    }"""
    sizes = np.array([1000, 1, 1, 1, 1, 1], np.float32)
    weights = {"w": normal(6, 4, 3, 3) * sizes.reshape(6, 1, 1, 1)}
    weights |= {
        name: normal(3, 6, 1, 1, seed=i) / sizes.reshape(1, 6, 1, 1) / 10
        for i, name in enumerate("kv")
    }
    bounds = {"max_drop": bound, "only_where_it_pays": "false"}
    _, outcome, _ = converted(tmp_path, build(graph, **weights), WIDE_DATA, **bounds)
    assert kept_for_the_drop(outcome)
    assert "pool" not in kept_for_the_drop(outcome)


def test_nothing_is_kept_where_the_bound_is_met(tmp_path):
    _, outcome, _ = converted(tmp_path, chain(), UNEVEN_DATA, max_drop=0.5)
    assert kept_for_the_drop(outcome) == []


def labelled(folder, images, labels, **options):
    """A job on digits as .npy files of one sample each, with their labels."""
    task = job(folder, load(MODEL), {"image": images}, **options)
    parts = folder / "parts"
    parts.mkdir()
    for i, image in enumerate(images):
        np.save(parts / f"{i:03}.npy", image[None])
    rows = "".join(f"{i:03}.npy,{label}\n" for i, label in enumerate(labels))
    (folder / "labels.csv").write_text("file,label\n" + rows)
    text = task.config.path.read_text().replace("image.npy", "parts")
    task.config.path.write_text(text + f"label_file = {folder / 'labels.csv'}\n")
    return replace(task, config=load_config(task.config.path))


def test_right_answers_bound_the_drop(tmp_path):
    ear = Ear()
    outcome = convert(labelled(tmp_path, IMAGES[:12], LABELS[:12], max_drop=0.3), ear)
    assert any(text.endswith("the output loses 0.00000 of top-1.") for text in ear.said)
    assert kept_for_the_drop(outcome) == []


def test_too_few_labels_to_tell_a_loss_are_said_to_be_and_the_cosine_counts(tmp_path):
    ear = Ear()
    outcome = convert(labelled(tmp_path, IMAGES[:12], LABELS[:12], max_drop=0.01), ear)
    assert any(
        "12 labelled samples cannot tell a loss of 1.0% from chance, 300" in w for w in ear.warned
    )
    assert all("of cosine" in text for text in ear.said if text.startswith("With "))
    assert kept_for_the_drop(outcome) == []


def test_labels_that_are_missing_stop_the_conversion(tmp_path):
    with pytest.raises(DataError, match=r"there is no label for 005\.npy"):
        convert(labelled(tmp_path, IMAGES[:12], LABELS[:5], max_drop=0.01))


# --- what is refused before any work


def test_a_provider_that_is_not_there(tmp_path):
    task = job(tmp_path, wide(), WIDE_DATA, {"providers": "CUDAExecutionProvider"})
    with pytest.raises(ConfigError) as caught:
        convert(task)
    message = str(caught.value)
    assert message.startswith(
        f"{at(tmp_path, 'common_quant_param', 'providers')} names CUDAExecutionProvider, "
    )
    assert "CPUExecutionProvider" in message


def test_resources_are_what_the_config_says(tmp_path):
    common = {"thread_num": 3, "calibration_memory": 17, "providers": "CPUExecutionProvider"}
    found = resources_of(job(tmp_path, wide(), WIDE_DATA, common))
    assert (found.threads, found.memory, found.providers) == (
        3,
        17 << 20,
        ("CPUExecutionProvider",),
    )


@pytest.mark.parametrize("affinity", [True, False])
def test_all_processors_work_by_default(tmp_path, monkeypatch, affinity):
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
    task = job(tmp_path, wide(), WIDE_DATA)
    text = task.config.path.read_text().replace("thread_num = 1\n", "")
    task.config.path.write_text(text)
    assert resources_of(replace(task, config=load_config(task.config.path))).threads == 3


SKIPS = {
    "a name": (
        {"skip_quant_node": "/layer4/conv/Con"},
        "skip_quant_node: no node is named '/layer4/conv/Con' in this ",
    ),
    "a pattern": (
        {"skip_quant_node": "/layer4/*,/leyer3/*"},
        "skip_quant_node: no node is named '/leyer3/*' in this ",
    ),
    "a type": (
        {"skip_quant_type": "Convolution"},
        "skip_quant_type: no node is of type 'Convolution' in this model; ",
    ),
    "a type's pattern": (
        {"skip_quant_type": "Conv*"},
        "skip_quant_type: no node is of type 'Conv*' in this model; ",
    ),
}
NEAREST = {
    "a name": "/layer4/conv/Conv",
    "a pattern": "/layer",
    "a type": "Conv",
    "a type's pattern": "Conv",
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_that_matches_nothing(tmp_path, name, dry):
    keys, words = SKIPS[name]
    task = job(tmp_path, load(MODEL), FEW, keys)
    with pytest.raises(ConfigError) as caught:
        make_plan(task, Ear()) if dry else convert(task)
    message = str(caught.value)
    assert message.startswith(
        f"{at(tmp_path, 'common_quant_param', next(iter(keys)))}: {words.partition(': ')[2]}"
    )
    assert f"the nearest is '{NEAREST[name]}" in message


KNOWN = {
    "a name": {"skip_quant_node": "/layer4/conv/Conv"},
    "a folded node": {"skip_quant_node": "/layer4/bn/BatchNormalization"},
    "a pattern": {"skip_quant_node": "/layer4/*,*Softmax"},
    "a folded type": {"skip_quant_type": "BatchNormalization,Clip"},
    "a type": {"skip_quant_type": "Gemm"},
}


@pytest.mark.parametrize("keys", KNOWN.values(), ids=KNOWN)
def test_skips_of_nodes_that_are_or_were(tmp_path, keys):
    plan = make_plan(job(tmp_path, load(MODEL), FEW, keys), Ear())
    assert plan.units()


def test_nodes_without_a_name_go_by_the_one_they_are_given(tmp_path):
    model = build(
        "g (float[1,4,6,6] x) => (float[] y) { a = Conv (x, w)  y = Conv (a, v) }",
        w=normal(6, 4, 3, 3),
        v=normal(3, 6, 1, 1),
    )
    names = [node.name for node in make_plan(job(tmp_path, model, WIDE_DATA), Ear()).nodes.values()]
    plan = make_plan(job(tmp_path, model, WIDE_DATA, {"skip_quant_node": names[0]}), Ear())
    assert [node.quantized for node in plan.nodes.values()] == [False, True]


# --- graphs that need care


def test_a_weight_of_several_matrices_stays_float(tmp_path):
    graph = "g (float[2,3,5] x) => (float[] y) { [stack] y = MatMul (x, w) }"
    model, outcome, _ = converted(tmp_path, build(graph, w=normal(2, 5, 4)), {"x": normal(8, 3, 5)})
    assert outcome.plan.nodes["stack"].reason == "its weight is not one matrix"
    assert types(model) == ["MatMul"]


def test_a_product_without_an_integer_output_alone(tmp_path):
    # Nothing but the input is to be calibrated.
    graph = "g (float[2,3,5] x) => (float[] y) { [one] y = MatMul (x, w) }"
    model, outcome, _ = converted(tmp_path, build(graph, w=normal(5, 4)), {"x": normal(8, 3, 5)})
    assert outcome.plan.nodes["one"].quantized
    x = {"x": normal(2, 3, 5, seed=3)}
    np.testing.assert_allclose(run(model, x, optimize=True)["y"], x["x"] @ normal(5, 4), atol=0.1)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_bounds_of_a_clip_may_be_vectors_of_one(tmp_path, shape):
    text = (
        "g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) { h = Conv (x, w)  y = Clip (h, low, "
        "high) }"
    )
    rng = np.random.default_rng(0)
    low, high = np.zeros(shape, np.float32), np.full(shape, 6, np.float32)
    model = build(text, w=rng.normal(size=(4, 3, 3, 3)).astype(np.float32), low=low, high=high)
    data = {"x": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}
    _, outcome, _ = converted(tmp_path, model, data)
    assert outcome.verification.outputs[0].cosine > 0.999


DETECTOR = """g (float[1,3,80,80] x) => (float[1,5,80,80] y) {
    f = Conv <pads = [1,1,1,1]> (x, stem, low)  a = Relu (f)
    [classes] c = Conv (a, class, bias)  [boxes] b = Conv (a, box)
    s = Sigmoid (c)  y = Concat <axis = 1> (b, s)
}"""
# The channel of the stem that is active where the object is, and nowhere else.
DECISIVE = 5


def scene(seed: int) -> Array:
    """Noise (1, 3, 80, 80) with spots at some 4 of the 6,400 positions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (1, 3, 80, 80))
    spots = rng.random((80, 80)) < 0.0006
    x[0, :, spots] += [1, -1, 1]
    return x.astype(np.float32)


def detector() -> dict[str, Array]:
    """Constants of DETECTOR."""
    stem = 0.6 * normal(16, 3, 3, 3, seed=2)
    stem[DECISIVE] = 0
    stem[DECISIVE, :, 1, 1] = [12, -12, 12]
    low = np.zeros(16, np.float32)
    low[DECISIVE] = -24
    box, classes = normal(4, 16, 1, 1, seed=3), 0.02 * normal(1, 16, 1, 1, seed=4)
    classes[0, DECISIVE] = 0.6
    return {
        "stem": stem,
        "low": low,
        "box": box,
        "class": classes,
        "bias": np.array([-4], np.float32),
    }


def scored(folder: Path, method: str) -> tuple[Outcome, list[Array], Ear]:
    """The conversion of a detector, the scores of both models on other scenes, and what was said."""
    data = np.concatenate([scene(seed) for seed in range(12)])
    model = build(DETECTOR, **detector())
    task = job(
        folder, model, {"x": data}, activation_quant_method=method, only_where_it_pays="false"
    )
    outcome = convert(task, ear := Ear())
    scores = []
    for path in (task.model, task.output):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = [session.run(None, {"x": scene(seed)})[0] for seed in range(90, 100)]
        scores.append(np.concatenate(outputs)[:, 4])
    return outcome, scores, ear


@pytest.mark.parametrize("method", ["MAX_MIN", "MSE", "AUTO"])
def test_a_detector_keeps_the_answers_of_a_channel_that_is_active_in_few_places(tmp_path, method):
    outcome, scores, ear = scored(tmp_path, method)
    wanted, found = (x > 0.5 for x in scores)
    assert 0.0003 < wanted.mean() < 0.001
    assert (wanted & found).sum() > 0.95 * wanted.sum()
    assert found.sum() < 1.05 * wanted.sum()
    weight = outcome.plan.weights["classes"]
    kept = dequantize(weight.codes, weight.qparams)[0, DECISIVE]
    assert kept == pytest.approx(detector()["class"][0, DECISIVE], rel=0.05)
    assert not [line for line in ear.warned if line.startswith("Output")]


def test_a_range_that_cuts_a_detectors_answers_off_is_told_of(tmp_path):
    outcome, scores, ear = scored(tmp_path, "KL")
    assert (scores[1] > 0.5).sum() < 0.5 * (scores[0] > 0.5).sum()
    assert outcome.verification is not None
    (line,) = [line for line in ear.warned if line.startswith("Output")]
    assert line.startswith("Output 'y', slice 4:5 of axis 1 is lost where it matters: ")
    assert outcome.verification.outputs[0].cosine > 0.99


def test_what_computes_in_floats_by_nature_may_be_allowed_to(tmp_path):
    strict = {"require_full_integer": "true"}
    _, outcome, _ = converted(tmp_path, load(MODEL), FEW, allow_float="Softmax", **strict)
    left = [node.op_type for node in outcome.plan.outside if not node.quantized]
    assert left == ["Softmax"]
    with pytest.raises(ConfigError, match=r"to let them, write allow_float = Gemm,Softmax\."):
        converted(tmp_path, load(MODEL), FEW, allow_float="Gemm", **strict)


def test_the_documented_strict_example_converts(tmp_path):
    config = changed(tmp_path / "c.cfg", base=CONFIG.with_name("full_quant_integer.cfg"))
    outcome = convert(Job(MODEL, tmp_path / "o.onnx", load_config(config)), Ear())
    assert [node.op_type for node in outcome.plan.outside if not node.quantized] == ["Softmax"]
