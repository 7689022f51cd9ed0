"""After every conversion: the float and the quantized model side by side."""

from __future__ import annotations

from converter.compare import TensorError, compare, speedup
from converter.job import Resources, Watch
from converter.model import saved, weight_bytes
from converter.quantized import Quantized

# Samples on which the tensors inside both models are compared.
COMPARED_SAMPLES = 4
# Models with more weights are not timed: writing and loading them would take longer than the conversion.
TIMED_BYTES = 500_000_000
# Less than this speed-up is called slower, not noise.
SLOWER = 0.95


def verify(result: Quantized, resources: Resources, watch: Watch) -> tuple[TensorError, ...]:
    """The error of every output and of every tensor inside that both models have, worst first; none without data."""
    if not len(result.data):
        return ()
    outputs = {value.name or "": value.name or "" for value in result.reference.graph.outputs}
    pairs = {**result.tensors, **outputs}
    with saved(result.reference, pairs) as reference, saved(result.model, pairs.values()) as other:
        found = compare(reference, other, pairs, result.data, COMPARED_SAMPLES, resources.threads)
    if result.plan.tensors and result.plan.units() and weight_bytes(result.reference) < TIMED_BYTES:
        _tell_speed(result, watch)
    return tuple(sorted(found, key=lambda error: error.sqnr_db))


def _tell_speed(result: Quantized, watch: Watch) -> None:
    """Says how much faster the quantized model is here, and warns where it is not."""
    with saved(result.reference) as reference, saved(result.model) as other:
        ratio = speedup(reference, other, result.data.sample(0))
    if ratio is None:
        return
    watch.tell(f"Speed {ratio:.2f} times the float model's, in ONNX Runtime on one thread of this machine.")
    if ratio < SLOWER:
        watch.warn(
            "The quantized model is slower here than the float one: what converts to integers and back costs more than "
            "integer kernels save; leave the operators around float nodes float (skip_quant_node) or use WEIGHT_QUANT."
        )
