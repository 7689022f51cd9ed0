"""THE target table: which integer types, symmetry and operators a runtime computes on, and how its kernels overflow."""

from __future__ import annotations

from dataclasses import dataclass

from calib.affine import UINT8, IntFormat


@dataclass(frozen=True)
class Target:
    """One kind of hardware and runtime.

    `integer`: operators with integer kernels between QuantizeLinear/DequantizeLinear pairs.
    `moves`: operators that run on integers when input and output share their parameters.
    `fused`: activation functions that vanish into the integer operator before them.
    `float_output`: operators whose integer kernel can hand out float, so that no output range is needed.
    `weight_full`: format of weights where the kernel cannot overflow; `weight_safe`: where a pair of products can.
    """

    name: str
    activation: IntFormat
    symmetric_activation: bool
    weight_full: IntFormat
    weight_safe: IntFormat
    integer: frozenset[str]
    moves: frozenset[str]
    fused: frozenset[str]
    float_output: frozenset[str]


CPU = Target(
    name="CPU",
    activation=UINT8,
    symmetric_activation=False,
    weight_full=IntFormat(8, signed=True, narrow=True),
    # x86 without VNNI adds pairs of u8 x s8 products in 16 bits: 2 * 255 * 64 is the most that fits.
    weight_safe=IntFormat(7, signed=True, narrow=True),
    integer=frozenset(
        "Conv Gemm MatMul Add Mul Concat AveragePool GlobalAveragePool Sigmoid LeakyRelu".split()
    ),
    moves=frozenset("MaxPool Reshape Flatten Squeeze Unsqueeze Transpose Slice Split DepthToSpace Resize".split()),
    fused=frozenset({"Relu", "Clip"}),
    float_output=frozenset({"Gemm", "MatMul"}),
)

TARGETS: dict[str, Target] = {target.name: target for target in (CPU,)}
