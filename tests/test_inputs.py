"""What a model is fed: inputs with a value of their own, and dimensions that share a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import Command, outputs
from graphs import build, frozen, normal
from onnx.external_data_helper import set_external_data
from running import write_config

from calib.affine import Array

WEIGHT, OTHER = normal(64, 64) / 8, normal(64, 64, seed=1) / 8
MODES: dict[str, dict[str, dict[str, object]]] = {
    "WEIGHT_QUANT": {"common_quant": {"quant_type": "WEIGHT_QUANT"}},
    "ON_THE_FLY": {
        "common_quant": {"quant_type": "WEIGHT_QUANT"},
        "weight_quant": {"dequant_strategy": "ON_THE_FLY", "block_size": 32},
    },
    "DYNAMIC_QUANT": {"common_quant": {"quant_type": "DYNAMIC_QUANT"}},
    "FULL_QUANT": {"common_quant": {"quant_type": "FULL_QUANT"}},
    "DSP": {
        "common_quant": {"quant_type": "FULL_QUANT"},
        "full_quant": {"target_device": "DSP"},
    },
}


def converted(
    qconvert: Command, mode: str, data: Mapping[str, Array] | None = None, *flags: str
) -> str:
    """What is said of the conversion of m.onnx to q.onnx."""
    sections = dict(MODES[mode])
    for name, samples in (data or {}).items():
        Path(name).mkdir(exist_ok=True)
        for index, sample in enumerate(samples):
            np.save(f"{name}/{index}.npy", sample)
    if data:
        sections["data_preprocess"] = {
            "calibrate_path": ",".join(f"{name}:{name}" for name in data),
            "calibrate_size": 4,
            "input_type": "NPY",
        }
    result = qconvert.convert(
        write_config(Path("c.cfg"), **sections), Path("q.onnx"), Path("m.onnx"), *flags
    )
    assert result.code == 0, result.err
    return result.out + result.err


def of_data(mode: str, **data: Array) -> dict[str, Array] | None:
    return data if mode in ("FULL_QUANT", "DSP") else None


# --- inputs with a default value

SCALED = """g (float[N,64] x, float[64] scale) => (float[N,64] y) {
    [one] h = MatMul (x, w)  [mul] m = Mul (h, scale)  [two] y = MatMul (m, v) }"""
CONSTANTS = {"w": WEIGHT, "v": OTHER, "scale": normal(64)}


def scaled(x: Array, scale: Array) -> Array:
    result: Array = (x.astype(np.float64) @ WEIGHT * scale) @ OTHER
    return result


def overridable(path: str) -> list[str]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [value.name for value in session.get_overridable_initializers()]


@pytest.mark.parametrize("opset", [9, 11, 17])
@pytest.mark.parametrize("mode", MODES)
def test_a_default_stays_the_value_of_an_input(qconvert: Command, mode: str, opset: int) -> None:
    Path("m.onnx").write_bytes(frozen(build(SCALED, opset, 4 if opset == 9 else 8, **CONSTANTS)))
    converted(qconvert, mode, of_data(mode, x=normal(4, 3, 64)))
    assert overridable("q.onnx") == ["scale"]
    # Not larger than the default, for which ranges were found.
    other = np.roll(CONSTANTS["scale"], 1) / 2
    x = normal(3, 64, seed=9)
    for feeds, scale in (({}, CONSTANTS["scale"]), ({"scale": other}, other)):
        wanted = scaled(x, scale)
        for optimized in (False, True):
            (found,) = outputs(Path("q.onnx"), {"x": x, **feeds}, optimized)
            np.testing.assert_allclose(found, wanted, atol=0.06 * np.abs(wanted).max())


@pytest.mark.parametrize("mode", ["WEIGHT_QUANT", "DSP"])
def test_a_matrix_that_may_be_fed_is_no_weight(qconvert: Command, mode: str) -> None:
    graph = """g (float[N,64] x, float[64,64] v) => (float[N,64] y) {
        [one] h = MatMul (x, w)  [two] y = MatMul (h, v) }"""
    Path("m.onnx").write_bytes(frozen(build(graph, 17, w=WEIGHT, v=OTHER)))
    told = converted(qconvert, mode, of_data(mode, x=normal(4, 3, 64)))
    assert "Quantized 1 of 2 nodes" in told
    assert overridable("q.onnx") == ["v"]
    x, other = normal(3, 64, seed=9), 100 * normal(64, 64, seed=5)
    wanted = x.astype(np.float64) @ WEIGHT @ other
    (found,) = outputs(Path("q.onnx"), {"x": x, "v": other}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


def test_what_follows_from_defaults_alone_is_no_constant(qconvert: Command) -> None:
    graph = """g (float[N,64] x, float scale) => (float[N,64] y) { [one] h = MatMul (x, w)
        [sum] s = Add (scale, half)  [mul] m = Mul (h, s)  [two] y = MatMul (m, v) }"""
    constants = {"w": WEIGHT, "v": OTHER, "scale": np.float32(2), "half": np.float32(0.5)}
    Path("m.onnx").write_bytes(frozen(build(graph, 17, **constants)))
    told = converted(qconvert, "DSP", {"x": normal(4, 3, 64)})
    assert "it reads 'scale', an input with a default value" in told
    assert "Ranges are found with the default" in told
    x = normal(3, 64, seed=9)
    wanted = (x.astype(np.float64) @ WEIGHT * -1.5) @ OTHER
    (found,) = outputs(Path("q.onnx"), {"x": x, "scale": np.array(-2, np.float32)}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.06 * np.abs(wanted).max())


def test_data_may_feed_an_input_with_a_default(qconvert: Command) -> None:
    """Then ranges hold for what the data shows: here a hundred times the default."""
    Path("m.onnx").write_bytes(frozen(build(SCALED, 17, **CONSTANTS)))
    scales = 100 * normal(4, 64, seed=3)
    told = converted(qconvert, "FULL_QUANT", {"x": normal(4, 3, 64), "scale": scales})
    assert "Ranges are found with the default" not in told
    x = normal(3, 64, seed=9)
    wanted = scaled(x, scales[0])
    (found,) = outputs(Path("q.onnx"), {"x": x, "scale": scales[0]}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.06 * np.abs(wanted).max())


def test_a_default_in_another_file(qconvert: Command) -> None:
    proto = onnx.load_from_string(frozen(build(SCALED, 11, **CONSTANTS)))
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "scale")
    Path("model").mkdir()
    Path("model/s.bin").write_bytes(scale.raw_data)
    Path("s.bin").write_bytes(bytes(len(scale.raw_data)))
    set_external_data(scale, "s.bin", offset=0, length=len(scale.raw_data))
    scale.ClearField("raw_data")
    Path("model/m.onnx").write_bytes(proto.SerializeToString())
    config = write_config(Path("c.cfg"), **MODES["WEIGHT_QUANT"])
    result = qconvert.convert(config, Path("q.onnx"), Path("model/m.onnx"))
    assert result.code == 0, result.err
    x = normal(3, 64, seed=9)
    wanted = scaled(x, CONSTANTS["scale"])
    (found,) = outputs(Path("q.onnx"), {"x": x}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


def test_defaults_are_not_asked_for(qconvert: Command) -> None:
    """Neither as data, nor as pixels; and both models have them."""
    Path("m.onnx").write_bytes(frozen(build(SCALED, 17, **CONSTANTS)))
    assert qconvert("init", "m.onnx").code == 0
    assert "calibrate_path = x:data/x\n" in Path("m.cfg").read_text()
    converted(qconvert, "FULL_QUANT", {"x": normal(4, 3, 64)}, "--inputDataType=UINT8")
    (given,) = (v for v in onnx.load("q.onnx").graph.input if v.name == "x")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert overridable("q.onnx") == ["scale"]
    converted(qconvert, "FULL_QUANT", {"x": normal(4, 3, 64)})
    assert qconvert("compare", "m.onnx", "q.onnx").code == 0


@pytest.mark.parametrize("version", [3, 8])
def test_old_exporters_list_all_constants(qconvert: Command, version: int) -> None:
    graph = SCALED.replace("float[64] scale", "float[64] scale, float[64,64] w, float[64,64] v")
    Path("m.onnx").write_bytes(frozen(build(graph, 9, version, **CONSTANTS)))
    told = converted(qconvert, "WEIGHT_QUANT")
    assert "Quantized 2 of 3 nodes" in told
    assert overridable("q.onnx") == []
    # From version 4 on they might have been meant to be fed.
    assert ("Every initializer (3) is listed as an input" in told) == (version > 3)


# --- dimensions of one name

BOTH = "float[N,64] x, float[N,64] z"
TWO_SIZES = {
    # What the exporter says of tensors inside says no more than the names of inputs.
    "inside": f"""g ({BOTH}) => (float[A,64] y) <float[N,64] a, float[N,64] b> {{
        a = MatMul (x, w)  b = MatMul (z, w)  s = Shape (a)  t = Shape (b)
        c = ConstantOfShape (s)  d = ConstantOfShape (t)  e = Add (a, c)  f = Add (b, d)
        y = Concat <axis = 0> (e, f) }}""",
    "two outputs": f"""g ({BOTH}) => (float[N,64] y, float[N,64] u) {{
        y = MatMul (x, w)  u = MatMul (z, w) }}""",
    "one input": """g (float[N,N,64] x) => (float[A,B,64] y, float[A,B] u) {
        h = MatMul (x, w)  t = Transpose <perm = [1, 0, 2]> (h)  s = Shape (x)  k = Shape (t)
        y = Reshape (h, k)  c = ConstantOfShape (s)  u = ReduceSum <keepdims = 0> (c, last) }""",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", TWO_SIZES)
def test_a_name_may_stand_for_two_sizes(qconvert: Command, case: str, mode: str) -> None:
    constants = {"w": WEIGHT, "last": np.array([2])}
    used = {name: x for name, x in constants.items() if f"{name})" in TWO_SIZES[case]}
    model = frozen(build(TWO_SIZES[case], 17, **used))
    Path("m.onnx").write_bytes(model)
    shapes = {"x": (2, 3, 64)} if case == "one input" else {"x": (2, 64), "z": (3, 64)}
    data = {name: normal(4, *shape) for name, shape in shapes.items()}
    told = converted(qconvert, mode, of_data(mode, **data))
    if of_data(mode, **data) and case != "one input":
        assert "not verified" not in told
    sample = {name: samples[0] for name, samples in data.items()}
    wanted = outputs(Path("m.onnx"), sample, optimized=False)
    for optimized in (False, True):
        found = outputs(Path("q.onnx"), sample, optimized)
        for before, after in zip(wanted, found, strict=True):
            assert before.shape == after.shape
            np.testing.assert_allclose(after, before, atol=0.06 * np.abs(before).max())


def test_data_that_contradicts_the_names_is_told(qconvert: Command) -> None:
    """One row is added to all rows of the other input, so that equal sizes were possible."""
    graph = (
        f"g ({BOTH}) => (float[A,64] y) {{ a = MatMul (x, w)  b = MatMul (z, w)  y = Add (a, b) }}"
    )
    Path("m.onnx").write_bytes(frozen(build(graph, 17, w=WEIGHT)))
    data = {"x": normal(4, 1, 64), "z": normal(4, 3, 64)}
    told = converted(qconvert, "FULL_QUANT", data)
    assert "A sample has several sizes for the dimension 'N'" in told
    names = [
        value.type.tensor_type.shape.dim[0].dim_param for value in onnx.load("q.onnx").graph.input
    ]
    assert len(set(names)) == 2


def test_names_that_the_model_relies_on_stay(qconvert: Command) -> None:
    graph = f"g ({BOTH}) => (float[N,64] y) {{ a = MatMul (x, w)  y = Add (a, z) }}"
    Path("m.onnx").write_bytes(frozen(build(graph, 17, w=WEIGHT)))
    data = {"x": normal(4, 3, 64), "z": normal(4, 3, 64)}
    for mode in ("FULL_QUANT", "DYNAMIC_QUANT"):
        converted(qconvert, mode, of_data(mode, **data))
        found = onnx.load("q.onnx").graph
        for value in (*found.input, *found.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "N"
