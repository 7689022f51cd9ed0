"""Learning: gradients as ONNX graphs that ONNX Runtime computes, and what is fitted with them."""
