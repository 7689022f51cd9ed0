"""What a configuration asks of its target that the target does not have; told before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from converter.config import Config
from converter.errors import ConfigError
from converter.plan.targets import TARGETS, Target

# Problem and advice about a key of [full_quant_param].
_Complaint = tuple[str, str]


def check_target(config: Config) -> None:
    """Raises ConfigError, naming the key, for what the target cannot do."""
    target = TARGETS[config.full_quant.target_device or "CPU"]
    for key, rule in _RULES:
        for problem, advice in rule(config, target):
            where = config.at("full_quant_param", key)
            msg = f"{where}: {problem}; {advice}."
            raise ConfigError(msg)


def wants_wide(config: Config) -> bool:
    """Whether any activations are to have 16 bits."""
    bits = {recipe.wishes.get("activation_bits") for recipe in config.recipes}
    wide = config.full_quant.activation_bits != "8" or "16" in bits
    return config.mode == "FULL_QUANT" and wide


def _has_the_width(config: Config, target: Target) -> Iterator[_Complaint]:
    if wants_wide(config) and not target.wide:
        able = ", ".join(name for name, other in TARGETS.items() if other.wide)
        problem = f"target {target.name} has no activations of 16 bits"
        yield problem, f"write activation_bits = 8, or one of the targets {able}"


def stores_signed(config: Config) -> bool:
    """Whether weights that stay integers in memory are signed, with the zero 0."""
    target = TARGETS[config.full_quant.target_device or "CPU"]
    on_the_fly = config.mode == "WEIGHT_QUANT" and config.weight_quant.on_the_fly
    return on_the_fly and target.signed_alone


def _has_the_mode(config: Config, target: Target) -> Iterator[_Complaint]:
    if config.mode == "DYNAMIC_QUANT" and target.signed_alone:
        problem = (
            f"does not go with DYNAMIC_QUANT: target {target.name} takes no ranges of run time"
        )
        yield problem, "write quant_type = FULL_QUANT or WEIGHT_QUANT, or remove the target"


def _has_the_type(config: Config, target: Target) -> Iterator[_Complaint]:
    widths = {recipe.wishes.get("bit_num", 8) for recipe in config.recipes}
    wrong = [bits for bits in (config.common.bit_num, *widths) if not 2 <= bits <= 8]
    if stores_signed(config) and wrong:
        problem = f"target {target.name} has no integers of {wrong[0]} bits in memory"
        if not wrong[0]:
            problem = f"bits that a search chooses may not be in memory on target {target.name}"
        yield problem, "write bit_num = 2 to 8, or dequant_strategy = ON_LOAD"


_RULES: tuple[tuple[str, Callable[[Config, Target], Iterator[_Complaint]]], ...] = (
    ("activation_bits", _has_the_width),
    ("target_device", _has_the_mode),
    ("target_device", _has_the_type),
)
