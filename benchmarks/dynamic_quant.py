#!/usr/bin/env python3
"""Transformers and recurrent models in every mode against the float model and onnxruntime's tools,
all in this run.

    python benchmarks/dynamic_quant.py [--quick]

A sentence transformer, quantized dynamically with and without calibration data and statically with
it: cosine similarity to the float embeddings, rank correlation with human similarity scores
(Spearman), size, and speed over the float model for single sentences and a batch. Then recurrent
models and graphs with control flow in every mode: outputs against float, size and speed. One
thread; times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import DATA, qconvert, session
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

Feed = Mapping[str, np.ndarray]
TRANSFORMER = DATA / "models" / "minilm_l6.onnx"
SHAPES = ((1, 12), (1, 32), (1, 128), (8, 64))
MODES = ("DYNAMIC_QUANT", "WEIGHT_QUANT", "FULL_QUANT")


def sentences(split: str, side: str) -> list[Feed]:
    """The tokens of one sentence of every pair."""
    data = np.load(DATA / "sts" / f"sts_{split}.npz")
    pairs = zip(data[f"{side}_input_ids"], data[f"{side}_attention_mask"], strict=True)
    return [tokens(ids[None, : mask.sum()].astype(np.int64)) for ids, mask in pairs]


def tokens(ids: np.ndarray) -> Feed:
    """A feed of unpadded sentences."""
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def given(folder: Path, feeds: Sequence[Feed]) -> str:
    """Writes feeds as calibration data; returns the config's section."""
    for i, feed in enumerate(feeds):
        for name, array in feed.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{i:04d}.npy", array)
    paths = ",".join(f"{name}:'{folder / name}'" for name in feeds[0])
    size = len(feeds)
    return (
        f"[data_preprocess_param]\ncalibrate_path={paths}\ncalibrate_size={size}\ninput_type=NPY\n"
    )


def calibration(folder: Path, count: int) -> str:
    """Writes sentences as arrays of varying length; returns the config's section."""
    return given(folder, list(Sentences(count).feeds))


def converted(
    model: Path, folder: Path, label: str, extra: str = "", mode: str = "DYNAMIC_QUANT"
) -> Path:
    """The model quantized by a whole qconvert process."""
    config, out = folder / f"{label}.cfg", folder / f"{model.stem}_{label}.onnx"
    config.write_text(f"[common_quant_param]\nquant_type = {mode}\n{extra}")
    cost = qconvert(model, config, out)
    print(f"  {label}: {cost.seconds:.1f} s, {cost.megabytes:.0f} MB", flush=True)
    return out


def by_peer(model: Path, folder: Path) -> dict[str, Path]:
    """quantize_dynamic with its defaults, per channel, and with the types that are exact on every
    x86.
    """
    choices = {
        "onnxruntime": {},
        "onnxruntime per channel": {"per_channel": True},
        "onnxruntime uint8": {"per_channel": True, "weight_type": QuantType.QUInt8},
    }
    outputs = {label: folder / f"{model.stem}_{label.replace(' ', '_')}.onnx" for label in choices}
    for label, options in choices.items():
        quantize_dynamic(model, outputs[label], **options)
    return outputs


