"""The configuration file: every key and every grammar rule, right and wrong."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from converter.config import Config, load_config
from converter.config.keys import RECIPES, SECTIONS
from converter.errors import ConfigError

COMMON, MIXED = "common_quant_param", "mixed_bit_weight_quant_param"
WEIGHT = "weight_quant_param"
DYNAMIC = "dynamic_quant_param"
TRANSFORM = "transform_quant_param"
FULL, DATA, TUNE = "full_quant_param", "data_preprocess_param", "fine_tune_param"
WEIGHT_ONLY = "[common_quant_param]\nquant_type=WEIGHT_QUANT\n"
FULL_QUANT = """[common_quant_param]
quant_type=FULL_QUANT
[data_preprocess_param]
calibrate_path=image:pictures
calibrate_size=10
input_type=IMAGE
"""

# What is wrong for a key → words the sentence must hold. Every key of the table has its rows here.
MISTAKES = {
    (COMMON, "quant_type"): [("FULL", "WEIGHT_QUANT, FULL_QUANT or DYNAMIC_QUANT")],
    (COMMON, "bit_num"): [
        (bad, "integer from 0 to 16")
        for bad in ("17", "-1", "8.0", "eight", "1_0", "٨", "9" * 5000)
    ],
    (COMMON, "min_quant_weight_size"): [
        (bad, "integer from 0 to 65535") for bad in ("65536", "-1", "1e3")
    ],
    (COMMON, "min_quant_weight_channel"): [
        (bad, "integer from 0 to 65535") for bad in ("65536", "-1")
    ],
    (COMMON, "skip_quant_node"): [
        (bad, "names separated by commas") for bad in ("a,,b", ",", "a,", "a,''")
    ],
    (COMMON, "skip_quant_type"): [(",Conv", "names separated by commas")],
    (COMMON, "debug_info_save_path"): [("'open", "quote")],
    (COMMON, "providers"): [
        (bad, "names separated by commas") for bad in (",", "CPUExecutionProvider,", "a,,b")
    ],
    (COMMON, "calibration_memory"): [
        (bad, "integer from 16 to 1048576") for bad in ("15", "1048577", "1GB", "0.5")
    ],
    (COMMON, "calibration_cache"): [("'cache.npz", "quote")],
    (COMMON, "thread_num"): [(bad, "integer from 1 to 1024") for bad in ("0", "-1", "all")],
    (MIXED, "init_scale"): [
        (bad, "above 0 and below 1") for bad in ("0", "1", "nan", "inf", "-0.1", "1" * 400, "0,5")
    ],
    (COMMON, "opset"): [(bad, "an integer from 13 to 99") for bad in ("12", "x")],
    (COMMON, "export_recipe"): [('"recipe.cfg', "quote")],
    (MIXED, "auto_tune"): [(bad, "true or false") for bad in ("yes", "1")],
    (MIXED, "min_cosine"): [(bad, "above 0 and below 1") for bad in ("1", "-1", "99%")],
    (MIXED, "search"): [("GREEDY", "ERROR or SENSITIVITY")],
    (MIXED, "target_ratio"): [(bad, "above 1 and below 32") for bad in ("1", "0.5", "32")],
    (WEIGHT, "dequant_strategy"): [("NEVER", "ON_LOAD or ON_THE_FLY")],
    (WEIGHT, "per_channel"): [("no", "true or false")],
    (WEIGHT, "bias_correction"): [("on", "true or false")],
    (WEIGHT, "quant_strategy"): [("KL", "MAX_MIN or GPTQ")],
    (WEIGHT, "block_size"): [
        (bad, "power of two from 16 to 256") for bad in ("8", "48", "512", "x")
    ],
    (WEIGHT, "table_bit_num"): [(bad, "integer from 1 to 16") for bad in ("0", "17", "x")],
    (FULL, "activation_quant_method"): [
        ("MINMAX_", "MAX_MIN, KL, REMOVAL_OUTLIER, PERCENTILE, MSE,")
    ],
    (FULL, "outlier_ratio"): [(bad, "above 0 and below 0.5") for bad in ("0", "0.5", "-0.1", "1%")],
    (FULL, "weight_rounding"): [("RANDOM", "GPTQ or NEAREST")],
    (FULL, "equalize"): [("yes", "true or false")],
    (FULL, "overflow_safe"): [("maybe", "true or false")],
    (FULL, "power_of_two_scale"): [("2", "true or false")],
    (FULL, "only_where_it_pays"): [("1", "true or false")],
    (FULL, "require_full_integer"): [("1", "true or false")],
    (FULL, "allow_float"): [(bad, "names separated by commas") for bad in ("Softmax,", ",")],
    (FULL, "max_drop"): [(bad, "above 0 and below 1") for bad in ("0", "1", "1%", "-0.01", "inf")],
    (FULL, "activation_bits"): [(bad, "8, 16 or MIXED") for bad in ("4", "32", "MIX")],
    (FULL, "bias_correction"): [("on", "true or false")],
    (FULL, "per_channel"): [("no", "true or false")],
    (FULL, "target_device"): [("KIRIN", "CPU, CPU_VNNI, ARM, OPENVINO, NVGPU, DSP or QNN")],
    (DYNAMIC, "quant_strategy"): [("ALWL", "ALWC or ACWL")],
    (TRANSFORM, "export_precision_mode"): [("INT8", "QUANT or FLOAT32")],
    (TRANSFORM, "mean"): [(bad, "above -0.5 and below 255.5") for bad in ("256", "-1", "x")],
    (TRANSFORM, "std_dev"): [(bad, "above 0 and below") for bad in ("0", "-1", "inf")],
    (DATA, "calibrate_path"): [
        (bad, "input_name:folder pairs")
        for bad in (
            "pictures",
            ":pictures",
            "image:",
            "a:x,",
            "a:x,a:y",
            r"C:\pictures",
            "a:x,pictures",
        )
    ],
    (DATA, "verify_size"): [(bad, "integer from 1 to 65535") for bad in ("0", "many")],
    (TUNE, "fine_tune"): [("YES", "OFF, BLOCK, END_TO_END or AUTO")],
    (TUNE, "time_limit"): [(bad, "above 0 and below 10080") for bad in ("0", "x", "20000")],
    (TUNE, "epochs"): [(bad, "integer from 1 to 65535") for bad in ("0", "1.5")],
    (TUNE, "batch_size"): [(bad, "integer from 1 to 4096") for bad in ("0", "4097")],
    (TUNE, "learning_rate"): [(bad, "above 0 and below 1") for bad in ("0", "1", "fast")],
    (TUNE, "seed"): [(bad, "integer from 0 to 2147483647") for bad in ("-1", "x")],
    (TUNE, "weight_bits"): [(bad, "integer from 2 to 8") for bad in ("1", "9")],
    (TUNE, "activation_bits"): [(bad, "integer from 1 to 8") for bad in ("0", "16")],
    (TUNE, "augment"): [("some", "true or false")],
    (DATA, "calibrate_size"): [(bad, "integer from 1 to 65535") for bad in ("0", "65536")],
    (DATA, "input_type"): [("JPEG", "IMAGE, BIN, NPY or SYNTHETIC")],
    (DATA, "synthetic_size"): [(bad, "integer from 0 to 65535") for bad in ("-1", "65536", "x")],
    (DATA, "state_inputs"): [
        (bad, "input_name:output_name pairs")
        for bad in ("h", "h:", ":h_out", "h:h_out,", "h:a,h:b", "h:a,c:a")
    ],
    (DATA, "label_file"): [('"labels.csv', "quote")],
    (DATA, "image_to_format"): [("RGBA", "RGB, GRAY or BGR")],
    (DATA, "normalize_mean"): [
        (bad, "1 or 3 finite numbers")
        for bad in ("[1, 2]", "[]", "[1", "[nan]", "[1,,2]", "[1 2 3]", "[1e999]")
    ],
    (DATA, "normalize_std"): [
        (bad, "finite numbers other than 0") for bad in ("[0]", "[1, 0.0, 1]", "[-0]", "1,2,3,4")
    ],
    (DATA, "resize_width"): [("0", "integer from 1 to 65535")],
    (DATA, "resize_height"): [("65536", "integer from 1 to 65535")],
    (DATA, "resize_short_side"): [("1.5", "integer from 1 to 65535")],
    (DATA, "resize_method"): [("AREA", "NEAREST, LINEAR or CUBIC")],
    (DATA, "center_crop_width"): [("x", "integer from 1 to 65535")],
    (DATA, "center_crop_height"): [("0x10", "integer from 1 to 65535")],
    ("job", "model"): [("'model.onnx", "quote")],
    ("job", "output"): [("'out.onnx", "quote")],
}
TABLE = [(section.name, key) for section in SECTIONS.values() for key in section.keys]


def load(folder: Path, text: str | bytes) -> Config:
    file = folder / "my.cfg"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(file)


def refusal(folder: Path, text: str | bytes) -> str:
    """Return the sentence a text is refused with, from the file's name on."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert message.startswith(f"{folder}{os.sep}my.cfg")
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{folder}{os.sep}")


