"""The float model beside the quantized one."""
