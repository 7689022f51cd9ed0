"""Calibration: data, inference, statistics and ranges, on numpy, onnxruntime and pillow alone."""


class CalibError(Exception):
    """Calibration data or a calibration run is unusable; `str(error)` is one sentence for the user."""
