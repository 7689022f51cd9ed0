"""What the benchmarks share: the real models and how each is fed, scores, timings and whole-process
costs.

The data is looked for in `../shared/data` or where the environment variable QCONVERT_DATA points:
`models/NAME.onnx`, `images/imagenet|cifar10/{calib,dev}` with `calib.csv`/`dev.csv` (columns file
and label).
"""

from __future__ import annotations

import csv
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from calib.images import ImageOptions
from calib.samples import Dataset, InputSpec, open_dataset

DATA = Path(
    os.environ.get("QCONVERT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@dataclass(frozen=True)
class Classifier:
    """A labelled image classifier; `first_label` is the class index of the first label."""

    name: str
    input: str
    images: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    format: str = "RGB"
    crop: int | None = 224
    first_label: int = 0

    @property
    def path(self) -> Path:
        """The float model."""
        return DATA / "models" / f"{self.name}.onnx"

    def config(self, folder: Path, quant: str, size: int = 100, extra: str = "") -> Path:
        """Writes a config: the calibration data, `quant` as quant_type, and more lines."""
        crop = (
            "resize_short_side=256\n"
            f"center_crop_width={self.crop}\ncenter_crop_height={self.crop}\n"
        )
        text = (
            "[data_preprocess_param]\n"
            f"calibrate_path={self.input}:'{DATA / 'images' / self.images / 'calib'}'\n"
            ""
            f"calibrate_size={size}\ninput_type=IMAGE\nimage_to_format={self.format}\n"
            f"normalize_mean={list(self.mean)}\nnormalize_std={list(self.std)}\n"
            f"{crop if self.crop else ''}"
            f"[common_quant_param]\nquant_type={quant}\n{extra}\n"
        )
        path = folder / f"{self.name}.cfg"
        path.write_text(text)
        return path

    def samples(self, split: str, count: int | None = None) -> tuple[Dataset, list[int]]:
        """Preprocessed samples of `calib` or `dev` with their labels."""
        folder = DATA / "images" / self.images / split
        with (folder.parent / f"{split}.csv").open(newline="") as file:
            labels = {
                row["file"]: int(row["label"]) + self.first_label for row in csv.DictReader(file)
            }
        session = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        shape = tuple(d if isinstance(d, int) else None for d in session.get_inputs()[0].shape)
        options = ImageOptions(
            self.format,
            self.mean,
            self.std,
            None,
            None,
            256 if self.crop else None,
            "LINEAR",
            self.crop,
            self.crop,
        )
        spec = InputSpec(self.input, np.dtype(np.float32), shape)
        data = open_dataset(
            [spec], {self.input: folder}, count or len(labels), kind="IMAGE", image=options
        )
        return data, [labels[data.files(i)[0].name] for i in range(len(data))]


_HALF = (127.5,) * 3
CLASSIFIERS = {
    c.name: c
    for c in (
        Classifier("mobilenet_v1_0.75_224", "input", "imagenet", _HALF, _HALF),
        Classifier("mobilenet_v2_1.0_224", "input", "imagenet", _HALF, _HALF, first_label=1),
        Classifier("squeezenet1.1", "data_0", "imagenet", (104.0, 117.0, 123.0), (1.0,) * 3, "BGR"),
        Classifier(
            "resnet20_cifar10",
            "input",
            "cifar10",
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            crop=None,
        ),
    )
}


@dataclass(frozen=True)
class Cost:
    """What a whole process took."""

    seconds: float
    megabytes: float
    output: str
    cpu: float


def measure(command: list[str], env: dict[str, str] | None = None) -> Cost:
    """Runs a command to its end; raises RuntimeError with its last words if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stdout is not None
    peak = _Peak(process.pid)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(text[-2000:])
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - start, peak.megabytes(), text, cpu)


class _Peak(threading.Thread):
    """Watches the most memory of a process: what the system says after its end counts in this one,
    of which it was forked.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.kilobytes = Path(f"/proc/{pid}/status"), 0
        self.start()

    def run(self) -> None:
        """Looks until the process is gone; the system remembers the most by itself."""
        while (found := self._most()) is not None:
            self.kilobytes = max(self.kilobytes, found)
            time.sleep(0.02)

    def _most(self) -> int | None:
        try:
            match = re.search(r"VmHWM:\s+(\d+)", self.status.read_text())
        except OSError:
            return None
        return int(match[1]) if match else None

    def megabytes(self) -> float:
        """The most, once the process has ended."""
        self.join()
        return self.kilobytes / 1024


def qconvert(model: Path, config: Path, output: Path, *flags: str) -> Cost:
    """A whole conversion, start-up included."""
    arguments = [f"--modelFile={model}", f"--configFile={config}", f"--outputFile={output}", *flags]
    return measure([sys.executable, "-m", "converter", *arguments])


def told(judged: tuple[float, float], model: Path, out: Path, cost: Cost) -> str:
    """The end of a row: two figures of `out`, how much smaller it is, and what it cost."""
    ratio = model.stat().st_size / out.stat().st_size
    return (
        f"{judged[0]:.4f} {judged[1]:.4f} {ratio:6.2f} {cost.seconds:6.0f} {cost.cpu:6.0f} "
        f"{cost.megabytes:6.0f}"
    )


def session(path: Path, threads: int = 0, exact: bool = False) -> ort.InferenceSession:
    """`exact` asks for integer kernels that never saturate, which are slower."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, data: Dataset, exact: bool = False) -> np.ndarray:
    """The first output for every sample: (samples, values), float64."""
    runner = session(path, exact=exact)
    return np.stack(
        [runner.run(None, dict(data.sample(i)))[0].ravel() for i in range(len(data))]
    ).astype(np.float64)


def speedup(
    reference: Path, other: Path, data: Dataset, seconds: float = 3.0, threads: int = 1
) -> float:
    """Median time of `reference` over that of `other`, interleaved single inferences."""
    pair, feed = [session(reference, threads), session(other, threads)], dict(data.sample(0))
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for i in (0, 1):
            start = time.perf_counter()
            pair[i].run(None, feed)
            times[i].append(time.perf_counter() - start)
    return statistics.median(times[0][2:]) / statistics.median(times[1][2:])


def score(reference: np.ndarray, other: np.ndarray, labels: list[int]) -> tuple[float, float]:
    """Top-1 of `other` and its agreement with `reference`."""
    best = other.argmax(1)
    return float((best == labels).mean()), float((best == reference.argmax(1)).mean())
