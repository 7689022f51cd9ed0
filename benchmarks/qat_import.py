#!/usr/bin/env python3
"""Import of models trained with fake quantization: a real one, and the example's network in 1 to 8
bits.

    python benchmarks/qat_import.py [--example]

The real one: top-1 on the dev split, agreement with the model run as it was trained, speed-up over
the float model (1 thread, median of interleaved runs), times smaller; then the same model with its
weights held as fake-quantized floats. The example: accuracy on its held-out pictures of the float
network rounded to so many bits, of the network trained in them, of its import, and of the float
network whose weights alone are stored in them.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from common import CLASSIFIERS, DATA, qconvert, session
from onnx import helper, numpy_helper

IMPORT = (
    "[common_quant_param]\nthread_num=1\n[transform_quant_param]\nexport_precision_mode=QUANT\n"
)
WEIGHTS = """[common_quant_param]
quant_type=WEIGHT_QUANT
bit_num={bits}
min_quant_weight_channel=0
[weight_quant_param]
quant_strategy={strategy}
[data_preprocess_param]
calibrate_path=image:'{data}'
calibrate_size=100
input_type=NPY
"""
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "qat_digits"
Array = np.ndarray


def pixels(samples: Array) -> Array:
    """What (p - 127.5) / 127.5 was made of."""
    return np.clip(np.rint(samples * 127.5 + 127.5), 0, 255).astype(np.uint8)


def outputs(path: Path, samples: Array) -> Array:
    """Outputs of every sample, one row each; samples are pixels for a model that takes them."""
    model = session(path)
    (fed,) = model.get_inputs()
    rows = pixels(samples) if "uint8" in fed.type else samples
    return np.concatenate(
        [model.run(None, {fed.name: row[None]})[0].reshape(1, -1) for row in rows]
    ).astype(float)


def with_float_weights(path: Path, out: Path) -> None:
    """Writes the model with floats and a Q/DQ pair in the place of every integer weight, and float
    biases.
    """
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
            real = ((codes.astype(np.float64) - zero) * scale.astype(np.float64)).astype(np.float32)
            constants[node.input[0]].CopyFrom(numpy_helper.from_array(real, node.input[0]))
            if codes.dtype == np.int32:
                node.op_type = "Identity"
                del node.input[1:]
            else:
                nodes.append(
                    helper.make_node("QuantizeLinear", list(node.input), [f"{node.name}_codes"])
                )
                node.input[0] = f"{node.name}_codes"
        nodes.append(node)
    changed = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(changed)
    onnx.save(model, out)


def real(folder: Path) -> None:
    """Prints the table of the real model."""
    classifier = CLASSIFIERS["mobilenet_v2_1.0_224"]
    data, labels = classifier.samples("dev")
    samples = np.concatenate([data.sample(i)[classifier.input] for i in range(len(data))])
    config, trained = folder / "import.cfg", DATA / "models" / f"{classifier.name}_qat_qdq.onnx"
    config.write_text(IMPORT)
    models = {"float": classifier.path, "as trained": trained, "imported": folder / "a.onnx"}
    qconvert(trained, config, models["imported"])
    found = {name: outputs(path, samples) for name, path in models.items()}
    best = found["as trained"].argmax(1)
    print(f"{classifier.name}, {len(labels)} images\n{'':12s} top-1   agree   speed  smaller")
    for name, path in models.items():
        classes = found[name].argmax(1)
        fast, small = (
            speedup_of(classifier.path, path, samples[:1]),
            classifier.path.stat().st_size / path.stat().st_size,
        )
        print(
            f"{name:12s} {np.mean(classes == labels):.4f}  {np.mean(classes == best):.4f}  "
            f"{fast:5.2f}x  {small:5.2f}x"
        )
    with_float_weights(trained, folder / "floats.onnx")
    qconvert(folder / "floats.onnx", config, folder / "b.onnx")
    difference = np.abs(outputs(folder / "b.onnx", samples[:50]) - found["imported"][:50]).max()
    print(f"imported from fake-quantized float weights: largest difference {difference}")


def speedup_of(reference: Path, path: Path, sample: Array) -> float:
    """How many times faster than `reference`, whatever type either takes."""
    times: list[list[float]] = [[], []]
    pair = [(session(model, 1), sample) for model in (reference, path)]
    for _ in range(40):
        for i, (model, x) in enumerate(pair):
            (fed,) = model.get_inputs()
            feed = {fed.name: pixels(x) if "uint8" in fed.type else x}
            start = time.perf_counter()
            model.run(None, feed)
            times[i].append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def example(folder: Path) -> None:
    """Prints the table of the example."""
    held_out = np.load(EXAMPLE / "held_out.npz")
    with (EXAMPLE / "post_training.csv").open(newline="") as file:
        rounded = {int(row["bits"]): float(row["accuracy"]) for row in csv.DictReader(file)}

    def accuracy(path: Path) -> float:
        return float(np.mean(outputs(path, held_out["images"]).argmax(1) == held_out["labels"]))

    print(
        f"example, {len(held_out['labels'])} pictures, float {accuracy(EXAMPLE / 'float.onnx'):.1%}"
    )
    print(
        "| Bits | Rounded | Trained | Imported | Weights alone, rounded | Weights alone, GPTQ |\n|"
        + " --- |" * 6
    )
    config, out = folder / "e.cfg", folder / "e.onnx"
    for bits, plain in rounded.items():
        trained = EXAMPLE / f"qat_{bits}.onnx"
        config.write_text(IMPORT)
        qconvert(trained, config, out)
        cells = [plain, accuracy(trained), accuracy(out)]
        for strategy in ("MAX_MIN", "GPTQ"):
            config.write_text(
                WEIGHTS.format(bits=bits, strategy=strategy, data=EXAMPLE / "calib" / "images.npy")
            )
            qconvert(EXAMPLE / "float.onnx", config, out)
            cells.append(accuracy(out))
        print(f"| {bits} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |", flush=True)


def main() -> None:
    """Prints both tables, or the example's alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--example", action="store_true", help="the example's table alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if not args.example:
            real(Path(name))
        example(Path(name))


if __name__ == "__main__":
    main()
