"""Hard sigmoids and hard swishes have one form, and an integer one."""

from __future__ import annotations

import numpy as np
import pytest
from emitted import CONSTANTS, IMAGE, decided
from graphs import assert_same, build, changes, normal, prepared, run, types

from calib.affine import UINT8, Range, qparams_of
from converter.calibrate.spans import seen_spans
from converter.emit.qdq import emit
from converter.measure.pairing import pair
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import CPU, TARGETS
from converter.prepare import prepare
from converter.prepare.hard_sigmoid import name_hard_sigmoids

HEAD = "g (float[1,4,8,8] x) => (float[] y)"
NUMBERS = {
    "zero": np.float32(0),
    "one": np.float32(1),
    "three": np.float32(3),
    "six": np.float32(6),
    "five": np.float32(5),
    "half": np.float32(0.5),
    "sixth": np.float32(1 / 6),
    "row": normal(8),
    "stack": np.full((1, 1, 1, 1, 1), 3, np.float32),
}
SWISH = ["HardSigmoid", "Mul"]
WRITTEN = {
    "divided last": ("a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)", SWISH),
    "multiplied last": ("a = Add (three, x)  c = Clip (a, zero, six)  m = Mul (c, x)  y = Mul (sixth, m)", SWISH),
    "divided before": ("a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (d, x)", SWISH),
    "the factor divided": ("a = Add (x, three)  c = Clip (a, zero, six)  d = Div (x, six)  y = Mul (d, c)", SWISH),
    "the operator": ("y = HardSwish (x)", SWISH),
    "a sigmoid": ("a = Add (x, three)  c = Clip (a, zero, six)  y = Mul (c, sixth)", ["HardSigmoid"]),
    "a line": ("a = Mul (x, sixth)  b = Add (a, half)  y = Clip (b, zero, one)", ["HardSigmoid"]),
    "a falling line": ("a = Div (x, five)  b = Sub (a, half)  y = Clip (b, zero, one)", ["HardSigmoid"]),
    "another factor": ("a = Add (x, three)  c = Clip (a, zero, six)  e = Exp (x)  m = Mul (e, c)  y = Div (m, six)",
                       ["Exp", *SWISH]),
}  # fmt: skip
OTHER = {
    "no line": "c = Clip (x, zero, six)  y = Div (c, six)",
    "another bound": "a = Add (x, three)  c = Clip (a, one, six)  y = Div (c, six)",
    "no upper bound": "a = Add (x, three)  c = Clip (a, zero)  y = Div (c, six)",
    "another division": "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, five)",
    "divided by it": "a = Add (x, three)  c = Clip (a, one, six)  y = Div (six, c)",
    "clipped value read elsewhere": "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Sub (d, c)",
    "product read elsewhere": (
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  d = Div (m, six)  y = Sub (d, m)"
    ),
    "a line read elsewhere": "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (d, a)",
    "a row of offsets": "a = Add (x, row)  c = Clip (a, zero, six)  y = Div (c, six)",
    "an offset of more axes": "a = Add (x, stack)  c = Clip (a, zero, six)  y = Div (c, six)",
}


def feeds():
    return {"x": 4 * normal(1, 4, 8, 8)}


@pytest.mark.parametrize(("nodes", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_every_way_to_write_it_becomes_one(nodes, expected):
    before, after = (build(f"{HEAD} {{ {nodes} }}", 14, **NUMBERS) for _ in range(2))
    name_hard_sigmoids(after)
    assert types(after) == expected
    assert_same(before, after, feeds())


@pytest.mark.parametrize("nodes", OTHER.values(), ids=OTHER)
def test_what_is_something_else_stays(nodes):
    model = build(f"{HEAD} {{ {nodes} }}", 14, **NUMBERS)
    assert not changes(name_hard_sigmoids, model)


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Conv (x, w, b)  y = HardSigmoid <alpha=0.3, beta=0.4> (c)",
        "c = Conv (x, w)  a = Add (c, three)  d = Clip (a, zero, six)  y = Div (d, six)",
        "c = Conv (x, w, b)  n = BatchNormalization (c, s, s, b, s)  y = HardSigmoid (n)",
    ],
)
def test_behind_a_convolution_alone_only_the_bounds_are_left(nodes):
    text = f"{HEAD} {{ {nodes} }}"
    constants = {**NUMBERS, "w": normal(4, 4, 3, 3), "b": normal(4), "s": np.ones(4, np.float32)}
    before, after = (build(text, **constants) for _ in range(2))
    assert types(prepare(after)) == ["Conv", "Clip"]
    assert_same(before, after, feeds())


SWISH_BETWEEN = f"""{HEAD} {{ [first] a = Conv <pads=[1,1,1,1]> (x, w, b)
    [gate] h = HardSigmoid <alpha=0.16666667, beta=0.5> (a)  [product] g = Mul (a, h)
    [last] y = Conv (g, v) }}"""


def emitted(graph):
    model = prepared(graph, **CONSTANTS)
    plan, after = decided(model, IMAGE), model.clone()
    emit(after, plan)
    return model, plan, after


