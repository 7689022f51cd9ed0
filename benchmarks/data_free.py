#!/usr/bin/env python3
"""FULL_QUANT without any data: samples distilled from the model itself, beside real pictures.

    python benchmarks/data_free.py [MODEL ...] [--split calib]

Columns: top-1 and agreement with the float model's best class on the dev split, with kernels that
cannot saturate (session.x64quantprecision=1), and what the whole conversion took. `normalisation`
says how pixels enter the model, which is no data; `few` are 8 real pictures, alone and beside
distilled samples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import CLASSIFIERS, Classifier, outputs, qconvert, score

REAL, FEW = 100, 8


def without_data(classifier: Classifier, folder: Path, pixels: bool) -> Path:
    """Writes a config that names no data; with `pixels` it says what they stand for."""
    mean, std = list(classifier.mean), list(classifier.std)
    known = f"normalize_mean={mean}\nnormalize_std={std}\n" if pixels else ""
    path = folder / f"{classifier.name}.cfg"
    path.write_text(
        "[common_quant_param]\nquant_type=FULL_QUANT\n"
        f"[data_preprocess_param]\ninput_type=SYNTHETIC\n{known}"
    )
    return path


def with_data(classifier: Classifier, folder: Path, size: int, made: int) -> Path:
    """Writes a config with real pictures, and `made` distilled ones beside them."""
    path = classifier.config(folder, "FULL_QUANT", size)
    section = "[data_preprocess_param]\n"
    more = f"{section}synthetic_size={made}\n"
    path.write_text(path.read_text().replace(section, more))
    return path


def compare(classifier: Classifier, split: str, folder: Path) -> None:
    """Prints one model's table."""
    data, labels = classifier.samples(split)
    reference = outputs(classifier.path, data)
    top1, _ = score(reference, reference, labels)
    print(f"\n{classifier.name}: float top-1 {top1:.4f}, {len(data)} images of {split}")
    print(f"{'':28s} top-1   agree   seconds  CPU s  MB", flush=True)
    configs = {
        "no data": lambda: without_data(classifier, folder, pixels=False),
        "no data, normalisation": lambda: without_data(classifier, folder, pixels=True),
        f"{FEW} pictures": lambda: with_data(classifier, folder, FEW, 0),
        f"{FEW} pictures and 32": lambda: with_data(classifier, folder, FEW, 32),
        f"{REAL} pictures": lambda: with_data(classifier, folder, REAL, 0),
    }
    out = folder / f"{classifier.name}.onnx"
    for label, written in configs.items():
        try:
            cost = qconvert(classifier.path, written(), out, "--verify=off")
        except RuntimeError as error:
            print(f"{label:28s} {str(error).strip().splitlines()[-1]}", flush=True)
            continue
        found = score(reference, outputs(out, data, exact=True), labels)
        print(
            f"{label:28s} {found[0]:.4f}  {found[1]:.4f}  {cost.seconds:7.1f}  {cost.cpu:5.1f}"
            f"  {cost.megabytes:.0f}",
            flush=True,
        )


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CLASSIFIERS))
    parser.add_argument("--split", choices=("dev", "calib"), default="dev")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            compare(CLASSIFIERS[name], args.split, Path(folder))


if __name__ == "__main__":
    main()
