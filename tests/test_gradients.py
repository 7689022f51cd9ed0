"""Gradients as graphs: every rule against central differences in float64, and whole models."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from differences import assert_gradients, freed, in_double, reference
from graphs import build, frozen, normal, positive, run

from calib.affine import Array
from converter.errors import ModelError
from converter.graph.files import load
from converter.learn.blocked import DOMAIN, block_convolutions, block_size
from converter.learn.fake_quant import fake_quantize
from converter.learn.gradients import Gap, gradient_model
from converter.learn.losses import TEACHER, divergence, error, squares
from converter.learn.rules import RULES
from converter.prepare import prepare

MODELS = (
    Path(os.environ.get("QCONVERT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "models"
)


@dataclass(frozen=True)
class Case:
    """Nodes from inputs and constants to `y`; gradients of what is `wanted`, by default all inputs."""

    nodes: str
    inputs: dict[str, Array]
    constants: dict[str, Array] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    opset: int = 17
    runtime: bool = True  # whether ONNX Runtime has kernels for it

    @property
    def graph(self) -> str:
        kinds = {"f": "float", "i": "int64", "b": "bool"}
        signature = ", ".join(
            f"{kinds[a.dtype.kind]}[{','.join(map(str, a.shape))}] {name}"
            for name, a in self.inputs.items()
        )
        return f"g ({signature}) => (float[] y) {{ {self.nodes} }}"

    @property
    def names(self) -> tuple[str, ...]:
        return self.wanted or tuple(k for k, a in self.inputs.items() if a.dtype.kind == "f")


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def of(nodes: str, *shape: int, opset: int = 17, **constants: Array) -> Case:
    """One normal input of a shape."""
    return Case(nodes, {"x": normal(*(shape or (2, 3, 4)))}, constants, opset=opset)


def pair(op: str, left: tuple[int, ...], right: tuple[int, ...]) -> Case:
    """Two positive inputs."""
    inputs = {"a": positive(*left), "b": positive(*right, seed=1)}
    return Case(f"y = {op} (a, b)", inputs)


def conv(
    image: tuple[int, ...], weight: tuple[int, ...], attributes: str = "", op: str = "Conv"
) -> Case:
    """A convolution with bias: the gradients of all three operands."""
    group = int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1
    outputs = weight[0] if op == "Conv" else weight[1] * group
    constants = {"w": normal(*weight, seed=1), "b": normal(outputs, seed=2)}
    nodes = f"y = {op} <{attributes}> (x, w, b)" if attributes else f"y = {op} (x, w, b)"
    return Case(nodes, {"x": normal(*image)}, constants, ("x", "w", "b"))


SMOOTH = "Sigmoid Tanh Erf Exp Softplus Softsign Sin Cos Mish Identity Neg Gelu HardSwish Elu Selu"
KINKED = "Relu Abs LeakyRelu HardSigmoid ThresholdedRelu"
NEW_OPERATORS = {"Gelu": 20, "Mish": 18}

ELEMENTWISE = {
    **{
        op: of(f"y = {op} (x)", opset=NEW_OPERATORS.get(op, 17))
        for op in (SMOOTH + " " + KINKED).split()
    },
    **{op: Case(f"y = {op} (x)", {"x": positive(2, 3)}) for op in ("Sqrt", "Log", "Reciprocal")},
    "Gelu by tanh": of('y = Gelu <approximate = "tanh"> (x)', opset=20),
    "LeakyRelu of its own": of("y = LeakyRelu <alpha = 0.3> (x)"),
    "HardSigmoid of its own": of("y = HardSigmoid <alpha = 0.4, beta = 0.3> (x)"),
    "Clip both": of("y = Clip (x, lo, hi)", lo=np.float32(-0.5), hi=np.float32(0.7)),
    "Clip below": of("y = Clip (x, lo)", lo=np.float32(-0.5)),
    "Clip above": of("y = Clip (x, , hi)", hi=np.float32(0.3)),
    "Clip none": of("y = Clip (x)"),
    "Clip bounds": Case(
        "y = Clip (x, lo, hi)",
        {"x": normal(4, 5)},
        {"lo": np.float32(-0.5), "hi": np.float32(0.7)},
        ("x", "lo", "hi"),
    ),
    "PRelu": Case("y = PRelu (x, s)", {"x": normal(2, 3, 4)}, {"s": positive(3, 1)}, ("x", "s")),
    "Cast": of("d = Cast <to = 11> (x) y = Exp (d)"),
    "Where": Case(
        "c = Greater (a, b) y = Where (c, a, d)",
        {"a": normal(2, 3), "b": normal(3, seed=1), "d": normal(2, 1, seed=2)},
        wanted=("a", "d"),
    ),
    "Pow": pair("Pow", (2, 3), (3,)),
    "Pow of 2": of("y = Pow (x, p)", p=np.float32(2)),
    "Mean": Case("y = Mean (a, b)", {"a": normal(2, 3), "b": normal(3, seed=1)}),
    "Sum": Case("y = Sum (a, b, a)", {"a": normal(2, 3), "b": normal(3, seed=1)}),
    **{op: pair(op, (2, 3, 4), (2, 3, 4)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")},
    **{f"{op} right": pair(op, (2, 3, 4), (3, 1)) for op in ("Add", "Sub", "Mul", "Div", "Max")},
    **{f"{op} left": pair(op, (4,), (2, 3, 1)) for op in ("Add", "Sub", "Mul", "Div", "Min")},
    "itself": of("y = Mul (x, x)"),
    "read often": of("a = Exp (x) b = Sin (x) c = Mul (a, b) d = Add (c, x) y = Mul (d, a)"),
}

MOVING = {
    "Reshape": of("y = Reshape (x, s)", s=ints(4, -1)),
    "Flatten": of("y = Flatten <axis = 2> (x)"),
    "Squeeze": of("y = Squeeze (x, a)", 2, 1, 3, a=ints(1)),
    "Unsqueeze": of("y = Unsqueeze (x, a)", a=ints(0, 3)),
    "Expand": of("y = Expand (x, s)", 3, 1, s=ints(2, 3, 4)),
    "Transpose": of("y = Transpose <perm = [1, 2, 0]> (x)"),
    "Transpose all": of("y = Transpose (x)"),
    "Concat": Case(
        "y = Concat <axis = 1> (a, b, a)", {"a": normal(2, 3), "b": normal(2, 1, seed=1)}
    ),
    "Concat last": Case(
        "y = Concat <axis = -1> (a, b)", {"a": normal(2, 3), "b": normal(2, 1, seed=1)}
    ),
    "Split": of(
        "a, b = Split <axis = 1> (x, s) c = Mul (a, a) y = Concat <axis = 1> (b, c)",
        2,
        5,
        s=ints(2, 3),
    ),
    "Split one read": of("a, b = Split <axis = -1> (x, s) y = Exp (b)", 2, 5, s=ints(2, 3)),
    "Slice": of("y = Slice (x, s, e, a)", 4, 5, s=ints(1), e=ints(4), a=ints(1)),
    "Slice to the end": of("y = Slice (x, s, e)", 4, 5, s=ints(-3, 2), e=ints(2**40, -1)),
    "Slice steps": of(
        "y = Slice (x, s, e, a, t)", 6, 7, s=ints(1, 0), e=ints(6, 7), a=ints(0, -1), t=ints(2, 3)
    ),
    "Slice backwards": of(
        "y = Slice (x, s, e, a, t)",
        6,
        7,
        s=ints(-1, 5),
        e=ints(-(2**40), 0),
        a=ints(0, 1),
        t=ints(-1, -2),
    ),
    "Pad": of("y = Pad (x, p, v)", 3, 4, p=ints(1, 0, 2, 3), v=np.float32(2)),
    "Pad cuts": of("y = Pad (x, p)", 4, 5, p=ints(1, -1, -2, 0)),
    "Pad axes": of("y = Pad (x, p, , a)", 4, 5, p=ints(1, 2), a=ints(-1), opset=18),
    "Pad reflect": of('y = Pad <mode = "reflect"> (x, p)', 1, 4, 5, p=ints(0, 2, 1, 0, 1, 3)),
    "Pad edge": of('y = Pad <mode = "edge"> (x, p)', 4, 5, p=ints(2, 1, 1, 0)),
    "Pad wrap": Case(
        'y = Pad <mode = "wrap"> (x, p)', {"x": normal(4, 5)}, {"p": ints(2, 1, 1, 0)}, opset=19
    ),
    "Gather": of("y = Gather <axis = 1> (x, i)", 3, 5, 2, i=np.array([[0, 4, 0], [1, -1, 3]])),
    "Gather first": of("y = Gather (x, i)", 5, 3, i=np.array([1, 1, -5], np.int32)),
    "Gather one": of("y = Gather <axis = -1> (x, i)", 3, 5, i=np.array(2)),
    "Gather fed": Case(
        "y = Gather (t, i)", {"i": np.array([[1, 2], [1, 0]])}, {"t": normal(4, 3)}, ("t",)
    ),
    "Tile": of("y = Tile (x, r)", 2, 3, r=ints(2, 3)),
    "DepthToSpace": of("y = DepthToSpace <blocksize = 2> (x)", 1, 8, 2, 3),
    "DepthToSpace CRD": of('y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)', 1, 8, 2, 3),
    "SpaceToDepth": of("y = SpaceToDepth <blocksize = 2> (x)", 2, 3, 4, 6),
}

HALF = {"g": positive(3), "b": normal(3), "m": normal(3, seed=1), "v": positive(3, seed=1)}
WRITTEN_OUT = """
    m = ReduceMean <axes = [-1]> (x)  c = Sub (x, m)  q = Pow (c, two)
    v = ReduceMean <axes = [-1]> (q)  e = Add (v, eps)  d = Sqrt (e)
    n = Div (c, d)  s = Mul (n, g)  y = Add (s, b)
