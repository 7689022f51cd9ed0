#!/usr/bin/env python3
"""What calibration costs: whole qconvert processes against the bare float inference and
onnxruntime's calibration.

    python benchmarks/calibration.py [--model mobilenet_v2_1.0_224] [--quick]

The floor is ONNX Runtime's time for the 100 decoded pictures once. Growth is shown over samples,
input size and tensors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from common import CLASSIFIERS, Classifier, measure, qconvert, session

PEER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from full_quant import CLASSIFIERS, PEER_OPTIONS, peer
options = {**PEER_OPTIONS["onnxruntime default"], "method": sys.argv[4]}
peer(CLASSIFIERS[sys.argv[2]], options, Path(sys.argv[3]))
"""


def floor(classifier: Classifier) -> float:
    """Seconds for one float inference of every calibration picture, best of three."""
    data, _ = classifier.samples("calib", 100)
    runner = session(classifier.path)
    runner.run(None, dict(data.sample(0)))
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        for i in range(len(data)):
            runner.run(None, dict(data.sample(i)))
        best = min(best, time.perf_counter() - start)
    return float(best)


def methods(classifier: Classifier, folder: Path, quick: bool) -> None:
    """Time and memory of each range method and of the peer."""
    print(f"{'':34s} seconds  x floor     MB")
    out = folder / "out.onnx"
    for method in ("MAX_MIN", "KL", "REMOVAL_OUTLIER", "MSE", "AUTO"):
        config = classifier.config(
            folder, "FULL_QUANT", extra=f"[full_quant_param]\nactivation_quant_method={method}"
        )
        least = floor(classifier)
        cost = qconvert(classifier.path, config, out)
        print(
            f"qconvert {method:25s} {cost.seconds:7.2f}  {cost.seconds / least:7.1f}  "
            f"{cost.megabytes:6.0f}",
            flush=True,
        )
    for method in () if quick else ("MinMax", "Entropy"):
        least = floor(classifier)
        here = str(Path(__file__).parent)
        cost = measure([sys.executable, "-c", PEER, here, classifier.name, str(out), method])
        print(
            f"onnxruntime {method:22s} {cost.seconds:7.2f}  {cost.seconds / least:7.1f}  "
            f"{cost.megabytes:6.0f}",
            flush=True,
        )


def cached(classifier: Classifier, folder: Path) -> None:
    """The same conversion again with a calibration cache, and with another range method."""
    print("\nwith calibration_cache              seconds")
    cache = (
        f"calibration_cache={folder / 'cache.npz'}\n[full_quant_param]\nactivation_quant_method="
    )
    for label, method in (
        ("first time, MAX_MIN", "MAX_MIN"),
        ("again, KL", "KL"),
        ("again, MSE", "MSE"),
    ):
        config = classifier.config(folder, "FULL_QUANT", extra=cache + method)
        print(
            f"{label:34s} {qconvert(classifier.path, config, folder / 'out.onnx').seconds:7.2f}",
            flush=True,
        )


def samples(classifier: Classifier, folder: Path, quick: bool) -> None:
    """Growth with the number of samples; pictures are linked under new names beyond the 100 there
    are.
    """
    source = sorted(classifier.samples("calib", 100)[0].files(i)[0] for i in range(100))
    many = folder / "many"
    many.mkdir()
    for i in range(1000):
        (many / f"{i:04d}{source[i % 100].suffix}").symlink_to(source[i % 100])
    print("\nsamples   seconds     MB   (MAX_MIN)")
    for count in (20, 100) if quick else (20, 50, 100, 200, 500, 1000):
        config = classifier.config(folder, "FULL_QUANT", count)
        config.write_text(config.read_text().replace(str(source[0].parent), str(many)))
        cost = qconvert(classifier.path, config, folder / "out.onnx")
        print(f"{count:7d}   {cost.seconds:7.2f}  {cost.megabytes:5.0f}", flush=True)


def sizes(folder: Path) -> None:
    """Growth with the input's side and the number of tensors: chains of 3x3 convolutions of 16
    channels, 20 samples.
    """
    print("\nside  layers   seconds     MB")
    for side, layers in ((64, 8), (128, 8), (256, 8), (512, 8), (128, 16), (128, 32), (128, 64)):
        model, data = folder / "chain.onnx", folder / f"data{side}"
        ir.save(chain(layers), model)
        data.mkdir(exist_ok=True)
        for i in range(20):
            noise = np.random.default_rng(i).normal(size=(1, 16, side, side)).astype(np.float32)
            np.save(data / f"{i}.npy", noise)
        config = folder / "chain.cfg"
        config.write_text(
            "[common_quant_param]\nquant_type=FULL_QUANT\n[data_preprocess_param]\ninput_type=NPY\n"
            f"calibrate_path=x:'{data}'\ncalibrate_size=20\n"
        )
        cost = qconvert(model, config, folder / "out.onnx")
        print(f"{side:4d}  {layers:6d}   {cost.seconds:7.2f}  {cost.megabytes:5.0f}", flush=True)


def chain(layers: int) -> ir.Model:
    """Conv and Relu, `layers` times."""
    rng = np.random.default_rng(0)
    value = ir.Value(
        name="x", shape=ir.Shape(["N", 16, "H", "W"]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    inputs, nodes, weights = [value], [], []
    for i in range(layers):
        array = (rng.normal(size=(16, 16, 3, 3)) / 12).astype(np.float32)
        weight = ir.Value(name=f"w{i}", const_value=ir.tensor(array, name=f"w{i}"))
        conv = ir.node("Conv", [value, weight], {"pads": [1, 1, 1, 1]}, name=f"conv{i}")
        relu = ir.node("Relu", conv.outputs, name=f"relu{i}")
        conv.outputs[0].name, relu.outputs[0].name = f"c{i}", f"r{i}"
        value = relu.outputs[0]
        nodes += [conv, relu]
        weights.append(weight)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 16, "H", "W"])
    graph = ir.Graph(
        inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="chain"
    )
    return ir.Model(graph, ir_version=8)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mobilenet_v2_1.0_224", choices=list(CLASSIFIERS))
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    args = parser.parse_args()
    classifier = CLASSIFIERS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        methods(classifier, Path(folder), args.quick)
        cached(classifier, Path(folder))
        samples(classifier, Path(folder), args.quick)
        sizes(Path(folder))


if __name__ == "__main__":
    main()
