"""Float16 storage: half the bytes, the same numbers to float16's precision, and nothing that
float16 cannot hold.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import assert_same, build, frozen, normal, positive, run, types

from converter.cli import main
from converter.emit.half import store_constants_as_half
from converter.graph.edit import values_by_name
from converter.prepare.opset import raise_opset

X = {"x": normal(3, 16)}
W = normal(16, 16)
HEAD = "g (float[3,16] x) => (float[M,N] y)"


def halved(graph, **constants):
    model = build(f"{HEAD} {{ {graph} }}", **constants)
    before = frozen(model)
    store_constants_as_half(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return before, model


def test_large_constants_are_stored_in_half_the_bytes():
    weight = normal(16, 16)
    before, model = halved("m = MatMul (x, w)  y = Add (m, b)", w=weight, b=normal(16))
    assert types(model) == ["Cast", "MatMul", "Add"]
    assert {v.name: v.dtype for v in model.graph.initializers.values()} == {
        "w": ir.DataType.FLOAT16,
        "b": ir.DataType.FLOAT,
    }
    rounded = weight.astype(np.float16).astype(np.float32)
    exact = build(f"{HEAD} {{ m = MatMul (x, w)  y = Add (m, b) }}", w=rounded, b=normal(16))
    assert_same(exact, model, X)
    assert len(frozen(model)) < len(before) - 16 * 16


def test_what_a_copy_was_made_of_stays_as_it_was():
    model = build(f"{HEAD} {{ m = MatMul (x, w)  y = Add (m, x) }}", w=normal(16, 16))
    before = frozen(model)
    store_constants_as_half(model.clone())
    assert frozen(model) == before
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    raise_opset(model, 16)


def test_a_constant_with_several_readers_is_stored_once():
    _, model = halved("m = MatMul (x, w)  n = MatMul (m, w)  y = Add (n, x)", w=normal(16, 16))
    assert types(model) == ["Cast", "MatMul", "MatMul", "Add"]


def test_what_float16_cannot_hold_and_integers_stay():
    large, whole = np.full((16, 16), 70000, np.float32), np.arange(256).reshape(16, 16)
    before, model = halved(
        "m = MatMul (x, w)  k = Cast <to=1> (i)  y = MatMul (m, k)", w=large, i=whole
    )
    assert frozen(model) == before


def test_scales_stay():
    constants = {
        "q": np.ones((64, 16), np.int8),
        "s": np.full(64, 0.1, np.float32),
        "z": np.zeros(64, np.int8),
    }
    before, model = halved(
        "w = DequantizeLinear <axis=0> (q, s, z)  y = Gemm <transB=1> (x, w)", **constants
    )
    assert frozen(model) == before


def test_a_constant_that_is_an_output_keeps_its_type():
    model = build(
        "g (float[3,16] x) => (float[] y, float[16,16] w) { y = MatMul (x, w) }", w=normal(16, 16)
    )
    store_constants_as_half(model)
    np.testing.assert_array_equal(run(model, X)["w"], normal(16, 16))


def test_constants_of_subgraphs_and_taken_names():
    graph = """g (float[3,16] x, bool q, float u) => (float[] y) {
        y = If (q) < then_branch = t () => (float[3,16] a)
                       <float[1] k = {2.0}> { l = MatMul (x, w)  a = Mul (l, u) },
                     else_branch = e () => (float[3,16] b) { b = MatMul (x, w) } >
    }"""
    model = build(graph, w=normal(16, 16).astype(np.float16).astype(np.float32))
    before = frozen(model)
    store_constants_as_half(model)
    assert values_by_name(model.graph)["w"].dtype == ir.DataType.FLOAT16
    for q in (True, False):
        assert_same(before, model, {**X, "q": np.array(q), "u": np.array(3, np.float32)})


def test_alone_it_needs_no_config(tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(
        frozen(build("g (float[3,16] x) => (float[] y) { y = MatMul (x, w) }", w=W))
    )
    main(
        [
            "--fp16=on",
            f"--modelFile={tmp_path / 'model.onnx'}",
            f"--outputFile={tmp_path / 'half.onnx'}",
        ]
    )
    assert "CONVERT RESULT SUCCESS:0" in capsys.readouterr().out
    found = onnx.load(tmp_path / "half.onnx")
    assert [tensor.data_type for tensor in found.graph.initializer] == [onnx.TensorProto.FLOAT16]
    np.testing.assert_allclose(
        run(found.SerializeToString(), X)["y"], X["x"] @ W.astype(np.float16), rtol=1e-5
    )


@pytest.mark.parametrize("half", ["on", "off"])
def test_alone_a_config_need_not_name_a_quant_type(tmp_path, capsys, half):
    (tmp_path / "model.onnx").write_bytes(
        frozen(build("g (float[3,16] x) => (float[] y) { y = MatMul (x, w) }", w=W))
    )
    (tmp_path / "c.cfg").write_text("[common_quant_param]\nthread_num = 1\n")
    flags = (
        f"--modelFile={tmp_path / 'model.onnx'}",
        f"--configFile={tmp_path / 'c.cfg'}",
        f"--fp16={half}",
    )
    if half == "on":
        main([*flags])
        assert (tmp_path / "model_quant.onnx").exists()
    else:
        with pytest.raises(SystemExit):
            main([*flags])
        assert "quant_type: is missing" in capsys.readouterr().err


def test_numbers_too_small_for_float16_stay_float32():
    fine, tiny = positive(128), positive(128, seed=1) * np.float32(1e-9)
    weights = normal(64, 64) * np.float32(0.01)
    quiet = weights.copy()
    quiet[7] *= 1e-6  # a channel whose numbers float16 holds in a few steps, or not at all
    model = build(
        "g (float[N,64] x) => (float[N,64] y) { a = MatMul (x, w)  y = MatMul (a, q) }",
        w=weights,
        q=quiet,
        d=tiny,
        f=fine,
    )
    assert sorted(store_constants_as_half(model)) == ["d", "q"]
