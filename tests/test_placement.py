"""Placement: which nodes of a float graph become integer, with what, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, prepared

from calib.affine import INT8, INT8_NARROW, UINT8
from converter.plan.placement import Wishes, build_plan
from converter.plan.plan import PerAxis, WeightPlan
from converter.plan.targets import CPU, TARGETS

HEAD = "g (float[1,4,8,8] x) => (float[] y)"
ROWS = "g (float[3,4] x) => (float[] y)"
NO_KERNEL = "no integer kernel for {} on target CPU"
FLOAT_INPUT = "an input of it is float"
TAIL = "no integer operator reads on from it"
CONSTANTS = {
    "w": normal(4, 4, 3, 3),
    "v": normal(4, 4, 3, 3, seed=1),
    "point": normal(4, 4, 1, 1),
    "depthwise": normal(4, 1, 3, 3),
    "narrow": normal(4, 2, 1, 1),
    "wide": normal(36, 5),
    "k": normal(4, 4),
    "stack": normal(2, 4, 4),
    "b": normal(4),
    "c": normal(1, 4, 1, 1),
    "scalar": np.float32(0.3),
    "edges": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "zero": np.float32(0),
    "one": np.float32(1),
    "six": np.float32(6),
}


def plan_of(graph, target=CPU, **wishes):
    """The plan of a graph that may use any of the constants; preparation removes the others."""
    return build_plan(prepared(graph, **CONSTANTS).graph, target, Wishes(**wishes))


def integers(plan):
    return [unit.name for unit in plan.units()]


def test_a_convolution_with_its_activation_is_one_unit():
    plan = plan_of(f"{HEAD} {{ [conv] a = Conv (x, w, b)  [relu] y = Relu (a) }}")
    (unit,) = plan.units()
    assert (unit.name, unit.op_type, unit.inputs, unit.outputs) == ("conv", "Conv", ("x",), ("y",))
    assert (unit.absorbed, unit.bias, unit.reason) == (
        ("relu",),
        "b",
        "integer kernel of target CPU",
    )
    assert unit.weight == WeightPlan("w", 1, INT8_NARROW, PerAxis(0), 128)
    assert plan.nodes["relu"].reason == "computed inside conv"
    assert (plan.nodes["relu"].inside, plan.nodes["relu"].quantized) == ("conv", False)
    assert list(plan.tensors) == ["x", "y"]
    assert plan.tensors["x"].format == UINT8
    assert not plan.tensors["x"].symmetric
    assert plan.tensors["x"].reason == "read by conv"
    assert plan.tensors["y"].reason == "computed by conv"


@pytest.mark.parametrize(
    ("clip", "absorbed"),
    [
        ("Clip (a, zero, six)", True),
        ("Clip (a, zero)", True),
        ("Relu (a)", True),
        ("Clip (a, , six)", False),
        ("Clip (a, one, six)", False),
        ("Clip (a)", False),
        ("Sigmoid (a)", False),
        ("local.Relu (a)", False),
    ],
)
def test_only_what_clips_at_zero_is_absorbed(clip, absorbed):
    plan = plan_of(f"{HEAD} {{ [conv] a = Conv (x, w)  [next] y = {clip} }}")
    assert plan.nodes["conv"].absorbed == (("next",) if absorbed else ())
    assert plan.nodes["conv"].outputs == (("y",) if absorbed else ("a",))
    assert not plan.nodes["next"].quantized


def test_an_activation_is_not_absorbed_where_the_product_is_read_elsewhere():
    for graph in (
        (
            "g (float[1,4,8,8] x) => (float[] y, float[] z) { [conv] a = Conv (x, w)  y = Relu "
            "(a)  z = Neg (a) }"
        ),
        "g (float[1,4,8,8] x) => (float[] y, float[] a) { [conv] a = Conv (x, w)  y = Relu (a) }",
    ):
        assert plan_of(graph).nodes["conv"].absorbed == ()


def test_an_activation_inside_a_subgraph_is_not_absorbed():
    graph = """g (float[1,4,8,8] x, bool q) => (float[] y) {
        [conv] a = Conv (x, w)
        y = If (q) < then_branch = t () => (float[1,4,6,6] r) { r = Relu (a) },
                     else_branch = e () => (float[1,4,6,6] n) { n = Relu (c) } >
    }"""
    assert plan_of(graph).nodes["conv"].absorbed == ()


CHAIN = f"""{HEAD} {{ [block1_conv] a = Conv (x, w)  [block1_relu] b1 = Relu (a)
                   [block2_conv] c1 = Conv (b1, v)  [block2_relu] y = Relu (c1) }}"""


@pytest.mark.parametrize(
    ("wishes", "left", "node", "reason"),
    [
        (
            {"skip_nodes": ("block1_conv",)},
            ["block2_conv"],
            "block1_conv",
            "named in skip_quant_node",
        ),
        ({"skip_nodes": ("block1_*",)}, ["block2_conv"], "block1_relu", "named in skip_quant_node"),
        ({"skip_nodes": ("*_conv",)}, [], "block2_conv", "named in skip_quant_node"),
        (
            {"skip_nodes": ("BLOCK1_*", "conv")},
            ["block1_conv", "block2_conv"],
            "block1_relu",
            "computed inside block1_conv",
        ),
        ({"skip_types": ("Conv",)}, [], "block1_conv", "named in skip_quant_type"),
        (
            {"skip_types": ("Relu",)},
            ["block1_conv", "block2_conv"],
            "block2_relu",
            "named in skip_quant_type",
        ),
        (
            {"skip_nodes": ("block2_relu",)},
            ["block1_conv", "block2_conv"],
            "block2_relu",
            "named in skip_quant_node",
        ),
    ],
)
def test_what_the_user_skips_stays_float(wishes, left, node, reason):
    plan = plan_of(CHAIN, **wishes)
    assert integers(plan) == left
    assert plan.nodes[node].reason == reason
    assert any(node in plan.nodes[name].absorbed for name in left) == reason.startswith(
        "computed inside"
    )


@pytest.mark.parametrize(
    ("graph", "node", "reason"),
    [
        (f"{HEAD} {{ a = Conv (x, w)  [n] y = Softmax (a) }}", "n", NO_KERNEL.format("Softmax")),
        (f"{HEAD} {{ [n] y = ConvTranspose (x, w) }}", "n", NO_KERNEL.format("ConvTranspose")),
        (
            f"{HEAD} {{ a = Conv (x, w)  [n] y = local.Conv (a, w) }}",
            "n",
            "operator of the domain local",
        ),
        (
            "g (float[1,4,8,8] x, float[4,4,3,3] d) => (float[] y) { [n] y = Conv (x, d) }",
            "n",
            "its weight is computed at run time",
        ),
        (
            "g (float[3,4] x, float[4,4] d) => (float[] y) { [n] y = Gemm (x, d) }",
            "n",
            "its weight is computed at run time",
        ),
        (
            "g (double[1,4,8,8] x, double[4,4,3,3] d) => (double[] y) { [n] y = Conv (x, d) }",
            "n",
            "its values are not float32",
        ),
        ("g (int64[3] x) => (int64[] y) { [n] y = Add (x, x) }", "n", "its values are not float32"),
        (f"{HEAD} {{ a = Conv (x, w)  [n] y = MaxPool <kernel_shape=[2,2]> (a) }}", "n", TAIL),
        (f"{HEAD} {{ [n] a = Add (x, x)  y = Softmax (a) }}", "n", FLOAT_INPUT),
    ],
)
def test_reasons_for_staying_float(graph, node, reason):
    plan = plan_of(graph)
    assert not plan.nodes[node].quantized
    assert plan.nodes[node].reason.startswith(reason)


def test_every_node_and_only_planned_tensors_are_listed():
    plan = plan_of(CHAIN)
    assert list(plan.nodes) == ["block1_conv", "block1_relu", "block2_conv", "block2_relu"]
    assert set(plan.tensors) == {
        name for unit in plan.units() for name in (*unit.inputs, *unit.outputs)
    }


def test_an_add_with_a_float_input_stays_float():
    nodes = (
        "[conv] a = Conv (x, w)  [float] t = Tanh (a)  [sum] s = Add (a, t)  [last] y = Conv (s, v)"
    )
    plan = plan_of(f"{HEAD} {{ {nodes} }}")
    assert integers(plan) == ["conv", "last"]
    assert plan.nodes["sum"].reason.startswith(FLOAT_INPUT)


def test_a_residual_sum_is_integer():
    nodes = """[one] a = Conv (x, w)  [two] p = Conv (a, point)  [sum] s = Add (p, a)  [relu] r = Relu (s)
               [last] y = Conv (r, v)"""
    plan = plan_of(f"{HEAD} {{ {nodes} }}")
    assert integers(plan) == ["one", "two", "sum", "last"]
    assert plan.nodes["sum"].inputs == ("p", "a")
    assert plan.nodes["sum"].absorbed == ("relu",)


@pytest.mark.parametrize("nodes", ["Mul (a, scalar)", "Mul (scalar, a)", "Add (a, c)"])
def test_a_constant_operand_does_not_keep_a_node_float(nodes):
    # The second reader keeps the arithmetic from being folded into the convolution.
    plan = plan_of(
        f"{HEAD} {{ [conv] a = Conv (x, w)  [n] s = {nodes}  t = Add (s, a)  y = Conv (t, v) }}"
    )
    assert plan.nodes["n"].quantized
    assert plan.nodes["n"].weight is None
    assert {"scalar", "c"} & set(plan.nodes["n"].inputs)
    assert set(plan.nodes["n"].inputs) <= set(plan.tensors)


def test_tails_stay_float():
    nodes = """[one] a = Conv (x, w)  [left] l = Conv (a, v)  [right] r = Conv (a, w)  [sig] s = Sigmoid (r)
               [join] j = Concat <axis=1> (l, s)  [pool] g1 = GlobalAveragePool (j)
                 [soft] y = Softmax <axis=1> (g1)"""
    plan = plan_of(f"{HEAD} {{ {nodes} }}")
    assert integers(plan) == ["one", "left", "right"]
    assert {plan.nodes[n].reason for n in ("sig", "join", "pool")} == {TAIL}


def test_an_absorbed_activation_goes_with_its_tail():
    nodes = (
        "[one] a = Conv (x, w)  [two] b1 = Conv (x, v)  [sum] s = Add (a, b1)  [relu] r = Relu "
        "(s)  y = Softmax (r)"
    )
    plan = plan_of(f"{HEAD} {{ {nodes} }}")
    assert [plan.nodes[n].reason for n in ("sum", "relu")] == [TAIL, TAIL]
    assert plan.nodes["relu"].inside is None


def test_moves_between_anchors_share_one_group():
    nodes = """[conv] a = Conv (x, w)  [pool] p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a)
               [flat] f = Flatten (p)  [fc] y = Gemm (f, wide)"""
    plan = plan_of(f"{HEAD} {{ {nodes} }}")
    assert integers(plan) == ["conv", "pool", "flat", "fc"]
    assert {name: t.group for name, t in plan.tensors.items()} == {
        "x": "x",
        "a": "a",
        "p": "a",
        "f": "a",
    }
    assert set(plan.groups()) == {"x", "a"}


def test_moves_before_the_first_anchor_are_integer():
    plan = plan_of(
        f"{HEAD} {{ [pool] p = MaxPool <kernel_shape=[2,2]> (x)  [conv] y = Conv (p, w) }}"
    )
    assert integers(plan) == ["pool", "conv"]
    assert plan.tensors["p"].group == "x"


def test_a_split_with_a_float_reader_stays_float_before_the_first_anchor():
    plan = plan_of(
        "g (float[1,8,8,8] x) => (float[] y, float[] z) "
        "{ [split] l, r = Split <axis=1> (x)  [conv] y = Conv (l, w)  z = Neg (r) }"
    )
    assert integers(plan) == ["conv"]
    assert plan.nodes["split"].reason.startswith(FLOAT_INPUT)


def test_all_outputs_of_a_split_behind_an_anchor_share_its_group():
    nodes = (
        "[conv] a = Conv (x, w)  [split] l, r = Split <axis=1> (a)  y = Conv (l, narrow)  z = "
        "Neg (r)"
    )
    plan = plan_of(f"g (float[1,4,8,8] x) => (float[] y, float[] z) {{ {nodes} }}")
    assert plan.nodes["split"].quantized
    assert [plan.tensors[name].group for name in ("a", "l", "r")] == ["a", "a", "a"]


def test_a_product_with_its_weight_on_the_right():
    (unit,) = plan_of(f"{ROWS} {{ [n] y = MatMul (x, k) }}").units()
    assert unit.weight == WeightPlan("k", 1, INT8_NARROW, PerAxis(1), 128)
    assert unit.inputs == ("x",)


def test_a_constant_on_the_left_of_a_product_is_an_activation():
    plan = plan_of("g (float[4,3] x) => (float[] y) { [n] y = MatMul (k, x) }")
    (unit,) = plan.units()
    assert unit.weight is None
    assert unit.inputs == ("k", "x")
    assert plan.tensors["k"].format == UINT8


def test_a_product_of_two_activations_is_integer_without_a_weight():
    graph = f"{ROWS} {{ [one] a = MatMul (x, k)  [two] t = Transpose (a)  [n] y = MatMul (a, t) }}"
    assert integers(plan_of(graph)) == ["one"]
    assert (
        plan_of(graph).nodes["n"].reason
        == "a product of two activations is no faster in integers on target CPU"
    )
    plan = plan_of(graph, TARGETS["OPENVINO"])
    assert integers(plan) == ["one", "two", "n"]
    assert plan.nodes["n"].weight is None
    assert plan.nodes["n"].inputs == ("a", "t")


@pytest.mark.parametrize("add", ["Add (m, b)", "Add (b, m)"])
def test_the_bias_of_a_product_is_absorbed(add):
    plan = plan_of(
        f"g (float[2,3,4] x) => (float[] y) {{ [n] m = MatMul (x, k)  [add] a = {add}  "
        "[relu] y = Relu (a) }"
    )
    (unit,) = plan.units()
    assert (unit.absorbed, unit.bias, unit.outputs) == (("add", "relu"), "b", ("y",))


@pytest.mark.parametrize("operand", ["scalar", "c", "x"])
def test_other_sums_are_no_bias(operand):
    plan = plan_of(
        f"g (float[2,3,4] x) => (float[] y) {{ [n] m = MatMul (x, k)  [add] y = Add (m, "
        f"{operand}) }}"
    )
    assert plan.nodes["n"].absorbed == ()
    assert plan.nodes["n"].bias is None


@pytest.mark.parametrize(("operand", "shape"), [("stack", "2,3,4"), ("b", "3,4")])
def test_only_matrices_are_multiplied_on_integers(operand, shape):
    # ONNX Runtime refuses scales of the channels of several matrices when the model runs.
    plan = plan_of(f"g (float[{shape}] x) => (float[] y) {{ [n] y = MatMul (x, {operand}) }}")
    assert (plan.nodes["n"].quantized, plan.nodes["n"].reason) == (
        False,
        "its weight is not one matrix",
    )


def test_a_skipped_bias_is_not_absorbed():
    graph = (
        "g (float[2,3,4] x) => (float[] y) { [n] m = MatMul (x, k)  [add] a = Add (m, b)  [relu] "
        "y = Relu (a) }"
    )
    plan = plan_of(graph, skip_nodes=("add",))
    assert (plan.nodes["n"].absorbed, plan.nodes["n"].bias) == ((), None)


@pytest.mark.parametrize(
    ("graph", "axis"),
    [
        (f"{HEAD} {{ [n] y = Conv (x, w) }}", 0),
        (f"{ROWS} {{ [n] y = Gemm (x, k) }}", 1),
        (f"{ROWS} {{ [n] y = Gemm <transB=1> (x, k) }}", 0),
        (f"{ROWS} {{ [n] y = MatMul (x, k) }}", 1),
    ],
)
def test_channel_axes(graph, axis):
    assert plan_of(graph).nodes["n"].weight.axis == axis
    assert plan_of(graph, per_channel=False).nodes["n"].weight.axis is None


def test_a_depthwise_convolution_has_no_pair_limit():
    plan = plan_of(f"{HEAD} {{ [n] y = Conv <group=4> (x, depthwise) }}")
    assert plan.nodes["n"].weight.pair_limit is None


def test_a_product_whose_reader_is_float_hands_out_float():
    plan = plan_of(
        f"{ROWS} {{ [one] a = Gemm (x, k, b)  [two] m = MatMul (a, k)  y = Softmax (m) }}"
    )
    assert integers(plan) == ["one", "two"]
    assert set(plan.tensors) == {"x", "a"}  # not `m`: nothing integer reads it


def test_a_convolution_always_hands_out_integers():
    plan = plan_of(f"{HEAD} {{ [one] a = Conv (x, w)  y = Softmax (a) }}")
    assert set(plan.tensors) == {"x", "a"}


def test_what_later_findings_keep_float_says_why():
    plan = plan_of(CHAIN, kept_float={"block2_conv": "too sensitive"})
    assert integers(plan) == ["block1_conv"]
    assert plan.nodes["block2_conv"].reason == "too sensitive"


def test_padding_with_zeros_between_anchors_runs_bare():
    graph = f"{HEAD} {{ [conv] a = Conv (x, w)  [pad] p = Pad (a, edges)  y = Conv (p, v) }}"
    plan = plan_of(graph)
    assert plan.nodes["pad"].bare
    assert not plan.nodes["conv"].bare
    assert plan.tensors["p"].group == "a"
    assert (
        plan_of(graph.replace("edges)", "edges, one)")).nodes["pad"].reason
        == "it pads with something else than zero"
    )


RESIDUAL = """[one] a = Conv (x, w)  [two] p = Conv (a, point)  [sum] s = Add (p, a)  [relu] r = Relu (s)
              [last] y = Conv (r, v)"""


@pytest.mark.parametrize(
    ("target", "tensors"),
    [
        ("CPU", {"x", "a", "p", "r", "y"}),
        (
            "OPENVINO",
            {"x", "a", "r"},
        ),  # `p` is added to inside the convolution, `y` is read by nothing
        ("NVGPU", {"x", "a", "r"}),
        ("DSP", {"x", "a", "p", "r", "y"}),
    ],
)
def test_where_a_residual_sum_runs_inside_the_convolution_its_result_is_not_converted(
    target, tensors
):
    plan = plan_of(f"{HEAD} {{ {RESIDUAL} }}", TARGETS[target])
    assert integers(plan) == ["one", "two", "sum", "last"]
    assert set(plan.tensors) == tensors


def test_formats_and_biases_are_the_target_s():
    graph = f"{HEAD} {{ [n] y = Conv (x, w, b) }}"
    formats = {name: plan_of(graph, target).tensors["x"] for name, target in TARGETS.items()}
    assert {name for name, plan in formats.items() if plan.symmetric} == {"NVGPU"}
    assert {name for name, plan in formats.items() if plan.format == INT8} == {"NVGPU"}
    units = {name: plan_of(graph, target).nodes["n"] for name, target in TARGETS.items()}
    assert {name for name, unit in units.items() if unit.integer_bias} == {
        "CPU",
        "CPU_VNNI",
        "ARM",
        "DSP",
        "QNN",
    }
    assert {name for name, unit in units.items() if unit.weight.pair_limit} == {"CPU", "OPENVINO"}


def test_a_target_where_everything_pays_takes_tails_and_heads():
    nodes = (
        "[head] h = Tanh (x)  [conv] a = Conv (h, w)  [pool] p = GlobalAveragePool (a)  [soft] y "
        "= Softmax <axis=1> (p)"
    )
    assert integers(plan_of(f"{HEAD} {{ {nodes} }}", TARGETS["DSP"])) == [
        "head",
        "conv",
        "pool",
        "soft",
    ]
    assert integers(plan_of(f"{HEAD} {{ {nodes} }}")) == ["conv"]
