"""Models that were trained with fake quantization: what they learnt, and how it enters a plan."""
