"""Samples that a search is judged on: such as nothing was fitted to, or it would praise itself."""

from __future__ import annotations

from dataclasses import dataclass

from calib.samples import Dataset
from converter.job import Watch

# Judges at the most, those that are labelled, and at the least; the part of the calibration samples
# that is kept for them where there are no others.
MOST, MOST_LABELLED, LEAST, PART = 64, 400, 8, 4
# So many samples must be allowed to change before a share of them tells more than chance.
TELLING = 3


@dataclass(frozen=True)
class Parted:
    """Samples to fit to, those to judge on, and what all samples that were looked at end with:
    verification goes on behind it.
    """

    fitted: Dataset
    judges: Dataset
    last: Dataset


def parted(data: Dataset, labelled: bool, watch: Watch) -> Parted:
    """Half of the samples behind `data` as judges, the others are left for the verification; where
    there are too few, the last of `data`.

    Random samples, and too few ones, judge themselves, which is said.
    """
    if data.random or not len(data):
        return Parted(data, data, data)
    most = MOST_LABELLED if labelled else MOST
    behind = data.further(2 * most)
    if len(behind) >= 2 * LEAST:
        judges = behind.part(0, len(behind) // 2)
        return Parted(data, judges, judges)
    count = len(data) // PART
    if count < LEAST:
        watch.warn(
            f"The search is judged on the {len(data)} samples that it was fitted to, which "
            f"flatters it: give {2 * LEAST} samples more than calibrate_size."
        )
        return Parted(data, data, data)
    start = len(data) - count
    watch.tell(f"The last {count} of {len(data)} samples judge the search: none is fitted to.")
    return Parted(
        data.part(0, start),
        data.part(start, len(data)),
        data,
    )


def tells(count: int, bound: float) -> bool:
    """Whether so many labelled samples can tell a loss of `bound` from chance."""
    return count * bound >= TELLING
