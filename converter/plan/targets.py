"""THE target table: which integer types and operators a runtime computes on, how its kernels
overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from calib.affine import INT8, INT8_NARROW, UINT8, UINT16, IntFormat

# x86 without VNNI multiplies u8 by s8 and adds two products in 16 bits: 128 * 255 fits, 129 * 255
# does not.
PAIR_LIMIT = 128
# The wide format of activations, and the opset that conversions to it came with.
WIDE, WIDE_OPSET = UINT16, 21


@dataclass(frozen=True)
class Target:
    """One kind of hardware and runtime.

    `integer`: operators with integer kernels between QuantizeLinear/DequantizeLinear pairs.
    `fused`: activation functions that vanish into the integer operator before them. `bare`:
    operators that only move values and that the runtime runs on integers without any pair around
    them. `float_output`: operators whose integer kernel can hand out float, so that no output range
    is needed. `pair_limit`: the most that two weight codes of equal sign may sum up to where
    kernels add two products in 16 bits. `integer_bias`: whether biases are stored as int32; else
    they stay float. `all_pays`: whether every operator with a kernel is worth it, also where
    integers begin and end. `computed_products`: whether products of two activations, as in
    attention, are worth it. `fuses_residual`: whether an Add after a convolution runs inside it, so
    that only its other input is converted. `counts_costs`: whether the table of costs is of its
    kernels, and what makes nothing faster stays float.

    `wide`: operators that may have activations of 16 bits, and `wide_is_slow`, whether these are
    computed in floats between conversions.

    `channels`: operators whose weights may have a scale a channel; None for all. `adds_bias`:
    whether an Add of a constant behind a product of bytes is part of it. `fixed`: scale and zero
    point that the outputs of an operator must have at some width. `joins_alike`: whether what is
    joined had better have the parameters of the whole. `signed_alone`: whether no integers but
    signed ones with the zero 0 are taken, in every mode. `least_product`: products of fewer rows or
    columns are faster in floats.
    """

    name: str
    activation: IntFormat
    symmetric: bool
    integer: frozenset[str]
    float_output: frozenset[str]
    fused: frozenset[str] = frozenset({"Relu", "Clip"})
    bare: frozenset[str] = frozenset()
    weight: IntFormat = INT8_NARROW
    pair_limit: int | None = None
    integer_bias: bool = True
    all_pays: bool = False
    fuses_residual: bool = False
    computed_products: bool = True
    counts_costs: bool = False
    wide: frozenset[str] = frozenset()
    wide_is_slow: bool = False
    channels: frozenset[str] | None = None
    adds_bias: bool = True
    fixed: Mapping[tuple[str, int], tuple[float, int]] = field(default_factory=dict)
    joins_alike: bool = False
    signed_alone: bool = False
    least_product: int = 0


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _set(
    "MaxPool Reshape Flatten Squeeze Unsqueeze Transpose Slice Split DepthToSpace "
    "SpaceToDepth Resize"
)
_WEIGHTED = _set("Conv Gemm MatMul")
_COMPUTED = _set("Add Mul Concat AveragePool GlobalAveragePool Sigmoid LeakyRelu")

CPU = Target(
    name="CPU",
    activation=UINT8,
    symmetric=False,
    integer=_WEIGHTED | _COMPUTED | _MOVES | _set("HardSigmoid"),
    float_output=_set("Gemm MatMul"),
    bare=_set("Pad"),
    pair_limit=PAIR_LIMIT,
    computed_products=False,
    counts_costs=True,
    wide=_WEIGHTED | _COMPUTED | _MOVES | _set("HardSigmoid Pad"),
    wide_is_slow=True,
)
OPENVINO = replace(
    CPU,
    name="OPENVINO",
    integer=CPU.integer - {"HardSigmoid"} | _set("Pad"),
    float_output=CPU.integer - {"HardSigmoid"},
    bare=frozenset(),
    integer_bias=False,
    fuses_residual=True,
    computed_products=True,
    counts_costs=False,
    wide=frozenset(),
)
NVGPU = Target(
    name="NVGPU",
    activation=INT8,
    symmetric=True,
    integer=_WEIGHTED | _set("ConvTranspose Add Concat AveragePool GlobalAveragePool") | _MOVES,
    # TensorRT fuses what follows a weighted operator by itself: only what operators read is
    # converted.
    float_output=_WEIGHTED | _set("ConvTranspose Add Concat AveragePool GlobalAveragePool"),
    integer_bias=False,
    fuses_residual=True,
    signed_alone=True,
    least_product=16,
)
DSP = Target(
    name="DSP",
    activation=UINT8,
    symmetric=False,
    integer=_WEIGHTED
    | _COMPUTED
    | _MOVES
    | _set(
        "ConvTranspose Abs BatchNormalization Ceil Clip Div Exp Floor Gather "
        "InstanceNormalization Max Min Neg Pad"
    )
    | _set("PRelu ReduceMax ReduceMean ReduceMin ReduceSum Relu Round Softmax Sqrt Sub Tanh Tile"),
    float_output=frozenset(),
    all_pays=True,
    # The supplements of Qualcomm's operator definitions list 16 bits for what HTP and HTA compute.
    wide=_WEIGHTED
    | _COMPUTED
    | _MOVES
    | _set("ConvTranspose Div Max Min Neg Pad PRelu ReduceMax")
    | _set("ReduceMean ReduceMin ReduceSum Relu Softmax Sqrt Sub Tanh Tile Clip Exp Gather"),
)
_NPU = DSP.integer - _set("BatchNormalization Ceil InstanceNormalization") | _set(
    "Elu Gelu HardSigmoid HardSwish LayerNormalization Log Pow"
)
# Qualcomm's NPU, as ONNX Runtime's QNN provider hands it a graph: operators between pairs of one
# width, scales a channel for convolutions alone, and what 16 bits between fixed bounds stand for.
QNN = Target(
    name="QNN",
    activation=UINT8,
    symmetric=False,
    integer=_NPU,
    float_output=frozenset(),
    all_pays=True,
    wide=_NPU,
    channels=_set("Conv ConvTranspose"),
    adds_bias=False,
    fixed={("Sigmoid", 16): (2.0**-16, 0), ("Tanh", 16): (2.0**-15, 1 << 15)},
    joins_alike=True,
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CPU,
        replace(CPU, name="CPU_VNNI", pair_limit=None),
        replace(CPU, name="ARM", pair_limit=None, counts_costs=False),
        OPENVINO,
        NVGPU,
        DSP,
        QNN,
    )
}
