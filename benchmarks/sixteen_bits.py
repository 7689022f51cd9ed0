#!/usr/bin/env python3
"""Activations of 8 bits, of 16 and of some in 16, for an NPU: what each leaves of a model.

    python benchmarks/sixteen_bits.py [MODEL ...] [--pictures 400] [--calib 100] [--target QNN]

Models are the classifiers of `common.py`, minilm_l6, and a detector of `zoo.py`, by default
nanodet_m. Everything becomes integers (only_where_it_pays = false). Columns: share of the
activation tensors with 16 bits; the task's own measure (top-1, Spearman's rank correlation with
human scores, F1 of boxes against the float model's); agreement with the float model (the same
answers, the mean cosine of embeddings, F1); decibels of the outputs over their error; and what of
the error of 8 bits that 16 take away MIXED takes away as well, in agreement and in noise.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from common import CLASSIFIERS, outputs, qconvert, score
from dynamic_quant import TRANSFORMER, calibration, cosines, ranks, sentences
from dynamic_quant import outputs as embeddings
from zoo import ROWS, Trial, answers, known

from converter.calibrate.exact import exact_here

BITS = ("8", "16", "MIXED")
SHARE = re.compile(r"Activations of 16 bits: (\d+)%")
DETECTOR = "nanodet_m"


@dataclass(frozen=True)
class Left:
    """What is left: the task's own measure, agreement, and noise over signal."""

    task: float
    agreement: float
    noise: float


Judge = Callable[[Path], Left]


def noise_of(reference: np.ndarray, other: np.ndarray) -> float:
    """Of all values together."""
    return float(np.square(reference - other).sum() / np.square(reference).sum())


def classifier(name: str, folder: Path, args: argparse.Namespace) -> tuple[Path, str, Judge]:
    """The model, its section of data, and how it is judged."""
    model = CLASSIFIERS[name]
    text = model.config(folder, "FULL_QUANT", args.calib).read_text()
    data, labels = model.samples("dev", args.pictures)
    reference = outputs(model.path, data)

    def judge(path: Path) -> Left:
        found = outputs(path, data)
        return Left(*score(reference, found, labels), noise_of(reference, found))

    print(f"{name}: float {score(reference, reference, labels)[0]:.4f}, {len(data)} pictures")
    return model.path, text.split("[common_quant_param]")[0], judge


def transformer(name: str, folder: Path, args: argparse.Namespace) -> tuple[Path, str, Judge]:
    """The same for the sentence transformer."""
    sides = [sentences("dev", side)[: args.pictures] for side in "ab"]
    reference = [embeddings(TRANSFORMER, side) for side in sides]
    human = ranks(np.load(TRANSFORMER.parents[1] / "sts" / "sts_dev.npz")["score"][: args.pictures])

    def spearman(found: Sequence[np.ndarray]) -> float:
        return float(np.corrcoef(ranks(cosines(*found)), human)[0, 1])

    def judge(path: Path) -> Left:
        found = [embeddings(path, side) for side in sides]
        near = [cosines(a, b) for a, b in zip(found, reference, strict=True)]
        noise = noise_of(np.concatenate(reference), np.concatenate(found))
        return Left(spearman(found), float(np.mean(near)), noise)

    print(f"{name}: float {spearman(reference):.4f}, {args.pictures} pairs of sentences")
    return TRANSFORMER, calibration(folder, 3 * args.calib), judge


def detector(name: str, folder: Path, args: argparse.Namespace) -> tuple[Path, str, Judge]:
    """The same for a detector."""
    row = ROWS[name]
    trial = Trial(name, row, folder, args.calib)
    text = trial.config("FULL_QUANT", "", trial.feeds()).read_text()
    samples = row.feed("dev", min(args.pictures, row.dev))

    def judge(path: Path) -> Left:
        given = list(answers(row, path, samples))
        pairs = [pair for a in given for pair in zip(a.wanted, a.given, strict=True)]
        noise = float(np.mean([noise_of(*pair) for pair in pairs]))
        f1 = float(row.judge(given)["F1"])
        return Left(f1, f1, noise)

    print(f"{name}: {len(samples)} pictures")
    return known(row.file), text[text.index("[data_preprocess_param]") :], judge


def kinds(name: str) -> Callable[[str, Path, argparse.Namespace], tuple[Path, str, Judge]]:
    """How a model is fed and judged."""
    if name in CLASSIFIERS:
        return classifier
    return transformer if name == TRANSFORMER.stem else detector


def compare(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Prints one model's table."""
    path, data, judge = kinds(name)(name, folder, args)
    rows: dict[str, Left] = {}
    for bits in BITS:
        config, out = folder / "c.cfg", folder / "out.onnx"
        config.write_text(
            "[common_quant_param]\nquant_type=FULL_QUANT\n[full_quant_param]\n"
            f"target_device={args.target}\nonly_where_it_pays=false\nactivation_bits={bits}\n{data}"
        )
        said = qconvert(path, config, out, "--verify=off").output
        ir.save(exact_here(ir.load(out)), folder / "exact.onnx")
        rows[bits] = left = judge(folder / "exact.onnx")
        share = SHARE.search(said)
        print(
            f"  {bits:6s} {share[1] if share else 0:>3}%  task {left.task:.4f}  agreement "
            f"{left.agreement:.4f}  {-10 * np.log10(left.noise):5.1f} dB{gain(rows)}",
            flush=True,
        )


def gain(rows: dict[str, Left]) -> str:
    """What MIXED has of what 16 bits gain."""
    if len(rows) < len(BITS):
        return ""
    narrow, wide, mixed = (rows[bits] for bits in BITS)
    agreement = (mixed.agreement - narrow.agreement) / (wide.agreement - narrow.agreement or 1)
    noise = (narrow.noise - mixed.noise) / (narrow.noise - wide.noise)
    return f"  of the gain {agreement:.0%} in agreement, {noise:.0%} in noise"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["mobilenet_v1_0.75_224", "mobilenet_v2_1.0_224", "minilm_l6", DETECTOR]
    parser.add_argument("models", nargs="*", default=models)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--calib", type=int, default=100)
    parser.add_argument("--target", default="QNN")
    args = parser.parse_args()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder), args)


if __name__ == "__main__":
    main()
