"""Loading, saving and asking about models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import assert_same, build, frozen, node, normal, prepared, run

from converter.errors import ModelError
from converter.graph import files as models
from converter.graph.edit import (
    Names,
    add_constant,
    constant,
    only_consumer,
    submodel,
    values_by_name,
)
from converter.graph.files import load, save, saved, serialized

CHAIN = "g (float[2,3] x) => (float[2,4] z) { [first] y = MatMul(x, w)  [second] z = Relu(y) }"
BRANCH = """g (bool c, float[2] x) => (float[2] z) {
    [outer] y = Relu(x)
    [choose] z = If (c) <
        then_branch = t () => (float[2] a) { [inner] a = Neg(y) },
        else_branch = e () => (float[2] b) { [other] b = Add(k, k) } >
}"""


def chain():
    return build(CHAIN, w=normal(3, 4))


def with_external_weights(folder: Path) -> Path:
    folder.mkdir()
    ir.save(
        build(CHAIN, w=normal(3, 4)),
        folder / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    assert (folder / "m.data").stat().st_size == 3 * 4 * 4
    return folder / "m.onnx"


def test_a_saved_model_loads_again(tmp_path):
    save(chain(), tmp_path / "new" / "m.onnx")
    assert_same(chain(), load(tmp_path / "new" / "m.onnx"), {"x": normal(2, 3)})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.onnx"]


def test_external_weights_come_along(tmp_path):
    model = load(with_external_weights(tmp_path / "a"))
    save(model, tmp_path / "b" / "m.onnx")
    assert_same(chain(), serialized(model), {"x": normal(2, 3)})
    with saved(model) as path:
        assert_same(chain(), path.read_bytes(), {"x": normal(2, 3)})
    (tmp_path / "a" / "m.data").unlink()
    assert_same(chain(), load(tmp_path / "b" / "m.onnx"), {"x": normal(2, 3)})


def test_a_large_model_keeps_its_weights_beside_it(tmp_path, monkeypatch):
    big = build("g (float[2,300] x) => (float[2,4] y) { y = MatMul(x, w) }", w=normal(300, 4))
    monkeypatch.setattr(models, "EXTERNAL_DATA_ABOVE", 100)
    save(big, tmp_path / "m.onnx")
    file, data = sorted(p.name for p in tmp_path.iterdir())
    assert file == "m.onnx"
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{16}\.data", data)
    loaded = load(tmp_path / "m.onnx")
    with saved(loaded) as path:
        assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert_same(big, serialized(loaded), {"x": normal(2, 300)})


@pytest.mark.parametrize("rows", [1, 30, 31, 33, 127, 4095, 4100])
def test_the_bytes_of_a_file_are_known_before_it_is_written(tmp_path, rows):
    text = f"g (float[2,{rows}] x) => (float[2,4] y) {{ z = MatMul(x, w)  y = Add(z, b) }}"
    model = build(text, w=normal(rows, 4), b=normal())
    save(model, tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    assert abs(models.model_bytes(model) - size) <= len(model.graph.initializers)


def test_an_invalid_model_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    broken = chain()
    node(broken, "second").op_type = "Rleu"
    with pytest.raises(ModelError, match=r"not valid ONNX: .*Rleu"):
        save(broken, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not protobuf at all", b"\x00" * 100])
def test_files_that_are_no_models(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx: this is not .*ONNX model"):
        load(tmp_path / "m.onnx")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.onnx: there is no such model file"):
        load(tmp_path / "gone.onnx")
    path = with_external_weights(tmp_path / "a")
    path.with_name("m.data").unlink()
    with pytest.raises(ModelError, match=r"m\.onnx: .*m\.data"):
        load(path)


def test_taps_become_outputs_of_a_copy():
    model = chain()
    with saved(model, ["y", "z", "y"]) as path:
        found = run(path.read_bytes(), {"x": normal(2, 3)})
        assert list(found) == ["z", "y"]
        np.testing.assert_allclose(found["y"], normal(2, 3) @ normal(3, 4), rtol=1e-5)
    assert not path.exists()
    assert [v.name for v in model.graph.outputs] == ["z"]


def test_a_part_of_a_model_runs_alone():
    model = prepared(CHAIN, w=normal(3, 4))
    part = submodel(model, ["y"], ["z"])
    found = run(serialized(part), {"y": np.array([[-1, 0, 1, 2]] * 2, np.float32)})
    np.testing.assert_array_equal(found["z"], [[0, 0, 1, 2]] * 2)
    assert len(model.graph) == 2


def test_values_and_weights_are_found():
    model = chain()
    assert sorted(values_by_name(model.graph)) == ["w", "x", "y", "z"]
    assert models.weight_bytes(model) == 3 * 4 * 4
    assert models.weight_bytes(prepared(BRANCH, k=normal(2))) == 2 * 4


def test_constants_are_initializers_only():
    model = build(
        "g (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul(x, w) }", w=normal(3, 4)
    )
    values = values_by_name(model.graph)
    assert constant(values["w"]) is None  # an input with a default
    assert constant(values["x"]) is None
    assert constant(values["y"]) is None
    assert constant(None) is None
    np.testing.assert_array_equal(constant(values_by_name(chain().graph)["w"]), normal(3, 4))


def test_the_only_consumer():
    assert only_consumer(values_by_name(chain().graph)["y"]).name == "second"
    many = build(
        "g (float[2] x) => (float[2] a, float[2] b, float[2] d) "
        "{ a = Neg(x)  b = Abs(a)  c = Abs(x)  d = Add(c, c)  e = Abs(d) }"
    )
    assert [only_consumer(values_by_name(many.graph)[name]) for name in "xabcde"] == [None] * 6


def test_a_reader_inside_a_subgraph_does_not_count_as_the_only_consumer():
    model = build(BRANCH, k=normal(2))
    assert only_consumer(values_by_name(model.graph)["y"]) is None


def test_fresh_names_are_new_to_the_whole_model():
    names = Names(build(BRANCH, k=normal(2)))
    assert [
        names.fresh(wish)
        for wish in ("new", "new", "new", "y", "a", "b", "k", "c", "inner", "outer", "t9")
    ] == [
        *("new", "new_2", "new_3", "y_2", "a_2", "b_2", "k_2", "c_2", "inner_2", "outer_2", "t9"),
    ]


def test_added_constants_are_saved_with_type_and_shape(tmp_path):
    model = build("g (float[2,3] x) => (float[2,3] y) { [n] y = Relu(x) }")
    add = ir.node("Add", [model.graph[0].inputs[0], add_constant(model.graph, "k", normal(3, 2).T)])
    add.outputs[0].name = "sum"
    model.graph.insert_before(model.graph[0], add)
    model.graph[1].replace_input_with(0, add.outputs[0])
    save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    # The tensor alone tells them.
    assert "k" not in {value.name for value in onnx.load(tmp_path / "m.onnx").graph.value_info}
    x = normal(2, 3)
    found = run(frozen(load(tmp_path / "m.onnx")), {"x": x})["y"]
    np.testing.assert_allclose(found, np.maximum(x + normal(3, 2).T, 0), rtol=1e-6)


def test_the_first_line_of_an_error():
    assert models.first_line(ValueError("\n bad thing. \nstack")) == "bad thing"
    assert models.first_line(ValueError()) == "ValueError"
