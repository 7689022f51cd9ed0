"""Opens model files and runs samples through them, with one thread inside ONNX Runtime, so that
results do not depend on the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from calib import CalibError
from calib.affine import Array

Sample = Mapping[str, Array]
# What ONNX Runtime says of itself in front of its messages.
NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:")
# What it says where an output cannot be handed out, and the types that this is so for.
UNKNOWN_TO_NUMPY = "No corresponding Numpy type"
LACKING = re.compile(r"tensor\((bfloat16|u?int[24]|float4\w*)\)")
CPU_PROVIDERS = ("CPUExecutionProvider",)


def open_session(
    model: Path | bytes,
    *,
    optimize: bool = True,
    providers: Sequence[str] = CPU_PROVIDERS,
    optimized: Path | None = None,
    pack: bool = True,
    same_sizes: bool = False,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session of a model file or serialized model; CalibError if the runtime
    refuses it.

    What the runtime makes of the model is written to `optimized`. Without `pack` it holds no copies
    of weights in the order that its kernels like, so that those in other files stay there. Where
    all runs have the `same_sizes`, memory is kept from one to the next. `end_profiling` writes what
    each node took to a file whose name begins with `profile`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1  # workers run samples side by side
    # Activations of varying size make the arena keep every size it ever saw.
    options.enable_cpu_mem_arena = same_sizes
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        msg = f"ONNX Runtime cannot load the model: {_first_line(error)}."
        raise CalibError(msg) from error


def run(session: ort.InferenceSession, outputs: Sequence[str], sample: Sample) -> dict[str, Array]:
    """The named outputs for one sample; CalibError if the model fails on it.

    There is None in place of tensors of types that NumPy lacks (bfloat16, 4 bits).
    """
    if not outputs:
        return {}  # to ONNX Runtime no names mean all
    try:
        return dict(zip(outputs, session.run(list(outputs), dict(sample)), strict=True))
    except Exception as error:
        lacking = _lacking(session) if UNKNOWN_TO_NUMPY in str(error) else set()
        if lacking.intersection(outputs):
            held = [name for name in outputs if name not in lacking]
            absent: dict[str, Any] = dict.fromkeys(outputs)
            return absent | run(session, held, sample)
        shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in sample.items())
        msg = f"The model fails on a sample with {shapes}: {_first_line(error)}."
        raise CalibError(msg) from error


def _lacking(session: ort.InferenceSession) -> set[str]:
    """The outputs of types that NumPy lacks."""
    return {output.name for output in session.get_outputs() if LACKING.fullmatch(output.type)}


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
    return NOISE.sub("", text)