def test_every_key_has_a_mistake() -> None:
    assert sorted(MISTAKES) == sorted(TABLE)


@pytest.mark.parametrize(
    ("section", "key", "bad", "words"),
    [(*name, *row) for name, rows in MISTAKES.items() for row in rows],
)
def test_a_wrong_value_names_file_line_section_key_and_what_is_allowed(
    tmp_path: Path, section: str, key: str, bad: str, words: str
) -> None:
    message = refusal(tmp_path, f"# first\n[{section}]\n\n{key} = {bad}\n")
    assert message.startswith(f"my.cfg:4: [{section}] {key} = {bad[:80]}")
    assert words in message


@pytest.mark.parametrize(("section", "key"), TABLE)
def test_the_example_of_every_key_is_allowed(section: str, key: str) -> None:
    kind = SECTIONS[section].keys[key].kind
    assert kind.parse(kind.example) not in (None, ())


def test_messages_in_full(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[common_quant_param]\nquant_type=FULL_QUANT\nbit_num = 9\n") == (
        "my.cfg:3: [common_quant_param] bit_num = 9: must be 8 for FULL_QUANT; write bit_num = 8."
    )
    assert refusal(tmp_path, "[common_quant_param]\nquant_type = FUL_QUANT\n") == (
        "my.cfg:2: [common_quant_param] quant_type = FUL_QUANT: must be WEIGHT_QUANT, FULL_QUANT "
        "or DYNAMIC_QUANT; "
        "write for example quant_type = FULL_QUANT."
    )


