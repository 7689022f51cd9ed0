"""WEIGHT_QUANT from config to file: what is stored how, what is left float, what runtimes make of
it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import build, frozen, normal, run
from running import Ear, write_config
from running import weights_converted as converted

from calib.affine import dequantize
from converter.config import load_config
from converter.job import Job
from converter.pipeline.convert import convert, make_plan

CONV = """g (float[2,8,9,9] x) => (float[2,10] y) {
    a = Conv <pads=[1,1,1,1]> (x, w1, b1)  r = Relu (a)
    d = Conv <group=24, pads=[1,1,1,1]> (r, w2)  p = GlobalAveragePool (d)
    f = Flatten (p)  m = MatMul (f, w3)  y = Add (m, b3) }"""
SHAPES = {"w1": (24, 8, 3, 3), "b1": (24,), "w2": (24, 1, 3, 3), "w3": (24, 10), "b3": (10,)}
WEIGHTS = {name: normal(*shape) for name, shape in SHAPES.items()}


def relative_error(model, quantized, feeds):
    wanted, found = run(model, feeds), run(quantized, feeds, optimize=True)
    return max(
        float(np.linalg.norm(found[k] - wanted[k]) / np.linalg.norm(wanted[k])) for k in wanted
    )


def all_outputs(model, x):
    return np.concatenate(
        [run(model, {"x": x[i : i + 2]})["y"].ravel() for i in range(0, len(x), 2)]
    )


def optimized(folder, data):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(
    ("bits", "most"), [(1, 2.0), (3, 0.3), (4, 0.15), (8, 0.01), (11, 0.002), (16, 1e-4)]
)
def test_every_width_runs_and_nears_the_float_model(tmp_path, bits, most):
    model = build(CONV, **WEIGHTS)
    _, data = converted(tmp_path, model, common={"bit_num": bits})
    assert relative_error(build(CONV, **WEIGHTS), data, {"x": normal(2, 8, 9, 9)}) < most


def test_runtimes_unpack_when_they_load(tmp_path):
    _, data = converted(tmp_path, build(CONV, **WEIGHTS), common={"bit_num": 5})
    assert not {"Floor", "Cast", "Sub", "Mul", "DequantizeLinear"} & set(optimized(tmp_path, data))


@pytest.mark.parametrize(("bits", "large", "halved"), [(4, 1, 1), (8, 1, 0), (4, 1e6, 0)])
def test_biases_beside_few_bits_take_half_the_bytes(tmp_path, bits, large, halved):
    bias = np.append(normal(95) * large, np.float32(1e-7))
    text = "g (float[1,64] x) => (float[1,96] y) { y = Gemm (x, w, b) }"
    model = build(text, w=normal(64, 96), b=bias)
    _, data = converted(tmp_path, model, common={"bit_num": bits})
    stored = onnx.load_from_string(data).graph.initializer
    types = [x.data_type for x in stored if x.name.startswith("b")]
    assert (onnx.TensorProto.FLOAT16 in types) == halved
    # What stands in for the bias is within float16's precision of it.
    found, exact = (
        run(x, {"x": np.zeros((1, 64), np.float32)}, optimize=True)["y"] for x in (data, model)
    )
    np.testing.assert_allclose(found, exact, rtol=2.0**-11, atol=1e-7)


@pytest.mark.parametrize("bits", [3, 8])
def test_one_scale_a_weight_fits_outputs_as_well(tmp_path, bits):
    model, x = build(CONV, **WEIGHTS), normal(16, 8, 9, 9)
    common, weight = {"bit_num": bits}, {"per_channel": "false"}
    outcome, data = converted(tmp_path, model, x, common=common, weight=weight)
    assert {stored.qparams.scale.shape for stored in outcome.plan.stored.values()} == {()}
    assert relative_error(model, data, {"x": x[:2]}) < {3: 0.3, 8: 0.01}[bits]


def error_with_data(folder, seed):
    """What is left with data of the error without, where channels have much in common."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(w.shape) * w.std() for name, w in WEIGHTS.items()}
    weights = {name: w.astype(np.float32) for name, w in drawn.items()}
    common, own = rng.standard_normal((16, 1, 9, 9)), rng.standard_normal((16, 8, 9, 9))
    x = np.abs(common + 0.3 * own).astype(np.float32)
    errors = []
    for strategy in ("GPTQ", "MAX_MIN"):
        model = build(CONV, **weights)
        _, data = converted(folder, model, x, {"bit_num": 3}, {"quant_strategy": strategy})
        errors.append(relative_error(build(CONV, **weights), data, {"x": x[:2]}))
    return errors[0] / errors[1]


