"""Where a quantized model comes from: fingerprints that any program computes again from the
files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from calib.samples import Dataset
from converter.config.settings import settings_of
from converter.job import Job, sha256
from converter.version import __version__


def provenance(job: Job, data: Dataset) -> dict[str, str]:
    """Version, mode, and the SHA-256 of the float model's file, of the settings and of the files
    calibrated with.

    Settings are lines `section.key=value` of the keys that are not as by default and decide what
    the model computes, in the README's order, those about single nodes in the file's; data are a
    line for each file in the order of use, its own SHA-256 in hexadecimal. Neither dates nor paths
    take part: equal inputs give equal bytes.
    """
    properties = {
        "qconvert.version": __version__,
        "qconvert.mode": job.mode,
        "qconvert.model_sha256": sha256(job.model),
        "qconvert.config_sha256": _sha256_of_lines(settings_of(job.config)),
    }
    files = dict.fromkeys(path for index in range(len(data)) for path in data.files(index))
    if files:
        properties["qconvert.calibration_sha256"] = _sha256_of_lines(map(sha256, files))
    return properties


def _sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