def test_integers_run_through_a_hard_swish():
    model, plan, after = emitted(SWISH_BETWEEN)
    assert [unit.name for unit in plan.units()] == ["first", "gate", "product", "last"]
    plain, fast = (run(after, IMAGE, optimize)["y"] for optimize in (False, True))
    wanted = run(model, IMAGE)["y"]
    assert np.abs(plain - wanted).max() < 0.03 * np.abs(wanted).max()
    # The runtime's integer kernels round ties their own way.
    np.testing.assert_allclose(fast, plain, atol=2.5 * float(plan.params("y").scale))


@pytest.mark.parametrize(("slope", "offset"), [(1 / 6, 0.5), (0.2, 0.5), (2.0, -0.25), (0.01, 1.5)])
def test_the_sum_that_stands_for_a_hard_sigmoid_is_right_to_half_a_code(slope, offset):
    graph = f"""g (float[1,4,8,8] x) => (float[] h, float[] y) {{ a = Conv (x, point)
        [gate] h = HardSigmoid <alpha={slope}, beta={offset}> (a)  g = Mul (a, h)  y = Conv (g, v) }}"""
    _, plan, after = emitted(graph)
    assert plan.nodes["gate"].quantized
    q = plan.params("a")
    twin = next(node for node in after.graph if node.name == "gate")
    assert twin.op_type == "Add"
    codes = next(
        value
        for node in after.graph
        for value in node.outputs
        if node.op_type == "QuantizeLinear" and node.inputs[0].name == "a"
    )
    codes.shape = None
    after.graph.outputs.append(codes)
    found = run(after, IMAGE)
    x = (found[codes.name].astype(np.float64) - q.zero_point) * np.float64(q.scale)
    wanted, step = np.clip(slope * x + offset, 0, 1), float(plan.params("h").scale)
    np.testing.assert_allclose(found["h"], wanted, atol=0.5001 * step)


@pytest.mark.parametrize(("slope", "offset"), [(-0.2, 0.5), (0.2, 0.0)])
def test_a_hard_sigmoid_without_such_a_sum_stays_float(slope, offset):
    graph = f"{HEAD} {{ a = Conv (x, point)  [gate] h = HardSigmoid <alpha={slope}, beta={offset}> (a)  g = Mul (a, h)  y = Conv (g, v) }}"
    plan = build_plan(prepared(graph, **CONSTANTS).graph, CPU, Wishes())
    assert plan.nodes["gate"].reason == "its line falls or has no offset"


@pytest.mark.parametrize(
    "target", [name for name in TARGETS if not name.startswith(("CPU", "ARM", "QNN"))]
)
def test_other_targets_leave_it_float(target):
    plan = build_plan(prepared(SWISH_BETWEEN, **CONSTANTS).graph, TARGETS[target], Wishes())
    assert plan.nodes["gate"].reason == f"no integer kernel for HardSigmoid on target {target}"


def test_a_comparison_knows_what_the_integers_before_it_stand_for():
    model, plan, after = emitted(SWISH_BETWEEN)
    pairing = pair(model, after, plan)
    places = {(p.node, p.name): p for p in pairing.places}
    for node in ("first", "gate", "product"):
        place = places[node, "a"]
        assert place.qparams.scale == plan.params("a").scale
        maker = next(n for n in pairing.model.graph if n.outputs[0].name == place.counterpart)
        assert maker.inputs[1].const_value.numpy() == plan.params("a").scale


SIGMOID_SPAN = (-8.0, 8.0)


@pytest.mark.parametrize(
    ("nodes", "span"),
    [
        (
            "h = HardSigmoid <alpha=0.25, beta=0.5> (a)  g = HardSigmoid <alpha=0.5> (a)  y = Add (g, h)",
            (-2.0, 2.0),
        ),
        ("h = HardSigmoid <alpha=0.25, beta=0.5> (a)  y = Mul (a, h)", (-2.0, np.inf)),
        ("h = Sigmoid (a)  y = Mul (h, a)", (-8.0, np.inf)),
        ("h = Sigmoid (a)  g = HardSigmoid <alpha=0.01, beta=0.5> (a)  y = Add (g, h)", (-50, 50)),
        ("h = Sigmoid (a)  g = Mul (h, a)  y = Add (g, a)", None),
        ("h = Sigmoid (a)  g = Mul (h, h)  y = Mul (g, a)", None),
        ("h = Tanh (a)  y = Mul (h, a)", None),
    ],
)
def test_what_readers_tell_apart_sets_the_span(nodes, span):
    graph = f"{HEAD} {{ a = Conv (x, point)  {nodes} }}"
    model = prepared(graph, **CONSTANTS)
    found = seen_spans(model.graph, build_plan(model.graph, CPU, Wishes()))
    assert found.get("a") == (span and pytest.approx(span))


def test_an_output_is_seen_as_a_whole():
    graph = (
        "g (float[1,4,8,8] x) => (float[] a, float[] y) { a = Conv (x, point)  y = Sigmoid (a) }"
    )
    model = prepared(graph, **CONSTANTS)
    assert seen_spans(model.graph, build_plan(model.graph, CPU, Wishes())) == {}


def test_a_byte_of_a_sigmoid_has_no_code_beyond_its_knees():
    q = qparams_of(Range(np.array(0.0), np.array(1.0)), UINT8, False)
    low, high = 1 / (1 + np.exp(-np.array(SIGMOID_SPAN)))
    assert low < q.scale / 2
    assert 1 - high < q.scale / 2
