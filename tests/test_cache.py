"""The calibration cache: what it holds is not computed again, what belongs to another model or data
is not used.
"""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from zipfile import ZipFile

import numpy as np
import onnx_ir as ir
import pytest
from evidence import CONSTANTS, EVERYTHING, GRAPH, SAMPLES, assert_equal
from graphs import normal, prepared
from running import Ear, InMemory, job, resources

from calib.affine import UINT8
from calib.ranges import RANGE_METHODS, RangeSpec, range_of
from converter.calibrate import cache
from converter.calibrate.cache import observe_with_cache
from converter.calibrate.observe import Wanted, observe
from converter.pipeline.convert import convert

FEW = Wanted(("x", "m"), (("m", 1),), histogram=False, samples=False)


@pytest.fixture
def observed(monkeypatch):
    """What was observed anew, call by call."""
    calls = []

    def spy(model, wanted, data, **others):
        calls.append(wanted)
        return observe(model, wanted, data, **others)

    monkeypatch.setattr(cache, "observe", spy)
    return calls


def seen(path, wanted=EVERYTHING, samples=SAMPLES, graph=GRAPH, **constants):
    ear = Ear()
    model = prepared(graph, **{**CONSTANTS, **constants})
    return observe_with_cache(
        model, wanted, InMemory(samples), resources=resources(), watch=ear, path=path
    ), ear


def plainly(wanted=EVERYTHING):
    return observe(
        prepared(GRAPH, **CONSTANTS), wanted, InMemory(SAMPLES), resources=resources(), watch=Ear()
    )


def test_without_a_path_nothing_is_kept(observed, tmp_path):
    assert_equal(seen(None)[0], plainly())
    assert observed == [EVERYTHING]
    assert not list(tmp_path.iterdir())


def test_a_full_hit_runs_nothing_and_is_equal(observed, tmp_path):
    path = tmp_path / "new" / "cache.npz"
    first, _ = seen(path)
    again, ear = seen(path)
    assert_equal(first, plainly())
    assert_equal(again, first)
    assert len(observed) == 1
    assert ear.said == [f"All ranges come from the calibration cache {path}."]
    assert [file.name for file in path.parent.iterdir()] == ["cache.npz"]


def test_what_is_missing_is_added(observed, tmp_path):
    path = tmp_path / "cache.npz"
    seen(path, FEW)
    full, ear = seen(path)
    assert (set(observed[1].tensors), observed[1].means) == ({"r", "b", "y"}, (("s", -1),))
    assert_equal(full, plainly())
    assert_equal(seen(path)[0], full)
    assert len(observed) == 2
    assert ear.warned == []


def test_means_of_fewer_samples_are_found_anew(observed, tmp_path):
    path, fewer = tmp_path / "cache.npz", replace(EVERYTHING, first=3)
    seen(path)
    evidence, _ = seen(path, fewer)
    assert (observed[1].tensors, observed[1].means) == ((), EVERYTHING.means)
    assert_equal(evidence, plainly(fewer))
    assert_equal(seen(path, fewer)[0], evidence)
    assert len(observed) == 2


def test_every_range_method_finds_what_it_needs(tmp_path):
    path = tmp_path / "cache.npz"
    seen(path, FEW)
    statistics = seen(path, FEW)[0].statistics["m"]
    expected = plainly().statistics["m"]
    for method in RANGE_METHODS.values():
        spec = RangeSpec(UINT8, False)
        assert range_of(method, statistics, spec) == range_of(method, expected, spec)


