"""The configuration file: what it may say (`keys`), how it is read (`reader`) and its reference (`reference`)."""

from converter.config.keys import (
    CommonQuantParam,
    Config,
    DataPreprocessParam,
    FullQuantParam,
    MixedBitWeightQuantParam,
    TransformQuantParam,
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
    "TransformQuantParam",
    "WeightQuantParam",
    "load_config",
    "reference_markdown",
]
