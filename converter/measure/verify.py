"""After every conversion: the float and the quantized model side by side, as a runtime executes
them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from calib import CalibError
from calib.affine import Array
from calib.intervals import Interval, drop_interval
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.data import synthetic_data
from converter.calibrate.exact import saturating
from converter.calibrate.runs import Executed, Opened, executed, file_opened
from converter.config.left import against_saturation
from converter.errors import DataError
from converter.graph.qdq import CONVERSIONS
from converter.job import Watch
from converter.measure.answers import are_answers, scores_of
from converter.measure.both import Both
from converter.measure.errors import (
    Speed,
    Tally,
    TensorError,
    error_of,
    errors_between,
    extent,
    speedup,
    tally,
    worst_of,
)
from converter.measure.labels import read_labels
from converter.measure.results import Changed, Here, Verification, Views
from converter.measure.slices import SHARE, comparable, few_of, judged_apart
from converter.measure.views import views
from converter.plan.ops import draws
from converter.plan.result import Quantized

# Samples the outputs are compared on where neither verify_size nor labels say how many, those where
# calibration has seen all, those without the runtime's optimizations, and those for the tensors
# inside.
VERIFIED_SAMPLES, SEEN_SAMPLES, PLAIN_SAMPLES, COMPARED_SAMPLES = 100, 16, 4, 4
# The size of open dimensions in random samples: tokens of a sentence.
RANDOM_LENGTH = 16
# What is called slower, and dB that optimizations may cost.
SLOWER, FUSED_DB = 1.0, 3.0
# Above this there are but the last bits of float32, which sums in another order change.
LAST_BITS_DB = 110.0
# Samples whose answers changed that are kept to be looked at, and the classes of each.
SHOWN_CHANGES, TOP = 24, 5
# All outputs of each sample.
Outputs = Sequence[Sequence[Array]]


@dataclass(frozen=True)
class _Seen:
    """The outputs of both models on the same samples, as ONNX Runtime executes them: those of exact
    kernels, and what this processor makes of the quantized file; `nodes` are what it executes.
    """

    names: tuple[str, ...]
    before: Outputs
    after: Outputs
    here: Outputs
    speed: Speed | None
    nodes: Sequence[tuple[str, str]]


def verify(both: Both, label_file: Path | None) -> Verification:
    """What running both models tells, on samples that calibration has not seen, where there are
    any.

    Warns of what the user should know. Raises CalibError or ModelError where a model does not run.
    """
    result, watch = both.result, both.watch
    data, held_back = _samples(result, label_file is not None, watch)
    try:
        seen = _run(both, data)
    except CalibError:
        if len(result.data):
            raise
        # Some models take no other open sizes, of which no time tells.
        data = synthetic_data(result.reference)
        seen = replace(_run(both, data), speed=None)
    plain = _outputs(both.quantized, data, PLAIN_SAMPLES, both) if len(seen.before) > 1 else []
    answers = _answers(seen.before, seen.after, label_file is not None)
    labels = _labels(answers, data, label_file, watch)
    top1, drop = _top1(answers, data, labels)
    outputs, slices = _judged(seen.names, seen.before, seen.after)
    found = Verification(
        samples=len(seen.before),
        held_back=held_back,
        outputs=outputs,
        slices=slices,
        fused_difference=_difference(plain, seen.after),
        speed=seen.speed,
        top1=top1,
        drop=drop,
        agreement=_agreement(answers),
        kernels=dict(Counter(op_type for _, op_type in seen.nodes)),
        conversions=tuple(name for name, op_type in seen.nodes if op_type in CONVERSIONS),
        saturated=() if result.exact else tuple(saturating(result.model)),
        random=data.random,
        distilled=data.made == len(data),
        closed_loop=bool(data.states),
        here=_here(seen, label_file is not None),
        given=not result.fitted,
        changed=tuple(_changed(seen, answers, data, labels or {})),
        views=tuple(_views(seen, data, result)),
    )
    samples = seen.after[: len(plain)], plain
    fused = [_errors(seen.names, _tallies(seen.before, x)) for x in samples]
    _warn(found, list(zip(*fused, strict=True)), result, watch)
    return found


def _samples(result: Quantized, labelled: bool, watch: Watch) -> tuple[Dataset, bool]:
    """Samples to verify on, and whether calibration saw none of them."""
    if not len(result.data):
        watch.say("There is no data: the outputs are compared on random samples.")
        return synthetic_data(result.reference, length=RANDOM_LENGTH), False
    wanted = result.settings.preprocess
    if not result.fitted:
        return _first(result.data, wanted.verify_size or sys.maxsize), False
    size = wanted.verify_size or (sys.maxsize if labelled else VERIFIED_SAMPLES)
    further = (result.last or result.data).further(size)
    if len(further):
        return further, True
    if not result.data.random and not result.data.made:
        watch.say(
            "calibrate_size takes all samples: the outputs are compared on calibration samples."
        )
    size = wanted.verify_size or (sys.maxsize if labelled else SEEN_SAMPLES)
    known = result.data.real if 0 < result.data.made < len(result.data) else result.data
    return _first(known, size), False


def _first(data: Dataset, size: int) -> Dataset:
    return data if data.random or size >= len(data) else data.part(0, size)


def _run(both: Both, data: Dataset) -> _Seen:
    result, big = both.result, both.big
    reference: Executed | None = executed(result.reference, look=False)
    assert reference is not None
    names = reference.exact.outputs
    before = _outputs(reference.exact, data, 1 if big else len(data), both)
    if big:
        reference = None  # one of them at a time in memory
    other = executed(result.model, look=not big)
    after = _outputs(other.exact, data, len(before), both)
    here = after if other.here is other.exact else _outputs(other.here, data, len(before), both)
    speed = None
    if reference:
        sample = data.sample(0)
        own = result.source and file_opened(result.source, reference.here.outputs, sample)
        speed = speedup(own or reference.here, other.here, sample)
    return _Seen(names, before, after, here, speed, other.nodes)


def _outputs(model: Opened, data: Dataset, most: int, both: Both) -> Outputs:
    """What a model gives for at most so many samples, as many as fit the memory."""

    def step(index: int) -> list[Array]:
        return model.answer(data.sample(index))

    first = step(0)
    held = sum(getattr(x, "nbytes", 0) for x in first)
    count = max(
        1,
        min(most, len(data), both.resources.memory // max(1, 3 * held)),
    )
    if data.states:
        return list(_closed_loop(model, data, count))
    rest = over_samples(
        count - 1,
        lambda index: step(index + 1),
        both.resources.threads,
    )
    return [first, *rest]


def _closed_loop(model: Opened, data: Dataset, count: int) -> Iterator[list[Array]]:
    """What a model gives for consecutive frames, fed its own states."""
    held: dict[str, Array] = {}
    for index in range(count):
        sample = data.sample(index)
        # Codes, where the model gives them, are no states.
        kept = {name: x for name, x in held.items() if x.dtype == sample[name].dtype}
        outputs = model.answer({**sample, **kept})
        made = dict(zip(model.outputs, outputs, strict=True))
        held = {name: made[output] for name, output in data.states.items()}
        yield outputs


def _tallies(before: Outputs, after: Outputs) -> list[list[Tally]]:
    """Of every output, in the samples of `after`."""
    return [list(map(tally, *sample)) for sample in zip(before, after, strict=False)]


def _errors(names: Sequence[str], tallies: list[list[Tally]]) -> tuple[TensorError, ...]:
    """The error of every output over all samples."""
    return tuple(map(error_of, names, np.sum(tallies, axis=0))) if tallies else ()


def _judged(
    names: Sequence[str], before: Outputs, after: Outputs
) -> tuple[tuple[TensorError, ...], tuple[TensorError, ...]]:
    """The error of every output over all samples, and of slices that are judged apart."""
    outputs, slices = list[TensorError](), list[TensorError]()
    for number, name in enumerate(names):
        pairs = [(x[number], y[number]) for x, y in zip(before, after, strict=True)]
        alike = [pair for pair in pairs if comparable(*pair)]
        error = error_of(
            name,
            np.sum([tally(*pair) for pair in pairs], axis=0),
        )
        outputs.append(replace(error, few=few_of(alike)))
        slices += judged_apart(name, alike)
    return tuple(outputs), tuple(slices)


def _extents(first: Outputs, second: Outputs) -> list[tuple[float, float]]:
    """The largest value and difference of every output, in the samples that both have."""
    samples = zip(first, second, strict=False)
    return [found for sample in samples for found in map(extent, *sample)]


def _difference(plain: Outputs, after: Outputs) -> float:
    """The largest relative to the largest value."""
    extents = [found for found in _extents(plain, after) if np.isfinite(found).all()]
    largest, difference = np.max([(0.0, 0.0), *extents], axis=0)
    return float(difference / (largest or 1.0))


def _answers(before: Outputs, after: Outputs, labelled: bool) -> Array | None:
    """The class that both give each sample (samples, 2), of the first output; None where it chooses
    none. Labels say that it does.
    """
    rows = [(x[0], y[0]) for x, y in zip(before, after, strict=True) if x]
    first, second = (
        (scores_of(side) for side in (*zip(*rows, strict=True),)) if rows else (None,) * 2
    )
    if first is None or second is None or first.shape != second.shape:
        return None
    if not labelled and not are_answers(first):
        return None
    return np.array([first.argmax(axis=1), second.argmax(axis=1)]).T


def _agreement(answers: Array | None) -> float | None:
    return None if answers is None else float(np.mean(answers[:, 0] == answers[:, 1]))


def _here(seen: _Seen, labelled: bool) -> Here | None:
    """What the outputs here tell, None where they are those of exact kernels."""
    if seen.here is seen.after:
        return None
    worst = worst_of(chain(*_judged(seen.names, seen.before, seen.here)))
    if worst is None or not any(difference for _, difference in _extents(seen.after, seen.here)):
        return None
    return Here(worst, _agreement(_answers(seen.before, seen.here, labelled)))


def _labels(
    answers: Array | None, data: Dataset, label_file: Path | None, watch: Watch
) -> Mapping[str, int] | None:
    """The class of every sample; None where no labels are given and, which is said, where they
    cannot be read or no answer can be compared with them.
    """
    if label_file is None:
        return None
    if answers is None:
        watch.warn(
            "Right answers are not counted: the first output holds no score for each class, one "
            "row a sample."
        )
        return None
    try:
        return read_labels(label_file, data)
    except DataError as error:
        watch.warn(f"Right answers are not counted: {error}")
        return None


def _top1(
    answers: Array | None, data: Dataset, labels: Mapping[str, int] | None
) -> tuple[tuple[float, float] | None, Interval | None]:
    """The share of right answers of both models, and the interval of what is lost; None where they
    are not known.
    """
    if answers is None or labels is None:
        return None, None
    wanted = [[labels[str(data.files(index)[0])]] for index in range(len(answers))]
    right = answers == wanted
    lost, won = (int(np.count_nonzero(right[:, k] > right[:, 1 - k])) for k in (0, 1))
    before, after = np.mean(right, axis=0).tolist()
    return (before, after), drop_interval(lost, won, len(right))


def _changed(
    seen: _Seen, answers: Array | None, data: Dataset, labels: Mapping[str, int]
) -> Iterator[Changed]:
    """The first samples whose answer changed."""
    if answers is None:
        return
    for index in np.flatnonzero(answers[:, 0] != answers[:, 1])[:SHOWN_CHANGES].tolist():
        files = data.files(index)
        file = str(files[0]) if files else ""
        tops = (_top(outputs[index][0]) for outputs in (seen.before, seen.after))
        yield Changed(file, labels.get(file), *tops)


def _views(seen: _Seen, data: Dataset, result: Quantized) -> Iterator[Views]:
    """What a report shows of the outputs, where there is to be one."""
    wanted = result.settings.preprocess
    if result.settings.common.debug_info_save_path and not data.random:
        yield from views(seen.names, seen.before, seen.after, data, wanted=wanted)


def _top(scores: Array) -> tuple[tuple[int, float], ...]:
    """The likeliest classes with their scores, best first."""
    row = np.asarray(scores).ravel()
    best = np.argsort(-row, kind="stable")[:TOP]
    return tuple((int(k), float(row[k])) for k in best)


def _warn(
    found: Verification,
    fused: Sequence[tuple[TensorError, TensorError]],
    result: Quantized,
    watch: Watch,
) -> None:
    """Says what the user should know; `fused` are errors with and without optimizations on the same
    samples.
    """
    if (
        found.speed is not None
        and found.speed.high < SLOWER
        and (result.plan.tensors or not result.plan.nodes)
    ):
        watch.warn(
            "The quantized model is slower here than the float one: what converts to integers and "
            "back costs more than "
            "integer kernels save; leave the operators around float nodes float (skip_quant_node) "
            "or use WEIGHT_QUANT."
        )
    if drawing := next((n for n in result.reference.graph.all_nodes() if draws(n)), None):
        watch.warn(
            f"The model draws random numbers ('{drawing.name}', {drawing.op_type}): its outputs "
            "differ from run to run, and the figures compare different draws."
        )
    for error, plain in () if drawing else fused:
        if error.sqnr_db < min(plain.sqnr_db, LAST_BITS_DB) - FUSED_DB:
            watch.warn(
                f"The runtime's integer kernels disagree with the model: output '{error.name}' has "
                f"{error.sqnr_db:.1f} dB, and {plain.sqnr_db:.1f} dB without optimizations."
            )
    # What stands out of random samples is no answer.
    ruined = [e for e in found.judged if e.compared and (e.spoilt if found.random else e.ruined)]
    worst = worst_of(ruined)
    if worst is not None and not drawing:
        reports = result.settings.common.debug_info_save_path
        where = f"{reports} shows" if reports else "set debug_info_save_path to see"
        others = [error.title for error in ruined if error is not worst]
        also = f", and {len(others)} more, first {others[0]}," if others else ""
        watch.warn(f"Output {worst.title}{also} is {_loss(worst)}: {where} which nodes cost most.")
    if found.saturated:
        watch.warn(
            f"The weights of {len(found.saturated)} nodes, first {found.saturated[0]}, can "
            "overflow 16-bit sums on x86 processors without VNNI, which then compute something "
            f"else: {against_saturation(result.settings)}."
        )


def _loss(error: TensorError) -> str:
    """What is lost, in words."""
    if error.few and error.few.lost:
        return (
            f"lost where it matters: the {SHARE:.1%} of its values that stand out most have "
            f"{error.few.sqnr_db:.1f} dB, an error of more than half their height"
        )
    return f"only {error.cosine:.4f} like the float model's (cosine similarity)"


def tensor_errors(both: Both) -> list[TensorError]:
    """The error of each of `both.tensors`.

    These are the models as their files say, without the runtime's optimizations.
    """
    if not both.tensors:
        return []
    return errors_between(
        both.reference,
        both.quantized,
        both.result.data,
        both.resources.threads,
        tensors=both.tensors,
        count=COMPARED_SAMPLES,
    )
