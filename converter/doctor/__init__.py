"""Is the model fed as it was trained? Checks on the float model alone, before anything is
quantized.
"""
