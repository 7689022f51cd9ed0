"""The walk through a model: at every layer it holds what the quantized model will compute there."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import MODEL, digits
from graphs import normal, positive, prepared, run
from running import Ear, InMemory, resources

from calib.affine import UINT8, dequantize, quantize
from calib.ranges import RANGE_METHODS, RangeSpec
from calib.session import open_session
from calib.session import run as run_session
from converter.calibrate.observe import Wanted, activation_qparams, observe
from converter.calibrate.walk import Walk, steps_of
from converter.emit.qdq import emit
from converter.graph.edit import values_by_name
from converter.graph.files import load, saved
from converter.plan.ops import view_of
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import TARGETS
from converter.prepare import prepare
from converter.weights.integer import Rounding
from converter.weights.layers import decide_weights
from converter.weights.moments import second_moments, with_mean_squares

HEAD = "g (float[1,4,8,8] x) => (float[] y)"
CONSTANTS = {
    "w": normal(6, 4, 3, 3),
    "b": normal(6, seed=1),
    "d": normal(6, 1, 3, 3, seed=2),
    "p": normal(5, 6, 1, 1, seed=3),
    "q": normal(6, 6, 1, 1, seed=4),
    "edges": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "k": positive(1),
}
GRAPHS = {
    "chain": "a = Conv <pads=[1,1,1,1]> (x, w, b)  r = Relu (a)  c = Conv <group=6> (r, d)  y = Conv "
    "(c, p)",
    "residual": """a = Conv (x, w, b)  r = Relu (a)  c = Conv (r, q)  s = Add (c, r)  t = Relu (s)
                   y = Conv (t, p)""",
    "moves and pads": """a = Conv (x, w, b)  u = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a)
                         z = Pad (u, edges)  y = Conv (z, p)""",
    "floats between": "a = Conv (x, w, b)  e = Erf (a)  f = Mul (e, k)  c = Conv (f, q)  g = Neg (c)  y = Conv "
    "(g, p)",
    "two readers": """a = Conv (x, w, b)  c = Conv (a, q)  h = Conv (a, q, b)  s = Concat <axis=1> (c, h)
                      y = Conv (s, v)""",
    "a float reader beside": "a = Conv (x, w, b)  e = Exp (a)  c = Conv (a, q)  s = Mul (c, e)  "
    "y = Conv (s, p)",
    "matrices": """a = GlobalAveragePool (x)  f = Flatten (a)  g1 = Gemm (f, m, b)  r = Relu (g1)  l = MatMul (r, n)
                   y = Add (l, o)""",
    "a subgraph reads": """a = Conv (x, w, b)  t = Cast <to=9> (k)
        i = If (t) < then_branch = t1 () => (float[] u) { u = Mul (a, k) },
                     else_branch = t2 () => (float[] z) { z = Neg (a) } >
        y = Conv (i, p)""",
}
CONSTANTS |= {"v": normal(3, 12, 1, 1), "m": normal(4, 6), "n": normal(6, 5), "o": normal(5)}
IMAGES = [{"x": normal(1, 4, 8, 8, seed=i)} for i in range(5)]


class Diary(Walk):
    """A walk that remembers what it held."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.held = [dict(stored) for stored in self._store]
        self.kept = [set(stored) for stored in self._store[:1]]

    def advance(self, position, plan):
        before = [dict(stored) for stored in self._store]
        writes = self.steps[position].writes
        super().advance(position, plan)
        self.kept.append(set(self._store[0]))
        for held, old, new in zip(self.held, before, self._store, strict=True):
            held.update({**old, **{name: new[name] for name in writes if name in new}})


def decided(model, samples, target="CPU", threads=1):
    """The plan with all numbers, and the walk that found them."""
    data = InMemory(samples)
    plan = build_plan(model.graph, TARGETS[target], Wishes())
    evidence = observe(
        model,
        Wanted(tuple(plan.groups()), (), False, False),
        data,
        resources=resources(),
        watch=Ear(),
    )
    spec = RangeSpec(UINT8, False)
    plan = plan.with_qparams(
        activation_qparams(plan, evidence.statistics, RANGE_METHODS["MAX_MIN"], spec)
    )
    walk = Diary(model, plan, data, resources(threads))
    return decide_weights(model, plan, walk, means={}, rounding=Rounding(), watch=Ear()), walk


