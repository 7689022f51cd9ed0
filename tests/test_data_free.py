"""Conversions without any data, end to end: what is made up, what is said of it, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import DIGITS, MODEL, digits
from graphs import build, exactly, normal, positive

from calib.images import ImageOptions
from calib.samples import Dataset, InputSpec, open_dataset
from converter.config.reader import load_config
from converter.job import Job, Watch
from converter.learn.tuning import Tuning

FULL = "[common_quant_param]\nquant_type = FULL_QUANT\n"
WEIGHT = "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 3\n"
DATA = "[data_preprocess_param]\n"
FEW = f"{DATA}calibrate_size = 4\n"
SYNTHETIC = f"{FEW}input_type = SYNTHETIC\n"
REAL = f"{DATA}calibrate_path = image:'{DIGITS / 'calib'}'\ninput_type = IMAGE\n"
PIXELS = "normalize_mean = [127.5]\nnormalize_std = [127.5]\n"
NOTHING_SEEN = "No real data was seen: on real samples more may be lost than on these."
NORMS = "what 7 BatchNormalizations have kept of the training data and outputs that are sure"


@pytest.fixture
def converted(qconvert, tmp_path: Path):
    """Converts a model with a config of that text to `out.onnx`."""

    def run(text, model=MODEL, *flags, output="out.onnx"):
        config = tmp_path / "my.cfg"
        config.write_text(text)
        return qconvert.convert(config, tmp_path / output, model, *flags)

    return run


def written(tmp_path, graph, **constants):
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(build(graph, **constants)), path)
    return path


def answers(path, count=100):
    """What a model makes of pictures of the example: (pictures, classes)."""
    session = onnxruntime.InferenceSession(exactly(path))
    return np.concatenate(
        [session.run(None, {"image": x[None]})[0] for x in digits("dev")[0][:count]]
    )


def right(path, count=100):
    """The share of right answers."""
    return np.mean(answers(path, count).argmax(1) == digits("dev")[1][:count])


def test_without_data_samples_are_distilled(converted, tmp_path):
    result = converted(f"{FULL}{DATA}calibrate_size = 8\n")
    assert result.code == 0
    assert f"8 samples are distilled from {NORMS}; no real data was seen." in result.lines
    assert "QLinear" in result.out
    assert right(tmp_path / "out.onnx") > right(MODEL) - 0.03


def test_it_is_said_that_nothing_real_was_seen(converted):
    result = converted(FULL + SYNTHETIC)
    assert result.code == 0
    assert any(x.startswith("Verified on 4 samples distilled from the model") for x in result.lines)
    assert NOTHING_SEEN in result.lines


def test_the_same_bytes_for_any_number_of_threads(converted, tmp_path):
    for threads in (1, 3):
        assert converted(f"{FULL}thread_num = {threads}\n{FEW}", output=f"{threads}.onnx").code == 0
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "3.onnx").read_bytes()


def test_a_few_real_samples_are_joined_and_verified_on(converted):
    sizes = "calibrate_size = 40\nsynthetic_size = 3\n"
    labels = f"label_file = '{DIGITS / 'calib.csv'}'\n"
    result = converted(FULL + REAL + PIXELS + sizes + labels)
    assert result.code == 0
    assert f"3 samples are distilled from {NORMS}; beside 40 real ones." in result.lines
    assert any(x.startswith("Verified on 110 samples held back") for x in result.lines)
    assert NOTHING_SEEN not in result.lines


def test_labels_are_those_of_the_real_samples(converted):
    sizes = "calibrate_size = 3\nsynthetic_size = 3\n"
    labels = f"label_file = '{DIGITS / 'calib.csv'}'\n"
    drop = "[full_quant_param]\nmax_drop = 0.5\n"
    result = converted(FULL + REAL + PIXELS + sizes + labels + drop)
    assert result.code == 0
    assert "right answers" in result.out


@pytest.mark.parametrize("mode", [WEIGHT, "[common_quant_param]\nquant_type = DYNAMIC_QUANT\n"])
def test_other_modes_fit_weights_on_distilled_samples(converted, tmp_path, mode):
    assert converted(mode, output="plain.onnx").code == 0
    result = converted(mode + SYNTHETIC)
    assert result.code == 0
    assert f"4 samples are distilled from {NORMS}; no real data was seen." in result.lines
    assert NOTHING_SEEN in result.lines
    assert (tmp_path / "out.onnx").read_bytes() != (tmp_path / "plain.onnx").read_bytes()


def test_a_model_that_takes_pixels(converted, tmp_path):
    text = f"{FULL}{SYNTHETIC}{PIXELS.replace('mean = [127.5]', 'mean = [128]')}"
    result = converted(text, MODEL, "--inputDataType=UINT8")
    assert result.code == 0
    fed = onnx.load(tmp_path / "out.onnx").graph.input[0].type.tensor_type
    assert fed.elem_type == onnx.TensorProto.UINT8


def test_the_dry_run_plans_integers_and_reads_nothing(converted):
    result = converted(FULL, MODEL, "--dry-run")
    assert result.code == 0
    assert "distilled" not in result.out
    assert any(" integer " in line for line in result.lines)


def test_real_samples_judge_what_is_learned_and_distilled_ones_are_learned_from(tmp_path):
    path = tmp_path / "my.cfg"
    path.write_text(f"{WEIGHT}{SYNTHETIC}[fine_tune_param]\nfine_tune = BLOCK\n")
    job = Job(MODEL, tmp_path / "out.onnx", load_config(path))
    samples = [(i, {"x": np.full((1, 2), i, np.float32)}) for i in range(10)]
    made = [{"x": np.full((1, 2), 99, np.float32)}] * 3
    data = Dataset((), samples, ()).with_made(made)
    fit, held = Tuning(job, Watch()).parted(data)
    values = [[part.sample(i)["x"][0, 0] for i in range(len(part))] for part in (fit, held)]
    assert values == [[*range(8), 99, 99, 99], [8, 9]]
    fit, held = Tuning(job, Watch()).parted(Dataset((), (), ()).with_made(made))
    assert (len(fit), len(held)) == (2, 1)


def test_learning_from_distilled_samples(converted):
    learning = "[fine_tune_param]\nfine_tune = END_TO_END\nepochs = 1\n"
    result = converted(WEIGHT + SYNTHETIC + learning, MODEL, "--verify=off")
    assert result.code == 0
    assert "on 1 of 4 samples that were held back" in result.out


# --- what little is known, and what nothing is

HEAD = "g (float[1,3,16,16] x) => (float[] y)"
CONVOLUTIONS = {"w": normal(24, 3, 3, 3) / 3, "v": normal(24, 24, 3, 3) / 9}
PLAIN = f"{HEAD} {{ c = Conv (x, w)  r = Relu (c)  y = Conv (r, v) }}"
SURE = f"{HEAD} {{ c = Conv (x, w)  r = Relu (c)  d = Conv (r, v)  m = GlobalAveragePool (d)  y = Softmax <axis=1> (m) }}"
FOLDED = "The model has no BatchNormalization, or its exporter folded it away: ranges follow from "


@pytest.mark.parametrize(("graph", "source"), [(PLAIN, "noise"), (SURE, "outputs that are sure")])
def test_a_model_without_norms_is_warned_of(converted, tmp_path, graph, source):
    result = converted(f"{FULL}{FEW}{PIXELS}", written(tmp_path, graph, **CONVOLUTIONS))
    assert result.code == 0
    assert f"4 samples are distilled from {source}; no real data was seen." in result.lines
    assert f"{FOLDED}{source} alone; give calibrate_path" in result.err
    assert "Nothing says" not in result.err


def test_pictures_of_unknown_size_are_refused_where_the_model_does_not_know_it(converted, tmp_path):
    result = converted(FULL + FEW, written(tmp_path, SURE, **CONVOLUTIONS))
    assert result.code == 1
    assert "nothing says how pixels enter input 'x'" in result.err
    assert "give normalize_mean and normalize_std, or calibrate_path." in result.err
    assert not (tmp_path / "out.onnx").exists()


def test_inputs_that_are_no_pictures_are_assumed_small(converted, tmp_path):
    graph = "g (float[1,32] x) => (float[] y) { h = Gemm (x, m)  y = Gemm (h, n) }"
    model = written(tmp_path, graph, m=normal(32, 32), n=normal(32, 32, seed=1))
    result = converted(FULL + FEW, model)
    assert result.code == 0
    assert "Nothing says which values input 'x' takes: some from -2 to 2 are assumed" in result.err


@pytest.mark.parametrize("more", ["", "[fine_tune_param]\nfine_tune = AUTO\n"])
def test_noise_of_an_unknown_size_rounds_no_weights(converted, tmp_path, more):
    graph = "g (float[N,32] x) => (float[N,64] y) { h = MatMul (x, w)  y = Relu (h) }"
    model = written(tmp_path, graph, w=normal(32, 64))
    result = converted(f"{WEIGHT}{SYNTHETIC}{more}", model)
    assert result.code == 0
    assert "Nothing says which values input 'x' takes, and noise of a wrong size" in result.err
    assert converted(WEIGHT, model, output="none.onnx").code == 0
    graphs = [onnx.load(tmp_path / name).graph for name in ("out.onnx", "none.onnx")]
    assert graphs[0] == graphs[1]


def test_tokens_are_random(converted, tmp_path):
    graph = "g (int64[1,4] ids) => (float[] y) { e = Gather (t, ids)  y = MatMul (e, m) }"
    model = written(tmp_path, graph, t=normal(50, 32), m=normal(32, 32))
    result = converted(FULL + FEW, model)
    assert result.code == 0
    assert "the model's inputs take no floats: random ones stand in, which mislead" in result.err
    assert "Verified on 4 random samples" in result.out


def test_tokens_beside_real_ones_are_refused(converted, tmp_path):
    graph = "g (int64[1,4] ids) => (float[] y) { e = Gather (t, ids)  y = MatMul (e, m) }"
    model = written(tmp_path, graph, t=normal(50, 32), m=normal(32, 32))
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / "ids" / "a.npy", np.arange(4)[None])
    sizes = "calibrate_size = 1\ninput_type = NPY\nsynthetic_size = 2\n"
    result = converted(f"{FULL}{DATA}calibrate_path = ids:{tmp_path / 'ids'}\n{sizes}", model)
    assert result.code == 1
    assert "synthetic_size: samples of integers cannot be distilled; remove the line." in result.err


def test_an_open_size_is_refused_until_a_flag_gives_it(converted, tmp_path):
    graph = "g (float[1,3,h,w] x) => (float[] y) { c = Conv (x, w)  r = Relu (c)  y = Conv (r, v) }"
    model = written(tmp_path, graph, **CONVOLUTIONS)
    result = converted(FULL + FEW, model)
    assert result.code == 1
    assert (
        "No sample can be distilled for the model's input 'x' (float32 [1, 3, ?, ?])" in result.err
    )
    assert "give --inputShape, or calibrate_path" in result.err
    assert not (tmp_path / "out.onnx").exists()
    assert converted(FULL + FEW + PIXELS, model, "--inputShape=x:1,3,16,16").code == 0


def test_a_node_without_a_gradient_is_named(converted, tmp_path):
    p = {"gamma": positive(24), "beta": normal(24), "mean": normal(24), "var": positive(24)}
    nodes = """
        c = Conv (x, w)  b = BatchNormalization (c, gamma, beta, mean, var)
        [odd] d = Det (x)  s = Sigmoid (d)  y = Relu (b)
    """
    graph = f"g (float[1,3,16,16] x) => (float[] y, float[] s) {{ {nodes} }}"
    result = converted(FULL + FEW, written(tmp_path, graph, **CONVOLUTIONS, **p))
    assert result.code == 0
    assert "without what lies behind node 'odd' (Det): no gradient is known for it." in result.err


def test_several_inputs_are_distilled_together(converted, tmp_path):
    nodes = "c = Conv (x, w)  d = Conv (z, w)  r = Add (c, d)  y = Conv (r, v)"
    graph = (
        f"g (float[1,3,16,16] x, float[1,3,16,16] z, int64[2] unused) => (float[] y) {{ {nodes} }}"
    )
    result = converted(FULL + FEW + PIXELS, written(tmp_path, graph, **CONVOLUTIONS))
    assert result.code == 0


# --- a data set with samples that are made


def test_made_samples_stand_behind_real_ones_and_have_no_files(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((1, 2), i, np.float32))
    spec = InputSpec("x", np.dtype(np.float32), (1, 2))
    real = open_dataset([spec], {"x": tmp_path}, 2, kind="NPY", image=ImageOptions())
    made = {"x": np.full((1, 2), 9, np.float32)}
    data = real.with_made([made, made])
    assert [data.sample(i)["x"][0, 0] for i in range(4)] == [0, 1, 9, 9]
    assert [len(data.files(i)) for i in range(4)] == [1, 1, 0, 0]
    assert (data.made, data.kind) == (2, "samples, 2 of them distilled")
    assert len(data.real) == 2
    assert [x.sample(0)["x"][0, 0] for x in (data.further(5), data.part(2, 3))] == [2, 9]
    alone = Dataset((), (), ()).with_made([made])
    assert (len(alone), alone.made, alone.kind) == (1, 1, "distilled samples")
    assert len(alone.further(3)) == 0
