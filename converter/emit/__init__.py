"""From plan and float model to the quantized model: the second and last place where graphs
change.
"""