def computed(model, plan, samples):
    """What ONNX Runtime computes, unoptimized, in the whole emitted model, by float names: codes
    behind every unit.
    """
    quantized = model.clone()
    restored = emit(quantized, plan)
    values = values_by_name(quantized.graph)
    outputs = {name for unit in plan.units() for name in unit.outputs if name in restored}
    names = {name: values[restored[name]].producer().inputs[0].name for name in outputs}
    names |= {
        name: name for name in values_by_name(model.graph) if name not in names and name in values
    }
    names = {name: other for name, other in names.items() if values[other].producer()}
    with saved(quantized, names.values()) as path:
        session = open_session(path, optimize=False)
        found = [run_session(session, list(names.values()), sample) for sample in samples]
    return [{name: one[other] for name, other in names.items()} for one in found]


def assert_held(walk, truth):
    """Equal but for the few codes whose ties fell the other way, and what little those change
    behind them, where a weight may be worth several codes.
    """
    names = set(walk.held[0]) & set(truth[0])
    assert names
    for name in names:
        held, true = (np.stack([one[name] for one in many]) for many in (walk.held, truth))
        assert held.dtype == true.dtype, name
        difference, whole = np.abs(held.astype(np.float64) - true), held.dtype.kind in "iu"
        largest = np.abs(true).max()
        assert np.mean(difference > (0 if whole else 1e-5 * largest)) < 0.01, name
        assert difference.max() <= (4 if whole else 0.02 * largest), name


