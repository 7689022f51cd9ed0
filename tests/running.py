"""Conversions inside a test: data in memory, jobs from a few lines of config, and what is said
meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from graphs import frozen

from calib.affine import Array
from calib.samples import Dataset, Sample
from calib.session import CPU_PROVIDERS
from converter.config import load_config
from converter.job import Job, Resources, Watch
from converter.pipeline import convert as pipeline

Keys = Mapping[str, object]


class InMemory(Dataset):
    """Samples that need no files, though they may be said to come from some."""

    def __init__(self, samples: Sequence[Sample], names: Sequence[str] = ()) -> None:
        self._samples, self._names, self.warnings = samples, names, ()

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        return self._samples[index]

    def files(self, index: int) -> tuple[Path, ...]:
        return (Path(self._names[index]),) if self._names else ()


def resources(threads: int = 1, memory: int = 64 << 20) -> Resources:
    """One processor's."""
    return Resources(threads, CPU_PROVIDERS, memory)


class Ear(Watch):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def tell(self, text: str) -> None:
        self.told.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def write_config(path: Path, **sections: Keys) -> Path:
    """An INI file; `full_quant={"equalize": "false"}` is the line `equalize = false` of
    [full_quant_param].
    """
    lines = []
    for name, keys in sections.items():
        lines += [f"[{name}_param]", *(f"{key} = {value}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def job(
    folder: Path,
    model: ir.Model,
    data: Mapping[str, Array],
    common: Keys | None = None,
    **full_quant: object,
) -> Job:
    """The full quantization of `model` with `data` (input name → samples along the first axis),
    files in `folder`.
    """
    (folder / "model.onnx").write_bytes(frozen(model))
    for name, samples in data.items():
        np.save(folder / f"{name}.npy", samples)
    config = write_config(
        folder / "c.cfg",
        common_quant={"quant_type": "FULL_QUANT", "thread_num": 1, **(common or {})},
        full_quant=full_quant,
        data_preprocess={
            "calibrate_path": ",".join(f"{name}:{folder / name}.npy" for name in data),
            "calibrate_size": min(map(len, data.values())),
            "input_type": "NPY",
        },
    )
    return Job(folder / "model.onnx", folder / "quantized.onnx", load_config(config))


def weights_converted(
    folder: Path,
    model: ir.Model,
    data: Array | None = None,
    common: Keys | None = None,
    weight: Keys | None = None,
    mixed: Keys | None = None,
    watch: Watch | None = None,
    fp16: bool = False,
) -> tuple[pipeline.Outcome, bytes]:
    """What becomes of `model` under WEIGHT_QUANT, with samples of its input x where `data` is
    given, and the file `out.onnx` in `folder`.
    """
    (folder / "model.onnx").write_bytes(frozen(model))
    sections = {
        "common_quant": {
            "quant_type": "WEIGHT_QUANT",
            "min_quant_weight_channel": 0,
            "thread_num": 1,
            **(common or {}),
        },
        "weight_quant": weight or {},
        "mixed_bit_weight_quant": mixed or {},
    }
    if data is not None:
        np.save(folder / "x.npy", data)
        sections["data_preprocess"] = {
            "calibrate_path": f"x:{folder / 'x.npy'}",
            "calibrate_size": len(data),
            "input_type": "NPY",
        }
    config = load_config(write_config(folder / "c.cfg", **sections))
    output = folder / "out.onnx"
    outcome = pipeline.convert(Job(folder / "model.onnx", output, config, fp16=fp16), watch)
    return outcome, output.read_bytes()
