#!/usr/bin/env python3
"""Fine-tuning without labels: accuracy before and after, size and seconds.

    python benchmarks/fine_tune.py [ROW ...] [--minutes 15] [--how AUTO]

Rows: v1_8x, v1_3bits, v1_2bits, v2_8x, resnet20_2bits, and resnet20_11x, a file of widths that are
searched, as small as 2 bits made one before weights were rotated; minilm, a sentence transformer
whose weights and tables have 4 bits; minilm_mixed, a file of it as small, of widths that are
searched; and qat, which trains weights and activations of examples/qat_digits to 2, 3 and 4 bits.
Columns: top-1 and agreement with the float model's best class on the dev split (of minilm the rank
correlation with human scores, and the mean cosine with the float model's embeddings), times
smaller, seconds, processor seconds and peak memory in megabytes of the conversion. Everything is
learned from `calib` alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from common import CLASSIFIERS, outputs, qconvert, score, told
from sixteen_bits import transformer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "qat_digits"
V1, V2, RESNET = "mobilenet_v1_0.75_224", "mobilenet_v2_1.0_224", "resnet20_cifar10"


def smaller(ratio: float) -> str:
    """Widths found for a file so many times smaller."""
    search = f"search=SENSITIVITY\ntarget_ratio={ratio}"
    return f"bit_num=0\n[mixed_bit_weight_quant_param]\n{search}"


# The model, samples, and the keys that say how small it is to be.
ROWS = {
    "v1_8x": (V1, 100, smaller(8.02)),
    "v1_3bits": (V1, 100, smaller(9.62)),
    "v1_2bits": (V1, 100, smaller(13.05)),
    "v2_8x": (V2, 100, smaller(8.02)),
    "resnet20_2bits": (RESNET, 200, "bit_num=2"),
    "resnet20_11x": (RESNET, 200, smaller(11.3)),
}


# Sentences that the transformer is calibrated with, and how it is stored.
SENTENCES = 120
STORED = "[common_quant_param]\nquant_type=WEIGHT_QUANT\n"
TRANSFORMERS = {
    "minilm": f"{STORED}bit_num=4\n[weight_quant_param]\ntable_bit_num=4\n",
    "minilm_mixed": f"{STORED}{smaller(7.74)}\n",
}


def tuned(how: str, minutes: float, *more: str) -> str:
    """The section that asks for it."""
    return "\n".join(["", "[fine_tune_param]", f"fine_tune={how}", f"time_limit={minutes}", *more])


@dataclass(frozen=True)
class Trial:
    """A model, how a config is written with more lines, and what tells how good a file is."""

    model: Path
    config: Callable[[str], Path]
    judge: Callable[[Path], tuple[float, float]]


def classifier_trial(name: str, folder: Path) -> Trial:
    """Of a row with pictures."""
    model, size, keys = ROWS[name]
    classifier = CLASSIFIERS[model]
    data, labels = classifier.samples("dev")
    reference = outputs(classifier.path, data)

    def config(more: str) -> Path:
        extra = f"min_quant_weight_channel=0\n{keys}{more}"
        return classifier.config(folder, "WEIGHT_QUANT", size, extra)

    return Trial(classifier.path, config, lambda out: score(reference, outputs(out, data), labels))


def sentence_trial(name: str, folder: Path) -> Trial:
    """Of a row with the sentence transformer."""
    counts = argparse.Namespace(calib=SENTENCES // 3, pictures=400)
    model, data, judge = transformer("minilm_l6", folder, counts)

    def config(more: str) -> Path:
        path = folder / "c.cfg"
        path.write_text(f"{TRANSFORMERS[name]}{data}{more}\n")
        return path

    def judged(out: Path) -> tuple[float, float]:
        left = judge(out)
        return left.task, left.agreement

    return Trial(model, config, judged)


def row(name: str, minutes: float, how: str, folder: Path) -> None:
    """Prints a row before and after."""
    trial = (sentence_trial if name in TRANSFORMERS else classifier_trial)(name, folder)
    out = folder / f"{name}.onnx"
    for label, more in (("as it is", ""), (how, tuned(how, minutes))):
        cost = qconvert(trial.model, trial.config(more), out, "--quiet")
        figures = told(trial.judge(out), trial.model, out, cost)
        print(f"{name:15} {label:11} {figures}", flush=True)


def example_rows(minutes: float, how: str, folder: Path) -> None:
    """Prints what the example reaches in few bits, on pictures held out."""
    pictures = np.load(EXAMPLE / "calib" / "images.npy")
    held = np.load(EXAMPLE / "held_out.npz")
    x, labels = (held[name] for name in held.files)
    for i, picture in enumerate(pictures):
        np.save(folder / f"{i:03}.npy", picture[None])
    for bits in (2, 3, 4):
        config, out = folder / "qat.cfg", folder / "qat.onnx"
        widths = (f"weight_bits={bits}", f"activation_bits={bits}", "epochs=400")
        config.write_text(
            "[common_quant_param]\nquant_type=FULL_QUANT\n[data_preprocess_param]\n"
            f"calibrate_path=image:'{folder}'\ncalibrate_size={len(pictures)}\ninput_type=NPY\n"
            + tuned(how, minutes, *widths)
        )
        cost = qconvert(EXAMPLE / "float.onnx", config, out, "--quiet")
        session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
        answers = session.run(None, {"image": x.astype(np.float32)})[0].argmax(axis=1)
        right = float((answers == labels).mean())
        print(f"qat {bits} bits      {how:11} {right:.4f} {'':14} {cost.seconds:6.0f}", flush=True)


def chosen(names: list[str]) -> list[str]:
    """The rows asked for, or all."""
    return names or [*ROWS, *TRANSFORMERS, "qat"]


def main() -> None:
    """Reads the arguments and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*chosen([]), []])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--how", default="AUTO", choices=["BLOCK", "END_TO_END", "AUTO"])
    wanted = parser.parse_args()
    print(f"{'':27} top-1  agree   ratio seconds    CPU     MB")
    for name in chosen(wanted.rows):
        with tempfile.TemporaryDirectory() as folder:
            if name == "qat":
                example_rows(wanted.minutes, wanted.how, Path(folder))
            else:
                row(name, wanted.minutes, wanted.how, Path(folder))


if __name__ == "__main__":
    main()
