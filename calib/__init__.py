"""Calibration: data, inference, statistics and ranges, on numpy, onnxruntime and pillow alone."""

import os

# ONNX Runtime reads it when it is imported: nothing about anybody's models leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class CalibError(Exception):
    """Calibration data or a calibration run is unusable; `str(error)` is one sentence for the
    user.
    """
