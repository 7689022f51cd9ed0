"""Converts one random model and measures everything that could be wrong with the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from generator import random_model
from graphs import run
from running import Keys, write_config
from simulation import BY_ROW, FAKE, NOISE, noise_to_signal, simulation

from converter.config import load_config
from converter.graph import files as models
from converter.job import Job, Watch
from converter.pipeline import convert as pipeline

SAMPLES, NOISE_DRAWS = 3, 3


@dataclass(frozen=True)
class Examination:
    """Roots of noise over signal power, of the worst output: of the result against the float model
    (`error`), against what its plan says (`simulated`), of its optimized run against the plain one
    (`optimized`), and of the float model with noise as large as the plan's steps (`predicted`,
    where ranges come from calibration).
    """

    error: float
    simulated: float
    optimized: float
    predicted: float | None
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong, if anything."""
        # Sums in another order may turn a single rounding.
        if self.simulated > max(2e-5, 0.15 * self.error):
            return f"the model does not compute what its plan says ({self.simulated:.1e})"
        if self.optimized > 2 * (self.predicted or 0) + 1e-4:
            return f"optimizations change the outputs ({self.optimized:.1e})"
        if self.predicted is not None and self.error > 4 * self.predicted + 1e-5:
            return f"the error {self.error:.1e} is larger than predicted ({self.predicted:.1e})"
        return None


def examine(
    folder: Path, seed: int, mode: str, with_data: bool = False, **sections: Keys
) -> Examination:
    """Converts random model number `seed` in `folder`; `sections` are those of the config."""
    model, data = random_model(seed)
    job = _job(folder, model, data if with_data or mode == "FULL_QUANT" else {}, mode, sections)
    start = time.perf_counter()
    quantized = pipeline.MODES[mode].quantize(pipeline.read(job, Watch()), job, Watch())
    models.save(quantized.model, job.output)
    seconds = time.perf_counter() - start
    samples = [{name: array[i] for name, array in data.items()} for i in range(SAMPLES)]
    by_row = sections.get("dynamic_quant", {}).get("quant_strategy") == "ACWL"
    simulated = simulation(quantized.reference, quantized.plan, BY_ROW if by_row else FAKE)
    wanted, found, fused, planned = (
        [run(content, sample, optimize) for sample in samples]
        for content, optimize in (
            (model.SerializeToString(), False),
            (job.output.read_bytes(), False),
            (job.output.read_bytes(), True),
            (simulated, False),
        )
    )
    # A single draw may hit little of what an output is sensitive to.
    draws = range(NOISE_DRAWS if mode == "FULL_QUANT" else 0)
    noisy = [simulation(quantized.reference, quantized.plan, NOISE, seed) for seed in draws]
    errors = [
        noise_to_signal(wanted, [run(model, sample) for sample in samples]) for model in noisy
    ]
    return Examination(
        error=noise_to_signal(wanted, found),
        simulated=noise_to_signal(planned, found),
        optimized=noise_to_signal(found, fused),
        predicted=max(errors, default=None),
        seconds=seconds,
    )


def _job(
    folder: Path,
    model: onnx.ModelProto,
    data: Mapping[str, np.ndarray],
    mode: str,
    sections: Mapping[str, Keys],
) -> Job:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    for name, array in data.items():
        (folder / name).mkdir(exist_ok=True)
        for number, sample in enumerate(array):
            np.save(folder / name / f"{number}.npy", sample)
    paths = ",".join(f"{name}:{folder / name}" for name in data)
    preprocess = {"calibrate_path": paths, "calibrate_size": SAMPLES, "input_type": "NPY"}
    common = {"quant_type": mode, "thread_num": 1, **sections.get("common_quant", {})}
    others = {name: keys for name, keys in sections.items() if name != "common_quant"}
    needed = {"data_preprocess": preprocess} if data else {}
    config = write_config(folder / "c.cfg", common_quant=common, **others, **needed)
    return Job(folder / "m.onnx", folder / "q.onnx", load_config(config))