GRAMMAR = {
    "text before a section": ("bit_num = 8\n", 1, "before any section"),
    "no closing bracket": ("\n[common_quant_param\n", 2, "write [common_quant_param]"),
    "no section name": ("[ ]\n", 1, "names no section"),
    "text after the header": (
        "[common_quant_param] quant_type = FULL_QUANT\n",
        1,
        "closing bracket",
    ),
    "no equals sign": ("[common_quant_param]\nquant_type\n", 2, "key = value"),
    "no key": ("[common_quant_param]\n= 8\n", 2, "key = value"),
    "no value": ("[common_quant_param]\nbit_num =\n", 2, "has no value"),
    "only a comment as value": ("[common_quant_param]\nbit_num = # 8\n", 2, "has no value"),
    "only quotes as value": ("[common_quant_param]\nbit_num = ''\n", 2, "has no value"),
    "open quote": ("[common_quant_param]\nskip_quant_node = a, 'b # c\n", 2, "quote"),
    "text after a quote": ("[common_quant_param]\nskip_quant_node = 'a' b\n", 2, "quote"),
    "key twice": (
        "[common_quant_param]\nbit_num=8\nthread_num=1\nbit_num=8\n",
        4,
        "already on line 2",
    ),
    "section twice": (WEIGHT_ONLY + "[common_quant_param]\n", 3, "already on line 1"),
    "unknown section": ("[common_param]\n", 1, "write [common_quant_param]"),
    "unlike any section": (
        "[zzz]\n",
        1,
        "write one of [common_quant_param], [mixed_bit_weight_quant_param]",
    ),
    "section in capitals": ("[COMMON_QUANT_PARAM]\n", 1, "write [common_quant_param]"),
    "unknown key": ("[common_quant_param]\nquant_typ = FULL_QUANT\n", 2, "write quant_type"),
    "unlike any key": (
        "[full_quant_param]\nzzz = 1\n",
        2,
        "write one of activation_quant_method, outlier_ratio, ",
    ),
    "key in capitals": ("[common_quant_param]\nBit_Num = 8\n", 2, "write bit_num"),
    "key of another section": (
        "[common_quant_param]\nper_channel = true\n",
        2,
        "under [full_quant_param]",
    ),
    "key of another section, like an own one": (
        f"[{DATA}]\nquant_type = KL\n",
        2,
        "line under [common_quant_param]",
    ),
    "nearly a key of another section": (
        "[common_quant_param]\nperchanel = 1\n",
        2,
        "per_channel under [full_quant_param]",
    ),
    "not UTF-8": (b"[common_quant_param]\r\n# \xff\r\n", 2, "UTF-8"),
    "UTF-16": ("[common_quant_param]".encode("utf-16"), 1, "UTF-8"),
    "NUL": ("[common_quant_param]\r\r\nbit_num = \0\n", 3, "NUL"),
    "very long names": (f"[{'s' * 500_000}]\n", 1, "is not a section"),
}


