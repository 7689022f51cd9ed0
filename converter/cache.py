"""Calibration evidence on disk: a second conversion of the same model and data needs no inference to find ranges."""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.samples import Dataset
from calib.stats import TensorStats
from converter import __version__
from converter.calibrate import Evidence, Wanted, observe
from converter.job import Resources, Watch
from converter.model import serialized_parts

NOTHING = Evidence({}, {})


def observe_with_cache(
    model: ir.Model, wanted: Wanted, data: Dataset, resources: Resources, watch: Watch, path: Path | None
) -> Evidence:
    """Like `observe`, but takes from the file at `path` what it holds and adds to it what it lacks."""
    if path is None:
        return observe(model, wanted, data, resources, watch)
    fingerprint = _fingerprint(model, data)
    known = _load(path, fingerprint, watch)
    if known.first != wanted.first:
        known = Evidence(known.statistics, {}, wanted.first)
    missing = replace(
        wanted,
        tensors=tuple(name for name in wanted.tensors if name not in known.statistics),
        means=tuple(mean for mean in wanted.means if mean not in known.means),
        histogram=True,  # whatever the next conversion may ask for
        samples=True,
    )
    if not missing.tensors and not missing.means:
        watch.say(f"All ranges come from the calibration cache {path}.")
        return known
    found = observe(model, missing, data, resources, watch)
    known = Evidence({**known.statistics, **found.statistics}, {**known.means, **found.means}, wanted.first)
    try:
        _save(path, fingerprint, known)
    except OSError as error:
        watch.warn(f"The calibration cache {path} cannot be written ({error.strerror}).")
    return known


def _fingerprint(model: ir.Model, data: Dataset) -> str:
    digest = hashlib.sha256(f"qconvert {__version__} {data.fingerprint()}".encode())
    for part in serialized_parts(model):
        digest.update(part)
    return digest.hexdigest()


def _load(path: Path, fingerprint: str, watch: Watch) -> Evidence:
    if not path.exists():
        return NOTHING
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
        if arrays["fingerprint"].item() != fingerprint:
            watch.warn(f"The calibration cache {path} is of another model, data or version; it is made anew.")
            return NOTHING
        return _evidence(arrays)
    except (CalibError, OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        watch.warn(f"The calibration cache {path} cannot be read ({error}); it is made anew.")
        return NOTHING


def _evidence(arrays: Mapping[str, Array]) -> Evidence:
    statistics = {}
    for number, name in enumerate(arrays["tensors"].tolist()):
        prefix = f"tensor{number}."
        fields = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        statistics[name] = TensorStats.from_arrays(fields)
    keys = zip(arrays["means"].tolist(), arrays["axes"].tolist(), strict=True)
    means = {key: arrays[f"mean{number}"] for number, key in enumerate(keys)}
    return Evidence(statistics, means, arrays["first"].item())


def _save(path: Path, fingerprint: str, evidence: Evidence) -> None:
    arrays: dict[str, Array] = {
        "fingerprint": np.array(fingerprint),
        "tensors": np.array(list(evidence.statistics), dtype=np.str_),
        "first": np.array(evidence.first),
        "means": np.array([name for name, _ in evidence.means], dtype=np.str_),
        "axes": np.array([axis for _, axis in evidence.means], dtype=np.int64),
    }
    for number, stats in enumerate(evidence.statistics.values()):
        arrays.update((f"tensor{number}.{key}", array) for key, array in stats.to_arrays().items())
    arrays.update((f"mean{number}", mean) for number, mean in enumerate(evidence.means.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / "cache.npz"
        np.savez_compressed(draft, **arrays)  # type: ignore[arg-type]
        draft.replace(path)
