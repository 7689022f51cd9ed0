"""The settings that decide what a conversion makes."""

from __future__ import annotations

from collections.abc import Iterator

from converter.config import Config
from converter.config.keys import SECTIONS

# Keys that say where files are and what a run may use, but not what comes out.
NEUTRAL = {
    *(
        "thread_num",
        "providers",
        "calibration_memory",
        "calibration_cache",
        "debug_info_save_path",
        "export_recipe",
    ),
    *("calibrate_path", "label_file", "model", "output"),
}


def settings_of(config: Config) -> Iterator[str]:
    """Lines of all that decides what a conversion makes of a model and its samples."""
    for section in SECTIONS.values():
        for name, key in section.keys.items():
            value = getattr(getattr(config, section.attribute), name)
            if value != key.default and name not in NEUTRAL:
                yield f"{section.name}.{name}={value}"
    for recipe in config.recipes:
        for name, value in recipe.wishes.items():
            yield f"{recipe.section}.{name}={value}"
