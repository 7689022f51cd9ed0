"""Which nodes cost the output most: ranked by what they do alone, measured as cosine or as right
answers.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import BATCHES, IMAGES, decided
from graphs import build, normal, types
from hypothesis import given
from hypothesis import strategies as st
from running import InMemory

from calib.samples import Sample
from calib.search import fewest
from converter.calibrate.runs import opened
from converter.emit.qdq import emit
from converter.errors import DataError
from converter.measure.errors import errors_between
from converter.measure.labels import read_labels
from converter.measure.pairing import Pairing, pair
from converter.measure.sensitivity import Alone, alone, only, output_drop, top1
from converter.plan.plan import QuantPlan

ROWS = "g (float[5,8] x) => (float[] y)"


def alone_in(pairing: Pairing, samples: list[Sample]) -> dict[str, Alone]:
    floats = opened(pairing.reference, pairing.tensors)
    return alone(pairing, floats, InMemory(samples), count=len(samples), threads=1)


def by_themselves(model: ir.Model, plan: QuantPlan, samples: list[Sample]) -> dict[str, Alone]:
    """What every node of the plan does alone, over all samples."""
    quantized = model.clone()
    emit(quantized, plan)
    return alone_in(pair(model, quantized, plan), samples)


def test_the_node_with_the_coarsest_integers_comes_first():
    # A column of the input that is large and says little leaves few codes to the others, which the
    # first node reads.
    sizes = np.array([1000, 1, 1, 1, 1, 1, 1, 1], np.float32)
    samples = [{"x": sample["x"] * sizes} for sample in BATCHES]
    graph = f"{ROWS} {{ [rough] a = Gemm (x, k)  [fine] c = Gemm (a, t)  [last] y = Gemm (c, t) }}"
    model, plan = decided(graph, samples, k=normal(8, 6) / (10 * sizes[:, None]))
    found = {name: cost.output for name, cost in by_themselves(model, plan, samples).items()}
    assert found.keys() == {"rough", "fine", "last"}
    rough = found.pop("rough")
    assert rough.sqnr_db < 15 < 20 < min(error.sqnr_db for error in found.values())
    assert rough.cosine < 0.99 < min(error.cosine for error in found.values()) < 1


def test_one_unit_is_quantized_alone():
    graph = """g (float[1,4,7,7] x) => (float[] y) {
        [one] a = Conv (x, w)  r = Relu (a)  p = Pad (r, edges)  [two] c = Conv (p, v)
          [three] y = Add (c, p)
    }"""
    model, plan = decided(graph, IMAGES, edges=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    for unit in plan.units():
        alone = model.clone()
        part = only(plan, unit)
        emit(alone, part)
        assert [node.name for node in part.units()] == [unit.name]
        converted = types(alone).count("QuantizeLinear")
        assert converted == len({*unit.inputs, *unit.outputs} & plan.tensors.keys())
    assert {unit.op_type for unit in plan.units()} == {"Conv", "Pad"}


def test_a_node_that_costs_nothing_is_infinitely_good():
    # Whole numbers that are codes as they are.
    graph = f"{ROWS} {{ [one] y = Gemm (x, m) }}"
    whole = np.diag([127] * 8)[:, :6].astype(np.float32)
    samples = [{"x": np.tile(np.array([0, 255] * 4, np.float32), (5, 1))}]
    model, plan = decided(graph, samples, m=whole, correct=False)
    found = by_themselves(model, plan, samples)["one"].output
    assert found.sqnr_db > 100
    assert found.cosine == pytest.approx(1)


def test_a_float_that_is_an_output_and_becomes_integers():
    graph = "g (float[5,8] x) => (float[] a, float[] y) { a = Tanh (x)  [one] y = Gemm (a, m) }"
    model, plan = decided(graph, BATCHES)
    quantized = model.clone()
    emit(quantized, plan)
    errors = errors_between(opened(model), opened(quantized), InMemory(BATCHES), 1)
    lost = next(error for error in errors if error.name == "y")
    found = by_themselves(model, plan, BATCHES)["one"]
    # Nothing else is quantized.
    assert found.output.name == "y"
    assert found.output.sqnr_db == pytest.approx(lost.sqnr_db, abs=0.01)


def test_a_tensor_of_one_number():
    graph = (
        "g (float[5,8] x) => (float[] y) { [one] a = Gemm (x, m)  s = ReduceSum <keepdims = 0> "
        "(a)  y = Abs (s) }"
    )
    model = build(graph, m=normal(8, 6))
    quantized = build(
        """g (float[5,8] x) => (float[] y) {
            [one] a = Gemm (x, m)  s = ReduceSum <keepdims = 0> (a)
            q = QuantizeLinear (s, k, z)  d = DequantizeLinear (q, k, z)  y = Abs (d)
        }""",
        m=normal(8, 6),
        k=np.float32(0.5),
        z=np.uint8(128),
    )
    found = alone_in(pair(model, quantized, QuantPlan({}, {})), BATCHES)
    sums = np.array([np.sum(sample["x"].astype(np.float64) @ normal(8, 6)) for sample in BATCHES])
    codes = np.clip(np.rint(sums / 0.5), -128, 127) * 0.5
    (error,) = (cost.output for cost in found.values())
    expected = 10 * np.log10(np.sum(sums**2) / np.sum((np.abs(codes) - np.abs(sums)) ** 2))
    assert error.sqnr_db == pytest.approx(expected, abs=0.01)


# --- what the output loses


def scores(*rows):
    """A model that adds a constant to its input."""
    return build(
        "g (float[1,3] x) => (float[1,3] y) { y = Add (x, k) }",
        k=np.array([rows], np.float32).reshape(1, 3),
    )


DATA = InMemory(
    [{"x": np.array([row], np.float32)} for row in ([3, 1, 0], [0, 2, 1], [1, 0, 4], [5, 4, 0])],
    ["a.png", "b.png", "c.png", "d.png"],
)
LABELS = {"a.png": 0, "b.png": 1, "c.png": 2, "d.png": 1, "unused.png": 7}


def drop(model: ir.Model, other: ir.Model, labels: dict[str, int] | None = None) -> float:
    return output_drop(opened(model), opened(other), DATA, labels, threads=1)


@pytest.mark.parametrize(
    ("shift", "share"),
    [((0, 0, 0), 3 / 4), ((0, 1.5, 0), 1), ((9, 0, 0), 1 / 4), ((0, 9, 0), 2 / 4)],
)
def test_right_answers(shift, share):
    assert top1(opened(scores(*shift)), DATA, LABELS, 2) == share
    assert drop(scores(0, 0, 0), scores(*shift), LABELS) == 3 / 4 - share


def test_without_labels_the_cosine_counts():
    x = np.concatenate([DATA.sample(i)["x"] for i in range(4)]).astype(np.float64)
    y = x + np.array([0, 1.5, 0])
    cosine = np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y))
    assert drop(scores(0, 0, 0), scores(0, 1.5, 0)) == pytest.approx(1 - cosine)


def test_the_worst_output_counts():
    graph = "g (float[1,3] x) => (float[1,3] y, float[1,3] z) {{ y = Neg (x)  z = {} (x) }}"
    assert drop(build(graph.format("Abs")), build(graph.format("Neg"))) == pytest.approx(2)


def test_several_rows_a_sample_have_no_one_label():
    data, model = (
        InMemory([{"x": normal(2, 3)}], ["a.png"]),
        build("g (float[2,3] x) => (float[2,3] y) { y = Neg (x) }"),
    )
    words = "label_file: output 'y' has 2 rows a sample; give --inputShape"
    with pytest.raises(DataError, match=words):
        top1(opened(model), data, LABELS, 1)


# --- labels


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na.png,0\nb.png,1\nc.png,2\nd.png,1\n",
        "label,file\r\n0,a.png\r\n1,b.png\r\n2,c.png\r\n1,d.png\r\n",
        'file,label,note\n"a.png",0,x\nb.png, 1,y\nc.png,2,\nd.png,1,\nmore.png,9,\n',
        "\ufefffile,label\na.png,0\nb.png,1\nc.png,2\nd.png,1\n",
    ],
)
def test_labels_are_read(tmp_path, text):
    (tmp_path / "labels.csv").write_bytes(text.encode())
    labels = read_labels(tmp_path / "labels.csv", DATA)
    assert {name: labels[name] for name in ("a.png", "b.png", "c.png", "d.png")} == {
        name: LABELS[name] for name in ("a.png", "b.png", "c.png", "d.png")
    }


BAD = {
    "no header": ("a.png,0\nb.png,1\n", "needs a header 'file,label' and an integer class a line"),
    "another header": ("name,label\na.png,0\n", "needs a header 'file,label'"),
    "words": ("file,label\na.png,cat\n", "an integer class a line"),
    "no class": ("file,label\na.png\n", "an integer class a line"),
    "not text": (b"file,label\n\xff\xfe,0\n", "needs a header 'file,label'"),
    "empty": ("", "there is no label for a.png; add a line 'a.png,<class>'."),
    "one missing": (
        "file,label\na.png,0\nb.png,1\nd.png,1\n",
        "there is no label for c.png; add a line 'c.png,<class>'.",
    ),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_labels_that_do_not_fit(tmp_path, text, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read_labels(path, DATA)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv"):
        read_labels(tmp_path / "none.csv", DATA)


def test_more_of_a_path_tells_files_of_one_name_apart(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\ncat/1.png,3\n1.png,4\n./dog/2.png,5\n")
    names = ["x/cat/1.png", "x/dog/1.png", "x/dog/2.png"]
    data = InMemory([{"x": normal(1, 3)}] * 3, names)
    assert list(read_labels(tmp_path / "labels.csv", data).values()) == [3, 4, 5]


def test_a_folder_of_folders_says_the_classes(tmp_path):
    names = [tmp_path / name for name in ("b/1.png", "a/deep/1.png", "c/1.png")]
    for path in names:
        path.parent.mkdir(parents=True)
        path.touch()
    data = InMemory([{"x": normal(1, 3)}] * 3, names)
    assert list(read_labels(tmp_path, data).values()) == [1, 0, 2]
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="name the folder whose sub-folders hold the files"):
        read_labels(tmp_path / "other", data)


def test_one_file_of_many_samples_has_no_one_label(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\nx.npy,0\n")
    data = InMemory([{"x": normal(1, 3)}] * 4, ["x.npy"] * 4)
    with pytest.raises(DataError, match=r"x\.npy holds 4 samples, which one label cannot serve"):
        read_labels(tmp_path / "labels.csv", data)


# --- bisection


@given(st.integers(1, 300), st.data())
def test_the_fewest_are_found_with_few_attempts(most, data):
    enough, tried = data.draw(st.integers(1, most)), []

    def attempt(count):
        tried.append(count)
        return f"{count} float" if count >= enough else None

    assert fewest(most, attempt) == f"{enough} float"
    assert len(tried) <= 2 + math.log2(most)
    assert min(tried) >= 1
