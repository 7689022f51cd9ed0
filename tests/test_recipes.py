"""Sections about single nodes, types and tensors: what they change, which of them wins, what is wrong
with them, and that what a conversion writes as such makes the same model again.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from graphs import build, frozen, normal
from running import Ear

from calib.affine import UINT8, UINT16
from converter.config import load_config
from converter.errors import ConfigError
from converter.job import Job
from converter.pipeline.convert import convert, make_plan
from converter.plan.plan import PerAxis, PerBlock, PerTensor
from converter.report.text import plan_lines

GRAPH = """g (float[1,24,8,8] x) => (float[1,24,8,8] y) {
    [stem] a = Conv <pads=[1,1,1,1]> (x, w)  [body_1] b = Conv <pads=[1,1,1,1]> (a, v)
    [body_2] c = Conv (b, p)  [head] y = Add (c, a)
}"""
WEIGHTS = {
    "w": normal(24, 24, 3, 3),
    "v": normal(24, 24, 3, 3, seed=1),
    "p": normal(24, 24, 1, 1),
}
MODEL = build(GRAPH, **WEIGHTS)
FULL = "quant_type = FULL_QUANT\n[full_quant_param]\ntarget_device = QNN"
WEIGHT = "quant_type = WEIGHT_QUANT\nmin_quant_weight_channel = 0\nbit_num = 4"


def task(folder, mode, text="", model=MODEL, shape=(8, 24, 8, 8)):
    """A job with more sections."""
    (folder / "model.onnx").write_bytes(frozen(model))
    np.save(folder / "x.npy", normal(*shape))
    data = f"calibrate_path = x:x.npy\ncalibrate_size = {shape[0]}\ninput_type = NPY"
    config = folder / "my.cfg"
    config.write_text(
        f"[data_preprocess_param]\n{data}\n[common_quant_param]\nthread_num = 1\n{mode}\n{text}"
    )
    return Job(folder / "model.onnx", folder / "out.onnx", load_config(config))


def planned(folder, mode, text):
    return make_plan(task(folder, mode, text), Ear())


# --- what they change


def test_a_node_is_left_float_and_says_which_section_did_it(tmp_path):
    plan = planned(tmp_path, FULL, "[node:body_*]\nskip = true")
    assert {name: node.quantized for name, node in plan.nodes.items()} == {
        "stem": True,
        "body_1": False,
        "body_2": False,
        "head": True,
    }
    assert plan.nodes["body_1"].reason == "skip in [node:body_*]"
    assert any("skip in [node:body_*]" in line for line in plan_lines(plan))


@pytest.mark.parametrize("mode", ["WEIGHT_QUANT", "DYNAMIC_QUANT"])
def test_every_mode_leaves_nodes_float(tmp_path, mode):
    plan = planned(tmp_path, f"quant_type = {mode}", "[type:Conv]\nskip = true")
    assert not plan.units()
    assert {plan.nodes[n].reason for n in ("stem", "body_1")} == {"skip in [type:Conv]"}


def test_later_sections_win_key_by_key(tmp_path):
    text = """[type:Conv]\nskip = true\nper_channel = false\n[node:body_*]\nskip = false
