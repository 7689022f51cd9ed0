"""Rules between keys: each is a function of the whole `Config` that yields what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from converter.config.keys import SECTIONS, Config

_COMMON = "common_quant_param"
_FULL = "full_quant_param"
_TRANSFORM = "transform_quant_param"
_DATA = "data_preprocess_param"


@dataclass(frozen=True)
class Complaint:
    """A key to change: the sentence is "<place of the key>: <problem>; <advice>."."""

    section: str
    key: str
    problem: str
    advice: str


def _missing(key: str, reason: str, section: str = _DATA) -> Complaint:
    """Complain about a key, of the data section by default, that is not set."""
    return Complaint(
        section,
        key,
        f"is missing {reason}",
        f"write {key} = {SECTIONS[section].keys[key].kind.example}",
    )


def _mode_is_given(config: Config) -> Iterator[Complaint]:
    if config.mode is None:
        kind = SECTIONS[_COMMON].keys["quant_type"].kind
        yield _missing("quant_type", f"and must be {kind.allowed}", _COMMON)


def _mode_is_clear(config: Config) -> Iterator[Complaint]:
    quant_type = config.common.quant_type
    precision = config.transform.export_precision_mode
    if quant_type and precision and (quant_type, precision) != ("FULL_QUANT", "QUANT"):
        problem = f"does not go with quant_type = {quant_type}"
        yield Complaint(_TRANSFORM, "export_precision_mode", problem, "remove one of the two")


def _bits_fit_the_mode(config: Config) -> Iterator[Complaint]:
    if config.mode != "WEIGHT_QUANT" and config.common.bit_num != 8:
        yield Complaint(_COMMON, "bit_num", f"must be 8 for {config.mode}", "write bit_num = 8")


def _bits_are_free(config: Config) -> Iterator[Complaint]:
    if config.transform.export_precision_mode and config.full_quant.activation_bits != "8":
        problem = "does not go with export_precision_mode, whose ranges were trained for 8 bits"
        yield Complaint(_FULL, "activation_bits", problem, "remove one of the two")


def _data_is_whole(config: Config) -> Iterator[Complaint]:
    data = config.preprocess
    reasons = {
        "for quant_strategy = GPTQ": config.weight_quant.quant_strategy == "GPTQ"
        or any(recipe.wishes.get("quant_strategy") == "GPTQ" for recipe in config.recipes),
        "for fine_tune": config.fine_tune.fine_tune != "OFF",
        "beside calibrate_path": bool(data.calibrate_path),
        f"beside input_type = {data.input_type}": bool(data.input_type),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    for key in ("calibrate_path", "calibrate_size", "input_type"):
        if reason and data.input_type != "SYNTHETIC" and not getattr(data, key):
            complaint = _missing(key, reason)
            without = key == "calibrate_path" and not data.input_type
            more = ", or input_type = SYNTHETIC where there are no samples" if without else ""
            yield replace(complaint, advice=f"{complaint.advice}{more}")


def _distilled_is_clear(config: Config) -> Iterator[Complaint]:
    data, alone = config.preprocess, config.preprocess.input_type == "SYNTHETIC"
    if alone and data.calibrate_path:
        problem = "reads no files, and there is calibrate_path"
        advice = "remove calibrate_path, or give the type of its files and synthetic_size = 32"
        yield Complaint(_DATA, "input_type", problem, advice)
    if config.distils and data.label_file:
        problem = "has no labels for samples that are distilled from the model"
        yield Complaint(_DATA, "label_file", problem, "give calibrate_path, or remove the line")


def _pairs_are_whole(config: Config) -> Iterator[Complaint]:
    pairs = (("normalize_mean", "normalize_std"), ("resize_width", "resize_height"))
    for pair in (*pairs, ("center_crop_width", "center_crop_height")):
        given = [key for key in pair if getattr(config.preprocess, key)]
        absent = [key for key in pair if key not in given]
        if given and absent:
            yield _missing(absent[0], f"beside {given[0]}")


def _pixels_are_whole(config: Config) -> Iterator[Complaint]:
    given = {
        "mean": config.transform.mean is not None,
        "std_dev": config.transform.std_dev is not None,
    }
    for key, other in (("mean", "std_dev"), ("std_dev", "mean")):
        if given[other] and not given[key]:
            yield _missing(key, f"beside {other}", _TRANSFORM)


def _channels_agree(config: Config) -> Iterator[Complaint]:
    data = config.preprocess
    mean, std = len(data.normalize_mean), len(data.normalize_std)
    if mean != std:
        yield Complaint(
            _DATA,
            "normalize_std",
            f"must have as many numbers as normalize_mean, {mean}",
            "write as many",
        )
    channels = {"GRAY": 1, "RGB": 3, "BGR": 3}.get(
        data.image_to_format or "",
        mean,
    )
    if mean and mean != channels:
        problem = f"must have the {channels} channels of image_to_format = {data.image_to_format}"
        yield Complaint(_DATA, "normalize_mean", problem, "write one number a channel")


def _resize_is_clear(config: Config) -> Iterator[Complaint]:
    data = config.preprocess
    if data.resize_short_side and data.resize_width:
        problem = "does not go with resize_width and resize_height"
        yield Complaint(
            _DATA,
            "resize_short_side",
            problem,
            "keep either the short side or width and height",
        )


def _crop_fits(config: Config) -> Iterator[Complaint]:
    data = config.preprocess
    crop = (data.center_crop_width or 0, data.center_crop_height or 0)
    for side, size, limit in zip(
        ("width", "height"), crop, (data.resize_width, data.resize_height), strict=True
    ):
        if limit and size > limit:
            problem = f"is larger than resize_{side} = {limit}"
            yield Complaint(_DATA, f"center_crop_{side}", problem, f"write {limit} or less")
    if data.resize_short_side and min(crop) > data.resize_short_side:
        problem = (
            f"is larger than resize_short_side = {data.resize_short_side}, as is the other crop "
            "side"
        )
        yield Complaint(
            _DATA,
            "center_crop_width",
            problem,
            f"write {data.resize_short_side} or less",
        )


Rule = Callable[[Config], Iterator[Complaint]]
DATA_RULES: tuple[Rule, ...] = (
    _data_is_whole,
    _distilled_is_clear,
    _pairs_are_whole,
    _channels_agree,
    _resize_is_clear,
    _crop_fits,
)
# Without a mode a model is left as it is, but for what flags change.
MODELESS_RULES: tuple[Rule, ...] = (
    _mode_is_clear,
    _bits_are_free,
    _pixels_are_whole,
    *DATA_RULES,
)
RULES: tuple[Rule, ...] = (_mode_is_given, _bits_fit_the_mode, *MODELESS_RULES)


def conversion_rules(fp16: bool) -> tuple[Rule, ...]:
    """The rules for a conversion: with float16 constants there may be no mode."""
    return MODELESS_RULES if fp16 else RULES
