"""Weights that stay integers in memory: what the runtime makes of them, how tables of words and
what scores them are stored, and that both still compute the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import build, frozen, normal, run
from running import Ear
from running import weights_converted as converted

from calib.affine import Array, dequantize
from calib.samples import Dataset
from converter.calibrate.data import synthetic_data, token_data
from converter.plan.ops import words_of
from converter.prepare import prepare
from converter.weights.importance import importance_of

WORDS, WIDTH, HIDDEN = 256, 64, 96
TABLE, IDS = normal(WORDS, WIDTH), np.random.default_rng(0).integers(0, WORDS, (2, 7))
CONSTANTS = {
    "table": TABLE,
    "up": normal(WIDTH, HIDDEN, seed=1) / 8,
    "down": normal(HIDDEN, WIDTH, seed=2) / 8,
}
KINDS = {
    "tied": ("t = Transpose <perm = [1, 0]> (table)  y = MatMul (o, t)", {}),
    "stored twice": ("y = MatMul (o, head)", {"head": TABLE.T.copy()}),
    "of its own": ("y = MatMul (o, head)", {"head": normal(WIDTH, WORDS, seed=3)}),
}
BLOCKS, ROWS = {"block_size": 32}, dict[str, object]()


def decoder(kind: str = "tied", between: str = "Relu", **more: Array) -> ir.Model:
    """Tokens looked up, two products with something between them, and scores of all words."""
    head, constants = KINDS[kind]
    nodes = (
        "e = Gather (table, ids)  h = Tanh (e)  [up] u = MatMul (h, up)  "
        f"[between] b = {between} (u)  [down] d = MatMul (b, down)  o = Tanh (d)  {head}"
    )
    text = f"g (int64[B,T] ids) => (float[] y) {{ {nodes} }}"
    return build(text, **{**CONSTANTS, **constants, **more})


def on_the_fly(
    folder: Path, model: ir.Model, bits: int = 4, **weight: object
) -> tuple[onnx.ModelProto, Counter[str]]:
    """The converted file and the operators that the runtime executes; it computes the same with
    optimizations as without but for the bytes that its kernels make of activations.
    """
    before = frozen(model)
    keys = {"dequant_strategy": "ON_THE_FLY", **weight}
    _, data = converted(folder, model, common={"bit_num": bits}, weight=keys)
    feeds = {"ids": IDS} if b"ids" in before else {"x": normal(5, WIDTH)}
    plain, fused = (run(data, feeds, optimize)["y"] for optimize in (False, True))
    assert np.linalg.norm(fused - plain) < 0.03 * np.linalg.norm(plain)
    wanted = run(before, feeds)["y"]
    assert np.linalg.norm(plain - wanted) < 0.35 * np.linalg.norm(wanted)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    executed = onnx.load(folder / "optimized.onnx").graph.node
    return onnx.load_from_string(data), Counter(node.op_type for node in executed)


def stored(file: onnx.ModelProto, size: int) -> list[str]:
    """The types of the initializers with so many numbers."""
    return [
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in file.graph.initializer
        if np.prod(tensor.dims) == size
    ]


# --- what the runtime makes of them


@pytest.mark.parametrize("weight", [BLOCKS, ROWS], ids=["blocks", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_products_of_a_decoder_fuse_and_its_table_is_stored_once(tmp_path, kind, weight):
    file, executed = on_the_fly(tmp_path, decoder(kind), **weight)
    assert executed["MatMulNBits"] == 3
    assert not executed["MatMul"] + executed["Gemm"] + executed["Transpose"]
    # What is left are the rows that were looked up.
    assert executed["DequantizeLinear"] == (1 if weight else 0)
    assert stored(file, TABLE.size) == ["UINT8"] * (2 if kind == "of its own" else 1)
    assert stored(file, WIDTH * HIDDEN) == ["UINT4"] * 2


@pytest.mark.parametrize(
    "product", ["MatMul (x, w)", "Gemm <transB = 1> (x, v)", "Gemm <transB = 1> (x, v, c)"]
)
@pytest.mark.parametrize(
    "bound", ["Relu (p)", "Clip (p, low, high)", "Clip (p, , high)", "Clip (p, low)", "Neg (p)"]
)
def test_a_product_fuses_whatever_stands_behind(tmp_path, product, bound):
    w = normal(WIDTH, HIDDEN, seed=1) / 8
    model = build(
        f"g (float[N,{WIDTH}] x) => (float[N,8] y) "
        f"{{ p = {product}  b = {bound}  y = MatMul (b, last) }}",
        **({"w": w} if "w" in product else {"v": w.T.copy()}),
        **({"c": normal(HIDDEN)} if "c)" in product else {}),
        last=normal(HIDDEN, 8, seed=2),
        **{n: np.float32(v) for n, v in (("low", -0.3), ("high", 0.4)) if n in bound},
    )
    _, executed = on_the_fly(tmp_path, model, block_size=32)
    assert executed["MatMulNBits"] == 2
    assert not executed["DequantizeLinear"]


def test_a_relu_written_as_max_is_the_same_everywhere(tmp_path):
    model = decoder(between="Relu")
    file, _ = on_the_fly(tmp_path, model, 16)
    wanted = run(decoder(between="Relu"), {"ids": IDS})["y"]
    np.testing.assert_allclose(run(file.SerializeToString(), {"ids": IDS})["y"], wanted, atol=2e-3)


# --- tables of words


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_words_and_their_scores_have_8_bits_unless_asked_otherwise(tmp_path, kind):
    for asked, least in ((None, 5), (4, 4)):
        weight = {"table_bit_num": asked} if asked else {}
        outcome, _ = converted(tmp_path, decoder(kind), common={"bit_num": 4}, weight=weight)
        widths = {w.qparams.format.bits for w in outcome.plan.stored.values()}
        assert widths == ({4, 8} if least > 4 else {4})


def test_the_plan_says_why_a_table_has_more_bits(tmp_path):
    outcome, _ = converted(tmp_path, decoder(), common={"bit_num": 4})
    reasons = {unit.reason for unit in outcome.plan.units() if "8 bits" in unit.reason}
    assert len(reasons) == 1
    assert "table_bit_num" in reasons.pop()


def test_more_bits_than_a_table_needs_are_kept(tmp_path):
    outcome, _ = converted(tmp_path, decoder(), common={"bit_num": 11})
    assert {w.qparams.format.bits for w in outcome.plan.stored.values()} == {11}


def test_a_table_of_positions_makes_no_words_of_what_has_its_sizes():
    model = build(
        "g (int64[B,T] ids) => (float[] y) "
        "{ e = Gather (places, ids)  h = MatMul (e, w)  y = MatMul (h, v) }",
        places=normal(WIDTH, WIDTH),
        w=normal(WIDTH, WIDTH, seed=1),
        v=normal(WIDTH, WIDTH, seed=2),
    )
    assert {value.name for value in words_of(model)} == {"places"}


# --- how much columns count


def test_columns_count_as_much_as_their_inputs_mean_square(tmp_path):
    outcome, _ = converted(tmp_path, decoder(), common={"bit_num": 4})
    samples = [{"ids": np.random.default_rng(i).integers(0, WORDS, (1, 9))} for i in range(4)]
    model, data = prepare(decoder()), Dataset((), list(enumerate(samples)), ())
    counts = importance_of(model, outcome.plan, data, threads=1, watch=Ear())
    rows = np.concatenate([TABLE[sample["ids"][0]] for sample in samples]).astype(np.float64)
    hidden = np.tanh(rows)
    up = CONSTANTS["up"].astype(np.float64)
    wanted = {"up": hidden, "down": np.maximum(hidden @ up, 0)}
    found = {value.name: square for value, square in counts.items()}
    assert found.keys() == wanted.keys()
    for name, inputs in wanted.items():
        np.testing.assert_allclose(found[name], np.square(inputs).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("weight", [BLOCKS, ROWS], ids=["blocks", "rows"])
def test_loud_columns_are_heard_without_data(tmp_path, weight):
    loud = TABLE * np.where(np.arange(WIDTH) % 8, 0.1, 3.0).astype(np.float32)
    model = build(
        "g (int64[B,T] ids) => (float[] y) { e = Gather (table, ids)  y = MatMul (e, w) }",
        table=loud,
        w=normal(WIDTH, 80, seed=4),
    )
    keys = {"dequant_strategy": "ON_THE_FLY", **weight}
    outcome, _ = converted(tmp_path, model, common={"bit_num": 4}, weight=keys)
    (found,) = (w for w in outcome.plan.stored.values() if w.qparams.format.bits == 4)
    w = normal(WIDTH, 80, seed=4).astype(np.float64)
    size = 32 if weight else WIDTH
    parts = w.reshape(-1, size, 80)
    low, high = (f(parts, axis=1, keepdims=True) for f in (np.min, np.max))
    steps = (high - low) / 15
    nearest = (np.rint(parts / steps) * steps).reshape(w.shape)
    errors = [
        np.linalg.norm(loud @ (v - w)) for v in (dequantize(found.codes, found.qparams), nearest)
    ]
    assert errors[0] < 0.8 * errors[1]


# --- samples for decoders

CACHED = """g (int64[B,T] ids, int64[B,S] attention_mask, float[B,2,P,8] past_key, float[B,T,64] z) =>
    (float[] y, float[] key) {
    e = Gather (table, ids)  k = Reshape (e, sizes)  key = Concat <axis = 2> (past_key, k)
    m = Cast <to = 1> (attention_mask)  y = ReduceSum (m) }"""


def test_caches_of_random_samples_are_empty_and_masks_let_all_through():
    model = build(CACHED, table=normal(WORDS, 16), sizes=np.array([1, 2, -1, 8]))
    sample = synthetic_data(model, 1, 5).sample(0)
    assert sample["ids"].shape == (1, 5)
    assert sample["past_key"].shape == (1, 2, 0, 8)
    assert sample["attention_mask"].tolist() == [[1] * 5]
    # What z is, is not known.
    assert not len(token_data(model, 2, 5))


def test_random_tokens_do_for_a_model_of_tokens_and_caches():
    text = CACHED.replace(", float[B,T,64] z", "")
    model = build(text, table=normal(WORDS, 16), sizes=np.array([1, 2, -1, 8]))
    data = token_data(model, 3, 6)
    assert len(data) == 3
    assert data.sample(2)["ids"].max() < WORDS
    assert run(model, data.sample(1))["key"].shape == (1, 2, 6, 8)
