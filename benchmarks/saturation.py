#!/usr/bin/env python3
"""Proof that the processor does not matter: what other x86 processors, emulated, make of the same
files and of the same conversions.

    python benchmarks/saturation.py run [MODEL ...] [--pictures 4]
    python benchmarks/saturation.py convert [MODEL ...] [--kinds CPU,ARM] [--cpus Haswell]

Needs `qemu-x86_64` (Debian: qemu-user) and a CPU with VNNI, which is exact. `run` converts with
overflow_safe true and false and prints the largest difference of the outputs between this CPU and
one with AVX2 but without VNNI, relative to the largest output.

`convert` converts for every target (other kinds are WEIGHT_QUANT and DYNAMIC_QUANT) here and on
other processors. It prints how many files are the same to the byte and, of the others, the largest
share of weight codes that differ, the largest relative difference of a scale, and how much above
their difference the outputs of two files are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from common import CLASSIFIERS, DATA, measure, qconvert, session
from onnx import numpy_helper
from PIL import Image

from converter.plan.targets import TARGETS

RUN = """
import sys, numpy, onnxruntime
o = onnxruntime.SessionOptions()
o.log_severity_level = 4
o.intra_op_num_threads = 1
s = onnxruntime.InferenceSession(sys.argv[1], o)
name = s.get_inputs()[0].name
numpy.save(sys.argv[3], numpy.stack([s.run(None, {name: x})[0] for x in numpy.load(sys.argv[2])]))
"""
# All conversions of a folder in one process, as starting takes longest.
CONVERT = """
import sys, pathlib
from converter import convert
for config in sorted(pathlib.Path(sys.argv[1]).glob("*.cfg")):
    output = pathlib.Path(sys.argv[2]) / f"{config.stem}.onnx"
    convert(config.with_name("model.onnx"), config, output, verify=False)