@pytest.mark.parametrize("target", ["CPU", "OPENVINO", "NVGPU", "DSP"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_walk_holds_what_the_quantized_model_computes(name, target):
    if (name, target) == ("matrices", "NVGPU"):
        pytest.skip("products of fewer than 16 columns stay float for it")
    model = prepared(f"{HEAD} {{ {GRAPHS[name]} }}", **CONSTANTS)
    plan, walk = decided(model, IMAGES, target)
    assert plan.weights.keys() == {unit.name for unit in plan.units() if unit.weight}
    assert_held(walk, computed(model, plan, IMAGES))


def test_the_walk_holds_what_the_quantized_example_computes():
    model = prepare(load(MODEL))
    samples = [{"image": image[None]} for image in digits("calib")[0][:6]]
    plan, walk = decided(model, samples, threads=2)
    codes = [name for name, array in walk.held[0].items() if array.dtype == np.uint8]
    assert len(codes) >= 8
    assert_held(walk, computed(model, plan, samples))


def test_what_no_later_layer_reads_is_forgotten():
    model = prepared(f"{HEAD} {{ {GRAPHS['residual']} }}", **CONSTANTS)
    _, walk = decided(model, IMAGES)
    assert walk.kept == [{"x"}, {"r"}, {"r", "c"}, {"t"}, set()]


def test_steps_are_units_and_what_lies_between():
    model = prepared(f"{HEAD} {{ {GRAPHS['floats between']}  tail = Softmax (y) }}", **CONSTANTS)
    plan = build_plan(model.graph, TARGETS["CPU"], Wishes())
    types = {node.name: node.op_type for node in model.graph}
    found = [
        ([types[name] for name in s.nodes], s.reads, s.writes, bool(s.unit))
        for s in steps_of(model.graph, plan)
    ]
    assert found == [
        (["Conv"], ("x",), ("a",), True),
        (["Erf", "Mul"], ("a",), ("f",), False),
        (["Conv"], ("f",), ("c",), True),
        (["Neg"], ("c",), ("g",), False),
        (["Conv"], ("g",), (), True),
    ]


def test_a_model_without_weights_has_no_steps():
    model = prepared(f"{HEAD} {{ y = Exp (x) }}")
    assert steps_of(model.graph, build_plan(model.graph, TARGETS["CPU"], Wishes())) == []


# --- memory


@pytest.mark.parametrize(
    ("room", "count"), [(1, 1), (3 * 1240 - 1, 2), (3 * 1240, 3), (1 << 30, 5)]
)
def test_as_many_samples_take_part_as_fit(room, count):
    # Most is held behind the first layer: the 4 * 8 * 8 floats it read, and the 6 * 6 * 6 codes it
    # wrote.
    model = prepared(f"{HEAD} {{ {GRAPHS['residual']} }}", **CONSTANTS)
    plan = build_plan(model.graph, TARGETS["CPU"], Wishes())
    assert 4 * 4 * 8 * 8 + 6 * 6 * 6 == 1240
    assert Walk(model, plan, InMemory(IMAGES), resources(), store_bytes=room).count == count
    assert Walk(model, plan, InMemory(IMAGES), resources(), most=2).count == 2


# --- second moments and means


def windows(x, size, pads=0):
    """Every (channels, size, size) window of a picture (channels, h, w) as (positions, size * size
    * channels).
    """
    x = np.pad(x, ((0, 0), (pads, pads), (pads, pads)))
    seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return seen.transpose(1, 2, 3, 4, 0).reshape(-1, size * size * x.shape[0])


def walk_of(graph, samples, name="a", **constants):
    model = prepared(graph, **constants)
    plan, _ = decided(model, samples)
    fresh = Walk(model, plan, InMemory(samples), resources(3))
    node = next(node for node in model.graph if node.outputs[0].name == name)
    unit = plan.nodes[node.name]
    weight = node.inputs[1].const_value.numpy()
    return fresh, unit, view_of(node, weight.shape, 1), plan


@pytest.mark.parametrize("pads", [0, 1])
def test_second_moments_of_all_positions(pads):
    graph = f"{HEAD} {{ a = Conv <pads=[{pads},{pads},{pads},{pads}]> (x, w)  y = Conv (a, q) }}"
    walk, unit, view, plan = walk_of(graph, IMAGES, **CONSTANTS)
    q = plan.params("x")
    rows = np.concatenate(
        [windows(dequantize(quantize(s["x"][0], q), q).astype(np.float64), 3, pads) for s in IMAGES]
    )
    drawn, scale = walk.draw(unit, view, len(rows), plan)
    moments = second_moments(drawn, 2) * scale**2
    assert moments.shape == (1, 36, 36)
    np.testing.assert_allclose(moments[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_second_moments_of_a_matrix_product():
    samples = [{"x": normal(2, 3, 4, seed=i)} for i in range(4)]
    graph = "g (float[2,3,4] x) => (float[] y) { a = MatMul (x, m)  y = MatMul (a, n) }"
    walk, unit, view, plan = walk_of(graph, samples, m=CONSTANTS["m"], n=CONSTANTS["n"])
    q = plan.params("x")
    rows = np.concatenate(
        [dequantize(quantize(s["x"], q), q).astype(np.float64).reshape(-1, 4) for s in samples]
    )
    drawn, scale = walk.draw(unit, view, 24, plan)
    np.testing.assert_allclose(
        second_moments(drawn, 1)[0] * scale**2, rows.T @ rows / 24, rtol=1e-5, atol=1e-6
    )


def test_inputs_that_are_codes_already_are_drawn_as_they_are():
    model = prepared(f"{HEAD} {{ a = Conv (x, w)  [second] y = Conv (a, q) }}", **CONSTANTS)
    plan, walk = decided(model, IMAGES)
    again = Walk(model, plan, InMemory(IMAGES), resources())
    again.advance(0, plan)
    drawn, scale = again.draw(
        plan.nodes["second"], view_of(model.graph[1], (6, 6, 1, 1), 1), 5 * 36, plan
    )
    codes = (
        np.stack([held["a"][0] for held in walk.held]).astype(np.float64)
        - plan.params("a").zero_point
    )
    np.testing.assert_array_equal(drawn[0], codes.transpose(0, 2, 3, 1).reshape(-1, 6))
    assert scale == plan.params("a").scale


def test_fewer_positions_are_drawn_than_there_are():
    walk, unit, view, plan = walk_of(
        f"{HEAD} {{ a = Conv (x, w)  y = Conv (a, q) }}", IMAGES, **CONSTANTS
    )
    drawn, scale = walk.draw(unit, view, 10, plan)
    assert drawn.shape == (1, 10, 36)
    q = plan.params("x")
    everything = np.concatenate(
        [windows(quantize(s["x"][0], q).astype(np.int64) - q.zero_point, 3) for s in IMAGES]
    )
    assert set(map(tuple, drawn[0].astype(np.int64))) <= set(map(tuple, everything))
    assert scale == q.scale
    other = Walk(
        prepared(f"{HEAD} {{ a = Conv (x, w)  y = Conv (a, q) }}", **CONSTANTS),
        plan,
        InMemory(IMAGES),
        resources(1),
    )
    np.testing.assert_array_equal(other.draw(unit, view, 10, plan)[0], drawn)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_second_moments_of_what_was_drawn(count):
    drawn = normal(2, count, 5)
    exact = np.einsum("gdk,gdl->gkl", drawn.astype(np.float64), drawn) / count
    np.testing.assert_allclose(second_moments(drawn, 1), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second_moments(drawn, 1), second_moments(drawn, 3))


@pytest.mark.parametrize("pads", [0, 1])
def test_mean_squares_are_of_all_positions_in_all_samples(pads):
    graph = f"{HEAD} {{ a = Conv <pads=[{pads},{pads},{pads},{pads}]> (x, w)  y = Conv (a, q) }}"
    walk, unit, view, plan = walk_of(graph, IMAGES, **CONSTANTS)
    q = plan.params("x")
    codes = [quantize(s["x"][0], q).astype(np.int64) - q.zero_point for s in IMAGES]
    rows = np.concatenate([windows(x, 3, pads) for x in codes])
    found = walk.mean_squares(unit, view, plan)
    np.testing.assert_allclose(found, np.square(rows).mean(axis=0)[None], rtol=1e-5)


def test_moments_of_some_inputs_take_the_mean_squares_of_all():
    some = np.array([[[4.0, 2, 0], [2, 1, 0], [0, 0, 0]]])
    whole = with_mean_squares(some, np.array([[1.0, 4, 9]]))
    np.testing.assert_allclose(whole, [[[1, 2, 0], [2, 4, 0], [0, 0, 9]]])


@pytest.mark.parametrize("kind", ["3 x 3", "1 x 1", "depthwise"])
def test_mean_of_a_product_on_quantized_inputs(kind):
    shapes = {
        "3 x 3": ((6, 4, 3, 3), 1),
        "1 x 1": ((6, 4, 1, 1), 1),
        "depthwise": ((4, 1, 3, 3), 4),
    }
    shape, group = shapes[kind]
    graph = f"{HEAD} {{ f = Conv (x, f0)  a = Conv <group={group}> (f, t, c)  y = Conv (a, v) }}"
    constants = {
        "f0": normal(4, 4, 1, 1),
        "t": normal(*shape),
        "v": normal(2, shape[0], 1, 1),
        "c": normal(shape[0]),
    }
    model = prepared(graph, **constants)
    plan, walk = decided(model, IMAGES)
    unit = next(unit for unit in plan.units() if unit.outputs == ("a",))
    again = Walk(model, plan, InMemory(IMAGES), resources(2))
    again.advance(0, plan)
    q, other = plan.params("f"), normal(*shape, seed=5)
    found = again.mean_product(unit, other, plan)
    inputs = [dequantize(held["f"], q).astype(np.float64)[0] for held in walk.held]
    size = shape[2]
    if group == 1:
        matrix = other.transpose(0, 2, 3, 1).reshape(6, -1).astype(np.float64)
        expected = np.mean([windows(x, size) @ matrix.T for x in inputs], axis=(0, 1))
    else:
        expected = [
            np.mean(
                [windows(x[i : i + 1], size) @ other[i].ravel().astype(np.float64) for x in inputs]
            )
            for i in range(4)
        ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_float_model_is_not_touched():
    model = prepared(f"{HEAD} {{ {GRAPHS['residual']} }}", **CONSTANTS)
    before = run(model, IMAGES[0])["y"]
    decided(model, IMAGES)
    np.testing.assert_array_equal(run(model, IMAGES[0])["y"], before)
