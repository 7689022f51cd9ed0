"""Recurrent models: samples are consecutive frames, and states are fed on from each to the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from graphs import build, frozen, normal
from running import Ear, write_config

from calib.affine import Array
from converter.calibrate.data import open_data
from converter.calibrate.states import states_of
from converter.cli import main
from converter.config import load_config
from converter.errors import ConfigError, DataError
from converter.job import Job
from converter.pipeline.compare import compare
from converter.pipeline.convert import Outcome, convert
from converter.report.text import verification_lines

# An Elman cell: h' = tanh(W x + U h), y = V h'.
CELL = """g (float[1,32] x, float[1,64] h_in) => (float[1,32] y, float[1,64] h_out) {
    a = MatMul (x, w)  b = MatMul (h_in, u)  c = Add (a, b)  h_out = Tanh (c)  y = MatMul (h_out, v)
}"""
W, U, V = normal(32, 64) / 4, normal(64, 64, seed=1) / 6, normal(64, 32, seed=2)
FRAMES = normal(30, 1, 32, seed=3)
COUNT = 20


def truth(frames: Array = FRAMES, u: Array = U) -> tuple[Array, Array]:
    """States before each frame and outputs, in float64."""
    h, states, outputs = np.zeros((1, 64)), [], []
    for x in frames.astype(np.float64):
        states.append(h)
        h = np.tanh(x @ W + h @ u)
        outputs.append(h @ V)
    return np.array(states), np.array(outputs)


def written(
    folder: Path, graph: str = CELL, mode: str = "FULL_QUANT", size: int = COUNT, **data: object
) -> Job:
    (folder / "frames").mkdir(exist_ok=True)
    for number, frame in enumerate(FRAMES):
        np.save(folder / "frames" / f"{number}.npy", frame)
    (folder / "model.onnx").write_bytes(frozen(build(graph, w=W, u=U, v=V)))
    common = {"quant_type": mode, "thread_num": 2, "min_quant_weight_channel": 0}
    config = write_config(
        folder / "c.cfg",
        common_quant=common,
        data_preprocess={
            "calibrate_path": f"x:{folder / 'frames'}",
            "calibrate_size": size,
            "input_type": "NPY",
            **data,
        },
    )
    return Job(folder / "model.onnx", folder / "q.onnx", load_config(config))


def converted(job: Job) -> tuple[Outcome, Ear]:
    return convert(job, ear := Ear()), ear


def test_states_are_the_outputs_of_the_frame_before(tmp_path):
    job = written(tmp_path)
    data = open_data(build(CELL, w=W, u=U, v=V), job, ear := Ear())
    wanted, _ = truth()
    for index in range(COUNT):
        sample = data.sample(index)
        np.testing.assert_array_equal(sample["x"], FRAMES[index])
        np.testing.assert_allclose(sample["h_in"], wanted[index], atol=1e-5)
    behind = data.further(5)
    assert [len(data), len(behind)] == [COUNT, 5]
    for index in range(5):
        np.testing.assert_array_equal(behind.sample(index)["x"], FRAMES[COUNT + index])
        np.testing.assert_allclose(behind.sample(index)["h_in"], wanted[COUNT + index], atol=1e-5)
    part = data.part(4, 7)
    assert len(part) == 3
    np.testing.assert_allclose(part.sample(2)["h_in"], wanted[6], atol=1e-5)
    np.testing.assert_allclose(part.further(1).sample(0)["h_in"], wanted[7], atol=1e-5)
    assert ear.told == [
        "Samples are consecutive frames, and states are fed on from each to the next: "
        "h_out to h_in."
    ]


@pytest.mark.parametrize("mode", ["FULL_QUANT", "DYNAMIC_QUANT", "WEIGHT_QUANT"])
def test_each_model_is_verified_on_its_own_states(tmp_path, mode):
    job = written(tmp_path, mode=mode)
    outcome, _ = converted(job)
    _, outputs = truth()
    session = ort.InferenceSession(job.output, providers=["CPUExecutionProvider"])
    held, given = truth()[0][COUNT].astype(np.float32), []
    for x in FRAMES[COUNT:]:
        y, held = session.run(["y", "h_out"], {"x": x, "h_in": held})
        given.append(y)
    noise = np.square(np.array(given) - outputs[COUNT:]).sum()
    wanted = 10 * np.log10(np.square(outputs[COUNT:]).sum() / noise)
    found = outcome.verification
    assert found is not None
    assert found.outputs[0].sqnr_db == pytest.approx(wanted, abs=0.5)
    assert 15 < wanted < 70
    assert next(verification_lines(found)).startswith(
        "Verified on 10 samples held back from calibration, each model fed its own states: "
    )


def test_errors_that_add_up_from_frame_to_frame_are_seen(tmp_path):
    job = written(tmp_path)
    worse = np.float32(0.8) * U
    job.output.write_bytes(frozen(build(CELL, w=W, u=worse, v=V)))
    found = compare(job, Ear()).verification
    assert found is not None
    states, outputs = truth()
    h, given = states[0], []
    for x in FRAMES[:COUNT].astype(np.float64):
        h = np.tanh(x @ W + h @ worse.astype(np.float64))
        given.append(h @ V)
    noise = np.square(np.array(given) - outputs[:COUNT]).sum()
    wanted = 10 * np.log10(np.square(outputs[:COUNT]).sum() / noise)
    assert found.outputs[0].sqnr_db == pytest.approx(wanted, abs=1e-3)
    assert found.closed_loop


def test_states_that_have_folders_are_read_from_them(tmp_path):
    np.save(tmp_path / "states.npy", normal(30, 64, seed=9))
    paths = f"x:{tmp_path / 'frames'}, h_in:{tmp_path / 'states.npy'}"
    outcome, ear = converted(written(tmp_path, calibrate_path=paths))
    assert outcome.verification is not None
    assert not outcome.verification.closed_loop
    assert ear.told == []


def test_a_cache_grows_from_nothing(tmp_path):
    graph = """g (float[1,1,32] x, float[1,past,32] past_key_values.0.key)
        => (float[1,1,32] y, float[1,total,32] present.0.key) {
        present.0.key = Concat <axis = 1> (past_key_values.0.key, x)
        m = ReduceMean <axes = [1], keepdims = 1> (present.0.key)
        z = Add (x, m)  y = MatMul (z, w)
    }""".replace(".", "_")
    weight = normal(32, 32)
    model = build(graph, w=weight)
    job = written(tmp_path)
    data = open_data(model, job, Ear())
    assert dict(data.states) == {"past_key_values_0_key": "present_0_key"}
    for index in range(COUNT):
        np.testing.assert_array_equal(
            data.sample(index)["past_key_values_0_key"][0], FRAMES[:index].reshape(-1, 32)
        )


def test_frames_whose_states_do_not_fit_the_memory_are_left_out(tmp_path):
    wide = CELL.replace("64]", "400000]").replace(
        "h_out = Tanh (c)", "d = Tanh (c)  e = ReduceMean <axes = [1]> (d)  h_out = Add (h_in, e)"
    )
    wide = wide.replace("b = MatMul (h_in, u)  c = Add (a, b)", "c = Identity (a)")
    wide = wide.replace("y = MatMul (h_out, v)", "y = MatMul (d, v)")
    job = written(tmp_path)
    config = job.config.path
    text = config.read_text().replace("thread_num = 2", "thread_num = 2\ncalibration_memory = 16")
    config.write_text(text)
    job = Job(job.model, job.output, load_config(config))
    data = open_data(build(wide, w=W, v=V), job, ear := Ear())
    assert 0 < len(data) < COUNT
    assert any("fill calibration_memory" in line for line in ear.warned)


NAMES = [
    ("h_in", "h_out"),
    ("h0", "hn"),
    ("x_cache", "x_cache_out"),
    ("past_key_values.0.key", "present.0.key"),
    ("past_key_values.11.value", "present_key_values.11.value"),
    ("state", "stateN"),
    ("prev_state", "next_state"),
    ("cached_conv_3", "new_cached_conv_3"),
    ("inputHidden", "outputHidden"),
]


@pytest.mark.parametrize(("name", "output"), NAMES)
def test_names_that_say_what_follows(name, output):
    graph = (
        "g (float[1,4] x, float[1,4] s) => (float[1,4] y, float[1,4] t) { y = Neg (x) t = Neg (s) }"
    )
    model = build(graph)
    model.graph.inputs[1].name, model.graph.outputs[1].name = name, output
    assert states_of(model, (), {"x": Path()}, "") == {name: output}
    assert states_of(model, (), {"x": Path(), name: Path()}, "") == {}


@pytest.mark.parametrize(
    ("name", "output", "shape"),
    [
        ("mask", "scores", "[1,4]"),
        ("input_1", "output_1", "[1,4]"),
        ("h.0", "h.1", "[1,4]"),
        ("h_in", "h_out", "[1,5]"),
        ("h_in", "h_out", "[4]"),
    ],
)
def test_names_that_say_nothing(name, output, shape):
    graph = f"g (float[1,4] x, float[1,4] s) => (float[1,4] y, float{shape} t) {{ y = Neg (x) t = Neg (s) }}"
    model = build(graph)
    model.graph.inputs[1].name, model.graph.outputs[1].name = name, output
    assert states_of(model, (), {"x": Path()}, "") == {}


def test_states_are_named_where_names_say_nothing(tmp_path):
    graph = CELL.replace("h_in", "memory").replace("h_out", "other")
    with pytest.raises(DataError, match="no folder is given for the model's input 'memory'"):
        converted(written(tmp_path, graph))
    outcome, ear = converted(written(tmp_path, graph, state_inputs="memory:other"))
    assert outcome.verification is not None
    assert outcome.verification.closed_loop
    assert "other to memory" in ear.told[0]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ("h:h_out", "has no input 'h'; write one of 'x', 'h_in'."),
        ("h_in:h", "has no output 'h'; write one of 'y', 'h_out'."),
        ("x:y", "'x' has a folder in calibrate_path as well; remove one of the two."),
        ("h_in:y", "output 'y' (float32 [1, 32]) does not fit input 'h_in' (float32 [1, 64])"),
    ],
)
def test_pairs_that_do_not_fit_are_told(tmp_path, pairs, words):
    with pytest.raises(DataError) as told:
        converted(written(tmp_path, state_inputs=pairs))
    assert str(told.value).startswith(f"{tmp_path / 'c.cfg'}:")
    assert "[data_preprocess_param] state_inputs: " in str(told.value)
    assert words in str(told.value)
    assert not (tmp_path / "q.onnx").exists()


def test_a_sequence_is_no_state(tmp_path):
    graph = """g (float[1,32] x, float[1,32] h_in) => (float[1,32] y, seq(float[1,32]) h_out) {
        y = Add (x, h_in)  h_out = SequenceConstruct (y) }"""
    with pytest.raises(DataError, match="no folder is given for the model's input 'h_in'"):
        converted(written(tmp_path, graph))
    with pytest.raises(DataError, match="does not fit input 'h_in'"):
        converted(written(tmp_path, graph, state_inputs="h_in:h_out"))


def test_a_pair_is_two_names(tmp_path):
    with pytest.raises(ConfigError, match=r"state_inputs .*input_name:output_name pairs"):
        written(tmp_path, state_inputs="h_in")


def test_a_starter_config_asks_for_no_folder_of_states(tmp_path):
    (tmp_path / "m.onnx").write_bytes(frozen(build(CELL, w=W, u=U, v=V)))
    main(["init", str(tmp_path / "m.onnx")])
    text = (tmp_path / "m.cfg").read_text()
    assert "calibrate_path = x:data/x\n" in text


def test_a_model_of_states_alone_takes_data_for_them():
    graph = "g (float[1,4] h_in) => (float[1,4] h_out) { h_out = Neg (h_in) }"
    assert states_of(build(graph), (), {}, "") == {}