def test_data_lowers_the_error(tmp_path):
    assert np.mean([error_with_data(tmp_path, seed) for seed in range(8)]) < 0.5


def test_the_mean_of_the_outputs_is_kept(tmp_path):
    text = "g (float[1,16] x) => (float[1,32] y) { y = Gemm (x, w) }"
    x, weight = normal(64, 16) + 2, normal(16, 32)
    _, data = converted(
        tmp_path, build(text, w=weight), x, {"bit_num": 2, "min_quant_weight_size": 0}
    )
    shift = np.mean([run(data, {"x": row[None]})["y"] - row[None] @ weight for row in x], axis=0)
    np.testing.assert_allclose(shift, 0, atol=1e-4 * np.abs(x @ weight).max())


def test_what_would_not_get_smaller_stays_float_and_says_so(tmp_path):
    outcome, _ = converted(tmp_path, build(CONV, **WEIGHTS), common={"bit_num": 8})
    reasons = {
        node.op_type: node.reason for node in outcome.plan.nodes.values() if not node.quantized
    }
    assert reasons["Relu"] == "no constant weight"
    assert [n.reason for n in outcome.plan.nodes.values() if n.op_type == "Conv"][
        1
    ] == "no smaller in 8 bits"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("min_quant_weight_size", 1727, None),
        ("min_quant_weight_size", 1728, "min_quant_weight_size = 1728"),
        ("min_quant_weight_channel", 23, None),
        ("min_quant_weight_channel", 24, "min_quant_weight_channel = 24"),
        ("skip_quant_type", "Conv", "skip_quant_type"),
    ],
)
def test_limits_are_strict_and_named(tmp_path, key, value, reason):
    outcome, _ = converted(tmp_path, build(CONV, **WEIGHTS), common={key: value})
    first = next(node for node in outcome.plan.nodes.values() if node.op_type == "Conv")
    assert first.quantized == (reason is None)
    assert reason is None or reason in first.reason


def test_a_tied_weight_is_stored_once(tmp_path):
    text = """g (int64[3] i, float[2,16] x) => (float[3,16] y, float[2,64] z) {
        y = Gather (w, i)  z = Gemm <transB=1> (x, w) }"""
    weight = normal(64, 16)
    _, data = converted(tmp_path, build(text, w=weight), common={"bit_num": 6})
    assert (
        sum(
            tensor.name.endswith("codes")
            for tensor in onnx.load_from_string(data).graph.initializer
        )
        == 1
    )
    feeds = {"i": np.array([0, 5, 63]), "x": normal(2, 16)}
    found = run(data, feeds, optimize=True)
    restored = run(data, {**feeds, "i": np.arange(3)})["y"]
    np.testing.assert_allclose(found["z"][:, :3], feeds["x"] @ restored.T, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(found["y"] - weight[[0, 5, 63]]) < 0.05 * np.linalg.norm(
        weight[[0, 5, 63]]
    )


def test_bodies_of_control_flow_are_stored_inside_and_captured(tmp_path):
    inner = onnx.parser.parse_graph("then () => (float[2,32] t) { t = MatMul (x, inside) }")
    inner.initializer.append(onnx.numpy_helper.from_array(normal(16, 32), "inside"))
    outer = onnx.parser.parse_graph("else () => (float[2,32] e) { e = MatMul (x, captured) }")
    text = "g (float[2,16] x, bool c) => (float[2,32] y) { y = If (c) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    branches = (("then_branch", inner), ("else_branch", outer))
    proto.graph.node[0].attribute.extend(
        onnx.helper.make_attribute(name, graph) for name, graph in branches
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(16, 32, seed=1), "captured"))
    model = onnx.load_model_from_string(proto.SerializeToString())
    outcome, data = converted(tmp_path, ir.from_proto(model), common={"bit_num": 7})
    assert sum(node.quantized for node in outcome.plan.nodes.values()) == 2
    for taken in (True, False):
        feeds = {"x": normal(2, 16), "c": np.array(taken)}
        assert relative_error(model.SerializeToString(), data, feeds) < 0.02