OTHERS = {
    "weight": {"w": normal(4, 6, seed=9)},
    "data": {"samples": [*SAMPLES[:-1], {"x": normal(3, 4, seed=99)}]},
    "fewer samples": {"samples": SAMPLES[:-1]},
    "another operator": {"graph": GRAPH.replace("Relu", "Abs")},
    "another attribute": {"graph": GRAPH.replace("Relu (m)", "LeakyRelu <alpha=0.5> (m)")},
    "outputs that change places": {
        "graph": GRAPH.replace(
            "y = Sigmoid (s)", "t, u = Split <axis=-1> (s)  y = Concat <axis=-1> (t, u)"
        )
    },
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_evidence_of_something_else_is_not_used(observed, tmp_path, change):
    path = tmp_path / "cache.npz"
    seen(path)
    evidence, ear = seen(path, **change)
    assert len(observed) == 2
    assert ear.warned == [
        f"The calibration cache {path} is of another model, data or version; it is made anew."
    ]
    again, ear = seen(path, **change)
    assert_equal(again, evidence)
    assert (len(observed), ear.warned) == (2, [])


def test_outputs_of_a_node_that_change_places_are_another_model(tmp_path):
    graph = "g (float[3,4] x) => (float[] y) {{ {} = Split <axis=-1> (x)  y = Sub (m, s) }}"
    path, wanted = tmp_path / "cache.npz", Wanted(("m", "s"), (), histogram=False, samples=False)
    samples = [{"x": np.arange(12, dtype=np.float32).reshape(3, 4)}]
    first, _ = seen(path, wanted, samples, graph.format("m, s"))
    second, ear = seen(path, wanted, samples, graph.format("s, m"))
    assert (first.statistics["m"].hi, second.statistics["m"].hi) == (9, 11)
    assert len(ear.warned) == 1


def test_another_version_is_not_trusted(observed, tmp_path, monkeypatch):
    path = tmp_path / "cache.npz"
    seen(path)
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    _, ear = seen(path)
    assert (len(observed), len(ear.warned)) == (2, 1)


def test_node_names_and_docs_do_not_matter(observed, tmp_path):
    path = tmp_path / "cache.npz"
    seen(path)
    seen(path, graph=GRAPH.replace("[one]", "[eins]"))
    assert len(observed) == 1


def damaged(data):
    return (
        data[:-200],
        data[:100],
        b"",
        b"not an archive",
        data.replace(b"index", b"yndex"),
        flipped(data),
    )


def flipped(data):
    """A byte in the middle of the largest array is another."""
    with ZipFile(BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    at = data.index(largest.filename.encode()) + largest.compress_size // 2 + 64
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize("kind", range(6))
def test_a_damaged_file_is_made_anew(observed, tmp_path, kind):
    path = tmp_path / "cache.npz"
    first, _ = seen(path)
    path.write_bytes(damaged(path.read_bytes())[kind])
    evidence, ear = seen(path)
    assert_equal(evidence, first)
    assert len(ear.warned) == 1
    assert ear.warned[0].startswith(f"The calibration cache {path} cannot be read (")
    assert ear.warned[0].endswith("); it is made anew.")
    assert_equal(seen(path)[0], first)
    assert len(observed) == 2


def saved_arrays(path, **changes):
    with np.load(path) as file:
        arrays = {**file, **changes}
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor0.totals": np.zeros(3)},
        {"tensor0.counts": np.zeros(5, np.int64)},
        {"index": np.array("[]")},
        {"index": np.array("{")},
        {"index": np.array("[" * 100_000)},
        {"index": np.array(["a", "b"])},
        {"index": np.array('{"fingerprint": "a", "tensors": 1, "means": [], "first": 1}')},
        {"index": np.array('{"fingerprint": "a", "tensors": [], "means": ["m"], "first": 1}')},
    ],
)
def test_a_file_that_holds_something_else_is_made_anew(observed, tmp_path, changes):
    path = tmp_path / "cache.npz"
    first, _ = seen(path)
    saved_arrays(path, **changes)
    evidence, ear = seen(path)
    assert_equal(evidence, first)
    assert (len(observed), len(ear.warned)) == (2, 1)


def test_an_array_file_is_no_cache(observed, tmp_path):
    path = tmp_path / "cache.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    evidence, ear = seen(path)
    assert_equal(evidence, plainly())
    assert (len(observed), len(ear.warned)) == (1, 1)


def test_a_file_that_cannot_be_written_is_told_of(tmp_path):
    evidence, ear = seen(tmp_path)
    assert_equal(evidence, plainly())
    assert len(ear.warned) == 2
    assert ear.warned[1].startswith(f"The calibration cache {tmp_path} cannot be written (")


def test_a_model_with_subgraphs_is_known_again(observed, tmp_path):
    graph = """g (float[N,4] x) => (float[] y) { q = Cast <to=9> (one)
        y = If (q) < then_branch = t () => (float[] a) { a = Abs (x) },
                     else_branch = e () => (float[] b) { b = Neg (x) } >
    }"""
    path, wanted = tmp_path / "cache.npz", Wanted(("y",), (), histogram=False, samples=False)
    constants = {"one": np.array(1, np.float32)}
    for _ in range(2):
        model = ir.from_proto(ir.to_proto(prepared(graph, **constants)))
        observe_with_cache(
            model, wanted, InMemory(SAMPLES), resources=resources(), watch=Ear(), path=path
        )
    assert len(observed) == 1
    other = prepared(graph.replace("Abs (x)", "Exp (x)"), **constants)
    observe_with_cache(
        other, wanted, InMemory(SAMPLES), resources=resources(), watch=Ear(), path=path
    )
    assert len(observed) == 2


def test_a_second_conversion_with_another_method_needs_no_inference_for_ranges(tmp_path, observed):
    graph = "g (float[1,4,6,6] x) => (float[] y) { c = Conv (x, k)  r = Relu (c)  y = Conv (r, v) }"
    model = prepared(graph, k=normal(6, 4, 3, 3), v=normal(3, 6, 3, 3))
    data = {"x": normal(5, 4, 6, 6)}
    common = {"calibration_cache": tmp_path / "cache.npz"}
    written = {}
    for method in ("MAX_MIN", "KL", "MOVING_AVERAGE"):
        task = job(tmp_path, model, data, common, activation_quant_method=method)
        convert(task)
        written[method] = task.output.read_bytes()
    assert len(observed) == 1
    assert len(set(written.values())) == 3
    for method, with_cache in written.items():
        task = job(tmp_path, model, data, activation_quant_method=method)
        convert(replace(task, output=tmp_path / "plain.onnx"))
        assert (tmp_path / "plain.onnx").read_bytes() == with_cache