"""
REDUCING = {
    "ReduceSum": of("y = ReduceSum (x, a)", a=ints(0, -1)),
    "ReduceSum dropped": of("y = ReduceSum <keepdims = 0> (x, a)", a=ints(1)),
    "ReduceSum all": of("y = ReduceSum (x)"),
    "ReduceSum none": of("y = ReduceSum <noop_with_empty_axes = 1> (x, a)", a=ints()),
    "ReduceMean": of("y = ReduceMean <axes = [1]> (x)"),
    "ReduceMean by input": of("y = ReduceMean <keepdims = 0> (x, a)", a=ints(2, 0), opset=18),
    **{
        op: of(f"y = {op} <axes = [1], keepdims = 0> (x)")
        for op in (
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    },
    "Softmax": of("y = Softmax (x)"),
    "Softmax inside": of("y = Softmax <axis = 1> (x)"),
    "LogSoftmax": of("y = LogSoftmax <axis = 1> (x)"),
    "LayerNormalization": Case(
        "y = LayerNormalization <epsilon = 0.01> (x, g, b)",
        {"x": normal(2, 4, 3)},
        {"g": positive(3), "b": normal(3)},
        ("x", "g", "b"),
    ),
    "LayerNormalization of two axes": Case(
        "y = LayerNormalization <axis = 1> (x, g)",
        {"x": normal(2, 4, 3)},
        {"g": positive(4, 3)},
        ("x", "g"),
    ),
    "LayerNormalization written out": Case(
        WRITTEN_OUT,
        {"x": normal(2, 4, 3)},
        {"g": positive(3), "b": normal(3), "two": np.float32(2), "eps": np.float32(0.01)},
        ("x", "g", "b"),
    ),
    "InstanceNormalization": Case(
        "y = InstanceNormalization (x, g, b)",
        {"x": normal(2, 3, 4, 2)},
        {"g": positive(3), "b": normal(3)},
        ("x", "g", "b"),
    ),
    "BatchNormalization": Case(
        "y = BatchNormalization <epsilon = 0.1> (x, g, b, m, v)",
        {"x": normal(2, 3, 2, 2)},
        HALF,
        ("x", "g", "b"),
    ),
}


def product(left: tuple[int, ...], right: tuple[int, ...]) -> Case:
    return Case("y = MatMul (a, b)", {"a": normal(*left), "b": normal(*right, seed=1)})


def gemm(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], bias: tuple[int, ...]
) -> Case:
    inputs = {"a": normal(*left), "b": normal(*right, seed=1), "c": normal(*bias, seed=2)}
    return Case(f"y = Gemm {attributes} (a, b, c)", inputs)


PRODUCTS = {
    "MatMul": product((3, 4), (4, 2)),
    "MatMul shared": product((2, 3, 4), (4, 5)),
    "MatMul batched": product((2, 3, 4), (2, 4, 5)),
    "MatMul broadcast": product((5, 1, 3, 4), (2, 4, 2)),
    "MatMul left shared": product((3, 4), (2, 4, 5)),
    "MatMul vector left": product((4,), (2, 4, 5)),
    "MatMul vector right": product((2, 3, 4), (4,)),
    "MatMul vectors": product((4,), (4,)),
    "Gemm": gemm("", (3, 4), (4, 2), (2,)),
    "Gemm turned": gemm(
        "<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>", (4, 3), (2, 4), (3, 1)
    ),
    "Gemm turned right": gemm("<transB = 1>", (3, 4), (2, 4), (1,)),
}

CONVOLUTIONS = {
    "1x1": conv((2, 3, 4, 5), (4, 3, 1, 1)),
    "1x1 of few places": conv((3, 8, 1, 2), (16, 8, 1, 1)),
    "1x1 strides": conv((2, 3, 5, 6), (4, 3, 1, 1), "strides = [2, 3]"),
    "1x1 groups": conv((2, 4, 3, 3), (6, 2, 1, 1), "group = 2"),
    "1x1 padded": conv((2, 3, 3, 3), (2, 3, 1, 1), "pads = [1, 0, 0, 2]"),
    "3x3": conv((2, 3, 5, 6), (4, 3, 3, 3)),
    "3x3 same": conv((2, 3, 5, 6), (4, 3, 3, 3), "pads = [1, 1, 1, 1]"),
    "3x3 wide": conv((2, 70, 3, 3), (2, 70, 3, 3), "pads = [1, 1, 1, 1]"),
    "3x3 of few places": conv((3, 5, 2, 2), (70, 5, 3, 3), "pads = [1, 1, 1, 1]"),
    "3x3 dilated": conv((2, 3, 8, 7), (4, 3, 3, 3), "dilations = [2, 1], pads = [2, 0, 1, 1]"),
    "3x3 strides": conv((2, 3, 8, 7), (4, 3, 3, 3), "strides = [2, 3], pads = [1, 1, 1, 1]"),
    "3x3 strides dilated": conv((2, 3, 9, 8), (4, 3, 3, 3), "strides = [2, 2], dilations = [1, 2], pads = [0, 1, 1, 1]"),
    "3x3 groups": conv((2, 4, 5, 5), (6, 2, 3, 3), "group = 2, pads = [1, 1, 1, 1]"),
    "3x3 groups strides": conv((2, 4, 6, 5), (6, 2, 3, 3), "group = 2, pads = [0, 1, 1, 0], strides = [2, 2]"),
    "2x3 uneven": conv((2, 3, 6, 7), (4, 3, 2, 3), "pads = [0, 2, 1, 0]"),
    "same upper": conv((2, 3, 6, 7), (4, 3, 3, 2), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    "same lower": conv((2, 3, 6, 7), (4, 3, 2, 2), 'auto_pad = "SAME_LOWER"'),
    "places left over": conv((2, 3, 8, 8), (4, 3, 3, 3), "strides = [3, 3]"),
    "padded far": conv((1, 2, 3, 3), (2, 2, 2, 2), "pads = [3, 3, 2, 2]"),
    "depthwise": conv((2, 4, 5, 6), (4, 1, 3, 3), "group = 4, pads = [1, 1, 1, 1]"),
    "depthwise of many places": conv((1, 2, 17, 18), (2, 1, 3, 3), "group = 2, pads = [1, 1, 1, 1]"),
    "depthwise padded far": conv((2, 2, 4, 4), (2, 1, 2, 2), "group = 2, pads = [2, 2, 2, 2]"),
    "depthwise strides": conv((2, 4, 6, 7), (4, 1, 3, 3), "group = 4, pads = [0, 0, 1, 1], strides = [2, 2]"),
    "depthwise left over": conv((2, 2, 8, 8), (2, 1, 3, 3), "group = 2, strides = [3, 3]"),
    "depthwise dilated": conv((2, 3, 8, 8), (3, 1, 3, 3), "group = 3, dilations = [2, 2], pads = [2, 2, 2, 2]"),
    "depthwise both": conv((2, 3, 9, 8), (3, 1, 3, 3), "group = 3, dilations = [2, 2], pads = [2, 2, 1, 2], strides = [2, 2]"),
    "depthwise multiplied": conv((2, 3, 5, 5), (6, 1, 3, 3), "group = 3, pads = [1, 1, 1, 1]"),
    "depthwise multiplied strides": conv((2, 3, 5, 5), (6, 1, 3, 3), "group = 3, pads = [1, 1, 1, 1], strides = [2, 2]"),
    "one axis": conv((2, 3, 9), (4, 3, 3), "strides = [2], pads = [1, 1]"),
    "one axis dense": conv((2, 3, 9), (4, 3, 3), "dilations = [2], pads = [2, 1]"),
    "three axes": conv((1, 2, 4, 4, 5), (3, 2, 2, 2, 3), "pads = [0, 1, 1, 1, 0, 1]"),
    "three axes strides": conv((1, 2, 5, 4, 5), (3, 2, 2, 2, 3), "strides = [2, 1, 2], pads = [0, 1, 1, 1, 0, 1]"),
}  # fmt: skip

TRANSPOSED = {
    name: conv(image, weight, attributes, "ConvTranspose")
    for name, image, weight, attributes in (
        ("plain", (2, 3, 4, 5), (3, 2, 3, 3), ""),
        ("1x1 transposed", (2, 3, 4, 5), (3, 4, 1, 1), ""),
        ("strides", (2, 3, 4, 3), (3, 2, 3, 3), "strides = [2, 2], pads = [1, 1, 1, 1]"),
        ("one more", (2, 3, 4, 3), (3, 2, 3, 3), "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]"),
        ("dilated", (2, 3, 4, 3), (3, 2, 2, 3), "dilations = [2, 1], strides = [1, 2], pads = [1, 0, 0, 1]"),
        ("kernel of the stride", (2, 3, 4, 3), (3, 2, 2, 2), "strides = [2, 2]"),
        ("groups", (2, 4, 4, 3), (4, 3, 3, 3), "group = 2, strides = [2, 2]"),
        ("transposed depthwise", (2, 3, 4, 3), (3, 1, 4, 4), "group = 3, strides = [2, 2], pads = [1, 1, 1, 1]"),
        ("output_shape", (2, 3, 4, 3), (3, 2, 3, 3), "strides = [2, 2], output_shape = [7, 7]"),
        ("transposed line", (2, 3, 5), (3, 2, 3), "strides = [2], pads = [0, 1]"),
    )
}  # fmt: skip

X46 = (2, 3, 6, 7)
POOLING = {
    "GlobalAveragePool": of("y = GlobalAveragePool (x)", *X46),
    "GlobalMaxPool": of("y = GlobalMaxPool (x)", *X46),
    "MaxPool": of("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)", *X46),
    "MaxPool overlapping": of("y = MaxPool <kernel_shape = [3, 3], strides = [2, 1], pads = [1, 1, 1, 0]> (x)", *X46),
    "MaxPool ceiled": of("y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)", *X46),
    "MaxPool of a line": of("y = MaxPool <kernel_shape = [3], strides = [2]> (x)", 2, 3, 8),
    "AveragePool": of("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)", *X46),
    "AveragePool of all": of("y = AveragePool <kernel_shape = [6, 7]> (x)", *X46),
    "AveragePool padded": of("y = AveragePool <kernel_shape = [3, 3], strides = [2, 1], pads = [1, 1, 1, 0]> (x)", *X46),
    "AveragePool counting": of("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)", *X46),
    "AveragePool same": of('y = AveragePool <kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)', *X46),
    "AveragePool of a line": of("y = AveragePool <kernel_shape = [3], strides = [2]> (x)", 2, 3, 8),
    "AveragePool dilated": of("y = AveragePool <kernel_shape = [2, 2], dilations = [2, 1]> (x)", *X46, opset=19),
    "Resize": of('y = Resize <mode = "nearest"> (x, , scales)', 2, 3, 3, 4, scales=np.float32([1, 1, 2, 2])),
    "Resize by size": of('y = Resize <mode = "linear"> (x, , , z)', 2, 3, 3, 4, z=ints(2, 3, 5, 7)),
    "Resize smaller": of('y = Resize <mode = "linear", coordinate_transformation_mode = "asymmetric"> (x, , scales)', 2, 3, 6, 4, scales=np.float32([1, 1, 0.5, 0.75])),
    "Resize to corners": of('y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, , , z)', 2, 3, 3, 4, z=ints(2, 3, 5, 7)),
    "Resize cubic": of('y = Resize <mode = "cubic"> (x, , scales)', 1, 2, 4, 4, scales=np.float32([1, 1, 1.5, 2])),
    "Resize nearest floor": of('y = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> (x, , scales)', 1, 2, 4, 4, scales=np.float32([1, 1, 1.5, 2])),
    "Resize axes": of('y = Resize <mode = "linear", axes = [2, 3]> (x, , scales)', 1, 2, 4, 4, scales=np.float32([1.5, 2]), opset=18),
}  # fmt: skip

CASES = {
    **ELEMENTWISE, **MOVING, **REDUCING, **PRODUCTS, **CONVOLUTIONS, **TRANSPOSED, **POOLING
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_central_differences(name):
    case = CASES[name]
    assert_gradients(
        case.graph, case.names, case.opset, case.runtime, case.inputs, **case.constants
    )


def test_every_rule_is_tested():
    models = (build(case.graph, case.opset, 10, **case.constants) for case in CASES.values())
    tested = {node.op_type for model in models for node in model.graph}
    assert set(RULES) - tested == {"FakeQuantize"}


# --- where gradients end, and what is asked for


def test_a_node_without_a_rule_is_named_and_ends_the_gradient():
    model = build(
        "g (float[2,3] x) => (float[2,3] y) { [sum] a = CumSum (x, axis)  b = Exp (x)  y = Add (a, b) }",
        axis=np.array(1),
    )
    found = gradient_model(model, squares("y"), ["x"], {"x": (2, 3)})
    assert found.gaps == (Gap("sum", "CumSum", "no gradient is known for it"),)
    x = normal(2, 3)
    (wanted,) = (2 * (x.cumsum(1) + np.exp(x)) * np.exp(x),)  # of the way around it alone
    np.testing.assert_allclose(run(found.model, {"x": x})[found.outputs["x"]], wanted, rtol=1e-5)


def test_what_goes_through_integers_does_not_change_a_little():
    model = build("g (float[3] x) => (float[3] y) { i = Cast <to = 7> (x)  y = Cast <to = 1> (i) }")
    found = gradient_model(model, "y", ["x"], {"x": (3,)})
    assert not found.outputs
    assert not found.gaps


def test_a_branch_that_reads_what_is_wanted_is_named():
    model = build(
        "g (float[3] x, bool c) => (float[3] y) { a = Exp (x)  [choice] y = If (c) <"
        "then_branch = t () => (float[3] p) { p = Sin (a) },"
        "else_branch = e () => (float[3] q) { q = Neg (a) }> }"
    )
    found = gradient_model(model, "y", ["x"], {"x": (3,), "c": ()})
    assert found.gaps == (Gap("choice", "If", "no gradient is known for it"),)


def test_an_unknown_shape_is_named():
    model = build(
        "g (float[1,4] x, int64[2] s) => (float[] y) { a = Expand (x, s)  [sum] y = ReduceSum (a) }"
    )
    found = gradient_model(model, "y", ["x"], {"x": (1, 4), "s": (2,)})
    assert found.gaps == (Gap("sum", "ReduceSum", "the shape of 'a' is not known"),)


def test_a_loss_of_unknown_shape_is_refused():
    model = build("g (float[1,4] x, int64[2] s) => (float[] y) { y = Expand (x, s) }")
    with pytest.raises(ModelError, match=r"shape of 'y' is not known.*--inputShape"):
        gradient_model(model, "y", ["x"], {"x": (1, 4), "s": (2,)})


def test_flat_operators_are_no_gaps():
    model = build("g (float[3] x) => (float[3] y) { a = Floor (x)  y = Mul (a, x) }")
    found = gradient_model(model, "y", ["x"], {"x": (3,)})
    assert not found.gaps
    x, seed = normal(3), positive(3)
    made = run(found.model, {"x": x, "y_seed": seed})
    np.testing.assert_allclose(made[found.outputs["x"]], seed * np.floor(x), rtol=1e-6)


def test_what_the_loss_does_not_depend_on_has_no_gradient():
    model = build(
        "g (float[3] x, float[3] z) => (float[3] y, float[3] w) { y = Exp (x)  w = Exp (z) }"
    )
    found = gradient_model(model, "y", ["x", "z"], {"x": (3,), "z": (3,)})
    assert list(found.outputs) == ["x"]


def test_inner_tensors_constants_and_inputs_have_gradients_at_once():
    model = build(
        "g (float[2,3] x) => (float[2,2] y) { a = MatMul (x, w)  y = Tanh (a) }", w=normal(3, 2)
    )
    found = gradient_model(model, squares("y"), ["w", "a", "x"], {"x": (2, 3)}, keep=["y"])
    x, w = normal(2, 3), normal(3, 2)
    made = run(found.model, {"x": x, "w": w})
    y = np.tanh(x @ w)
    da = 2 * y * (1 - y**2)
    np.testing.assert_allclose(made["y"], y, rtol=1e-5)
    np.testing.assert_allclose(made[found.loss], (y**2).sum(), rtol=1e-5)
    for name, wanted in (("a", da), ("x", da @ w.T), ("w", x.T @ da)):
        np.testing.assert_allclose(made[found.outputs[name]], wanted, rtol=1e-4, atol=1e-6)


def test_the_model_given_stays_as_it_is():
    model = build("g (float[n,3] x) => (float[n,2] y) { y = MatMul (x, w) }", w=normal(3, 2))
    before = frozen(model)
    gradient_model(model, "y", ["w"], {"x": (4, 3)})
    assert frozen(model) == before


def test_shapes_that_are_computed_become_constants():
    model = build(
        "g (float[n,3,4] x) => (float[n,12] y) { s = Shape (x)  n = Gather (s, zero)  r = Concat <axis = 0>"
        " (n, rest)  a = Reshape (x, r)  y = Tanh (a) }",
        zero=np.array([0]),
        rest=np.array([-1]),
    )
    found = gradient_model(model, squares("y"), ["x"], {"x": (2, 3, 4)})
    assert not found.gaps
    x = normal(2, 3, 4)
    y = np.tanh(x)
    made = run(found.model, {"x": x})[found.outputs["x"]]
    np.testing.assert_allclose(made, 2 * y * (1 - y**2), rtol=1e-4, atol=1e-6)


# --- losses


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


@pytest.mark.parametrize("end", ["", "Softmax", "LogSoftmax"])
def test_divergence_of_logits_and_of_what_was_made_of_them(end):
    last = f"y = {end} <axis = 1> (a)" if end else "y = Identity (a)"
    model = build(
        f"g (float[4,5,1] x) => (float[4,5,1] y) {{ a = Mul (x, two)  {last} }}", two=np.float32(2)
    )
    x, logits = normal(4, 5, 1), normal(4, 5, 1, seed=1)
    axis = 1 if end else -1
    known, made = softmax(logits, axis), softmax(2 * x, axis)
    teacher = {"": logits, "Softmax": known, "LogSoftmax": np.log(known)}[end]
    found = gradient_model(model, divergence("y"), ["x"], {"x": (4, 5, 1)})
    results = run(found.model, {"x": x, TEACHER.format("y"): teacher})
    count = 4 if end else 20
    wanted = (known * (np.log(known) - np.log(made))).sum() / count
    np.testing.assert_allclose(results[found.loss], wanted, rtol=1e-5)
    np.testing.assert_allclose(
        results[found.outputs["x"]], 2 * (made - known) / count, rtol=1e-4, atol=1e-6
    )


def test_divergence_of_certain_probabilities_is_finite():
    model = build("g (float[1,3] x) => (float[1,3] y) { y = Softmax (x) }")
    found = gradient_model(model, divergence("y"), ["x"], {"x": (1, 3)})
    feeds = {"x": np.float32([[500, 0, -500]]), TEACHER.format("y"): np.float32([[0, 0, 1]])}
    results = run(found.model, feeds)
    np.testing.assert_allclose(results[found.loss], 1000)
    np.testing.assert_allclose(results[found.outputs["x"]], [[1, 0, -1]], atol=1e-30)


def test_error_is_relative_to_the_teacher():
    model = build("g (float[2,3] x) => (float[2,3] y, float[2,3] z) { y = Exp (x)  z = Neg (x) }")
    x, y, z = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    found = gradient_model(model, error(["y", "z"]), ["x"], {"x": (2, 3)})
    results = run(found.model, {"x": x, TEACHER.format("y"): y, TEACHER.format("z"): z})
    wanted = ((np.exp(x) - y) ** 2).sum() / (y**2).sum() + ((-x - z) ** 2).sum() / (z**2).sum()
    np.testing.assert_allclose(results[found.loss], wanted / 2, rtol=1e-5)
    slope = (np.exp(x) - y) * np.exp(x) / (y**2).sum() + (x + z) / (z**2).sum()
    np.testing.assert_allclose(results[found.outputs["x"]], slope, rtol=1e-4, atol=1e-6)


# --- fake quantization


def fake_quantized(shape: tuple[int, ...], scale: tuple[int, ...]) -> ir.Model:
    """y = 2 fake_quantize(x), all parameters inputs."""
    shapes = {"x": shape, "scale": scale, "zero": scale, "low": (), "high": ()}
    kind = ir.TensorType(ir.DataType.FLOAT)
    values = [ir.Value(name=k, shape=ir.Shape(s), type=kind) for k, s in shapes.items()]
    q = ir.Value(name="q")
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=10)
    graph.append(fake_quantize(model, values, "quantize", q))
    double = ir.node("Add", [q, q], name="double")
    double.outputs[0].name, double.outputs[0].type = "y", kind
    graph.append(double)
    graph.outputs.append(double.outputs[0])
    return model


@pytest.mark.parametrize("scale_shape", [(), (3, 1)])
def test_fake_quantization_passes_straight_through_and_learns_its_steps(scale_shape):
    model = fake_quantized((3, 40), scale_shape)
    x, seed = 2 * normal(3, 40), normal(3, 40, seed=1)
    scale = np.asarray(positive(*scale_shape) * 0.3, np.float32)
    zero = np.asarray(positive(*scale_shape, seed=3) * 4, np.float32)
    feeds = {
        "x": x,
        "scale": scale,
        "zero": zero,
        "low": np.array(0, np.float32),
        "high": np.array(7, np.float32),
    }
    wanted = ["x", "scale", "zero"]
    found = gradient_model(model, "y", wanted, {k: v.shape for k, v in feeds.items()}, keep=["y"])
    assert not found.gaps
    v = x.astype(np.float64) / scale + zero
    code = np.clip(np.rint(v), 0, 7)
    inside = (v >= 0) & (v <= 7)
    assert 20 < inside.sum() < 100
    axes = 1 if scale_shape else None
    keep = {"keepdims": True} if scale_shape else {}
    slopes = {
        "x": 2 * seed * inside,
        "scale": (2 * seed * np.where(inside, code - v, code - zero)).sum(axis=axes, **keep),
        "zero": (2 * seed * np.where(inside, 0, -scale)).sum(axis=axes, **keep),
    }
    for optimize in (False, True):
        made = run(found.model, {**feeds, "y_seed": seed}, optimize)
        np.testing.assert_allclose(made["y"], 2 * scale * (code - zero), rtol=1e-5, atol=1e-6)
        for name, slope in slopes.items():
            np.testing.assert_allclose(made[found.outputs[name]], slope, rtol=1e-3, atol=1e-4)


# --- blocked convolutions


BLOCKED = {
    "3x3": ((2, 16, 7, 6), (32, 16, 3, 3), "pads = [1, 1, 1, 1]"),
    "strides": ((2, 32, 7, 6), (16, 32, 3, 3), "strides = [2, 2], pads = [0, 1, 1, 0]"),
    "dilations": ((1, 16, 9, 9), (16, 16, 3, 2), "dilations = [2, 3], pads = [2, 0, 1, 1]"),
    "depthwise": ((2, 32, 7, 6), (32, 1, 3, 3), "group = 32, pads = [1, 1, 1, 1]"),
    "same": ((1, 16, 7, 6), (16, 16, 3, 3), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    "groups": ((1, 32, 5, 5), (32, 16, 3, 3), "group = 2"),
    "odd channels": ((1, 12, 5, 5), (20, 12, 3, 3), "pads = [1, 1, 1, 1]"),
}
LAST = {
    "": "y = Identity (a)",
    "Relu": "y = Relu (a)",
    "Clip": "y = Clip (a, low, high)",
    "read twice": "c = Relu (a)  y = Sub (c, a)",
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", BLOCKED)
def test_blocked_convolutions_compute_the_same(name, last):
    image, weight, attributes = BLOCKED[name]
    graph = f"g (float[{','.join(map(str, image))}] x) => (float[] y) {{ a = Conv <{attributes}> (x, w, b)  {LAST[last]} }}"
    w, b = normal(*weight) / 4, normal(weight[0], seed=1)
    model = build(graph, 16, w=w, b=b, low=np.float32(-0.5), high=np.float32(0.7))
    found = gradient_model(model, squares("y"), ["w", "b", "x"], {"x": image}, keep=["y"])
    feeds = {"x": normal(*image, seed=2), "w": w, "b": b}
    before = run(found.model, feeds, optimize=True)
    blocked = block_convolutions(found.model)
    if block_size() and name not in {"groups", "odd channels"}:
        assert DOMAIN in {node.domain for node in blocked.graph}
    for optimize in (False, True):
        after = run(blocked, feeds, optimize)
        for output, wanted in before.items():
            scale = max(1.0, np.abs(wanted).max())
            np.testing.assert_allclose(after[output], wanted, rtol=1e-3, atol=1e-4 * scale)


# --- whole models


CNN = """
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  b = BatchNormalization (a, g, h, m, v)  c = Relu (b)
    d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
    e = Conv <group = 4, pads = [1, 1, 1, 1]> (d, w2)  f = HardSwish (e)  i = Add (f, d)
    j = Conv <strides = [2, 2]> (i, w3)  k = GlobalAveragePool (j)  l = Sigmoid (k)  n = Mul (j, l)
    o = Flatten (n)  p = Gemm <transB = 1> (o, w4, b4)  y = LogSoftmax (p)