@pytest.mark.parametrize(("text", "line", "words"), GRAMMAR.values(), ids=GRAMMAR)
def test_a_grammar_error_names_its_line(
    tmp_path: Path, text: str | bytes, line: int, words: str
) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"my.cfg:{line}: ")
    assert words in message
    assert len(message) < 500


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in refusal(tmp_path, "[common_quant_param]\nbit_num = \x1b[2J8\n")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.cfg: cannot be read \(no such file"):
        load_config(tmp_path / "none.cfg")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    assert "larger than 1 MB" in refusal(tmp_path, "#" * 1_000_001)
    assert (
        load(tmp_path, WEIGHT_ONLY + "#" * (1_000_000 - len(WEIGHT_ONLY))).common.quant_type
        == "WEIGHT_QUANT"
    )


CROSS = {
    "no mode": ("[full_quant_param]\n", 0, "quant_type: is missing"),
    "no mode in its section": ("\n[common_quant_param]\nbit_num=8\n", 2, "quant_type: is missing"),
    "two modes": (
        f"{WEIGHT_ONLY}[{TRANSFORM}]\nexport_precision_mode=QUANT",
        4,
        "go with quant_type = WEIGHT_QUANT",
    ),
    "float and integers": (
        FULL_QUANT + f"[{TRANSFORM}]\nexport_precision_mode=FLOAT32",
        8,
        "remove one of the two",
    ),
    "pixels without a scale": (
        f"[{TRANSFORM}]\nexport_precision_mode=QUANT\nmean=0",
        1,
        "std_dev: is missing beside",
    ),
    "pixels without a mean": (
        f"[{TRANSFORM}]\nexport_precision_mode=QUANT\nstd_dev=1",
        1,
        "mean: is missing beside",
    ),
    "dynamic bits": (
        "[common_quant_param]\nquant_type=DYNAMIC_QUANT\nbit_num=4\n",
        3,
        "must be 8 for DYNAMIC_QUANT",
    ),
    "files without a folder": (
        FULL_QUANT.replace("calibrate_path=image:pictures", ""),
        3,
        "calibrate_path: is missing beside input_type = IMAGE",
    ),
    "distilled and files": (
        FULL_QUANT.replace("IMAGE", "SYNTHETIC"),
        6,
        "reads no files, and there is calibrate_path; remove calibrate_path, or give the type of "
        "its files and synthetic_size = 32",
    ),
    "labels of what is distilled": (
        f"[common_quant_param]\nquant_type=FULL_QUANT\n[{DATA}]\nlabel_file=labels.csv",
        4,
        "has no labels for samples that are distilled from the model; give calibrate_path",
    ),
    "no size": (
        FULL_QUANT.replace("calibrate_size=10", ""),
        3,
        "calibrate_size: is missing beside calibrate_path",
    ),
    "no type": (
        FULL_QUANT.replace("input_type=IMAGE", ""),
        3,
        "input_type: is missing beside calibrate_path",
    ),
    "mean alone": (
        FULL_QUANT + "normalize_mean=[1]",
        3,
        "normalize_std: is missing beside normalize_mean",
    ),
    "std alone": (
        FULL_QUANT + "normalize_std=[1]",
        3,
        "normalize_mean: is missing beside normalize_std",
    ),
    "lengths": (
        FULL_QUANT + "normalize_mean=[1]\nnormalize_std=[1,2,3]",
        8,
        "as many numbers as normalize_mean, 1",
    ),
    "grey": (
        FULL_QUANT + "normalize_mean=1,2,3\nnormalize_std=1,2,3\nimage_to_format=GRAY",
        7,
        "the 1 channels",
    ),
    "colour": (
        FULL_QUANT + "image_to_format=BGR\nnormalize_mean=1\nnormalize_std=1",
        8,
        "the 3 channels",
    ),
    "width alone": (
        FULL_QUANT + "resize_width=8",
        3,
        "resize_height: is missing beside resize_width",
    ),
    "height alone": (
        FULL_QUANT + "resize_height=8",
        3,
        "resize_width: is missing beside resize_height",
    ),
    "crop width alone": (FULL_QUANT + "center_crop_width=8", 3, "center_crop_height: is missing"),
    "crop height alone": (FULL_QUANT + "center_crop_height=8", 3, "center_crop_width: is missing"),
    "two sizes": (
        FULL_QUANT + "resize_width=8\nresize_height=8\nresize_short_side=8",
        9,
        "either the short side",
    ),
    "wide crop": (
        FULL_QUANT + "resize_width=8\nresize_height=9\ncenter_crop_width=9\ncenter_crop_height=8",
        9,
        "larger than resize_width = 8; write 8 or less",
    ),
    "high crop": (
        FULL_QUANT + "resize_width=9\nresize_height=8\ncenter_crop_width=9\ncenter_crop_height=9",
        10,
        "larger than resize_height = 8; write 8 or less",
    ),
    "crop over the short side": (
        FULL_QUANT + "resize_short_side=8\ncenter_crop_width=9\ncenter_crop_height=10",
        8,
        "larger than resize_short_side = 8",
    ),
}


@pytest.mark.parametrize(("text", "line", "words"), CROSS.values(), ids=CROSS)
def test_rules_between_keys(tmp_path: Path, text: str, line: int, words: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"my.cfg:{line}: " if line else "my.cfg: ")
    assert words in message


def test_a_crop_may_exceed_the_short_side_on_one_side(tmp_path: Path) -> None:
    crop = "resize_short_side=8\ncenter_crop_width=20\ncenter_crop_height=8"
    assert load(tmp_path, FULL_QUANT + crop).preprocess.center_crop_width == 20


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, WEIGHT_ONLY)
    assert (config.common.bit_num, config.common.min_quant_weight_size) == (8, 0)
    assert (config.common.min_quant_weight_channel, config.common.thread_num) == (16, None)
    assert (config.mixed_bit.init_scale, config.mixed_bit.auto_tune) == (0.02, False)
    assert (config.full_quant.activation_quant_method, config.full_quant.target_device) == (
        "MAX_MIN",
        None,
    )
    assert (config.full_quant.bias_correction, config.full_quant.per_channel) == (True, True)
    assert (config.preprocess.resize_method, config.preprocess.normalize_mean) == ("LINEAR", ())
    assert (config.path, config.warnings) == (tmp_path / "my.cfg", ())