[node:body_2]\nper_channel = true"""
    plan = planned(tmp_path, FULL, text)
    assert [unit.name for unit in plan.units()] == ["body_1", "body_2", "head"]
    assert plan.nodes["body_1"].weight.granularity == PerTensor()
    assert plan.nodes["body_2"].weight.granularity == PerAxis(0)
    assert "per_channel = true in [node:body_2]" in plan.nodes["body_2"].reason


def test_a_section_may_take_back_what_the_whole_model_skips(tmp_path):
    mode = FULL.replace("[full", "skip_quant_type = Conv\n[full")
    plan = planned(tmp_path, mode, "[node:stem]\nskip = false")
    assert [u.name for u in plan.units() if u.op_type == "Conv"] == ["stem"]


def test_bits_of_activations_a_node(tmp_path):
    plan = planned(tmp_path, FULL, "[node:body_*]\nactivation_bits = 16")
    formats = {unit.name: unit.activation for unit in plan.units()}
    assert formats == {"stem": UINT8, "body_1": UINT16, "body_2": UINT16, "head": UINT8}
    assert {name: t.format for name, t in plan.converted.items()} == {"a": UINT16, "c": UINT8}
    lines = [" ".join(line.split()) for line in plan_lines(plan)]
    assert "a uint16 converted, as read by body_1" in lines
    wide = FULL + "\nactivation_bits = 16"
    plan = planned(tmp_path, wide, "[type:Add]\nactivation_bits = 8")
    assert plan.nodes["head"].activation == UINT8
    assert plan.nodes["stem"].activation == UINT16


def test_a_given_range_and_a_method_of_a_node_s_own(tmp_path):
    text = "[tensor:a]\nrange = [-3, 9]\n[node:body_1]\nactivation_quant_method = PERCENTILE"
    convert(task(tmp_path, FULL, text), Ear())
    model = onnx.load(tmp_path / "out.onnx")
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert scales["a_scale"] == np.float32(12 / 255)
    (node,) = (n for n in model.graph.node if n.output[0] == "a_quantized")
    assert scales[node.input[2]] == round(3 / (12 / 255))


def test_a_range_without_effect_is_named(tmp_path):
    text = "[node:*]\nskip = true\n[tensor:a]\nrange = [-3, 9]"
    convert(task(tmp_path, FULL, text), ear := Ear())
    (said,) = (line for line in ear.warned if "range" in line)
    assert said.endswith(
        "[tensor:a] range has no effect, as the tensor stays float; remove the section."
    )


def test_bits_and_grids_of_weights_a_node(tmp_path):
    matrices = build(
        "g (float[2,64] x) => (float[2,64] y) { [one] a = MatMul (x, w)  [two] y = MatMul (a, v) }",
        w=normal(64, 64),
        v=normal(64, 64, seed=1),
    )
    mode = WEIGHT + "\n[weight_quant_param]\ndequant_strategy = ON_THE_FLY"
    text = "[node:two]\nbit_num = 8\nblock_size = 32\nquant_strategy = MAX_MIN"
    job = task(tmp_path, mode, text, matrices, (16, 64))
    plan = make_plan(job, Ear())
    one, two = (plan.nodes[name] for name in ("one", "two"))
    assert (one.weight.format.bits, one.weight.granularity) == (4, PerAxis(1))
    assert (two.weight.format.bits, two.weight.granularity) == (8, PerBlock(1, 32))
    assert (one.weight.blind, two.weight.blind) == (False, True)
    assert two.reason.startswith("weights stored in 8 bits; bit_num = 8 in [node:two]")
    convert(job, Ear())
    kinds = {t.data_type for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert {onnx.TensorProto.UINT4, onnx.TensorProto.UINT8} <= kinds


@pytest.mark.parametrize("search", ["ERROR", "SENSITIVITY\ntarget_ratio = 6"])
def test_no_search_changes_bits_that_are_given(tmp_path, search):
    mode = WEIGHT.replace("bit_num = 4", "bit_num = 0")
    mode += f"\n[mixed_bit_weight_quant_param]\nsearch = {search}"
    outcome = convert(task(tmp_path, mode, "[node:stem]\nbit_num = 11"), Ear())
    widths = {name: w.qparams.format.bits for (name, _), w in outcome.plan.stored.items()}
    assert widths["stem"] == 11
    assert widths["body_1"] < 11


# --- what is wrong with them


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[node:stam]", "no node is named 'stam' in this model; the nearest is 'stem'."),
        ("[type:Con]", "no node is of type 'Con' in this model; the nearest is 'Conv'."),
        ("[tensor:aa]", "no tensor is named 'aa' in this model; the nearest is 'a'."),
    ],
)
def test_a_section_about_nothing_is_an_error_with_the_nearest_name(tmp_path, text, words):
    keys = "range = [0, 1]" if "tensor" in text else "skip = true"
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, FULL, f"{text}\n{keys}")
    assert str(caught.value) == f"{tmp_path / 'my.cfg'}:10: {text}: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[node:]\nskip = true", "is not a section"),
        ("[nodes:stem]\nskip = true", "[nodes:stem]: is not a section"),
        ("[node:stem]\nskipp = true", "is not a key of [node:stem]; write skip."),
        ("[node:stem]\nskip = yes", "must be true or false"),
        ("[node:stem]\nbit_num = 0", "must be an integer from 1 to 16"),
        ("[node:stem]\nactivation_bits = MIXED", "must be 8 or 16"),
        ("[tensor:a]\nrange = [1, 1]", "two finite numbers in brackets, the lower one first"),
        ("[tensor:a]\nrange = 1, 2", "two finite numbers in brackets"),
        ("[tensor:a]\nrange = [0, 1, 2]", "two finite numbers in brackets"),
        ("[tensor:a]\nskip = true", "is not a key of [tensor:a]"),
        ("[node:stem]\nskip = true\n[node:stem]\nskip = false", "already on line"),
    ],
)
def test_mistakes_name_the_line_and_what_to_write(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        task(tmp_path, FULL, text)
    assert f"{tmp_path / 'my.cfg'}:" in str(caught.value)
    assert words in str(caught.value)


def test_a_key_of_another_mode_has_no_effect_and_says_so(tmp_path):
    job = task(tmp_path, FULL, "[node:stem]\nbit_num = 4")
    (warning,) = job.config.warnings
    assert "[node:stem] bit_num = 4: has no effect, as it is for WEIGHT_QUANT" in warning
    assert "bit_num" not in make_plan(job, Ear()).nodes["stem"].reason


def test_sixteen_bits_for_a_target_that_has_none_are_refused(tmp_path):
    mode = FULL.replace("QNN", "NVGPU")
    with pytest.raises(ConfigError, match="target NVGPU has no activations of 16 bits"):
        planned(tmp_path, mode, "[node:stem]\nactivation_bits = 16")


def test_rounding_by_data_needs_data(tmp_path):
    config = tmp_path / "c.cfg"
    config.write_text(f"[common_quant_param]\n{WEIGHT}\n[node:a]\nquant_strategy = GPTQ\n")
    with pytest.raises(ConfigError, match="calibrate_path: is missing for quant_strategy = GPTQ"):
        load_config(config)


# --- what a conversion writes


def same_again(folder, mode, more=""):
    """The sections written; a conversion with them gives the same graph and decides the same."""
    exported = mode.replace("quant_type", f"export_recipe = {folder / 'r.cfg'}\nquant_type", 1)
    convert(task(folder, exported, more), Ear())
    first, text = onnx.load(folder / "out.onnx").graph, (folder / "r.cfg").read_text()
    convert(task(folder, exported, f"{more}\n{text}"), Ear())
    assert onnx.load(folder / "out.onnx").graph == first
    assert (folder / "r.cfg").read_text() == text
    return text


@pytest.mark.parametrize("more", ["", "max_drop = 0.0001"])
def test_what_was_widened_can_be_kept(tmp_path, more):
    text = same_again(tmp_path, f"{FULL}\nactivation_bits = MIXED", more)
    assert "[node:*]\nactivation_bits = 8\n" in text
    assert bool(more) <= ("activation_bits = 16" in text)


def test_what_max_drop_left_float_can_be_kept(tmp_path):
    text = same_again(tmp_path, f"{FULL.replace('QNN', 'ARM')}\nmax_drop = 0.00005")
    assert "skip = true" in text


def test_bits_that_a_search_found_can_be_kept(tmp_path):
    mode = WEIGHT.replace("bit_num = 4", "bit_num = 0")
    text = same_again(tmp_path, mode)
    assert text.count("bit_num = ") == 3
    plan = json.loads((tmp_path / "r.json").read_text())
    assert [node["name"] for node in plan["nodes"]] == ["stem", "body_1", "body_2", "head"]
    assert plan["recipe"].keys() == {"stem", "body_1", "body_2"}


def test_the_plan_for_programs_has_the_parameters(tmp_path):
    mode = FULL.replace("quant_type", f"export_recipe = {tmp_path / 'r.cfg'}\nquant_type", 1)
    convert(task(tmp_path, mode, "[tensor:a]\nrange = [0, 255]"), Ear())
    plan = json.loads((tmp_path / "r.json").read_text())
    (tensor,) = (t for t in plan["tensors"] if t["name"] == "a")
    assert (tensor["format"], tensor["scale"], tensor["zero_point"]) == ("uint8", 1.0, 0)
    (stem,) = (node for node in plan["nodes"] if node["name"] == "stem")
    assert stem["weights"] == [{"name": "w", "format": "int8"}]


@pytest.mark.parametrize("name", ["a b", "a#b # c", "it's", "[0]", "é/ü", "a'b\"c", "*?"])
def test_any_name_can_be_written(tmp_path, name):
    model = build("g (float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }", w=normal(64, 64))
    model.graph[0].name = name
    mode = WEIGHT.replace("bit_num = 4", f"bit_num = 0\nexport_recipe = {tmp_path / 'r.cfg'}")
    convert(task(tmp_path, mode, "", model, (8, 64)), Ear())
    first = onnx.load(tmp_path / "out.onnx").graph
    convert(task(tmp_path, mode, (tmp_path / "r.cfg").read_text(), model, (8, 64)), Ear())
    assert onnx.load(tmp_path / "out.onnx").graph == first
