"""qconvert: a float ONNX model and an INI file become a quantized ONNX model.

>>> from converter import convert
>>> outcome = convert("model.onnx", "full_quant.cfg", "model_int8.onnx")
"""

# Nothing is imported here before it is asked for: the command begins with this package, and an
# interrupt in its first moments must find it ready.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from converter.api import convert
    from converter.errors import QConvertError, UsageError
    from converter.version import __version__

__all__ = ["QConvertError", "UsageError", "__version__", "convert"]
_HOMES = {
    "convert": "converter.api",
    "QConvertError": "converter.errors",
    "UsageError": "converter.errors",
    "__version__": "converter.version",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        msg = f"module 'converter' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
