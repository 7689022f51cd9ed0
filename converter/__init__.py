"""qconvert: a float ONNX model and an INI file become a quantized ONNX model."""

__version__ = "0.1.0"
