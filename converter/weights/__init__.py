"""Integer weights: scales, codes and biases."""
