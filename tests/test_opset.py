"""The opset of the result: as the float model's, as new as is asked, or an error that says which is
needed.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import build, frozen, normal, run
from running import Ear

from converter.config import load_config
from converter.errors import ConfigError
from converter.job import Job
from converter.pipeline.convert import convert
from converter.prepare.opset import newest_opset, runtime_knows

GRAPH = """g (float[1,8,8,8] x) => (float[1,4] y) {
    a = Conv (x, w)  r = Relu (a)  p = GlobalAveragePool (r)  f = Flatten (p)  y = Gemm (f, k)
}"""
WEIGHTS = {"w": normal(32, 8, 3, 3) / 8, "k": normal(32, 4) / 6}
MODES = {
    "FULL_QUANT": "",
    "WEIGHT_QUANT": "min_quant_weight_channel = 0\n",
    "DYNAMIC_QUANT": "",
}


def converted(folder, mode, opset=None, extra="", own=13):
    ear = Ear()
    (folder / "model.onnx").write_bytes(frozen(build(GRAPH, own, 10, **WEIGHTS)))
    np.save(folder / "x.npy", normal(8, 8, 8, 8))
    asked = "" if opset is None else f"opset = {opset}\n"
    (folder / "my.cfg").write_text(
        f"[common_quant_param]\nquant_type = {mode}\nthread_num = 1\n{MODES[mode]}{asked}{extra}\n"
        "[data_preprocess_param]\ncalibrate_path = x:x.npy\ncalibrate_size = 8\ninput_type = NPY\n"
    )
    config = load_config(folder / "my.cfg")
    convert(Job(folder / "model.onnx", folder / "out.onnx", config), ear)
    return onnx.load(folder / "out.onnx"), ear


def opset_of(model):
    return next(each.version for each in model.opset_import if not each.domain)


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("mode", MODES)
def test_the_result_has_the_opset_that_is_asked_for_and_computes_the_same(tmp_path, mode, opset):
    model, _ = converted(tmp_path, mode, opset)
    assert opset_of(model) == opset
    onnx.checker.check_model(model, full_check=True)
    x = {"x": normal(1, 8, 8, 8, seed=3)}
    wanted = run(build(GRAPH, 13, **WEIGHTS), x)["y"]
    for optimize in (False, True):
        found = run(model.SerializeToString(), x, optimize)["y"]
        np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())


def test_without_a_wish_the_opset_stays(tmp_path):
    assert opset_of(converted(tmp_path, "FULL_QUANT", own=17)[0]) == 17


ON_THE_FLY = "[weight_quant_param]\ndequant_strategy = ON_THE_FLY\n"


@pytest.mark.parametrize(
    ("mode", "opset", "extra", "words"),
    [
        (
            "FULL_QUANT",
            17,
            "[full_quant_param]\nactivation_bits = 16",
            "activations of 16 bits need opset 21; write opset = 21 or more.",
        ),
        ("FULL_QUANT", 13, "", "the model itself has opset 14; write opset = 14 or more, or none."),
        ("FULL_QUANT", 99, "", "the newest opset known here is "),
        (
            "WEIGHT_QUANT",
            17,
            f"bit_num = 16\n{ON_THE_FLY}",
            "these integers need a type of opset 21; write opset = 21 or more, or "
            "dequant_strategy = ON_LOAD.",
        ),
        ("WEIGHT_QUANT", 17, f"{ON_THE_FLY}block_size = 32", "need a type of opset 21"),
    ],
)
def test_an_opset_that_will_not_do_is_an_error(tmp_path, mode, opset, extra, words):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, mode, opset, extra, own=14)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'my.cfg'}:")
    assert f"[common_quant_param] opset = {opset}: " in message
    assert words in message
    assert not (tmp_path / "out.onnx").exists()


def test_a_type_that_an_opset_lacks_is_replaced_by_a_wider_one_and_said(tmp_path):
    model, ear = converted(tmp_path, "WEIGHT_QUANT", 17, f"bit_num = 4\n{ON_THE_FLY}")
    assert opset_of(model) == 17
    assert any("stored in as many, as opset = 17 has no narrower type" in w for w in ear.warned)
    model, ear = converted(tmp_path, "WEIGHT_QUANT", 21, f"bit_num = 4\n{ON_THE_FLY}")
    assert opset_of(model) == 21
    assert not any("narrower type" in line for line in ear.warned)


def test_an_opset_that_the_runtime_lacks_is_an_error(tmp_path, monkeypatch):
    assert runtime_knows(21)
    assert not runtime_knows(newest_opset() + 50)
    monkeypatch.setattr("converter.pipeline.convert.runtime_knows", lambda opset: opset < 23)
    with pytest.raises(ConfigError, match="has no integers of opset 23; write a lower one"):
        converted(tmp_path, "FULL_QUANT", 23)


def test_the_newest_opset_is_onnx_s_own():
    assert newest_opset() == onnx.defs.onnx_opset_version() >= 24
