"""Fine-tuning of models of all kinds: what it learns by, what it joins, what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import build, frozen, normal, prepared
from running import Ear, write_config

from calib.affine import IntFormat, QParams, zero_bytes, zero_step
from converter.config import load_config
from converter.job import Job
from converter.learn.fine_tune import width_of
from converter.learn.student import ZERO, Student
from converter.learn.told import told_by
from converter.pipeline import convert as pipeline
from converter.plan.plan import NodePlan, PerAxis, QuantizedWeight, QuantPlan, WeightPlan

COUNT = 20
W1, W2 = normal(8, 256) / 3, normal(256, 64, seed=1) / 16
W = {"w1": W1, "w2": W2}
X = {"x": [normal(1, 8, seed=i) for i in range(COUNT)]}
BODY = "h = MatMul (x, w1)  r = Relu (h)  s = MatMul (r, w2)"
GRU = {"w1": normal(1, 48, 8) / 3, "r1": normal(1, 48, 16, seed=1) / 4, "w2": normal(16, 64) / 4}
LENGTHS = {
    "a": [normal(3 + i % 3, 8, seed=i) for i in range(COUNT)],
    "b": [normal(2 + i % 2, 8, seed=i) for i in range(COUNT)],
}

# Graph, constants and samples by input.
MODELS = {
    "classes alone": (
        f"g (float[N,8] x) => (int64[N] y) {{ {BODY}  y = ArgMax <axis=1, keepdims=0> (s) }}",
        W,
        X,
    ),
    "classes beside scores": (
        f"""g (float[N,8] x) => (float[N,2] y, int64[N,2] z)
            <int64[1] k = {{2}}> {{ {BODY}  y, z = TopK (s, k) }}""",
        W,
        X,
    ),
    "as many as are positive": (
        f"g (float[N,8] x) => (int64[2,M] y) {{ {BODY}  y = NonZero (s) }}",
        W,
        X,
    ),
    "a scalar": (
        f"g (float[N,8] x, float k) => (float[N,64] y) {{ {BODY}  y = Mul (s, k) }}",
        W,
        {**X, "k": [np.float32(1 + i) for i in range(COUNT)]},
    ),
    "two lengths": (
        """g (float[N,8] a, float[M,8] b) => (float[N,M] y) { h = MatMul (a, w1)
            i = MatMul (b, w1)  t = Transpose <perm=[1,0]> (i)  y = MatMul (h, t) }""",
        {"w1": W1},
        LENGTHS,
    ),
    "pairs of all": (
        """g (float[N,8] a, float[M,8] b) => (float[N,M] y) { h = MatMul (a, w1)
            i = MatMul (b, w1)  t = Transpose <perm=[1,0]> (i)  y = MatMul (h, t) }""",
        {"w1": W1},
        {name: [normal(2, 8, seed=i) for i in range(COUNT)] for name in "ab"},
    ),
    "recurrent": (
        """g (float[T,1,8] x) => (float[T,1,64] y) <int64[1] one = {1}> {
            h, l = GRU <hidden_size=16> (x, w1, r1)  q = Squeeze (h, one)
            y = MatMul (q, w2) }""",
        GRU,
        {"x": [normal(5, 1, 8, seed=i) for i in range(COUNT)]},
    ),
}


def converted(
    folder: Path,
    mode: str,
    model: bytes,
    samples: dict[str, list[np.ndarray]],
    tune: str = "AUTO",
    ear: Ear | None = None,
    more: str = "",
    common: dict[str, object] | None = None,
) -> tuple[Ear, Path]:
    (folder / "m.onnx").write_bytes(model)
    for name, arrays in samples.items():
        (folder / name).mkdir(exist_ok=True)
        for i, array in enumerate(arrays):
            np.save(folder / name / f"{i:03}.npy", array)
    bits = {"bit_num": 3, "min_quant_weight_channel": 0} if mode == "WEIGHT_QUANT" else {}
    config = write_config(
        folder / "c.cfg",
        common_quant={"quant_type": mode, "thread_num": 1, **bits, **(common or {})},
        fine_tune={"fine_tune": tune, "epochs": 4},
        data_preprocess={
            "calibrate_path": ",".join(f"{name}:{folder / name}" for name in samples),
            "calibrate_size": COUNT,
            "input_type": "NPY",
        },
    )
    config.write_text(config.read_text() + more)
    ear, out = ear or Ear(), folder / f"{mode}.{tune}.onnx"
    pipeline.convert(Job(folder / "m.onnx", out, load_config(config)), ear)
    return ear, out


def run_all(path: Path, samples: dict[str, list[np.ndarray]]) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = zip(*samples.values(), strict=True)
    feeds = [dict(zip(samples, map(np.asarray, row), strict=True)) for row in rows]
    return [session.run(None, feed)[0] for feed in feeds]


@pytest.mark.parametrize("mode", ["WEIGHT_QUANT", "FULL_QUANT"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_all_kinds_learn(tmp_path, kind, mode):
    text, weights, samples = MODELS[kind]
    model = frozen(build(text, **weights))
    ear, out = converted(tmp_path, mode, model, samples)
    assert any("samples that were held back" in line for line in ear.told), ear.warned
    if mode == "WEIGHT_QUANT":
        assert any(line.startswith("Bits of weights: 3 (") for line in ear.told)
    pairs = zip(run_all(tmp_path / "m.onnx", samples), run_all(out, samples), strict=True)
    if kind != "as many as are positive":
        alike = [np.mean(a == b) if a.dtype == np.int64 else cosine(a, b) for a, b in pairs]
        assert np.mean(alike) > 0.8


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("opset", [13, 15])
def test_integers_of_older_opsets_learn(tmp_path, opset):
    text = f"g (float[N,8] x) => (float[N,64] s) {{ {BODY} }}"
    ear, _ = converted(tmp_path, "FULL_QUANT", frozen(build(text, opset=opset, **W)), X, "BLOCK")
    assert any(line.startswith("Fine-tuning (BLOCK)") for line in ear.told)


def test_no_name_of_a_model_gets_in_the_way(tmp_path):
    text = f"g (float[N,8] x) => (float[N,64] loss, float[N,256] loss_teacher) {{ {BODY} "
    text += "loss = Identity (s)  loss_teacher = Identity (r) }"
    ear, _ = converted(tmp_path, "WEIGHT_QUANT", frozen(build(text, **W)), X)
    assert any(line.startswith("Fine-tuning") for line in ear.told)


@pytest.mark.parametrize("odd", [[3], range(COUNT)], ids=["one", "all"])
def test_samples_that_overflow_teach_nothing(tmp_path, odd):
    text = f"g (float[N,8] x) => (float[N,64] y) {{ {BODY}  y = Exp (s) }}"
    samples = {"x": [x * (1e4 if i in odd else 1) for i, x in enumerate(X["x"])]}
    ear, out = converted(tmp_path, "WEIGHT_QUANT", frozen(build(text, **W)), samples)
    assert any("teach nothing" in line for line in ear.warned)
    learned = any(line.startswith("Fine-tuning") for line in ear.told)
    assert learned == (len(odd) < COUNT)
    assert out.exists()


def test_a_model_of_which_nothing_is_known_before_is_not_taught(tmp_path):
    text = """g (float[N,8] x) => (float[M,64] y) { n = NonZero (x)  t = Transpose (n)
        f = Cast <to=1> (t)  h = MatMul (f, v)  y = MatMul (h, w) }"""
    model = frozen(build(text, v=normal(2, 64), w=normal(64, 64)))
    ear, out = converted(tmp_path, "WEIGHT_QUANT", model, X)
    assert any("Nothing is learned, as no output is made of" in line for line in ear.warned)
    _, off = converted(tmp_path, "WEIGHT_QUANT", model, X, "OFF")
    assert graph_of(out) == graph_of(off)


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path).graph


@pytest.mark.parametrize("mode", ["WEIGHT_QUANT", "FULL_QUANT"])
def test_what_restores_weights_is_no_weight_of_a_second_conversion(tmp_path, mode):
    model = frozen(build(f"g (float[N,8] x) => (float[N,64] s) {{ {BODY} }}", **W))
    _, first = converted(tmp_path, "WEIGHT_QUANT", model, X, "OFF")
    (tmp_path / "again").mkdir()
    ear, second = converted(tmp_path / "again", mode, first.read_bytes(), X)
    assert any("as what it computes is constant" in line for line in ear.warned)
    for a, b in zip(run_all(first, X), run_all(second, X), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ranges_of_what_is_learned_come_from_the_cache(tmp_path):
    model = frozen(build(f"g (float[N,8] x) => (float[N,64] s) {{ {BODY} }}", **W))
    cache = {"calibration_cache": tmp_path / "c.npz"}
    files = []
    for _ in range(2):
        ear, out = converted(tmp_path, "FULL_QUANT", model, X, common=cache)
        files.append(out.read_bytes())
    assert any("come from the calibration cache" in line for line in [*ear.told, *ear.said])
    assert not any("made anew" in line for line in ear.warned)
    assert files[0] == files[1]


class Impatient(Ear):
    """Interrupts when it hears what was gained."""

    def tell(self, text):
        super().tell(text)
        if "samples that were held back" in text:
            assert "->" in text
            raise KeyboardInterrupt


def test_whoever_interrupts_learning_hears_what_there_is(tmp_path):
    model = frozen(build(f"g (float[N,8] x) => (float[N,64] s) {{ {BODY} }}", **W))
    with pytest.raises(
        KeyboardInterrupt, match=r"onnx holds the best so far, and the same command"
    ):
        converted(tmp_path, "WEIGHT_QUANT", model, X, "BLOCK", ear=Impatient())
    assert (tmp_path / "WEIGHT_QUANT.BLOCK.onnx").exists()
    assert (tmp_path / "WEIGHT_QUANT.BLOCK.onnx.fine_tune").exists()
    # Another job begins anew.
    node = "[node:h]\nbit_num = 8\n"
    _, out = converted(tmp_path, "WEIGHT_QUANT", model, X, "BLOCK", more=node)
    kept = out.read_bytes()
    _, out = converted(tmp_path, "WEIGHT_QUANT", model, X, "BLOCK", more=node)
    assert out.read_bytes() == kept


def test_a_model_is_told_by_what_its_outputs_are_made_of():
    text = f"""g (float[N,8] x) => (int64[N] y, float[N,256] r, int64[2,M] z)
        {{ {BODY}  y = ArgMax <axis=1, keepdims=0> (s)  z = NonZero (r) }}"""
    assert told_by(prepared(text, **W), {"x": (1, 8)}) == ("s", "r")


def test_what_an_output_is_made_of_may_lie_far_back():
    steps = " ".join(f"i{k + 1} = Neg (i{k})" for k in range(1500))
    text = f"g (float[N,8] x) => (int64[2,M] i1500) {{ {BODY}  i0 = NonZero (s)  {steps} }}"
    assert told_by(prepared(text, **W), {"x": (1, 8)}) == ("s",)


def test_where_no_gradient_goes_is_told_once(tmp_path):
    body = "h = MatMul (x, w1)  a = Asinh (h)  b = Asinh (a)  s = MatMul (b, w2)"
    model = frozen(build(f"g (float[N,8] x) => (float[N,64] s) {{ {body} }}", **W))
    ear, _ = converted(tmp_path, "WEIGHT_QUANT", model, X, "END_TO_END")
    (line,) = [text for text in ear.warned if "Nothing is learned through node" in text]
    assert "(Asinh)" in line
    assert "no gradient is known for it" in line


@pytest.mark.parametrize(
    ("text", "shape", "width"),
    [
        ("g (float[N,8] x) => (float[N,64] s) { BODY }", (1, 8), 8),
        ("g (float[N,8] x) => (float[64,N] y) { BODY y = Transpose <perm=[1,0]> (s) }", (1, 8), 1),
        ("g (float[N,8] x) => (float y) { BODY y = ReduceMax <keepdims=0> (s) }", (1, 8), 1),
        ("g (float[N,8] x) => (float[N,64] y) { BODY y = Softmax <axis=0> (s) }", (2, 8), 1),
        ("g (float[1,8] x) => (float[1,64] s) { BODY }", (1, 8), 1),
    ],
)
def test_samples_go_together_where_that_is_the_same(text, shape, width):
    model = prepared(text.replace("BODY", BODY), **W)
    samples = [{"x": normal(*shape, seed=i)} for i in range(8)]
    assert width_of(model, [model.graph.outputs[0].name], samples, 8) == width


def test_learned_zeros_take_as_many_bytes():
    bits, array = 3, normal(32, 64)
    fmt, step = IntFormat(bits, signed=False), zero_step(bits)
    low, high = array.min(axis=0), array.max(axis=0)
    scale = ((high - low) / 7).astype(np.float16).astype(np.float32)
    zero = np.rint(-low / scale / step).astype(np.float32) * step
    codes = np.clip(np.rint(array / scale + zero), 0, 7).astype(np.uint8)
    model = prepared("g (float[N,32] x) => (float[N,64] y) { y = MatMul (x, w) }", w=array)
    place = model.graph[0].name, 1
    weight = WeightPlan("w", 1, fmt, PerAxis(1))
    unit = NodePlan(place[0], "MatMul", True, "", ("x",), weight=weight)
    stored = {place: QuantizedWeight(codes, QParams(scale, zero, fmt, 1))}
    student = Student(model, QuantPlan({place[0]: unit}, {}, stored=stored))
    learned = student.start()
    assert f"{student.constants[0]} {ZERO}" in learned
    learned[f"{student.constants[0]} {ZERO}"] += np.linspace(-0.1, 0.1, 64)
    found = student.plan_with(learned).stored[place].qparams.zero_point
    assert not np.array_equal(found, zero)
    np.testing.assert_array_equal(zero_bytes(found, bits) * step, found)
    np.testing.assert_allclose(found, zero - np.linspace(-0.1, 0.1, 64), atol=step)
