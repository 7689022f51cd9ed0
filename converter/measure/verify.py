"""After every conversion: the float and the quantized model side by side, as a runtime executes
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calib.affine import Array
from calib.samples import Dataset
from calib.session import open_session, over_samples, run
from converter.calibrate.data import synthetic_data
from converter.calibrate.exact import both_files, saturating
from converter.config.left import against_saturation
from converter.errors import DataError
from converter.graph.edit import weight_bytes
from converter.graph.files import nodes_in
from converter.graph.qdq import CONVERSIONS
from converter.job import Resources, Watch
from converter.measure.errors import (
    TensorError,
    compare,
    error_of,
    extent,
    speedup,
    tally,
    worst_of,
)
from converter.measure.results import Here, Verification
from converter.measure.sensitivity import read_labels
from converter.plan.ops import draws
from converter.plan.result import Quantized

# Samples the outputs are compared on, those without the runtime's optimizations, and those for the
# tensors inside.
VERIFIED_SAMPLES, PLAIN_SAMPLES, COMPARED_SAMPLES = 16, 4, 4
# Models with more weights are compared on one sample and not timed, which would take longer than
# the conversion.
TIMED_BYTES = 500_000_000
# What is called slower and not noise, a cosine similarity called a loss, and dB that optimizations
# may cost.
SLOWER, LOST_COSINE, LOST_DB = 0.95, 0.95, 3.0
# Above this there are but the last bits of float32, which sums in another order change.
LAST_BITS_DB = 110.0
# All outputs of each sample.
Outputs = Sequence[Sequence[Array]]


def verify(
    result: Quantized, label_file: Path | None, resources: Resources, watch: Watch
) -> Verification:
    """What running both models tells, on samples that calibration has not seen, where there are
    any.

    Warns of what the user should know. Raises CalibError or ModelError where a model does not run.
    """
    data, held_back = _samples(result, watch)
    return _verified(result, data, held_back, label_file, resources, watch)


def _samples(result: Quantized, watch: Watch) -> tuple[Dataset, bool]:
    """Samples to verify on, and whether calibration saw none of them."""
    if not len(result.data):
        watch.say("There is no data: the outputs are compared on random samples.")
        return synthetic_data(result.reference), False
    further = result.data.further(VERIFIED_SAMPLES)
    if not len(further):
        watch.say(
            "calibrate_size takes all samples: the outputs are compared on calibration samples."
        )
    return (further, True) if len(further) else (result.data, False)


def _verified(
    result: Quantized,
    data: Dataset,
    held_back: bool,
    labels: Path | None,
    resources: Resources,
    watch: Watch,
) -> Verification:
    big = weight_bytes(result.reference) > TIMED_BYTES
    with (
        both_files(result.reference) as (reference, exact_reference),
        both_files(result.model) as (other, exact_other),
    ):
        names, before = _outputs(exact_reference, data, 1 if big else VERIFIED_SAMPLES, resources)
        _, after = _outputs(exact_other, data, len(before), resources)
        _, plain = _outputs(
            exact_other, data, PLAIN_SAMPLES if len(before) > 1 else 0, resources, optimize=False
        )
        differs = exact_other != other
        here = _outputs(other, data, len(before), resources)[1] if differs else after
        ratio = None if big else speedup(reference, other, data.sample(0))
        executed = [] if big else _executed(other)
    answers = _answers(before, after)
    found = Verification(
        samples=len(before),
        held_back=held_back,
        outputs=_errors(names, before, after),
        fused_difference=_difference(plain, after),
        speedup=ratio,
        top1=_top1(answers, data, labels, watch) if labels and answers is not None else None,
        agreement=_agreement(answers),
        kernels=dict(Counter(op_type for _, op_type in executed)),
        conversions=tuple(name for name, op_type in executed if op_type in CONVERSIONS),
        saturated=() if result.exact else tuple(saturating(result.model)),
        random=not len(result.data),
        here=_here(names, before, after, here),
    )
    both = [_errors(names, before[: len(plain)], outputs) for outputs in (after, plain)]
    _warn(found, list(zip(*both, strict=True)), result, watch)
    return found


def _outputs(
    path: Path, data: Dataset, most: int, resources: Resources, optimize: bool = True
) -> tuple[list[str], Outputs]:
    """Names of the outputs, and what they are for at most so many samples, as many as fit the
    memory.
    """
    session = open_session(path, optimize=optimize)
    names = [output.name for output in session.get_outputs()]

    def step(index: int) -> list[Array]:
        return list(run(session, names, data.sample(index)).values())

    first = [step(0)] if most else []
    held = sum(getattr(x, "nbytes", 0) for sample in first for x in sample)
    room = resources.memory // max(1, 3 * held) if first else 0
    count = max(1, min(most, len(data), room))
    return names, [
        *first,
        *over_samples(count - 1, lambda index: step(index + 1), resources.threads),
    ]


def _errors(names: Sequence[str], before: Outputs, after: Outputs) -> tuple[TensorError, ...]:
    """The error of every output over the samples of `after`."""
    found = [
        [tally(x, y) for x, y in zip(*both, strict=True)]
        for both in zip(before, after, strict=False)
    ]
    return tuple(map(error_of, names, np.sum(found, axis=0))) if found else ()


def _difference(plain: Outputs, after: Outputs) -> float:
    """The largest relative to the largest value."""
    pairs = [
        both for sample in zip(plain, after, strict=False) for both in zip(*sample, strict=True)
    ]
    extents = [found for x, y in pairs if np.isfinite(found := extent(x, y)).all()]
    largest, difference = np.max([(0.0, 0.0), *extents], axis=0)
    return float(difference / (largest or 1.0))


def _answers(before: Outputs, after: Outputs) -> Array | None:
    """Where both find the largest value of each sample (samples, 2); None where it is not one of a
    row of floats.
    """
    rows = [(x[0], y[0]) for x, y in zip(before, after, strict=True) if x]
    if not rows or not all(_is_row(x) and np.shape(y) == x.shape for x, y in rows):
        return None
    return np.array([(x.argmax(), y.argmax()) for x, y in rows])


def _is_row(x: object) -> bool:
    return (
        isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim == 2 and len(x) == 1 < x.size
    )


def _agreement(answers: Array | None) -> float | None:
    return None if answers is None else float(np.mean(answers[:, 0] == answers[:, 1]))


def _here(names: Sequence[str], before: Outputs, after: Outputs, here: Outputs) -> Here | None:
    """What the outputs `here` tell, None where they are those of exact kernels."""
    pairs = [both for sample in zip(after, here, strict=True) for both in zip(*sample, strict=True)]
    worst = worst_of(_errors(names, before, here))
    if worst is None or all(extent(x, y)[1] == 0 for x, y in pairs):
        return None
    return Here(worst, _agreement(_answers(before, here)))


def _top1(
    answers: Array, data: Dataset, label_file: Path, watch: Watch
) -> tuple[float, float] | None:
    """The share of right answers of both models."""
    try:
        labels = read_labels(label_file, data)
    except DataError as error:
        watch.warn(f"Right answers are not counted: {error}")
        return None
    wanted = [[labels[data.files(index)[0].name]] for index in range(len(answers))]
    before, after = np.mean(answers == wanted, axis=0).tolist()
    return before, after


def _executed(path: Path) -> list[tuple[str, str]]:
    """Name and operator type of the nodes that ONNX Runtime is left with after its optimizations.

    It writes them beside the file at `path`, in a form that the ONNX checker need not accept.
    """
    optimized = path.with_name("optimized.onnx")
    open_session(path, optimized=optimized)
    return nodes_in(optimized)


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
        found.speedup is not None
        and found.speedup < SLOWER
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
        if error.sqnr_db < min(plain.sqnr_db, LAST_BITS_DB) - LOST_DB:
            watch.warn(
                f"The runtime's integer kernels disagree with the model: output '{error.name}' has "
                f"{error.sqnr_db:.1f} dB, and {plain.sqnr_db:.1f} dB without optimizations."
            )
    worst = found.worst
    if worst is not None and worst.cosine < LOST_COSINE and not drawing:
        reports = result.settings.common.debug_info_save_path
        where = f"{reports} shows" if reports else "set debug_info_save_path to see"
        watch.warn(
            f"Output '{worst.name}' is only {worst.cosine:.4f} like the float model's (cosine "
            f"similarity): {where} which nodes cost most."
        )
    if found.saturated:
        watch.warn(
            f"The weights of {len(found.saturated)} nodes, first {found.saturated[0]}, can "
            "overflow 16-bit sums on x86 processors without VNNI, which then compute something "
            f"else: {against_saturation(result.settings)}."
        )


def tensor_errors(result: Quantized, resources: Resources) -> tuple[TensorError, ...]:
    """The error of every output and of every tensor inside that both models have, worst first; none
    without data.
    """
    if not len(result.data):
        return ()
    outputs = {value.name or "": value.name or "" for value in result.reference.graph.outputs}
    tensors = {**result.tensors, **outputs}
    found = compare(
        result.reference, result.model, tensors, result.data, COMPARED_SAMPLES, resources.threads
    )
    return tuple(sorted(found, key=lambda error: error.sqnr_db))