"""


def test_gradients_of_a_small_network():
    weights = {
        "w1": normal(4, 2, 3, 3) / 3, "b1": normal(4), "w2": normal(4, 1, 3, 3) / 2, "w3": normal(6, 4, 1, 1),
        "w4": normal(3, 24) / 4, "b4": normal(3, seed=1), "g": positive(4), "h": normal(4, seed=2),
    }  # fmt: skip
    statistics = {"m": normal(4, seed=3), "v": positive(4)}
    graph = f"g (float[2,2,8,8] x) => (float[] y) {{ {CNN} }}"
    wanted = ("x", *weights)
    assert_gradients(graph, wanted, inputs={"x": normal(2, 2, 8, 8)}, **weights, **statistics)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10"])
def test_gradients_of_a_trained_network(name):
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    model = prepare(load(path))
    x, output = normal(2, 3, 32, 32), model.graph.outputs[0].name
    values = [v for n in model.graph if n.op_type in {"Conv", "Gemm"} for v in n.inputs[1:]]
    weights = {v.name: v.const_value.numpy() for v in values}
    feed = model.graph.inputs[0].name
    found = gradient_model(model, output, list(weights), {feed: x.shape})
    assert not found.gaps
    assert set(found.outputs) == set(weights)
    seed = normal(2, 10, seed=1)
    made = run(found.model, {feed: x, f"{output}_seed": seed, **weights}, optimize=True)
    rng = np.random.default_rng(3)
    wide = in_double(freed(model, list(weights)))
    step = {k: rng.standard_normal(a.shape) * np.abs(a).mean() for k, a in weights.items()}
    slope = sum((made[found.outputs[k]].astype(float) * d).sum() for k, d in step.items())

    def total(size: float) -> float:
        moved = {k: a + size * step[k] for k, a in weights.items()}
        return float((reference(wide, {feed: x.astype(float), **moved})[output] * seed).sum())

    assert abs((total(1e-6) - total(-1e-6)) / 2e-6 - slope) < 1e-3 * abs(slope)
