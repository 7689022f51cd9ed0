"""What can go wrong, as one tree; every message is one sentence that says what to change.

QConvertError        exit code 1: bad input
├── ConfigError      the INI file: names file, line, section and key
├── ModelError       the ONNX file: names the node or tensor
├── DataError        the calibration data: names the folder or file
├── UsageError       exit code 2: wrong flags
├── GateError        exit code 3: the result misses a quality gate
└── StoppedError     exit code 130: Ctrl-C or SIGTERM
"""

from __future__ import annotations


class QConvertError(Exception):
    """A user's mistake or an input that cannot be converted; `str(error)` is shown as it is."""

    exit_code = 1


class ConfigError(QConvertError):
    """The configuration file is wrong."""


class ModelError(QConvertError):
    """The model cannot be read or converted."""


class DataError(QConvertError):
    """The calibration data cannot be used."""


class UsageError(QConvertError):
    """The command line is wrong."""

    exit_code = 2


class GateError(QConvertError):
    """The model was converted, but is not as good as was asked for."""

    exit_code = 3


class StoppedError(QConvertError):
    """The user stopped a batch."""

    exit_code = 130