def test_recurrent_weights_are_stored(tmp_path):
    text = (
        "g (float[5,1,16] x) => (float[5,2,1,24] y) { y = LSTM <hidden_size=24, "
        'direction="bidirectional"> (x, w, r) }'
    )
    model = build(text, opset=14, w=normal(2, 96, 16) / 4, r=normal(2, 96, 24) / 4)
    outcome, data = converted(tmp_path, model, common={"bit_num": 8})
    assert outcome.size_after < 0.4 * outcome.size_before
    assert relative_error(frozen(model), data, {"x": normal(5, 1, 16)}) < 0.02


@pytest.mark.parametrize(("bits", "opset"), [(2, 25), (3, 21), (8, 13), (12, 21)])
def test_on_the_fly_weights_stay_integers(tmp_path, bits, opset):
    weight = {"dequant_strategy": "ON_THE_FLY"}
    _, data = converted(tmp_path, build(CONV, **WEIGHTS), common={"bit_num": bits}, weight=weight)
    model = onnx.load_from_string(data)
    assert model.opset_import[0].version == opset
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    assert (
        relative_error(build(CONV, **WEIGHTS), data, {"x": normal(2, 8, 9, 9)}) < 2.0**-bits * 2.5
    )


def test_blocks_become_the_runtimes_low_bit_product(tmp_path):
    text = "g (float[1,64] x) => (float[1,128] y) { y = MatMul (x, w) }"
    weight = {"dequant_strategy": "ON_THE_FLY", "block_size": 32}
    _, data = converted(
        tmp_path, build(text, w=normal(64, 128)), common={"bit_num": 4}, weight=weight
    )
    assert optimized(tmp_path, data) == {"MatMulNBits": 1}
    assert relative_error(build(text, w=normal(64, 128)), data, {"x": normal(1, 64)}) < 0.12


def test_init_scale_bounds_the_error_of_every_weight(tmp_path):
    x = normal(8, 8, 9, 9)
    sizes = []
    for scale in (0.2, 0.02):
        outcome, _ = converted(
            tmp_path, build(CONV, **WEIGHTS), x, {"bit_num": 0}, mixed={"init_scale": scale}
        )
        sizes.append(outcome.size_after)
        for (name, index), stored in outcome.plan.stored.items():
            assert stored.qparams.format.bits <= (4 if scale == 0.2 else 8), (name, index)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("mixed", [{"auto_tune": "true"}, {"search": "SENSITIVITY"}])
def test_a_search_keeps_the_cosine(tmp_path, mixed):
    x, model = normal(8, 8, 9, 9), build(CONV, **WEIGHTS)
    ear = Ear()
    _, data = converted(
        tmp_path, model, x, {"bit_num": 0}, mixed={**mixed, "min_cosine": 0.99}, watch=ear
    )
    wanted, found = all_outputs(frozen(model), x), all_outputs(data, x)
    assert wanted @ found / np.linalg.norm(wanted) / np.linalg.norm(found) >= 0.99
    assert any("cosine" in line for line in ear.said)