def test_comments_quotes_blanks_and_line_ends(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "\ufeff  # whole line\r\n; whole line\r\n\t[ common_quant_param ]  # header\r\n"
        "  quant_type\t= 'FULL_QUANT' # why\r"
        "debug_info_save_path = \"/a b/#c=d # 'e'\"  # 'comment'\nskip_quant_node =#1, 'a,b' , "
        'c#d,"e # f", it\'s\n'
        "[data_preprocess_param]\ncalibrate_path=x:y\ncalibrate_size=+010\ninput_type=NPY",
    )
    assert config.common.quant_type == "FULL_QUANT"
    assert config.common.debug_info_save_path == Path("/a b/#c=d # 'e'")
    assert config.common.skip_quant_node == ("#1", "a,b", "c#d", "e # f", "it's")
    assert config.preprocess.calibrate_size == 10


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("RemovalOutlier", "REMOVAL_OUTLIER"),
        ("removal_outlier", "REMOVAL_OUTLIER"),
        ("kl", "KL"),
        ("'MAX_MIN'", "MAX_MIN"),
    ],
)
def test_spellings_of_the_activation_method(tmp_path: Path, text: str, method: str) -> None:
    config = load(tmp_path, f"{FULL_QUANT}[full_quant_param]\nactivation_quant_method={text}")
    assert config.full_quant.activation_quant_method == method


