"""float16 and bfloat16 models are quantized from float32 copies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, run

from converter.prepare import prepare
from converter.prepare.widen import NARROW

TEXT = """
g (float16[N, 4] x, bool choice) => (float16[N, 3] y, float16[N, 3] z)
{
  h = MatMul (x, w)
  i = Cast <to = 1> (h)
  c = Cast <to = 10> (i)
  z = Relu (c)
  y = If (choice) <
    then_branch = t () => (float16[N, 3] a) { a = Add (z, w2) },
    else_branch = e () => (float16[N, 3] b) { b = Mul (z, w2) }
  >
}
"""


def half_model(dtype: type = np.float16) -> ir.Model:
    rng = np.random.default_rng(0)
    text = TEXT if dtype == np.float16 else TEXT.replace("float16", "bfloat16").replace("10", "16")
    return build(text, w=rng.normal(size=(4, 3)).astype(dtype), w2=rng.normal(size=3).astype(dtype))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("choice", [False, True])
def test_it_computes_the_same_and_keeps_its_types(optimize: bool, choice: bool) -> None:
    model = half_model()
    wide = prepare(model.clone())
    assert [v.dtype for v in (*wide.graph.inputs, *wide.graph.outputs)] == [
        ir.DataType.FLOAT16,
        ir.DataType.BOOL,
    ] + [ir.DataType.FLOAT16] * 2
    assert [v.name for v in wide.graph.outputs] == ["y", "z"]
    feed = {
        "x": np.random.default_rng(1).normal(size=(5, 4)).astype(np.float16),
        "choice": np.array(choice),
    }
    old, new = run(model, feed, optimize), run(wide, feed, optimize)
    for name in ("y", "z"):
        assert new[name].dtype == np.float16
        np.testing.assert_allclose(new[name], old[name], rtol=4e-3, atol=2e-3)


def test_nothing_narrow_is_left_inside() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        wide = prepare(half_model(dtype))
        onnx.checker.check_model(ir.to_proto(wide), full_check=True)
        casts = {v for node in wide.graph for v in node.outputs if node.op_type == "Cast"} | set(
            wide.graph.inputs
        )
        values = [
            v
            for g in wide.graphs()
            for v in (*g.initializers.values(), *(o for n in g for o in n.outputs))
        ]
        assert not [v.name for v in values if v.dtype in NARROW and v not in casts]


def test_float32_models_stay_as_they_are() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert [node.op_type for node in prepare(model).graph] == ["Relu"]