@pytest.mark.parametrize("data", [None, np.abs(normal(16, 8, 9, 9)) + 1])
def test_pruned_weights_stay_zeros(tmp_path, data):
    keep = np.random.default_rng(0).random(SHAPES["w1"]) > 0.5
    model = build(CONV, **{**WEIGHTS, "w1": WEIGHTS["w1"] * keep})
    outcome, _ = converted(tmp_path, model, data, {"bit_num": 4})
    weight = next(w for w in outcome.plan.stored.values() if w.codes.shape == keep.shape)
    found = dequantize(weight.codes, weight.qparams)
    assert (found[~keep] == 0).all()
    assert (found[keep] != 0).mean() > 0.8


def test_weights_that_no_walk_sees_say_so(tmp_path):
    text = """g (float[2,8,9,9] x) => (float[2,4,9,9] y) {
        a = Conv <pads=[1,1,1,1]> (x, w1)  r = Relu (a)
          y = ConvTranspose <pads=[1,1,1,1]> (r, w2) }"""
    model = build(text, w1=normal(16, 8, 3, 3), w2=normal(16, 4, 3, 3))
    outcome, _ = converted(tmp_path, model, normal(4, 8, 9, 9), {"bit_num": 4})
    reasons = {node.op_type: node.reason for node in outcome.plan.nodes.values()}
    assert reasons["ConvTranspose"] == "weights stored in 4 bits, rounded without data"
    assert reasons["Conv"] == "weights stored in 4 bits"


# Words of two kinds: their table is small beside the model.
KINDS = """g (int64[N] kind, float[N,384] x) => (float[N,384] y) {
    k = Gather (kinds, kind)
    s = Add (x, k)
    y = MatMul (s, w) }"""


@pytest.mark.parametrize("mode", ["WEIGHT_QUANT", "DYNAMIC_QUANT", "FULL_QUANT"])
def test_a_table_that_saves_next_to_nothing_stays_float(tmp_path, mode):
    kinds = normal(2, 384)
    model = build(KINDS, kinds=kinds, w=normal(384, 384))
    x, kind = normal(8, 384, seed=2), np.arange(8) % 2
    config = write_config(
        tmp_path / "c.cfg",
        common_quant={"quant_type": mode, "bit_num": 8, "thread_num": 1},
        data_preprocess={
            "calibrate_path": f"x:{tmp_path / 'x.npy'},kind:{tmp_path / 'kind.npy'}",
            "calibrate_size": 8,
            "input_type": "NPY",
        },
    )
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "kind.npy", kind)
    (tmp_path / "model.onnx").write_bytes(frozen(model))
    task = Job(tmp_path / "model.onnx", tmp_path / "out.onnx", load_config(config), verify=False)
    outcome = convert(task, Ear())
    (table,) = [node for node in outcome.plan.outside if node.op_type == "Gather"]
    assert not table.quantized
    if mode != "FULL_QUANT":  # which has looked at the operator before
        assert table.reason == "a table of 3.1 kB saves next to nothing"
    stored = [onnx.numpy_helper.to_array(i) for i in onnx.load(task.output).graph.initializer]
    assert any(np.array_equal(each, kinds) for each in stored)


def test_a_small_table_is_stored_where_its_bits_are_asked_for_and_a_larger_one_always(tmp_path):
    for rows, recipe, stored in (
        (2, "", False),
        (2, "[type:Gather]\nbit_num = 8\n", True),
        (3, "", True),
    ):
        model = build(KINDS, kinds=normal(rows, 384), w=normal(384, 384))
        keys = {"quant_type": "WEIGHT_QUANT", "bit_num": 4}
        config = write_config(tmp_path / "c.cfg", common_quant=keys)
        config.write_text(config.read_text() + recipe)
        (tmp_path / "m.onnx").write_bytes(frozen(model))
        plan = make_plan(Job(tmp_path / "m.onnx", tmp_path / "o.onnx", load_config(config)), Ear())
        assert [n.quantized for n in plan.outside if n.op_type == "Gather"] == [stored]
