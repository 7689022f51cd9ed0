"""[fine_tune_param] as a user writes it, on the example."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from command_line import Command, changed, digits, outputs

from converter.learn.checkpoint import Checkpoint

WEIGHTS = ("quant_type = FULL_QUANT\nbit_num = 8", "quant_type = WEIGHT_QUANT\nbit_num = 2")
NARROW = ("[full_quant_param]", "min_quant_weight_channel = 0\n[full_quant_param]")


@pytest.fixture
def command(capsys):
    return Command(capsys)


def tuned(path, *lines, weights=False, more=()):
    """A config with [fine_tune_param]."""
    base = [WEIGHTS, NARROW] if weights else []
    config = changed(path, *base, *more)
    # Blocks start where there is much to gain.
    stored = ["\n[weight_quant_param]", "block_size = 32"] if weights else []
    text = "\n".join([*stored, "\n[fine_tune_param]", *lines, ""])
    config.write_text(config.read_text() + text)
    return config


def answers(path):
    x, labels = digits("dev")
    return float(np.mean(outputs(path, {"image": x}, optimized=True)[0].argmax(axis=1) == labels))


def test_stored_weights_are_tuned_in_as_many_bytes(command, tmp_path):
    plain, out = tmp_path / "plain.onnx", tmp_path / "tuned.onnx"
    off = tuned(tmp_path / "off.cfg", "fine_tune = OFF", weights=True)
    assert command.convert(off, plain).code == 0
    lines = ("fine_tune = END_TO_END", "epochs = 10")
    result = command.convert(tuned(tmp_path / "t.cfg", *lines, weights=True), out)
    assert result.code == 0
    (line,) = (line for line in result.lines if line.startswith("Fine-tuning"))
    assert "(END_TO_END)" in line
    assert "on 20 of 100 samples that were held back" in line
    assert "->" in line
    again = "What was gained is learned again from all 100 samples." in result.lines
    stays = "Rounding on all 100 samples is better than what was learned: it stays." in result.lines
    graphs = [onnx.load(path).graph for path in (plain, out)]
    assert again != stays
    assert (graphs[0] == graphs[1]) == stays
    assert abs(out.stat().st_size - plain.stat().st_size) < 0.02 * plain.stat().st_size
    assert not (tmp_path / "tuned.onnx.fine_tune").exists()
    second = tmp_path / "again.onnx"
    assert command.convert(tmp_path / "t.cfg", second).code == 0
    assert second.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("bits", [3, 4])
def test_integers_are_trained_for_few_bits(command, tmp_path, bits):
    lines = (
        "fine_tune = AUTO",
        "epochs = 15",
        f"weight_bits = {bits}",
        f"activation_bits = {bits}",
    )
    out = tmp_path / "q.onnx"
    config = tuned(tmp_path / "t.cfg", *lines, more=[("activation_quant_method = MAX_MIN\n", "")])
    result = command.convert(config, out)
    assert result.code == 0
    assert "Fine-tuning (AUTO)" in result.out
    graph = onnx.load(out).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    codes = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    bounds = [node for node in graph.node if node.op_type == "Clip" and node.input[0] in codes]
    assert {int(constants[node.input[2]]) for node in bounds} == {2**bits - 1}
    weights = [
        constants[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and constants.get(node.input[0], np.zeros(0)).dtype == np.int8
    ]
    assert weights
    for codes in weights:
        # A channel's codes may be multiplied by one power of two.
        for row in codes.reshape(len(codes), -1) if codes.ndim == 4 else codes.T:
            assert len(np.unique(np.abs(row))) <= 2 ** (bits - 1)
    assert answers(out) > {3: 0.7, 4: 0.9}[bits]


def test_integers_of_eight_bits_keep_their_codes(command, tmp_path):
    out = tmp_path / "q.onnx"
    lines = ("fine_tune = AUTO", "epochs = 5")
    assert command.convert(tuned(tmp_path / "t.cfg", *lines), out).code == 0
    assert answers(out) > 0.95


def test_an_end_by_time_is_told(command, tmp_path):
    lines = ("fine_tune = END_TO_END", "time_limit = 0.001", "epochs = 5000")
    result = command.convert(tuned(tmp_path / "t.cfg", *lines), tmp_path / "q.onnx")
    assert result.code == 0
    assert "time_limit = 0.001 ended fine-tuning after" in result.err


def test_data_is_needed(command, tmp_path):
    config = tuned(tmp_path / "t.cfg", "fine_tune = AUTO", weights=True)
    text = config.read_text()
    data, own = (text.rindex(f"[{name}_param]") for name in ("data_preprocess", "fine_tune"))
    config.write_text(text[:data] + text[own:])
    result = command.convert(config, tmp_path / "q.onnx")
    assert result.code == 1
    assert "calibrate_path: is missing for fine_tune; write calibrate_path = " in result.err
    assert ", or input_type = SYNTHETIC where there are no samples." in result.err
    assert not (tmp_path / "q.onnx").exists()


def test_one_sample_cannot_judge(command, tmp_path):
    config = tuned(
        tmp_path / "t.cfg",
        "fine_tune = AUTO",
        weights=True,
        more=[("calibrate_size = 100", "calibrate_size = 1")],
    )
    result = command.convert(config, tmp_path / "q.onnx")
    assert result.code == 0
    assert "Nothing is learned from fewer than two samples" in result.err


def test_keys_without_effect_are_told(command, tmp_path):
    config = tuned(tmp_path / "t.cfg", "fine_tune = OFF", "epochs = 3")
    result = command.convert(config, tmp_path / "q.onnx")
    assert result.code == 0
    assert "epochs" in result.err


@pytest.mark.parametrize("saved", [5, 22], ids=["judged", "again"])
def test_an_interrupted_tuning_keeps_the_best_and_goes_on(command, tmp_path, monkeypatch, saved):
    lines = ("fine_tune = END_TO_END", "epochs = 10")
    config, out = tuned(tmp_path / "t.cfg", *lines, weights=True), tmp_path / "q.onnx"
    assert command.convert(config, tmp_path / "whole.onnx").code == 0
    save, left = Checkpoint.save, iter(range(saved))

    def stopped(self, stage, state):
        save(self, stage, state)
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stopped)
        assert command.convert(config, out).code == 130
    assert (tmp_path / "q.onnx.fine_tune").is_dir()
    assert command.convert(config, out).code == 0
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not (tmp_path / "q.onnx.fine_tune").exists()


def test_where_nothing_is_gained_all_samples_are_rounded_on(command, tmp_path):
    plain, out = tmp_path / "plain.onnx", tmp_path / "tuned.onnx"
    off = tuned(tmp_path / "off.cfg", "fine_tune = OFF", weights=True)
    assert command.convert(off, plain).code == 0
    lines = ("fine_tune = END_TO_END", "epochs = 1", "learning_rate = 0.9")
    result = command.convert(tuned(tmp_path / "t.cfg", *lines, weights=True), out)
    assert "nothing gained" in result.out
    assert onnx.load(out).graph == onnx.load(plain).graph
