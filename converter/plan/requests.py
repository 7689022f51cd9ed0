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
    for key, rule in _RULES.items():
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


_RULES: dict[str, Callable[[Config, Target], Iterator[_Complaint]]] = {
    "activation_bits": _has_the_width,
}
