#!/usr/bin/env python3
"""WEIGHT_QUANT: accuracy, size, speed and load time of every width; mixed bits; a sentence
transformer.

    python benchmarks/weight_quant.py [MODEL ...] [--bits 1 2 …] [--mixed] [--transformer]

Columns: top-1 on the dev split, agreement with the float model's best class, times smaller and how
many that should at least be, speed-up over float (1 thread, median of interleaved runs), seconds to
load and to convert, and the largest difference of OpenVINO's outputs from ONNX Runtime's where
openvino is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from common import CLASSIFIERS, DATA, Classifier, outputs, qconvert, score, session, speedup

MIXED = {
    "mixed, init_scale 0.02": "init_scale=0.02",
    "mixed, auto_tune": "auto_tune=true",
    "sensitivity, as small as 5 bits": "search=SENSITIVITY\ntarget_ratio=6.03",
    "sensitivity, as small as 4 bits": "search=SENSITIVITY\ntarget_ratio=7.43",
    "sensitivity, 8 times smaller": "search=SENSITIVITY\ntarget_ratio=8",
}
ON_THE_FLY = "dequant_strategy=ON_THE_FLY"
TRANSFORMER = {
    "W8": "bit_num=8",
    "W4": "bit_num=4",
    "W8 on the fly": f"bit_num=8\n[weight_quant_param]\n{ON_THE_FLY}",
    "W4 on the fly, blocks of 32": f"bit_num=4\n[weight_quant_param]\n{ON_THE_FLY}\nblock_size=32",
}


def load_seconds(path: Path) -> float:
    """Least of three loads."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        session(path, 1)
        times.append(time.perf_counter() - start)
    return min(times)


def openvino_difference(path: Path, x: np.ndarray) -> str:
    """The largest difference of the first output between the two runtimes, over its largest
    value.
    """
    if importlib.util.find_spec("openvino") is None:
        return "-"
    import openvino

    wanted = session(path).run(None, {session(path).get_inputs()[0].name: x})[0]
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return f"{np.abs(compiled([x])[0] - wanted).max() / np.abs(wanted).max():.0e}"


def row(
    classifier: Classifier,
    name: str,
    extra: str,
    bits: int | None,
    folder: Path,
    reference: np.ndarray,
) -> str:
    """Converts and measures; `bits` sets the least ratio."""
    out = folder / "out.onnx"
    config = classifier.config(folder, "WEIGHT_QUANT", extra=f"min_quant_weight_channel=0\n{extra}")
    cost = qconvert(classifier.path, config, out, "--quiet")
    data, labels = classifier.samples("dev")
    top1, agreement = score(reference, outputs(out, data), labels)
    ratio = classifier.path.stat().st_size / out.stat().st_size
    least = f"{0.9 * 32 / (bits + 0.25):.2f}" if bits else "-"
    x = dict(data.sample(0))[classifier.input]
    return (
        f"{name:34} {top1:.4f} {agreement:.4f} {ratio:6.2f} {least:>6} "
        f"{speedup(classifier.path, out, data):5.2f} "
        f"{load_seconds(out):5.2f} {cost.seconds:6.1f} {openvino_difference(out, x):>6}"
    )


def classifier_table(classifier: Classifier, widths: list[int], mixed: bool) -> None:
    """One line a width, then the searches."""
    data, labels = classifier.samples("dev")
    reference = outputs(classifier.path, data)
    print(f"\n{classifier.name}: float top-1 {score(reference, reference, labels)[0]:.4f}")
    print(f"{'':34} top1   agree  ratio  least speed  load convert openvino")
    section = "bit_num=0\n[mixed_bit_weight_quant_param]\n"
    wanted = [(f"{bits} bits", f"bit_num={bits}", bits) for bits in widths]
    wanted += [(name, section + keys, None) for name, keys in MIXED.items()] if mixed else []
    with tempfile.TemporaryDirectory() as folder:
        for name, extra, bits in wanted:
            print(row(classifier, name, extra, bits, Path(folder), reference), flush=True)


def embeddings(path: Path, pairs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Both sides' sentence embeddings."""
    runner, sides = session(path), []
    for side in "ab":
        rows = []
        for ids, mask in zip(
            pairs[f"{side}_input_ids"], pairs[f"{side}_attention_mask"], strict=True
        ):
            length = int(mask.sum())
            tokens = {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}
            feed = {**tokens, "token_type_ids": np.zeros((1, length))}
            rows.append(
                runner.run(None, {name: x.astype(np.int64) for name, x in feed.items()})[0][0]
            )
        sides.append(np.array(rows))
    return sides


def spearman(sides: list[np.ndarray], scores: np.ndarray) -> float:
    """Rank correlation of the pairs' similarity with the human scores, equal scores sharing a
    rank.
    """

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - counts / 2)[inverse]

    return float(np.corrcoef(ranks((sides[0] * sides[1]).sum(1)), ranks(scores))[0, 1])


def peer(model: Path, out: Path, bits: int) -> None:
    """onnxruntime's MatMulNBits quantizer, blocks of 32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.INFO)
    quantizer = MatMulNBitsQuantizer(onnx.load(model), bits=bits, block_size=32, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def transformer_table() -> None:
    """The sentence transformer without data, beside onnxruntime's quantizer."""
    model, pairs = DATA / "models" / "minilm_l6.onnx", dict(np.load(DATA / "sts" / "sts_dev.npz"))
    reference = embeddings(model, pairs)
    print(f"\nminilm_l6: float Spearman {spearman(reference, pairs['score']):.4f}")
    print(f"{'':34} cosine  Spearman   MB   load convert")
    with tempfile.TemporaryDirectory() as folder:
        out, config = Path(folder) / "out.onnx", Path(folder) / "c.cfg"
        for name, extra in [
            *TRANSFORMER.items(),
            ("onnxruntime 8 bits", "8"),
            ("onnxruntime 4 bits", "4"),
        ]:
            start = time.perf_counter()
            if name in TRANSFORMER:
                config.write_text(f"[common_quant_param]\nquant_type=WEIGHT_QUANT\n{extra}\n")
                qconvert(model, config, out, "--quiet")
            else:
                peer(model, out, int(extra))
            seconds, found = time.perf_counter() - start, embeddings(out, pairs)
            cosine = np.mean([(a * b).sum(1) for a, b in zip(reference, found, strict=True)])
            size, rank = out.stat().st_size / 1e6, spearman(found, pairs["score"])
            print(
                f"{name:34} {cosine:.5f} {rank:.4f} {size:6.2f} {load_seconds(out):6.2f} "
                f"{seconds:6.1f}",
                flush=True,
            )


def main() -> None:
    """Prints the tables asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["mobilenet_v1_0.75_224"])
    parser.add_argument("--bits", nargs="*", type=int, default=list(range(1, 17)))
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--transformer", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        classifier_table(CLASSIFIERS[name], arguments.bits, arguments.mixed)
    if arguments.transformer:
        transformer_table()


if __name__ == "__main__":
    main()