def test_nearest_may_be_misspelt_as_the_documentation_has_it(tmp_path: Path) -> None:
    sizes = "resize_width=8\nresize_height=8\nresize_method=NEARST"
    assert load(tmp_path, FULL_QUANT + sizes).preprocess.resize_method == "NEAREST"


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("image:/data", [("image", "/data")]),
        ("input:0:/data, b : /other dir ", [("input:0", "/data"), ("b", "/other dir")]),
        (r"image:C:\data,b:D:/data", [("image", r"C:\data"), ("b", "D:/data")]),
        (r"input:0:C:\data", [("input:0", r"C:\data")]),
        ("image:'like, this: one'", [("image", "like, this: one")]),
        ("'a:b':\"/x:y\", c:/z", [("a:b", "/x:y"), ("c", "/z")]),
        ('"a:/x,b:/y"', [("a", "/x"), ("b", "/y")]),
        ("'a:/x','b:/y'", [("a", "/x"), ("b", "/y")]),
        ("x:/data", [("x", "/data")]),
    ],
)
def test_calibrate_path(tmp_path: Path, text: str, pairs: list[tuple[str, str]]) -> None:
    config = load(tmp_path, FULL_QUANT.replace("image:pictures", text))
    assert config.preprocess.calibrate_path == tuple((name, Path(folder)) for name, folder in pairs)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[common_quant_param]\nquant_type=FULL_QUANT\n", 32),
        (f"[common_quant_param]\nquant_type=FULL_QUANT\n[{DATA}]\ncalibrate_size=7", 7),
        (f"{WEIGHT_ONLY}[{DATA}]\ninput_type=SYNTHETIC", 32),
        (f"{WEIGHT_ONLY}[{DATA}]\ncalibrate_size=7", 0),
        (f"[{TRANSFORM}]\nexport_precision_mode=QUANT", 0),
        (FULL_QUANT, 0),
        (FULL_QUANT + "synthetic_size=5", 5),
    ],
)
def test_how_many_samples_are_distilled(tmp_path: Path, text: str, count: int) -> None:
    assert load(tmp_path, text).distilled == count


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data_preprocess_param", "calibrate_path", "image:{}"),
        ("data_preprocess_param", "label_file", "{}"),
        ("common_quant_param", "calibration_cache", "{}"),
        ("common_quant_param", "debug_info_save_path", "{}"),
    ],
)
def test_a_relative_path_is_looked_for_beside_the_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str, value: str
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    lines = [line for line in FULL_QUANT.splitlines() if not line.startswith(key)]
    lines.insert(lines.index(f"[{section}]") + 1, f"{key} = {value.format('named')}")

    def seen() -> Path:
        config = load(beside, "\n".join(lines))
        part = config.common if section.startswith("common") else config.preprocess
        found = getattr(part, key)
        return Path(found if isinstance(found, Path) else found[0][1])

    assert seen() == Path("named")
    (here / "named").mkdir()
    assert seen() == Path("named")
    (beside / "named").mkdir()
    assert seen() == beside / "named"


IDLE = {
    "mode": (
        WEIGHT_ONLY + "[full_quant_param]\nper_channel=true",
        [(4, "per_channel = true", "FULL_QUANT")],
    ),
    "weight key": (
        FULL_QUANT.replace("[data", "min_quant_weight_size=9\n[data"),
        [(3, "size = 9", "WEIGHT_QUANT")],
    ),
    "fixed bits": (
        WEIGHT_ONLY + "[mixed_bit_weight_quant_param]\ninit_scale=.5",
        [(4, "init_scale = .5", "bit_num = 0")],
    ),
    "mixed bits": (
        WEIGHT_ONLY + "bit_num=0\n[mixed_bit_weight_quant_param]\ninit_scale=.5\nauto_tune=TRUE",
        [],
    ),
    "distilled pictures": (
        f"[common_quant_param]\nquant_type=FULL_QUANT\n[{DATA}]\nnormalize_mean=[1]\n"
        "normalize_std=[1]",
        [],
    ),
    "distilled beside nothing": (
        f"{WEIGHT_ONLY}[{DATA}]\nsynthetic_size=8",
        [(4, "synthetic_size = 8", "calibrate_path")],
    ),
    "not pictures": (
        FULL_QUANT.replace("IMAGE", "BIN") + "resize_width=8\nresize_height=9\n",
        [
            (7, "resize_width = 8", "input_type = IMAGE"),
            (8, "resize_height = 9", "input_type = IMAGE"),
        ],
    ),
    "nothing to resize": (
        FULL_QUANT + "resize_method=CUBIC",
        [(7, "resize_method = CUBIC", "a size to resize to")],
    ),
    "trained": (f"[{TRANSFORM}]\nexport_precision_mode=QUANT\nmean=127.5\nstd_dev=127.5", []),
    "float, no data": (
        f"[{TRANSFORM}]\nexport_precision_mode=FLOAT32\nmean=1\nstd_dev=1",
        [(3, "mean = 1", "FULL_QUANT"), (4, "std_dev = 1", "FULL_QUANT")],
    ),
    "resized": (FULL_QUANT + "resize_short_side=9\nresize_method=CUBIC", []),
}