class Sentences(CalibrationDataReader):
    """The sentences of `calibration` for the peer."""

    def __init__(self, count: int) -> None:
        self.feeds = iter(
            [*sentences("calib", "a")[: count // 2], *sentences("calib", "b")[: count // 2]]
        )

    def get_next(self) -> Feed | None:
        """The next feed, None behind the last."""
        return next(self.feeds, None)


def statically_by_peer(folder: Path, count: int) -> dict[str, Path]:
    """quantize_static on the same sentences: with its defaults, and with what a user who knows it
    would choose.
    """
    known = {
        "per_channel": True,
        "activation_type": QuantType.QUInt8,
        "op_types_to_quantize": ["MatMul", "Gather"],
    }
    found = {}
    for label, options in {"static onnxruntime": {}, "static ort, MatMul u8s8": known}.items():
        found[label] = folder / f"{label.replace(' ', '_')}.onnx"
        quantize_static(TRANSFORMER, found[label], Sentences(count), **options)
    return found


def outputs(path: Path, feeds: Sequence[Feed]) -> np.ndarray:
    """All outputs of every feed in one row each, float64."""
    runner = session(path)
    return np.stack(
        [np.concatenate([y.ravel() for y in runner.run(None, dict(f))]) for f in feeds]
    ).astype(np.float64)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row by row."""
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def times(paths: Sequence[Path], feed: Feed, seconds: float) -> list[float]:
    """Median seconds of each model, run in turn."""
    runners = [session(path, threads=1) for path in paths]
    found: list[list[float]] = [[] for _ in paths]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < 12:
        for runner, row in zip(runners, found, strict=True):
            start = time.perf_counter()
            runner.run(None, dict(feed))
            row.append(time.perf_counter() - start)
    return [statistics.median(row[2:]) for row in found]


def transformer(folder: Path, quick: bool) -> None:
    """The sentence transformer's table."""
    samples = 100 if quick else 400
    data = calibration(folder, samples)
    models = {
        "float": TRANSFORMER,
        "qconvert": converted(TRANSFORMER, folder, "no_data"),
        "qconvert, data": converted(TRANSFORMER, folder, "data", data),
        "qconvert, ACWL": converted(
            TRANSFORMER, folder, "acwl", "[dynamic_quant_param]\nquant_strategy = ACWL\n"
        ),
        **by_peer(TRANSFORMER, folder),
        "static qconvert": converted(TRANSFORMER, folder, "full", data, "FULL_QUANT"),
        **statically_by_peer(folder, samples),
    }
    count = 100 if quick else 1500
    sides = [sentences("dev", side)[:count] for side in "ab"]
    scores = np.load(DATA / "sts" / "sts_dev.npz")["score"][:count]
    reference = [outputs(TRANSFORMER, side) for side in sides]
    clocked = [
        times(list(models.values()), tokens(np.full(s, 2000)), 3 if quick else 12) for s in SHAPES
    ]
    shapes = "".join(f"{f'{rows}x{length}':>8s}" for rows, length in SHAPES)
    print(f"{'':26s} cosine   least  Spearman  ratio  speed of {shapes}")
    for i, (label, path) in enumerate(models.items()):
        found = [outputs(path, side) for side in sides]
        near = np.concatenate([cosines(a, b) for a, b in zip(found, reference, strict=True)])
        spearman = np.corrcoef(ranks(cosines(*found)), ranks(scores))[0, 1]
        ratio = TRANSFORMER.stat().st_size / path.stat().st_size
        speeds = "".join(f"{row[0] / row[i]:8.2f}" for row in clocked)
        print(
            f"{label:26s} {near.mean():.5f} {near.min():.5f}  {spearman:.4f}  {ratio:5.2f}   "
            f"       {speeds}",
            flush=True,
        )


def recurrent_feeds() -> dict[str, list[Feed]]:
    """Made-up inputs of the models with recurrence and control flow: text bytes, tones in noise,
    feature maps.
    """
    rng = np.random.default_rng(0)
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    wave = np.sin(np.cumsum(rng.uniform(0.02, 0.3, (20, 1)), axis=0) * np.arange(576)) * 0.3
    noise = rng.normal(0, 0.02, wave.shape)
    audio = {"state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    features = rng.normal(size=(20, 1, 49, 10, 1)).cumsum(axis=2) / 4
    return {
        "byte_sb_bidi_lstm": [{"input": text[None, i * 200 : i * 200 + 200]} for i in range(20)],
        "silero_vad": [{"input": x[None].astype(np.float32), **audio} for x in wave + noise],
        "mlperf_tiny_kws_dscnn": [{"input_1": x.astype(np.float32)} for x in features],
    }


def recurrent(folder: Path) -> None:
    """Outputs, sizes and times of the other models."""
    rows = []
    for name, feeds in recurrent_feeds().items():
        path = DATA / "models" / f"{name}.onnx"
        data = given(folder / name, feeds[::2])
        models = {mode: converted(path, folder, mode, data, mode) for mode in MODES}
        models["onnxruntime dynamic"] = by_peer(path, folder)["onnxruntime"]
        reference = outputs(path, feeds)
        for label, other in models.items():
            try:
                off, clock = outputs(other, feeds), times([path, other], feeds[0], 2)
            except Exception as error:
                rows.append(f"{name:22s} {label:20s} fails: {str(error).splitlines()[0][:90]}")
                continue
            ratio, speed = path.stat().st_size / other.stat().st_size, clock[0] / clock[1]
            near, worst = cosines(off, reference).mean(), np.abs(off - reference).max()
            rows.append(f"{name:22s} {label:20s} {near:.5f} {worst:9.5f} {ratio:6.2f} {speed:6.2f}")
    print(f"{'':22s} {'':20s}  cosine  max off  ratio  speed", *rows, sep="\n")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Fewer sentences and shorter timings.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        transformer(Path(name), arguments.quick)
        recurrent(Path(name))


if __name__ == "__main__":
    main()
