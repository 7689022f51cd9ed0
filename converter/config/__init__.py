"""The configuration file: what it may say (`keys`), how it is read (`reader`) and its reference (`reference`)."""

from converter.config.keys import (
    CommonQuantParam,
    Config,
    DataPreprocessParam,
    FullQuantParam,
    MixedBitWeightQuantParam,
    WeightQuantParam,
)
from converter.config.reader import load_config
from converter.config.reference import reference_markdown

__all__ = [
    "CommonQuantParam",
    "Config",
    "DataPreprocessParam",
    "FullQuantParam",
    "MixedBitWeightQuantParam",
    "WeightQuantParam",
    "load_config",
    "reference_markdown",
]
