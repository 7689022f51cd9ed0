"""Advice names settings that would change something: in this mode, and not as they are already."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import write_config

from calib.affine import UINT8, QParams
from converter.config import Config, default_config, load_config
from converter.config.keys import SECTIONS
from converter.config.left import against_saturation
from converter.measure.errors import Speed, TensorError
from converter.measure.pairing import Place
from converter.measure.results import NodeFinding, Verification
from converter.report.advice import advice_for, overall_advice, skip_line
from converter.report.recipe import lines_in
from converter.report.rounds import Figures

KEYS = {name: key for section in SECTIONS.values() for name, key in section.keys.items()}
DATA = {"calibrate_path": "x:.", "calibrate_size": 1, "input_type": "NPY"}


def config(tmp_path: Path, mode: str, **more: object) -> Config:
    common = {"quant_type": mode, **{k: v for k, v in more.items() if k == "bit_num"}}
    full = {k: v for k, v in more.items() if k != "bit_num"}
    path = tmp_path / "c.cfg"
    return load_config(
        write_config(path, common_quant=common, full_quant=full, data_preprocess=DATA)
    )


def figures(low: float, high: float, shown_high: float) -> Figures:
    """A tensor of which what is above `shown_high` is cut off."""
    origin = (low, low / 2, 0.0, high / 2, high, 0.0, 1.0, 0.0)
    dequant = (low, low / 2, 0.0, high / 2, shown_high, 0.0, 1.0, 0.0)
    return Figures(origin, dequant, 0.2, (1.0, 1.0, 0.5, 0.5, 4.0, 0.0, 0.0))


def place(node: str) -> Place:
    q = QParams(np.float32(0.1), np.uint8(0), UINT8)
    return Place(node, "Conv", "t", 0, output=False, qparams=q)


def all_advice(settings: Config, bits: int = 8) -> str:
    """What is said of nodes that are cut off, noisy or costly, and saturate."""
    noisy = TensorError("y", 0.5, 3.0)
    nodes = [
        NodeFinding("a", "Conv", True, "", bits, 4, 1, noisy, noisy, 0.9),
        NodeFinding("b", "Conv", True, "", bits, 4, 1, noisy, noisy, 0.0),
    ]
    ranged = [(place("a"), figures(-1, 1, 0.2))]
    nodes = [
        replace(node, advice=advice_for(node, ranged if index else [], True, settings))
        for index, node in enumerate(nodes * 2)
    ]
    found = Verification(1, True, (noisy,), 0.0, Speed(0.5, 0.4, 0.6), None, None, {}, (), ("a",))
    return " ".join([*(node.advice for node in nodes), *overall_advice(nodes, found, settings)])


def named(text: str) -> set[str]:
    return {key for key in KEYS if re.search(rf"\b{key}\b", text)}


@pytest.mark.parametrize("mode", ["FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT"])
def test_only_keys_of_the_mode_are_named(tmp_path: Path, mode: str) -> None:
    settings = config(tmp_path, mode)
    text = all_advice(settings)
    assert all(KEYS[key].scope.holds(settings) for key in named(text))
    assert ("bit_num" in named(text)) == (mode == "WEIGHT_QUANT")
    assert ("max_drop" in named(text)) == (mode == "FULL_QUANT")
    assert ("WEIGHT_QUANT" in text) == (mode != "WEIGHT_QUANT")


def test_what_is_set_is_not_advised(tmp_path: Path) -> None:
    assert "activation_quant_method = MAX_MIN" not in all_advice(config(tmp_path, "FULL_QUANT"))
    other = config(tmp_path, "FULL_QUANT", activation_quant_method="KL")
    assert "activation_quant_method = MAX_MIN" in all_advice(other)
    assert "max_drop = 0.05, or" in all_advice(config(tmp_path, "FULL_QUANT", max_drop=0.1))
    assert "bit_num" not in all_advice(config(tmp_path, "WEIGHT_QUANT", bit_num=16), bits=16)


def test_saturation(tmp_path: Path) -> None:
    unsafe = config(tmp_path, "FULL_QUANT", overflow_safe="false")
    assert against_saturation(unsafe) == "write overflow_safe = true"
    for target in ("ARM", "CPU_VNNI", "OPENVINO"):
        other = config(tmp_path, "FULL_QUANT", target_device=target, overflow_safe="false")
        assert "write target_device = CPU" in against_saturation(other)
    for mode in ("FULL_QUANT", "DYNAMIC_QUANT", "WEIGHT_QUANT"):
        assert "overflow_safe" not in against_saturation(config(tmp_path, mode))
    assert "reduce_range" in against_saturation(default_config())


def test_a_model_of_unknown_settings_gets_all_advice() -> None:
    text = all_advice(default_config())
    assert named(text) >= {"activation_quant_method", "skip_quant_node", "max_drop"}
    assert "bit_num" not in named(text)  # which no one knows to be there


def test_ranges_of_training_follow_no_method(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.cfg", transform_quant={"export_precision_mode": "QUANT"})
    assert not named(all_advice(load_config(path))) & {"activation_quant_method", "max_drop"}


@pytest.mark.parametrize("names", [["conv"], ["a,b", "it's"], ["/head/conv", "x y"]])
def test_a_line_can_be_pasted_and_keeps_what_is_skipped_already(
    tmp_path: Path, names: list[str]
) -> None:
    settings = config(tmp_path, "FULL_QUANT")
    settings = replace(settings, common=replace(settings.common, skip_quant_node=("old/*",)))
    line = skip_line(names, settings)
    (tmp_path / "p.cfg").write_text(f"[common_quant_param]\nquant_type = WEIGHT_QUANT\n{line}\n")
    assert load_config(tmp_path / "p.cfg").common.skip_quant_node == ("old/*", *names)


def test_more_bits_are_advised_where_a_key_gives_them(tmp_path: Path) -> None:
    advice = all_advice(config(tmp_path, "WEIGHT_QUANT", bit_num=4), bits=4)
    lines = next(lines for lines in lines_in([advice]) if "bit_num" in lines)
    text = "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 4\n"
    (tmp_path / "p.cfg").write_text(f"{text}{lines}\n")
    (recipe,) = load_config(tmp_path / "p.cfg").recipes
    assert recipe.wishes == {"bit_num": 6}


def test_lines_of_a_sentence_are_told_with_their_sections() -> None:
    sentence = (
        "Its output is noisy (5.0 dB): try activation_quant_method = MSE, or leave it float, "
        "skip_quant_node = a,b"
    )
    assert lines_in([sentence, sentence]) == [
        "[full_quant_param]\nactivation_quant_method = MSE",
        "[common_quant_param]\nskip_quant_node = a,b",
    ]


def test_integers_get_no_more_bits(tmp_path: Path) -> None:
    assert "more bits" not in all_advice(config(tmp_path, "FULL_QUANT"))
