"""Folders of calibration data to samples, each one feed of the model's inputs.

File number i of every input's folder, in natural order (img2 before img10), makes sample number i.
Hidden files are ignored, and so are sub-folders beside files. A file that cannot be used takes its
sample with it, is named in `Dataset.warnings`, and the next files step in.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np

from calib import CalibError
from calib.affine import Array
from calib.images import ImageOptions
from calib.sources import KINDS, InputSpec, Source, as_item

__all__ = ["Dataset", "ImageOptions", "InputSpec", "Sample", "open_dataset"]

Sample = Mapping[str, Array]
# The number of a usable candidate, with its arrays if they are in the cache.
Choice = tuple[int, Sample | None]

# Samples kept in memory, so that a second pass over the data need not decode them again.
CACHE_BYTES = 256 << 20
# Candidates loaded at a time while the usable ones are found; bounds what is in memory at once.
WAVE = 64
# In place of the number of a candidate: a sample that is made, of no file.
MADE = -1


class Dataset:
    """A fixed, numbered list of usable samples; immutable, so any number of threads may read it.

    `warnings` holds one sentence for each file left out and each way in which the data falls short.
    Where samples are consecutive frames, `states` are outputs of a model by the inputs that they
    are fed to at the next one. `random` says that they are no data, `made` how many of
    them, the last ones, are not.
    """

    states: Mapping[str, str] = MappingProxyType({})
    random = False
    made = 0

    def __init__(
        self,
        sources: Sequence[Source],
        chosen: Sequence[Choice],
        warnings: Sequence[str],
        fixed: Sample | None = None,
    ) -> None:
        self._sources = sources
        self._fixed = fixed or {}
        self._chosen = chosen
        self.warnings = tuple(warnings)
        self.made = sum(candidate == MADE for candidate, _ in chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def sample(self, index: int) -> Sample:
        """Input name → read-only C-contiguous array of the input's dtype, batch axis included.

        Raises CalibError if a file has become unreadable since the dataset was opened.
        """
        candidate, cached = self._chosen[index]
        return {**self._fixed, **(cached or _load(self._sources, candidate))}

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that sample `index` is made of, input by input."""
        candidate, _ = self._chosen[index]
        if candidate == MADE:
            return ()
        return tuple(chain.from_iterable(source.files[candidate] for source in self._sources))

    def with_made(self, samples: Sequence[Sample]) -> Dataset:
        """These, and behind them samples that are made and lie in memory."""
        made: list[Choice] = [(MADE, sample) for sample in samples]
        return Dataset(
            self._sources,
            [*self._chosen, *made],
            self.warnings,
            self._fixed,
        )

    @property
    def real(self) -> Dataset:
        """The samples that are not made, which are the first."""
        return self.part(0, len(self) - self.made)

    @property
    def kind(self) -> str:
        """What they are, in words."""
        if self.random:
            return "random samples"
        if 0 < self.made < len(self):
            return f"samples, {self.made} of them distilled"
        return "distilled samples" if self.made else "samples"

    def part(self, start: int, end: int) -> Dataset:
        """Samples number `start` to `end`."""
        return Dataset(self._sources, self._chosen[start:end], (), self._fixed)

    def further(self, size: int) -> Dataset:
        """The next usable samples behind these, at most `size` of them; may be none."""
        end = min((len(source.files) for source in self._sources), default=0)
        start = max((candidate for candidate, _ in self._chosen), default=MADE) + 1
        chosen, _ = _select(self._sources, range(start, end), size, workers=None)
        return Dataset(self._sources, chosen, (), self._fixed)

    def fingerprint(self) -> str:
        """SHA-256 over all samples as the model sees them: it follows the files' contents and the
        preprocessing.

        Names, folders and dates of the files do not matter. Costs a pass over the data.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            for name, array in self.sample(index).items():
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(array.data)
        return digest.hexdigest()


def open_dataset(
    specs: Sequence[InputSpec],
    folders: Mapping[str, Path],
    size: int,
    *,
    kind: str,
    image: ImageOptions,
    workers: int | None = None,
    fixed: Sample | None = None,
    spread: int | None = None,
) -> Dataset:
    """The first `size` usable samples for a model's inputs; `kind` is IMAGE, BIN or NPY (a key of
    `KINDS`). Of more than `spread` so many are looked at, at equal distances.

    `fixed` holds what every sample has beside the data: inputs that need not be fed.
    `folders` says where the data of each input lies; for NPY it may be one file whose rows are the
    samples. Every candidate is loaded once, by `workers` threads (None: as many as the machine
    suggests); the outcome does not depend on their number. A sample of an input with fixed batch N
    takes N pictures or rows. Raises CalibError if inputs and folders do not pair up, a folder or
    input cannot be used, or no sample is left.
    """
    sources = sources_of(specs, folders, kind, image)
    counts = {source.spec.name: len(source.files) for source in sources}
    candidates = _candidates(min(counts.values()), size, spread)
    size = min(size, spread or size)
    chosen, skipped = _select(sources, candidates, size, workers=workers)
    if not chosen:
        # A model may take what is no number for a missing value.
        chosen, skipped = _select(sources, candidates, size, workers=workers, numbers_only=False)
    if not chosen:
        paths = " and ".join(map(str, folders.values()))
        msg = (
            f"{paths}: none of the {len(skipped)} sample(s) can be used, the first for this "
            f"reason: {skipped[0]}"
        )
        raise CalibError(msg)
    warnings = [*chain.from_iterable(source.warnings for source in sources), *skipped]
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{count} for '{name}'" for name, count in counts.items())
        warnings.append(
            f"The inputs have different numbers of samples ({numbers}); the surplus is not used."
        )
    if len(chosen) < size:
        warnings.append(f"calibrate_size is {size} but only {len(chosen)} sample(s) are usable.")
    return Dataset(sources, chosen, warnings, fixed)


def sources_of(
    specs: Sequence[InputSpec], folders: Mapping[str, Path], kind: str, image: ImageOptions
) -> list[Source]:
    """What each input is fed from, of which nothing is read yet. Raises CalibError if inputs and
    folders do not pair up, or a folder or input cannot be used.
    """
    _check_names(specs, folders)
    return [KINDS[kind](spec, folders[spec.name], image) for spec in specs]


def _candidates(count: int, size: int, spread: int | None) -> Sequence[int]:
    if spread is None or min(count, size) <= spread:
        return range(count)
    return [int(k) for k in np.linspace(0, min(count, size) - 1, spread)]


def _select(
    sources: Sequence[Source],
    candidates: Sequence[int],
    size: int,
    *,
    workers: int | None,
    numbers_only: bool = True,
) -> tuple[list[Choice], list[str]]:
    """The first `size` of the candidates that load, and why others do not."""
    chosen: list[Choice] = []
    skipped: list[str] = []
    room, start = CACHE_BYTES, 0
    with ThreadPoolExecutor(workers) as pool:
        while start < len(candidates) and len(chosen) < size:
            wave = candidates[start : start + min(WAVE, size - len(chosen))]
            for candidate, loading in [(k, pool.submit(_load, sources, k)) for k in wave]:
                try:
                    sample = loading.result()
                    if numbers_only:
                        _check_numbers(sources, candidate, sample)
                except CalibError as error:
                    skipped.append(str(error))
                    continue
                room -= sum(array.nbytes for array in sample.values())
                chosen.append((candidate, sample if room >= 0 else None))
            start += len(wave)
    return chosen, skipped


def _load(sources: Sequence[Source], candidate: int) -> Sample:
    sample = {source.spec.name: np.asarray(source.read(candidate), order="C") for source in sources}
    if not any(array.size for array in sample.values()):
        files = ", ".join(str(path) for source in sources for path in source.files[candidate])
        msg = f"{files}: the sample is empty; give arrays with values."
        raise CalibError(msg)
    for array in sample.values():
        array.flags.writeable = False
    return sample


def _check_numbers(sources: Sequence[Source], candidate: int, sample: Sample) -> None:
    """Raises CalibError where an array holds NaN, which would spoil every mean it enters."""
    for source in sources:
        array = sample[source.spec.name]
        if array.dtype.kind == "f" and array.size and np.isnan(array.max()):
            files = ", ".join(map(str, source.files[candidate]))
            msg = f"{files}: {np.isnan(array).sum()} values are NaN; the sample is left out."
            raise CalibError(msg)


def _check_names(specs: Sequence[InputSpec], folders: Collection[str]) -> None:
    """Raise CalibError unless there is one folder for each model input."""
    names = [spec.name for spec in specs]
    for name in folders:
        if name not in names:
            near = " or ".join(map(_item, difflib.get_close_matches(name, names, 1) or names))
            known = ", ".join(map(str, specs)) or "none"
            msg = (
                f"calibrate_path: the model has no input '{name}', its inputs are {known}; write "
                f"{near}."
            )
            raise CalibError(msg)
    for spec in specs:
        if spec.name not in folders:
            msg = (
                f"calibrate_path: no folder is given for the model's input {spec}; add "
                f"{_item(spec.name)}:<folder>."
            )
            raise CalibError(msg)


def _item(name: str) -> str:
    """The name as the configuration writes it, if it can."""
    return as_item(name) or name
