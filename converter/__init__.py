"""qconvert: a float ONNX model and an INI file become a quantized ONNX model.

>>> from converter import convert
>>> outcome = convert("model.onnx", "full_quant.cfg", "model_int8.onnx")
"""

from converter.api import convert
from converter.errors import QConvertError, UsageError
from converter.version import __version__

__all__ = ["QConvertError", "UsageError", "__version__", "convert"]
