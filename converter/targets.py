"""THE target table: which integer types, symmetry and operators a runtime computes on, and how its kernels overflow."""

from __future__ import annotations

from dataclasses import dataclass

from calib.affine import INT8_NARROW, UINT8, IntFormat


@dataclass(frozen=True)
class Target:
    """One kind of hardware and runtime.

    `integer`: operators with integer kernels between QuantizeLinear/DequantizeLinear pairs.
    `moves`: operators that run on integers when input and output share their parameters.
    `fused`: activation functions that vanish into the integer operator before them.
    `float_output`: operators whose integer kernel can hand out float, so that no output range is needed.
    `pair_limit`: the most that two weight codes of equal sign may sum up to where kernels add two products in 16 bits.
    """

    name: str
    activation: IntFormat
    symmetric_activation: bool
    weight: IntFormat
    pair_limit: int | None
    integer: frozenset[str]
    moves: frozenset[str]
    fused: frozenset[str]
    float_output: frozenset[str]


CPU = Target(
    name="CPU",
    activation=UINT8,
    symmetric_activation=False,
    weight=INT8_NARROW,
    pair_limit=128,  # x86 without VNNI: 128 * 255 is the last multiple of 255 below 2 ** 15
    integer=frozenset(
        "Conv Gemm MatMul Add Mul Concat AveragePool GlobalAveragePool Sigmoid LeakyRelu".split()
    ),
    moves=frozenset("MaxPool Reshape Flatten Squeeze Unsqueeze Transpose Slice Split DepthToSpace Resize".split()),
    fused=frozenset({"Relu", "Clip"}),
    float_output=frozenset({"Gemm", "MatMul"}),
)

TARGETS: dict[str, Target] = {target.name: target for target in (CPU,)}
