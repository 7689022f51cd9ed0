"""THE table of checks: a row says what is measured, from when on it is a finding, and what to do.

Each looks at the float model and its data alone. A limit lies between what was measured on models
that are fed as in training and what the least of the mistakes it is for makes, not near either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from calib.affine import Array
from calib.images import enlarged, picture_size
from calib.intervals import share_interval, sign_test
from converter.calibrate.data import image_options
from converter.doctor.evidence import Evidence, Fit, Seen
from converter.doctor.preprocessing import (
    Change,
    Way,
    looks_like_unit,
    other_ways,
    times_255,
)
from converter.errors import DataError
from converter.measure.answers import are_answers, information


@dataclass(frozen=True)
class Finding:
    """What is wrong in one sentence, and the lines of the configuration that would put it right;
    empty where no line does.
    """

    text: str
    lines: str = ""

    def __str__(self) -> str:
        return (
            f"{self.text} Write: {'; '.join(self.lines.splitlines())}" if self.lines else self.text
        )


@dataclass(frozen=True)
class Check:
    """A row; what takes few inferences a sample is part of every conversion, too."""

    title: str
    measures: str
    warns: str
    look: Callable[[Evidence], Iterator[Finding]]
    in_doctor: bool = True
    in_conversion: bool = True


# --- the samples

# Ranges that follow from fewer samples are exceeded by one new sample in ten: the next of n + 1
# alike is the most extreme with a chance of 1 / (n + 1).
FEW_SAMPLES = 9
# The share of samples that may be blank, or like another, by nature.
ODD = 0.1
# Pixels of 0..255 that span less hold no picture, or nothing at all.
FLAT, BLANK = 16.0, 0.5
# Enlarged so many times, a picture is a blur that no training shows.
ENLARGED = 3.0
# Levels of 256 that a picture of integers has at least.
LEAST_LEVELS = 16


def _few_samples(seen: Evidence) -> Iterator[Finding]:
    wanted = seen.job.config.preprocess.calibrate_size or 0
    if seen.job.mode == "FULL_QUANT" and not seen.data.states and len(seen.data) < FEW_SAMPLES:
        yield Finding(
            f"Ranges are to follow from {len(seen.data)} sample(s), which others exceed: give "
            "100 or more of the kind the model will see.",
            "calibrate_size = 100" if wanted < FEW_SAMPLES else "",
        )


def _same_samples(seen: Evidence) -> Iterator[Finding]:
    if len(seen.summaries) < 2 or seen.data.states:
        return
    contents = Counter(tuple(s.content for s in each.values()) for each in seen.summaries)
    again = len(seen.summaries) - len(contents)
    if again > ODD * len(seen.summaries):
        yield Finding(
            f"{again} of {len(seen.summaries)} samples are copies of others: what they show counts "
            "once; give different ones."
        )


def _blank_samples(seen: Evidence) -> Iterator[Finding]:
    for picture in seen.pictures:
        spans = [each[picture.name].pixels for each in seen.summaries]
        blank = sum(high - low < BLANK for low, high in spans)
        low, high = min(low for low, _ in spans), max(high for _, high in spans)
        if blank > ODD * len(spans):
            yield Finding(
                f"{blank} of {len(spans)} pictures have one colour and no content: look at the "
                "files of calibrate_path."
            )
        elif high - low < FLAT:
            yield Finding(
                f"All pixels lie from {low:.0f} to {high:.0f} of 255: pictures that are saved as "
                "numbers of 0..1, or masks, are nearly black; save them with 8 bits."
            )


def _small_pictures(seen: Evidence) -> Iterator[Finding]:
    if not seen.pictures:
        return
    options = image_options(seen.job.config.preprocess)
    sizes = [picture_size(seen.data.files(k)[0]) for k in range(len(seen.data))]
    factors = [enlarged(options, *size) for size in sizes]
    if sizes and median(factors) > ENLARGED:
        width, height = sizes[0]
        yield Finding(
            f"Pictures are enlarged {median(factors):.1f} times, the first from {width}x{height}: "
            "give pictures of the size that the model will see."
        )


# --- what is fed


def _unit_constants(seen: Evidence) -> Iterator[Finding]:
    for picture in seen.pictures:
        if looks_like_unit(picture.given):
            yield Finding(
                "normalize_mean and normalize_std look like those of pixels from 0 to 1, and "
                "pixels go from 0 to 255: multiply both by 255.",
                times_255(picture.given).lines(picture.given),
            )


def _integer_input(seen: Evidence) -> Iterator[Finding]:
    for picture in seen.pictures:
        if picture.dtype.kind not in "iu" or not seen.summaries:
            continue
        levels = median(each[picture.name].levels for each in seen.summaries)
        if levels < LEAST_LEVELS:
            yield Finding(
                f"Input '{picture.name}' takes {picture.dtype} and is fed {levels:.0f} levels of "
                "256: a model of integers takes pixels as they are.",
                "normalize_mean = [0]\nnormalize_std = [1]",
            )


# The model's own first step makes values so many times smaller, or moves them as many standard
# deviations, that are as small as normalised ones already.
SCALED, NORMALISED = 32.0, 4.0


def _normalised_twice(seen: Evidence) -> Iterator[Finding]:
    for name, least, greatest in seen.first_steps:
        fed = [end for each in seen.summaries for end in each[name].span]
        span = max(fed) - min(fed)
        if 0 < span <= 2 * NORMALISED and (
            SCALED * (greatest - least) < span or abs(greatest + least) > SCALED * span
        ):
            yield Finding(
                f"The model itself makes {least:.3g}..{greatest:.3g} of what input '{name}' is "
                f"fed, {min(fed):.3g}..{max(fed):.3g}: it normalises, and so does the data.",
                "normalize_mean = [0]\nnormalize_std = [1]" if seen.pictures else "",
            )


# Doublings of a variance: from data to data it differs by half of one, and the least of wrong
# constants, 0..1 for -1..1, halves it twice. A mean moves by a sixth of a standard deviation, of
# drawn pages by half of one, and where it is forgotten mostly by one and more.
DOUBLINGS, SHIFT = 1.25, 0.7


def fits(fit: Fit) -> bool:
    """Whether inputs of the first BatchNorms are as in training."""
    return fit.doublings <= DOUBLINGS and fit.shift <= SHIFT


def _first_norm(seen: Evidence) -> Iterator[Finding]:
    fit = seen.seen.fit if seen.seen else None
    if fit is not None and not fits(fit):
        yield Finding(
            f"What the first BatchNorm reads is not as in training: its variance is off "
            f"{2**fit.doublings:.3g} times, its mean by {fit.shift:.2g} standard deviations. The "
            f"preprocessing is another, or the data of another kind{HOW}"
        )


HOW = "; qconvert doctor tries what fits."
# Among so many classes or more, the share of samples that must not all be called the same.
CLASSES, SAME_ANSWER, ENOUGH = 10, 0.5, 16


def _same_answers(seen: Evidence) -> Iterator[Finding]:
    scores = seen.seen.scores if seen.seen else None
    if scores is None or len(scores) < ENOUGH or scores.shape[1] < CLASSES:
        return
    counts = Counter(scores.argmax(axis=1).tolist())
    winner, most = counts.most_common(1)[0]
    if most > SAME_ANSWER * len(scores):
        yield Finding(
            f"The float model gives {most} of {len(scores)} samples the same answer, class "
            f"{winner}, and {len(counts)} answers at all, of {scores.shape[1]} classes: either all "
            f"samples are of one kind, or it is fed what it cannot read{HOW}"
        )


# --- the labels


def _labels(seen: Evidence) -> Iterator[Finding]:
    try:
        table, labels = seen.label_table, seen.labels
    except DataError as error:
        yield Finding(str(error))
        return
    scores = seen.seen.scores if seen.seen else None
    if scores is None or labels is None:
        return
    answers, classes = scores.argmax(axis=1), scores.shape[1]
    right = answers == labels
    outside = [label for label in table.values() if not 0 <= label < classes]
    step, better = _offset(answers, labels)
    if step:
        yield Finding(
            f"{right.mean():.0%} of the float model's answers are right, and {better:.0%} were all "
            f"labels {abs(step)} {'greater' if step > 0 else 'smaller'}: one of the two counts a "
            "background or begins at 1; change the labels of label_file."
        )
    elif outside:
        yield Finding(
            f"{len(outside)} label(s), such as {outside[0]}, are no class of the model, which has "
            f"{classes}, 0 to {classes - 1}: the label file belongs to another model."
        )
    elif share_interval(int(right.sum()), len(right))[0] <= 1 / classes:
        yield Finding(
            f"{right.sum()} of the float model's {len(right)} answers are right, no more than by "
            f"chance: labels or preprocessing are of another model{HOW}"
        )


# The chance that a finding is none, where a few are tried at a time.
BY_CHANCE = 0.005


def _offset(answers: Array, labels: Array) -> tuple[int, float]:
    """The number that must be added to all labels, 0 unless that is certain, and the share of right
    answers then.
    """
    (step, count), right = Counter((answers - labels).tolist()).most_common(1)[0], answers == labels
    sure = step and sign_test(count, int(right.sum())) < BY_CHANCE
    return (int(step), count / len(labels)) if sure else (0, float(right.mean()))


# --- other ways to feed it

# Samples on which all ways are tried, and how many of the ways are tried on all samples then.
SCREENED, HOPEFUL = 16, 4


def _better_order(seen: Evidence) -> Iterator[Finding]:
    """With labels, the other channel order alone: what a conversion has time for."""
    if seen.known_labels is not None:
        yield from _better(seen, [way for way in _others(seen) if "channel order" in way.title])


def _better_way(seen: Evidence) -> Iterator[Finding]:
    yield from _better(seen, _others(seen))


def _others(seen: Evidence) -> list[Way]:
    single = len(seen.pictures) == 1 and seen.pictures[0].dtype.kind == "f"
    return other_ways(seen.pictures[0].given) if single else []


def _better(seen: Evidence, ways: Sequence[Way]) -> Iterator[Finding]:
    if seen.seen is None or not ways or not seen.seen.judged:
        return
    picture, labels = seen.pictures[0], seen.known_labels
    given = _Trial.of(picture.given, seen.seen, labels)

    def tried(way: Way, count: int) -> _Trial:
        change = Change(picture.given, way, picture.axis)
        return _Trial.of(
            way,
            seen.see({picture.name: change}, count),
            labels,
        )

    hopeful = [tried(way, SCREENED) for way in ways]
    hopeful.sort(key=lambda trial: trial.rank, reverse=True)
    trials = [tried(trial.way, len(seen.data)) for trial in hopeful[:HOPEFUL]]
    if better := [trial for trial in trials if trial.beats(given)]:
        best = max(better, key=lambda trial: trial.rank)
        yield Finding(
            f"Another preprocessing, {best.way.title}, suits the model clearly better: "
            f"{best.beside(given)}.",
            best.way.lines(picture.given),
        )


@dataclass(frozen=True)
class _Trial:
    """What the model makes of samples that are fed one way: which answers are right, what each
    answer says in nats, and how the first BatchNorms fit; None where that is not known.
    """

    way: Way
    right: Array | None
    says: Array | None
    fit: Fit | None

    @classmethod
    def of(cls, way: Way, seen: Seen, labels: Array | None) -> _Trial:
        if seen.scores is None or not np.isfinite(seen.scores).all():
            return cls(way, None, None, seen.fit)
        answers, right = seen.scores.argmax(axis=1), None
        if labels is not None:
            labels = labels[: len(answers)]
            right = answers == labels + _offset(answers, labels)[0]
        says = information(seen.scores) if are_answers(seen.scores) else None
        return cls(way, right, says, seen.fit)

    @property
    def rank(self) -> tuple[float, float, float]:
        """Greater is better. What fits fits: the order of channels hardly shows there."""
        fit = 0.0
        if self.fit:
            fit = -max(1.0, self.fit.doublings / DOUBLINGS, self.fit.shift / SHIFT)
        right = 0.0 if self.right is None else round(float(self.right.mean()), 2)
        return right, fit, 0.0 if self.says is None else float(self.says.mean())

    def beats(self, other: _Trial) -> bool:
        """Whether some judge is sure that it is better, and none that it is worse."""
        verdicts = [
            _verdict(self.right, other.right),
            _verdict(self.says, other.says),
            _fit_verdict(self.fit, other.fit),
        ]
        return max(verdicts) > 0 and min(verdicts) >= 0

    def beside(self, other: _Trial) -> str:
        """What is better, in words."""
        words = []
        if self.right is not None and other.right is not None:
            words.append(
                f"{self.right.mean():.0%} right answers instead of {other.right.mean():.0%}"
            )
        if self.fit and other.fit and not fits(other.fit):
            words.append(
                f"the first BatchNorm's variance is off {2**self.fit.doublings:.2g} times instead "
                f"of {2**other.fit.doublings:.2g}"
            )
        if self.says is not None and other.says is not None:
            words.append(
                f"answers say {self.says.mean():.2f} nats instead of {other.says.mean():.2f}"
            )
        return ", ".join(words)


def _verdict(first: Array | None, second: Array | None) -> int:
    """1 if the first wins sample by sample, -1 if the second does, 0 where that is not sure."""
    if first is None or second is None:
        return 0
    wins, losses = (int(np.count_nonzero(x > y)) for x, y in ((first, second), (second, first)))
    if sign_test(wins, losses) < BY_CHANCE:
        return 1
    return -1 if sign_test(losses, wins) < BY_CHANCE else 0


def _fit_verdict(first: Fit | None, second: Fit | None) -> int:
    if first is None or second is None:
        return 0
    return int(fits(first)) - int(fits(second))


CHECKS = (
    Check(
        "Number of samples",
        "samples that ranges follow from",
        f"fewer than {FEW_SAMPLES}",
        _few_samples,
    ),
    Check(
        "Copies", "samples that are like another to the bit", f"more than {ODD:.0%}", _same_samples
    ),
    Check("Content", "pictures of one colour", f"more than {ODD:.0%}", _blank_samples),
    Check(
        "Enlarged pictures",
        "how many times pictures are enlarged, the median",
        f"more than {ENLARGED:g} times",
        _small_pictures,
    ),
    Check(
        "Constants",
        "normalize_mean and normalize_std",
        "all at most 1, as for pixels of 0..1",
        _unit_constants,
    ),
    Check(
        "Integer input",
        "levels that an input of integers is fed",
        f"fewer than {LEAST_LEVELS}",
        _integer_input,
    ),
    Check(
        "Normalised twice",
        "what the model's own first step makes of normalised values",
        f"{SCALED:g} times smaller, or moved as far",
        _normalised_twice,
    ),
    Check(
        "First BatchNorm",
        "variance and mean of its input beside those of training, the median of its channels",
        f"variance off {2**DOUBLINGS:.1f} times, or mean off {SHIFT:g} standard deviations",
        _first_norm,
    ),
    Check(
        "Different answers",
        f"samples with the same answer, of {CLASSES} classes and more",
        f"more than {SAME_ANSWER:.0%}",
        _same_answers,
    ),
    Check(
        "Labels",
        "right answers of the float model",
        "outside the classes, better with an offset, or near chance",
        _labels,
    ),
    Check(
        "Channel order",
        "right answers with the other channel order",
        f"better, by chance in {BY_CHANCE:.1%} of all cases",
        _better_order,
        in_doctor=False,  # where all ways are tried
    ),
    Check(
        "Preprocessing",
        "right answers, what answers say and the first BatchNorm, fed as others are",
        f"better, by chance in {BY_CHANCE:.1%} of all cases",
        _better_way,
        in_conversion=False,
    ),
)
