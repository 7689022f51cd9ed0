"""Models for NVIDIA's GPUs: what every mode stores, what stays float, that integers compute what ONNX
Runtime does, and, where TensorRT for RTX is installed, that its parser and builder take them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from command_line import MODEL, digits
from graphs import build, normal, prepared, run
from integer_layers import differences, quantized_layers
from running import Ear, job, write_config

from calib.affine import IntFormat
from converter.config import load_config
from converter.errors import ConfigError
from converter.graph.edit import constant
from converter.graph.files import load
from converter.job import Job
from converter.pipeline.convert import convert, make_plan
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import TARGETS
from converter.weights.grids import Grids, fit

IMAGES, _ = digits("calib")
STORED = [("ON_LOAD", 8), ("ON_LOAD", 4), ("ON_THE_FLY", 8), ("ON_THE_FLY", 6), ("ON_THE_FLY", 4)]


def fully(folder: Path, target: str = "NVGPU") -> Path:
    """The example with integers, for a target."""
    task = job(folder, load(MODEL), {"image": IMAGES[:12]}, target_device=target)
    convert(task, Ear())
    return task.output


def stored(folder: Path, strategy: str, bits: int, data: bool = False, **weight: object) -> Path:
    """The example with weights in fewer bits."""
    np.save(folder / "image.npy", IMAGES[:12])
    path = f"image:{folder / 'image.npy'}"
    with_data = {"calibrate_path": path, "calibrate_size": 12, "input_type": "NPY"}
    config = write_config(
        folder / "w.cfg",
        common_quant={
            "quant_type": "WEIGHT_QUANT",
            "bit_num": bits,
            "min_quant_weight_channel": 0,
            "thread_num": 1,
        },
        weight_quant={"dequant_strategy": strategy, **weight},
        full_quant={"target_device": "NVGPU"},
        data_preprocess=with_data if data else {},
    )
    convert(Job(MODEL, folder / "stored.onnx", load_config(config)), Ear())
    return folder / "stored.onnx"


# --- what is stored


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(
    ("bits", "kind"), [(8, "INT8"), (6, "INT8"), (4, "INT4"), (3, "INT4"), (2, "INT4")]
)
def test_weights_in_memory_are_signed_with_the_zero_0(tmp_path, bits, kind, data):
    model = ir.load(stored(tmp_path, "ON_THE_FLY", bits, data))
    restores = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert len(restores) == 6
    for restore in restores:
        codes, zero = (restore.inputs[i].const_value for i in (0, 2))
        assert codes.dtype == zero.dtype == ir.DataType[kind]
        assert not zero.numpy().astype(np.int8).any()
        numbers = codes.numpy().astype(np.int8)
        assert -(2 ** (bits - 1)) <= numbers.min() < 0 < numbers.max() < 2 ** (bits - 1)
    assert {n.op_type for n in model.graph} >= {"Conv", "Gemm"}


def test_stored_weights_compute_what_float_ones_do(tmp_path):
    found = run(ir.load(stored(tmp_path, "ON_THE_FLY", 8, True)), {"image": IMAGES[12:20]})
    wanted = run(load(MODEL), {"image": IMAGES[12:20]})
    np.testing.assert_allclose(found["probs"], wanted["probs"], atol=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_symmetric_grids_have_the_zero_in_the_middle_and_the_scale_of_least_squares(bits, per_row):
    weight = normal(1, 5, 200).astype(np.float64) + 0.2
    rows = fit(weight, None, Grids(IntFormat(bits, False), per_row, True, symmetric=True))
    assert (rows.zero == 2 ** (bits - 1)).all()
    assert rows.points.min() >= 0
    assert rows.points.max() <= 2**bits - 1
    codes = rows.points - 2 ** (bits - 1)
    assert (len(np.unique(rows.scale)) > 1) == per_row

    def error(scale: np.ndarray) -> float:
        return float(
            np.square(
                np.clip(np.rint(weight / scale), codes.min(), codes.max()) * scale - weight
            ).sum()
        )

    best = min(error(rows.scale[..., None] * factor) for factor in np.linspace(0.7, 1.4, 71))
    assert np.square(rows.values() - weight).sum() <= 1.1 * best


# --- what is refused, what stays float


def test_dynamic_quantization_is_an_error_before_any_work(tmp_path):
    config = write_config(
        tmp_path / "d.cfg",
        common_quant={"quant_type": "DYNAMIC_QUANT"},
        full_quant={"target_device": "NVGPU"},
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(
            Job(tmp_path / "is not there.onnx", tmp_path / "o.onnx", load_config(config)), Ear()
        )
    message = str(caught.value)
    assert "[full_quant_param] target_device: does not go with DYNAMIC_QUANT" in message
    assert message.endswith("write quant_type = FULL_QUANT or WEIGHT_QUANT, or remove the target.")


@pytest.mark.parametrize(
    ("bits", "words"), [(16, "no integers of 16 bits"), (1, "of 1 bits"), (0, "search")]
)
def test_widths_that_have_no_type_are_refused_in_memory_alone(tmp_path, bits, words):
    with pytest.raises(ConfigError, match=words):
        stored(tmp_path, "ON_THE_FLY", bits)
    stored(tmp_path, "ON_LOAD", bits)


def test_other_targets_say_that_they_have_no_effect_in_other_modes(tmp_path):
    def warnings(target: str) -> tuple[str, ...]:
        config = write_config(
            tmp_path / "c.cfg",
            common_quant={"quant_type": "WEIGHT_QUANT"},
            full_quant={"target_device": target},
        )
        return load_config(config).warnings

    assert not warnings("NVGPU")
    (said,) = warnings("ARM")
    assert "target_device = ARM: has no effect" in said


@pytest.mark.parametrize(
    ("shape", "integer"), [((16, 16), True), ((15, 64), False), ((64, 15), False), ((64, 64), True)]
)
def test_products_of_few_rows_or_columns_stay_float(shape, integer):
    graph = f"g (float[2,{shape[0]}] x) => (float[] y) {{ [n] y = MatMul (x, w) }}"
    plan = build_plan(prepared(graph, w=normal(*shape)).graph, TARGETS["NVGPU"], Wishes())
    assert plan.nodes["n"].quantized == integer
    assert integer or plan.nodes["n"].reason == (
        "a product with 15 rows or columns is faster in floats on target NVGPU"
    )
    other = build_plan(prepared(graph, w=normal(*shape)).graph, TARGETS["ARM"], Wishes())
    assert other.nodes["n"].quantized


def test_small_products_of_activations_stay_float_as_far_as_sizes_are_known():
    def is_integer(rows: object) -> bool:
        graph = (
            f"g (float[2,4,32] x, float[2,32,{rows}] z) => (float[] y) {{ [n] y = MatMul (x, z) }}"
        )
        return build_plan(prepared(graph).graph, TARGETS["NVGPU"], Wishes()).nodes["n"].quantized

    assert [is_integer(rows) for rows in (8, 16, "N")] == [False, True, True]


# --- what integers compute


def test_exact_integers_compute_what_onnx_runtime_does_layer_by_layer(tmp_path):
    model = ir.load(fully(tmp_path))
    found = dict(differences(model, {"image": IMAGES[12:14]}))
    assert len(found) == 7
    assert max(found.values()) < 1e-5


def test_the_arithmetic_knows_groups_strides_dilations_and_pads(tmp_path):
    graph = """g (float[1,4,9,11] x) => (float[] y) {
        [one] a = Conv <group=2, strides=[2,1], dilations=[1,2], pads=[1,0,2,1]> (x, w, b)
        [two] y = Conv <pads=[1,1,1,1]> (a, v)
    }"""
    model = build(graph, w=normal(6, 2, 3, 3), b=normal(6), v=normal(4, 6, 3, 3, seed=1))
    task = job(tmp_path, model, {"x": normal(6, 4, 9, 11)}, target_device="NVGPU")
    convert(task, Ear())
    quantized = ir.load(task.output)
    assert [node.name for node in quantized_layers(quantized)] == ["one", "two"]
    assert max(d for _, d in differences(quantized, {"x": normal(1, 4, 9, 11, seed=9)})) < 1e-5
    codes = constant(quantized_layers(quantized)[0].inputs[1].producer().inputs[0])
    assert codes.dtype == np.int8


# --- NVIDIA's own parser and builder


def taken(path: Path) -> str:
    """Why TensorRT for RTX does not make an engine of a model, empty where it does."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return str(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for fed in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(fed.name, *[[max(side, 1) for side in fed.shape]] * 3)
    config.add_optimization_profile(profile)
    return "" if builder.build_serialized_network(network, config) else "no engine"


@pytest.mark.slow
def test_tensorrt_takes_integers(tmp_path):
    assert taken(fully(tmp_path)) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "bits"), STORED)
def test_tensorrt_takes_stored_weights(tmp_path, strategy, bits):
    assert taken(stored(tmp_path, strategy, bits)) == ""


@pytest.mark.slow
def test_tensorrt_takes_no_model_for_processors(tmp_path):
    assert "zero point" in taken(fully(tmp_path, "ARM"))
