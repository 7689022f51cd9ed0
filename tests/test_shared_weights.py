"""A weight that several nodes share: once in the file, and good for all of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import build, normal
from running import Ear, job

from calib.affine import Array, dequantize
from converter.config import load_config
from converter.job import Job
from converter.pipeline.convert import Outcome, convert

LEVELS = 5
CHANNELS = 32


def heads() -> tuple[str, dict[str, Array]]:
    """One head on maps of several sizes, as detectors have it, and its constants."""
    nodes = " ".join(
        f"p{i} = AveragePool <kernel_shape = [{i}, {i}], strides = [{i}, {i}]> (x) "
        f"c{i} = Conv <pads = [1,1,1,1]> (p{i}, w, b)  y{i} = Relu (c{i})"
        for i in range(1, LEVELS + 1)
    )
    outputs = ", ".join(f"float[] y{i}" for i in range(1, LEVELS + 1))
    graph = f"g (float[1,{CHANNELS},24,24] x) => ({outputs}) {{ {nodes} }}"
    return graph, {"w": normal(CHANNELS, CHANNELS, 3, 3) / 17, "b": normal(CHANNELS)}


def loop() -> tuple[str, dict[str, Array]]:
    """A product over and over, as an unrolled recurrence, and its constants."""
    nodes = " ".join(f"p{i} = MatMul (h{i}, w)  h{i + 1} = Tanh (p{i})" for i in range(LEVELS))
    graph = f"g (float[1,16,96] x) => (float[] y) {{ h0 = Neg (x)  {nodes}  y = Neg (h{LEVELS}) }}"
    return graph, {"w": normal(96, 96) / 8}


MODELS = {"heads": (heads, normal(8, CHANNELS, 24, 24)), "loop": (loop, normal(8, 16, 96))}
MODES = ["FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT"]


def converted(task: Job, mode: str, calibrated: bool = True) -> tuple[Outcome, Ear]:
    config = task.config.path
    text = config.read_text().replace("FULL_QUANT", mode)
    text = text if mode == "FULL_QUANT" else text.replace("[full_quant_param]\n", "")
    config.write_text(text if calibrated else text.partition("[data_preprocess_param]")[0])
    return convert(Job(task.model, task.output, load_config(config)), ear := Ear()), ear


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("mode", "calibrated"), [(m, True) for m in MODES] + [(m, False) for m in MODES[1:]]
)
def test_a_shared_weight_is_stored_once(tmp_path, model, mode, calibrated):
    make, data = MODELS[model]
    graph, constants = make()
    task = job(tmp_path, build(graph, **constants), {"x": data})
    outcome, ear = converted(task, mode, calibrated)
    stored = onnx.load(task.output).graph.initializer
    size = constants["w"].size
    (weight,) = [x for x in stored if onnx.numpy_helper.to_array(x).size >= size]
    assert onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize == 1
    assert task.output.stat().st_size < 0.75 * task.model.stat().st_size
    assert not [line for line in ear.warned if "no smaller" in line]
    assert outcome.verification is not None
    assert min(output.sqnr_db for output in outcome.verification.outputs) > 25


@pytest.mark.parametrize("heard", [32, 0])
def test_a_shared_weight_serves_readers_of_what_is_silent_at_the_first(tmp_path, heard):
    graph = """g (float[1,64,8,8] x, float[1,64,8,8] z) => (float[] y, float[] u) {
        [first] a = Conv (x, w)  y = Relu (a)  [second] b = Conv (z, w)  u = Relu (b) }"""
    x, z = normal(12, 64, 8, 8), normal(12, 64, 8, 8, seed=1)
    x[:, heard:] = 0
    z[:, :heard] = 0
    weight = normal(16, 64, 1, 1) / 8
    weight[:, heard:] *= 4
    task = job(tmp_path, build(graph, w=weight), {"x": x, "z": z})
    outcome, _ = converted(task, "FULL_QUANT")
    codes = [outcome.plan.weights[name].codes for name in ("first", "second")]
    assert (codes[0] == codes[1]).all()
    assert outcome.verification is not None
    heard_ones = outcome.verification.outputs if heard else outcome.verification.outputs[1:]
    assert min(output.sqnr_db for output in heard_ones) > 30


def test_a_weight_that_two_nodes_read_in_other_ways_is_decided_for_each(tmp_path):
    graph = """g (float[4,16] x) => (float[] y) {
        [straight] a = MatMul (x, w)  r = Relu (a)
        [turned] y = Gemm <transB = 1> (r, w) }"""
    constants = {"w": normal(16, 16)}
    outcome, _ = converted(
        job(tmp_path, build(graph, **constants), {"x": normal(160, 16)}), "FULL_QUANT"
    )
    for name in ("straight", "turned"):
        weight = outcome.plan.weights[name]
        found = dequantize(weight.codes, weight.qparams)
        step = weight.qparams.scale.max()
        np.testing.assert_allclose(found, constants["w"], atol=4 * step)
    assert outcome.verification is not None
    assert outcome.verification.outputs[0].sqnr_db > 25
