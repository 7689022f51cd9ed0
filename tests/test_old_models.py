"""Models as old exporters wrote them, in every mode: scalers of each opset, operators that there
are no more, domains that nobody imports, dimensions of -1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import build, frozen, normal
from running import Ear, write_config

from calib.affine import Array
from converter.config import load_config
from converter.job import Job
from converter.pipeline.convert import convert

MODES = ["FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT"]
DATA = normal(6, 3, 16, 16)
DOUBLE, HALF = (np.array(s, np.float32) for s in ([1, 1, 2, 2], [1, 1, 0.5, 0.5]))
SIZES = np.array([1, 16, 40, 24], np.int64)
NONE = np.zeros(0, np.float32)

OLD: dict[str, tuple[int, str, dict[str, Array]]] = {
    "Upsample 7": (7, "Upsample <mode = 'nearest', scales = [1.0, 1.0, 2.0, 2.0]> (r)", {}),
    "linear Upsample 8": (8, "Upsample <mode = 'linear', scales = [1.0, 1.0, 2.0, 2.0]> (r)", {}),
    "Upsample 9": (9, "Upsample <mode = 'nearest'> (r, s)", {"s": DOUBLE}),
    "linear Upsample 9": (9, "Upsample <mode = 'linear'> (r, s)", {"s": DOUBLE}),
    "Resize 10": (10, "Resize <mode = 'nearest'> (r, s)", {"s": DOUBLE}),
    "linear Resize 10": (10, "Resize <mode = 'linear'> (r, s)", {"s": HALF}),
    "Resize 11 by scales": (
        11,
        "Resize <mode = 'linear', coordinate_transformation_mode = 'asymmetric'> (r, none, s)",
        {"none": NONE, "s": DOUBLE},
    ),
    "Resize 11 by sizes": (
        11,
        "Resize <mode = 'linear', coordinate_transformation_mode = 'align_corners'> "
        "(r, none, none, sizes)",
        {"none": NONE, "sizes": SIZES},
    ),
    "ImageScaler": (
        9,
        f"ImageScaler <scale = 0.5, bias = [{', '.join(['0.25'] * 16)}]> (r)",
        {},
    ),
    "a domain that is not imported": (12, "com.microsoft.Gelu (r)", {}),
}


def model(opset: int, middle: str, constants: dict[str, Array]) -> ir.Model:
    graph = f"""g (float[1,3,16,16] x) => (float[1,16,H,W] y) {{
        c = Conv <pads = [1,1,1,1]> (x, w)  r = Relu (c)
        u = {middle.replace("'", '"')}
        [last] y = Conv <pads = [1,1,1,1]> (u, v)
    }}"""
    weights = {"w": normal(16, 3, 3, 3) / 5, "v": normal(16, 16, 3, 3) / 12}
    return build(graph, opset, ir_version=6 if opset < 13 else 8, **weights, **constants)


def written(folder: Path, proto: bytes, mode: str) -> Job:
    (folder / "m.onnx").write_bytes(proto)
    np.save(folder / "x.npy", DATA)
    config = write_config(
        folder / "c.cfg",
        common_quant={"quant_type": mode, "thread_num": 1},
        data_preprocess={
            "calibrate_path": f"x:{folder / 'x.npy'}",
            "calibrate_size": 6,
            "input_type": "NPY",
        },
    )
    return Job(folder / "m.onnx", folder / "q.onnx", load_config(config))


def decibels(job: Job) -> float:
    x, y = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": DATA[:1]})[0]
        for path in (job.model, job.output)
    )
    noise = np.square(x.astype(np.float64) - y).sum()
    return float(10 * np.log10(np.square(x.astype(np.float64)).sum() / max(noise, 1e-30)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OLD)
def test_old_operators_are_no_obstacle(tmp_path, name, mode):
    opset, middle, constants = OLD[name]
    old = ir.to_proto(model(opset, middle, constants))
    kept = [each for each in old.opset_import if each.domain != "com.microsoft"]
    del old.opset_import[:]
    old.opset_import.extend(kept)
    job = written(tmp_path, old.SerializeToString(), mode)
    convert(job, ear := Ear())
    assert decibels(job) > 25
    assert not [line for line in ear.warned if "unchecked" in line or "cannot" in line]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("opset", [9, 13])
def test_dimensions_of_minus_one_are_open(tmp_path, mode, given, opset):
    proto = onnx.load_from_string(frozen(model(opset, "Relu (r)", {})))
    for axis in (0, 2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = -1
    job = written(tmp_path, proto.SerializeToString(), mode)
    shapes = {"x": (1, 3, 16, 16)} if given else {}
    convert(replace(job, input_shapes=shapes), Ear())
    assert decibels(job) > 25
