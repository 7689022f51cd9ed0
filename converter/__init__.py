"""qconvert: a float ONNX model and an INI file become a quantized ONNX model.

>>> from converter import convert
>>> outcome = convert("model.onnx", "full_quant.cfg", "model_int8.onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.api import convert
    from converter.errors import QConvertError, UsageError
    from converter.version import __version__

__all__ = ["QConvertError", "UsageError", "__version__", "convert"]
# Imported when they are asked for: the command begins with this package.
_HOMES = {
    "convert": "converter.api",
    "QConvertError": "converter.errors",
    "UsageError": "converter.errors",
    "__version__": "converter.version",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'converter' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)