"""
# With AVX2, without it, and one whose AVX-512 the emulator leaves out.
CPUS = ("Haswell", "Nehalem", "Cascadelake-Server")
DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
# What is converted to: FULL_QUANT for each target, and the other modes.
KINDS = {
    **{x: f"quant_type=FULL_QUANT\n[full_quant_param]\ntarget_device={x}" for x in TARGETS},
    "WEIGHT_QUANT": "quant_type=WEIGHT_QUANT\nbit_num=4\nmin_quant_weight_channel=0",
    "DYNAMIC_QUANT": "quant_type=DYNAMIC_QUANT",
}
# BLAS chooses its kernels by processor; their threads only cost time here.
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Small:
    """A model that an emulator gets done, and what it is fed: (samples, …) float32."""

    path: Path
    input: str
    samples: Callable[[], np.ndarray]


def _pictures() -> np.ndarray:
    files = sorted((DIGITS / "calib").iterdir())[:16]
    pictures = [np.asarray(Image.open(file).convert("L"), np.float32) for file in files]
    return (np.stack(pictures)[:, None] - np.float32(127.5)) / np.float32(127.5)


def _of_classifier(name: str, count: int) -> np.ndarray:
    data, _ = CLASSIFIERS[name].samples("calib", count)
    return np.concatenate([data.sample(i)[CLASSIFIERS[name].input] for i in range(count)])


def _noise(*shape: int) -> Callable[[], np.ndarray]:
    return lambda: np.random.default_rng(0).standard_normal(shape).astype(np.float32)


SMALL = {
    "digits_cnn": Small(DIGITS / "digits_cnn.onnx", "image", _pictures),
    "resnet20_cifar10": Small(
        CLASSIFIERS["resnet20_cifar10"].path, "input", lambda: _of_classifier("resnet20_cifar10", 2)
    ),
    "mnist_cnn": Small(DATA / "models/mnist_cnn.onnx", "Input3", _noise(16, 1, 28, 28)),
    "mlperf_tiny_kws_dscnn": Small(
        DATA / "models/mlperf_tiny_kws_dscnn.onnx", "input_1", _noise(4, 49, 10, 1)
    ),
    "yunet_s_320": Small(DATA / "models/yunet_s_320.onnx", "input", _noise(1, 3, 320, 320)),
}


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "convert"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--kinds", default=",".join(TARGETS))
    parser.add_argument("--cpus", default=",".join(CPUS))
    args = parser.parse_args()
    if shutil.which("qemu-x86_64") is None:
        sys.exit("qemu-x86_64 is not installed (Debian: apt-get install qemu-user).")
    with tempfile.TemporaryDirectory() as name:
        if args.what == "run":
            run_here_and_there(Path(name), args.models or list(CLASSIFIERS), args.pictures)
        else:
            models, cpus = args.models or list(SMALL), args.cpus.split(",")
            convert_everywhere(Path(name), models, args.kinds.split(","), cpus)


def emulated(cpu: str, code: str, *arguments: Path) -> None:
    """Runs Python code on another processor."""
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", code, *map(str, arguments)]
    measure(command, {**os.environ, **SINGLE})


# --- the same file


def run_here_and_there(folder: Path, models: Sequence[str], pictures: int) -> None:
    """Prints a row for each model and value of overflow_safe."""
    print(f"{'':28s} overflow_safe   largest difference")
    for model in models:
        classifier = CLASSIFIERS[model]
        data, _ = classifier.samples("dev", pictures)
        samples = np.stack([data.sample(i)[classifier.input] for i in range(len(data))])
        np.save(folder / "in.npy", samples)
        for safe in ("true", "false"):
            extra = f"[full_quant_param]\noverflow_safe={safe}"
            config = classifier.config(folder, "FULL_QUANT", extra=extra)
            qconvert(classifier.path, config, folder / "out.onnx")
            runner = session(folder / "out.onnx", 1)
            here = np.stack([runner.run(None, {classifier.input: x})[0] for x in samples])
            emulated("Haswell", RUN, *(folder / x for x in ("out.onnx", "in.npy", "there.npy")))
            difference = np.abs(np.load(folder / "there.npy") - here).max() / np.abs(here).max()
            print(f"{model:28s} {safe:13s}   {difference:.6f}", flush=True)


# --- the same conversion


def convert_everywhere(
    folder: Path, models: Sequence[str], kinds: Sequence[str], cpus: Sequence[str]
) -> None:
    """Prints a row for each model and processor, over all kinds."""
    print(f"{'':24s} {'':20s} same bytes   codes      scales     outputs")
    for model in models:
        jobs, here = folder / model, folder / model / "here"
        here.mkdir(parents=True)
        samples = _write_jobs(jobs, SMALL[model], kinds)
        measure([sys.executable, "-c", CONVERT, str(jobs), str(here)], SINGLE)
        for cpu in cpus:
            there = jobs / cpu
            there.mkdir()
            emulated(cpu, CONVERT, jobs, there)
            pairs = [(here / f"{kind}.onnx", there / f"{kind}.onnx") for kind in kinds]
            found = _difference(pairs, SMALL[model].input, samples[:4])
            print(f"{model:24s} {cpu:20s} {found}", flush=True)


def _write_jobs(folder: Path, small: Small, kinds: Sequence[str]) -> np.ndarray:
    """Model, data and a config for each kind; returns the samples."""
    samples = small.samples()
    np.save(folder / "x.npy", samples)
    shutil.copy(small.path, folder / "model.onnx")
    for kind in kinds:
        (folder / f"{kind}.cfg").write_text(
            f"[common_quant_param]\nthread_num=1\n{KINDS[kind]}\n"
            f"[data_preprocess_param]\ncalibrate_path={small.input}:x.npy\n"
            f"input_type=NPY\ncalibrate_size={len(samples)}\n"
        )
    return samples


def _difference(pairs: Sequence[tuple[Path, Path]], name: str, samples: np.ndarray) -> str:
    """How many pairs of files are the same, and how far apart the others."""
    other = [pair for pair in pairs if pair[0].read_bytes() != pair[1].read_bytes()]
    same = f"{len(pairs) - len(other)} of {len(pairs)}"
    if not other:
        return f"{same:12s} -          -          -"
    apart = (_apart(*pair, name, samples) for pair in other)
    codes, scales, noise = (max(x) for x in zip(*apart, strict=True))
    return f"{same:12s} {codes:8.4%}  {scales:8.1e}   {-noise:5.1f} dB"


def _apart(first: Path, second: Path, name: str, samples: np.ndarray) -> tuple[float, float, float]:
    """Share of weight codes, relative difference of scales, noise of the outputs in dB."""
    left, right = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (first, second)
    )
    both = [(left[key], right[key]) for key in left.keys() & right.keys()]
    codes = [np.mean(x != y) for x, y in both if x.dtype.itemsize == 1 and x.ndim > 1]
    sizes = [x.size for x, _ in both if x.dtype.itemsize == 1 and x.ndim > 1]
    scales = [np.abs(left[k] / right[k] - 1).max() for k in left if k.endswith("_scale")]
    x, y = (_outputs(path, name, samples) for path in (first, second))
    noise = 10 * np.log10(np.sum((x - y) ** 2) / np.sum(x**2)) if (x != y).any() else -np.inf
    return float(np.average(codes, weights=sizes)), float(max(scales)), float(noise)


def _outputs(path: Path, name: str, samples: np.ndarray) -> np.ndarray:
    runner = session(path, 1)
    found = [runner.run(None, {name: x[None]}) for x in samples]
    return np.concatenate([y.ravel() for outputs in found for y in outputs]).astype(np.float64)


if __name__ == "__main__":
    main()
