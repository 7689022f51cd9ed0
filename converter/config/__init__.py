"""The configuration file: what it may say (`keys`) and how it is read (`reader`)."""

from converter.config.keys import (
    Config,
    DataPreprocessParam,
    TransformQuantParam,
    default_config,
)
from converter.config.reader import load_config

__all__ = [
    "Config",
    "DataPreprocessParam",
    "TransformQuantParam",
    "default_config",
    "load_config",
]