@pytest.mark.parametrize(("text", "expected"), IDLE.values(), ids=IDLE)
def test_a_key_without_effect_is_named(
    tmp_path: Path, text: str, expected: list[tuple[int, str, str]]
) -> None:
    warnings = load(tmp_path, text).warnings
    assert len(warnings) == len(expected)
    for warning, (line, entry, words) in zip(warnings, expected, strict=True):
        assert warning.startswith(f"{tmp_path / 'my.cfg'}:{line}: [")
        assert f"{entry}: has no effect" in warning
        assert words in warning


GARBAGE = st.lists(
    st.sampled_from(
        [
            *SECTIONS,
            *(key for _, key in TABLE),
            *"[]=#;,:'\" \n\r\0é",
            "FULL_QUANT",
            "WEIGHT_QUANT",
            "1",
            "x",
        ]
    )
).map(lambda parts: "".join(parts).encode())


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300
)
@given(
    st.binary() | st.text().map(str.encode) | GARBAGE.map(WEIGHT_ONLY.encode().__add__) | GARBAGE
)
@example(WEIGHT_ONLY.encode())
@example(b"[data_preprocess_param]\ncalibrate_path = x:" + b"y" * 5000)
def test_any_bytes_give_a_config_or_a_config_error(tmp_path: Path, data: bytes) -> None:
    try:
        assert isinstance(load(tmp_path, data), Config)
    except ConfigError as error:
        assert str(error).startswith(str(tmp_path / "my.cfg"))


PIXELS = st.integers(1, 65535)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAME = st.text(st.characters(exclude_characters="'", exclude_categories=["Cc", "Cs"]), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    nodes=st.lists(NAME, min_size=1),
    folders=st.dictionaries(NAME, NAME.map("/folder".__add__), min_size=1),
    mean=st.lists(FINITE, min_size=3, max_size=3),
    std=st.lists(FINITE.filter(lambda number: not math.isclose(number, 0)), min_size=3, max_size=3),
    width=PIXELS,
    height=PIXELS,
    flag=st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path: Path,
    nodes: list[str],
    folders: dict[str, str],
    mean: list[float],
    std: list[float],
    width: int,
    height: int,
    flag: bool,
) -> None:
    written = [
        f"[{COMMON}]\nquant_type = FULL_QUANT\nskip_quant_node = "
        + ", ".join(f"'{name}'" for name in nodes),
        f"[{FULL}]\nper_channel = {flag}",
        f"[{DATA}]\ncalibrate_path = "
        + ",".join(f"'{name}':'{folder}'" for name, folder in folders.items()),
        f"calibrate_size = {width}\ninput_type = IMAGE\nnormalize_mean = "
        f"{mean}\nnormalize_std = {std}",
        f"resize_width = {width}\nresize_height = {height}",
    ]
    config = load(tmp_path, "\n".join(written))
    data = config.preprocess
    assert config.common.skip_quant_node == tuple(nodes)
    assert config.full_quant.per_channel is flag
    assert data.calibrate_path == tuple((name, Path(folder)) for name, folder in folders.items())
    assert (data.normalize_mean, data.normalize_std) == (tuple(mean), tuple(std))
    assert (data.calibrate_size, data.resize_width, data.resize_height) == (width, width, height)


PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.cfg"))


def test_there_are_presets() -> None:
    assert "full_quant.cfg" in [preset.name for preset in PRESETS]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_presets_load_without_a_warning(preset: Path) -> None:
    assert load_config(preset).warnings == ()


def test_the_reference_has_one_row_a_key() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "converter.config"],
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    lines = run.stdout.splitlines()
    rows = [
        line.split(" | ")[0].removeprefix("| `").rstrip("`")
        for line in lines
        if line.startswith("| `")
    ]
    about_nodes = [key for section in RECIPES.values() for key in section.keys]
    assert rows == [key for _, key in TABLE] + about_nodes
    assert all(line.replace(r"\|", "").count("|") == 6 for line in lines if line.startswith("|"))
    assert (
        "| `init_scale` | 0.02 | a number above 0 and below 1 | WEIGHT_QUANT with bit_num = 0 |"
        in "\n".join(lines)
    )
