"""THE table of gradients: operator → what each of its inputs gets, given what its outputs get.

A new operator is one row in the module of its kind and one row in tests/test_gradients.py, which
holds every row against finite differences.
"""

from __future__ import annotations

from converter.learn import (
    convolution,
    elementwise,
    fake_quant,
    moving,
    pooling,
    products,
    reducing,
)
from converter.learn.site import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **moving.RULES,
    **reducing.RULES,
    **products.RULES,
    **convolution.RULES,
    **pooling.RULES,
    **fake_quant.RULES,
}
# Operators whose outputs do not change with small changes of their inputs.
FLAT = frozenset(
    {
        *("Floor", "Ceil", "Round", "Sign", "Shape", "Size", "ConstantOfShape", "ArgMax", "ArgMin"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "NonZero"),
    }
)
