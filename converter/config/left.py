"""What a configuration leaves to change, for advice that helps."""

from __future__ import annotations

from converter.config.keys import SECTIONS, Config

# What ranges that training found do without.
OF_DATA = {"full_quant_param.activation_quant_method", "full_quant_param.max_drop"}


def left(config: Config, name: str, value: object) -> bool:
    """Whether `section.key` = `value` would change something: the key has an effect in this mode,
    there is the data that it needs, and it is not set so.

    Without a mode, as beside a model that another tool may have made, anything would.
    """
    section, _, key = name.partition(".")
    row = SECTIONS[section]
    if config.mode is None:
        return True
    if name in OF_DATA and not config.has_samples:
        return False
    return bool(
        row.keys[key].scope.holds(config) and getattr(getattr(config, row.attribute), key) != value
    )


def against_saturation(settings: Config) -> str:
    """What keeps sums exact on every processor, in words."""
    if settings.mode is None:
        return "convert with overflow_safe = true (in other tools: 7-bit weights, reduce_range)"
    target = settings.full_quant.target_device
    if settings.mode == "FULL_QUANT" and target not in (None, "CPU"):
        return f"target {target} computes exactly; for those processors write target_device = CPU"
    if left(settings, "full_quant_param.overflow_safe", True):
        return "write overflow_safe = true"
    return "the model came with these integers: start from the float one"
