"""A model's weights in other files: those of its own folder are read, wherever the command runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command, outputs
from graphs import normal
from onnx.external_data_helper import set_external_data
from running import write_config

# The weight of a large model stays mapped, and the bias is as small as biases are.
WEIGHT, BIAS = normal(80, 80) / 8, normal(80)
NODES = "h = MatMul (x, a)  y = Add (h, b)"
BODY = "b{0} () => (float[N,80] y{0}) {{ h{0} = MatMul (x, a)  y{0} = Add (h{0}, b) }}"
TEXTS = {
    "plain": f"g (float[N,80] x) => (float[N,80] y) {{ {NODES} }}",
    "branches": f"""g (float[N,80] x, bool c) => (float[N,80] y)
        {{ y = If (c) <then_branch = {BODY.format(1)}, else_branch = {BODY.format(2)}> }}""",
    "function": f"""g (float[N,80] x) => (float[N,80] y) {{ y = local.F (x) }}
        <domain: "local", opset_import: ["" : OPSET]> F (x) => (y) {{ {NODES} }}""",
}
MODES: dict[str, dict[str, dict[str, object]]] = {
    "ON_LOAD": {"common_quant": {"quant_type": "WEIGHT_QUANT"}},
    "ON_THE_FLY": {
        "common_quant": {"quant_type": "WEIGHT_QUANT"},
        "weight_quant": {"dequant_strategy": "ON_THE_FLY", "block_size": 16},
    },
    "DYNAMIC": {"common_quant": {"quant_type": "DYNAMIC_QUANT"}},
}


def parts_of(model: onnx.ModelProto, text: str) -> list[onnx.GraphProto | onnx.FunctionProto]:
    """Where the nodes are that read the weights."""
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    return {"plain": [model.graph], "branches": bodies, "function": list(model.functions)}[text]


def weights_in(part: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    yield from getattr(part, "initializer", ())
    yield from (a.t for node in part.node for a in node.attribute if a.HasField("t"))


def small_model(text: str, constants: bool, opset: int) -> tuple[onnx.ModelProto, bytes]:
    """A model with its weights as initializers, or as the constants of nodes, and what the file
    beside it holds.
    """
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "local" : 1]>'
    model = onnx.parser.parse_model(f"{head} {TEXTS[text]}".replace("OPSET", str(opset)))
    data = b""
    for part in parts_of(model, text):
        tensors = [onnx.numpy_helper.from_array(w, n) for n, w in (("a", WEIGHT), ("b", BIAS))]
        for tensor in tensors if constants else ():
            made = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
            part.node.insert(0, made)
        if not constants:
            part.initializer.extend(tensors)
        for tensor in weights_in(part):
            raw = tensor.raw_data
            set_external_data(tensor, "w.bin", offset=len(data), length=len(raw))
            tensor.ClearField("raw_data")
            data += raw
    return model, data


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("large", "opset"), [(True, 11), (True, 17), (False, 11)])
@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("plain", False),
        ("plain", True),
        ("branches", False),
        ("branches", True),
        ("function", True),
    ],
)
def test_a_file_of_that_name_in_the_current_folder_is_another(
    qconvert: Command,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    constants: bool,
    large: bool,
    opset: int,
    mode: str,
) -> None:
    if large:
        monkeypatch.setattr("converter.graph.files.EXTERNAL_DATA_ABOVE", 0)
    model, data = small_model(text, constants, opset)
    Path("model").mkdir()
    Path("model/m.onnx").write_bytes(model.SerializeToString())
    Path("model/w.bin").write_bytes(data)
    Path("w.bin").write_bytes(bytes(len(data)))
    config = write_config(Path("c.cfg"), **MODES[mode])
    result = qconvert.convert(config, Path("q.onnx"), Path("model/m.onnx"))
    assert result.code == 0, result.err
    assert "unchecked" not in result.err
    x = normal(3, 80)
    sample = {"x": x, "c": np.array(True)} if text == "branches" else {"x": x}
    wanted = x.astype(np.float64) @ WEIGHT + BIAS
    for optimized in (False, True):
        (found,) = outputs(Path("q.onnx"), sample, optimized)
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


# --- links


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def link(path: Path, target: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def hub(model: bytes, data: bytes) -> Path:
    """A cache as model hubs have it: names are links to files named after their contents."""
    put(Path("blobs/aa"), model)
    put(Path("blobs/bb"), data)
    link(Path("snapshots/1/onnx/w.bin"), "../../../blobs/bb")
    return link(Path("snapshots/1/onnx/m.onnx"), "../../../blobs/aa")


def linked_folder(model: bytes, data: bytes) -> Path:
    hub(model, data)
    link(Path("latest"), "snapshots/1")
    return Path("latest/onnx/m.onnx")


def linked_model(model: bytes, data: bytes) -> Path:
    """Only the model has a link; its weights lie beside the real file."""
    put(Path("real/m.onnx"), model)
    put(Path("real/w.bin"), data)
    return link(Path("links/m.onnx"), "../real/m.onnx")


@pytest.mark.parametrize("constants", [True, False])
@pytest.mark.parametrize(("large", "opset"), [(True, 11), (False, 17)])
@pytest.mark.parametrize("folders", [hub, linked_folder, linked_model])
def test_weights_behind_links(
    qconvert: Command,
    monkeypatch: pytest.MonkeyPatch,
    folders: Callable[[bytes, bytes], Path],
    large: bool,
    constants: bool,
    opset: int,
) -> None:
    if large:
        monkeypatch.setattr("converter.graph.files.EXTERNAL_DATA_ABOVE", 0)
    model, data = small_model("plain", constants, opset)
    path = folders(model.SerializeToString(), data)
    put(Path("w.bin"), bytes(len(data)))
    config = write_config(Path("c.cfg"), **MODES["ON_LOAD"])
    result = qconvert.convert(config, Path("q.onnx"), path)
    assert result.code == 0, result.err
    x = normal(3, 80)
    wanted = x.astype(np.float64) @ WEIGHT + BIAS
    (found,) = outputs(Path("q.onnx"), {"x": x}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())
    assert qconvert("inspect", path).code == 0
    assert qconvert("compare", path, "q.onnx").code == 0


def test_what_only_the_runtime_knows_may_have_its_weights_behind_links(qconvert: Command) -> None:
    model, data = small_model("plain", constants=False, opset=17)
    added = onnx.helper.make_node(
        "SimplifiedLayerNormalization", ["h", "b"], ["y"], name="n", axis=-1, epsilon=1e-5
    )
    model.graph.node[1].CopyFrom(added)
    path = hub(model.SerializeToString(), data)
    config = write_config(Path("c.cfg"), **MODES["ON_LOAD"])
    result = qconvert.convert(config, Path("q.onnx"), path)
    assert result.code == 0, result.err
    x = normal(3, 80)
    h = x.astype(np.float64) @ WEIGHT
    wanted = h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + 1e-5) * BIAS
    (found,) = outputs(Path("q.onnx"), {"x": x}, optimized=True)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("location", "target", "told"),
    [
        ("w.bin", "../../../secret", "outside of the model's folder"),
        ("../../../blobs/bb", None, "outside of the model's folder"),
        ("s/../../../../blobs/bb", None, "outside of the model's folder"),
        ("{here}/blobs/bb", None, "outside of the model's folder"),
        ("s/../w.bin", None, "outside of the model's folder"),
        ("w.bin", "../../../gone", "outside of the model's folder"),
        ("w.bin", "../../../blobs/gone", "is no file"),
        ("gone.bin", None, "is no file"),
    ],
)
def test_links_that_lead_elsewhere_are_refused(
    qconvert: Command, location: str, target: str | None, told: str
) -> None:
    """`s` is a link to a folder that is neither the model's nor the real file's."""
    model, data = small_model("plain", constants=False, opset=17)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location.format(here=Path.cwd())
    path = hub(model.SerializeToString(), data)
    put(Path("secret"), data)
    put(Path("away/w.bin"), data)
    link(path.parent / "s", "../../../away")
    if target:
        path.with_name("w.bin").unlink()
        link(path.with_name("w.bin"), target)
    if location == "s/../w.bin":
        path.with_name("w.bin").unlink()
        put(Path("w.bin"), data)
    config = write_config(Path("c.cfg"), **MODES["ON_LOAD"])
    result = qconvert.convert(config, Path("q.onnx"), path)
    assert result.code == 1
    assert told in result.err
    assert not Path("q.onnx").exists()


def test_a_second_name_of_the_weights_is_refused(qconvert: Command) -> None:
    """A hard link looks like a file of its own, wherever it leads."""
    model, data = small_model("plain", constants=False, opset=17)
    put(Path("m/m.onnx"), model.SerializeToString())
    Path("m/w.bin").hardlink_to(put(Path("secret"), data))
    config = write_config(Path("c.cfg"), **MODES["ON_LOAD"])
    result = qconvert.convert(config, Path("q.onnx"), Path("m/m.onnx"))
    assert result.code == 1
    assert "has several names (hard links)" in result.err
    assert "copy the file" in result.err


@pytest.mark.parametrize("taken", ["blobs/aa", "blobs/bb", "snapshots/1/onnx/w.bin"])
def test_the_files_behind_links_are_not_overwritten(qconvert: Command, taken: str) -> None:
    model, data = small_model("plain", constants=False, opset=17)
    path = hub(model.SerializeToString(), data)
    Path(f"{taken}.onnx").symlink_to(Path(taken).absolute())
    config = write_config(Path("c.cfg"), **MODES["ON_LOAD"])
    result = qconvert.convert(config, Path(f"{taken}.onnx"), path)
    assert result.code == 2
    assert Path(taken).read_bytes() in (data, model.SerializeToString())
