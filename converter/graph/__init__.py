"""ONNX files and graphs: reading, writing, asking, editing."""
