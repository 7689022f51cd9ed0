"""Calibration evidence on disk: a second conversion of the same model and data needs no inference
to find ranges.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.samples import Dataset
from calib.stats import TensorStats
from converter.calibrate.observe import (
    Evidence,
    Wanted,
    merged,
    observe,
    warn_of_oddities,
)
from converter.graph.files import digest_of
from converter.job import Resources, Watch
from converter.version import __version__

NOTHING = Evidence({}, {})
UNREADABLE = (
    CalibError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RecursionError,
    BadZipFile,
    zlib.error,
)


def observe_with_cache(
    model: ir.Model,
    wanted: Wanted,
    data: Dataset,
    *,
    resources: Resources,
    watch: Watch,
    path: Path | None,
) -> Evidence:
    """Like `observe`, but takes from the file at `path` what it holds and adds to it what it lacks.

    A part of the samples is left in a file of its own, for `merge`.
    """
    if path is None:
        return observe(model, wanted, data, resources=resources, watch=watch)
    fingerprint = fingerprint_of(model, data)
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
    warn_of_oddities(
        {n: known.statistics[n] for n in wanted.tensors if n not in missing.tensors},
        watch,
    )
    if not missing.tensors and not missing.means:
        watch.say(f"All ranges come from the calibration cache {path}.")
        return known
    fresh = observe(model, missing, data, resources=resources, watch=watch)
    if wanted.part != (0, 1):
        _save(part_path(path, *wanted.part), fingerprint, fresh)
        return fresh
    known = Evidence(
        {**known.statistics, **fresh.statistics},
        {**known.means, **fresh.means},
        wanted.first,
    )
    try:
        _save(path, fingerprint, known)
    except OSError as error:
        watch.warn(f"The calibration cache {path} cannot be written ({error.strerror}).")
    return known


def part_path(path: Path, number: int, parts: int) -> Path:
    """Where a part of what belongs into the cache at `path` is kept."""
    return path.with_name(f"{path.name}.part{number}of{parts}")


def merge(parts: Sequence[Path], path: Path) -> None:
    """Makes a cache of its parts, and takes them away; where one is missing or unlike the others
    there is none.
    """
    try:
        contents = [_read(part) for part in parts]
    except UNREADABLE:
        return
    for part in parts:
        part.unlink()
    if len({fingerprint for fingerprint, _ in contents}) == 1:
        evidence = [part for _, part in contents]
        _save(
            path,
            contents[0][0],
            replace(evidence[0], statistics=merged(part.statistics for part in evidence)),
        )


def fingerprint_of(model: ir.Model, data: Dataset) -> str:
    """SHA-256 over this version, the data and the model."""
    return digest_of(model, f"qconvert {__version__} {data.fingerprint()}")


def _load(path: Path, fingerprint: str, watch: Watch) -> Evidence:
    if not path.exists():
        return NOTHING
    try:
        stamp, evidence = _read(path)
    except UNREADABLE as error:
        watch.warn(f"The calibration cache {path} cannot be read ({error}); it is made anew.")
        return NOTHING
    if stamp == fingerprint:
        return evidence
    watch.warn(
        f"The calibration cache {path} is of another model, data or version; it is made anew."
    )
    return NOTHING


def _read(path: Path) -> tuple[str, Evidence]:
    """The fingerprint and contents of a cache."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = dict(file)
    index = json.loads(arrays["index"].item())
    statistics = {
        name: _statistics(arrays, f"tensor{number}.")
        for number, name in enumerate(index["tensors"])
    }
    means = {
        (name, axis): arrays[f"mean{number}"] for number, (name, axis) in enumerate(index["means"])
    }
    return index["fingerprint"], Evidence(statistics, means, index["first"])


def _statistics(arrays: Mapping[str, Array], prefix: str) -> TensorStats:
    fields = {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
    return TensorStats.from_arrays(fields)


def _save(path: Path, fingerprint: str, evidence: Evidence) -> None:
    tensors, means = list(evidence.statistics), list(evidence.means)
    index = {
        "fingerprint": fingerprint,
        "tensors": tensors,
        "means": means,
        "first": evidence.first,
    }
    arrays: dict[str, Array] = {"index": np.array(json.dumps(index))}
    for number, stats in enumerate(evidence.statistics.values()):
        arrays.update((f"tensor{number}.{key}", array) for key, array in stats.to_arrays().items())
    arrays.update((f"mean{number}", mean) for number, mean in enumerate(evidence.means.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / "cache.npz"
        np.savez_compressed(draft, **arrays)  # type: ignore[arg-type]
        draft.replace(path)
