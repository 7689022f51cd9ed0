"""Running models: what goes wrong is told in one sentence, and results come in order whatever the
workers do.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from graphs import build, frozen, normal

from calib import CalibError
from calib.session import open_session, run
from calib.workers import SLICE, over_samples

MODEL = build("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu (x)  z = Neg (x) }")


@pytest.mark.parametrize("optimize", [True, False])
def test_outputs_are_named_and_chosen(optimize, tmp_path):
    (tmp_path / "m.onnx").write_bytes(frozen(MODEL))
    for source in (tmp_path / "m.onnx", frozen(MODEL)):
        found = run(open_session(source, optimize=optimize), ["z"], {"x": normal(2, 4)})
        assert list(found) == ["z"]
        np.testing.assert_array_equal(found["z"], -normal(2, 4))


def test_no_outputs_are_none():
    assert run(open_session(frozen(MODEL)), [], {"x": normal(2, 4)}) == {}


def test_one_session_serves_many_workers():
    session = open_session(frozen(MODEL))
    samples = [normal(3, 4, seed=i) for i in range(200)]
    found = list(over_samples(200, lambda i: run(session, ["y"], {"x": samples[i]})["y"], 3))
    np.testing.assert_array_equal(found, np.maximum(samples, 0))


def test_a_model_that_cannot_be_loaded(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    for source in (tmp_path / "m.onnx", b"nothing", tmp_path / "gone.onnx"):
        with pytest.raises(CalibError, match=r"^ONNX Runtime cannot load the model: .+\.$"):
            open_session(source)


def test_a_sample_that_does_not_fit():
    session = open_session(frozen(MODEL))
    with pytest.raises(
        CalibError, match=r"^The model fails on a sample with x \[2, 3\] float32: [^\n]+\.$"
    ):
        run(session, ["y"], {"x": normal(2, 3)})
    with pytest.raises(CalibError, match=r"x \[2, 4\] float64"):
        run(session, ["y"], {"x": normal(2, 4).astype(np.float64)})


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order(threads):
    def step(index):
        time.sleep(0.002 * (index % 3))
        return index

    assert list(over_samples(23, step, threads)) == list(range(23))
    assert list(over_samples(0, step, threads)) == []


def test_work_runs_side_by_side():
    together = threading.Barrier(2, timeout=600)
    assert len(list(over_samples(4, lambda index: together.wait(), 2))) == 4


def test_few_results_wait_to_be_taken():
    started = []
    results = over_samples(1000, started.append, 2)
    next(results)
    time.sleep(0.05)
    assert len(started) <= 2 * 2 * SLICE
    results.close()


def test_an_error_in_a_step_reaches_the_caller():
    def step(index):
        if index == 3:
            raise CalibError("third")
        return index

    with pytest.raises(CalibError, match="third"):
        list(over_samples(10, step, 2))
