"""A model of more than 2 GB through every mode: python benchmarks/scale.py [gigabytes] [mode ...].

The model is a chain of square products whose weights lie in a file beside it. Every conversion runs
in a process of its own; its time, peak memory and output are printed, and the output is compared
with the float model on one sample.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

SIDE, BATCH, SAMPLES = 6000, 2, 8
# A conversion that prints the kilobytes it needed as its last word.
WATCHED = """
import resource
from converter.cli import main
main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
MODES = ("WEIGHT_QUANT", "DYNAMIC_QUANT", "FULL_QUANT")


def build(folder: Path, gigabytes: float) -> Path:
    """Writes the model layer by layer, so that making it needs little memory."""
    layers = max(1, round(gigabytes * 1e9 / (4 * SIDE**2)))
    nodes, weights, rng = [], [], np.random.default_rng(0)
    with (folder / "big.data").open("wb") as file:
        for layer in range(layers):
            name = f"w{layer}"
            weight = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=(SIDE, SIDE))
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "big.data"),
                ("offset", file.tell()),
                ("length", 4 * SIDE**2),
            ):
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            for _ in range(SIDE):
                file.write(
                    (rng.standard_normal(SIDE, np.float32) / np.float32(SIDE**0.5)).tobytes()
                )
            nodes.append(
                helper.make_node("MatMul", [f"x{layer}", name], [f"p{layer}"], f"product{layer}")
            )
            nodes.append(helper.make_node("Relu", [f"p{layer}"], [f"x{layer + 1}"], f"relu{layer}"))
    values = [
        helper.make_tensor_value_info(name, 1, (BATCH, SIDE)) for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "big", values[:1], values[1:], weights)
    path = folder / "big.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def convert(folder: Path, model: Path, mode: str) -> tuple[Path, float, float]:
    """The output, seconds and gigabytes of one conversion."""
    lines = f"[common_quant_param]\nquant_type = {mode}\n"
    if mode == "FULL_QUANT":
        np.save(
            folder / "x.npy",
            np.random.default_rng(1).standard_normal((SAMPLES * BATCH, SIDE)).astype(np.float32),
        )
        lines += f"[data_preprocess_param]\ncalibrate_path = x0:{folder}/x.npy\n"
        lines += f"calibrate_size = {SAMPLES}\ninput_type = NPY\n"
    (folder / "c.cfg").write_text(lines)
    output, start = folder / f"{mode}.onnx", time.perf_counter()
    flags = [
        f"--modelFile={model}",
        f"--configFile={folder}/c.cfg",
        f"--outputFile={output}",
        "--verify=off",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *flags], check=True, stdout=subprocess.PIPE, text=True
    )
    return output, time.perf_counter() - start, int(done.stdout.split()[-1]) / 1e6


def cosine(model: Path, output: Path) -> float:
    """The cosine similarity of both models' outputs on one random sample."""
    x = np.random.default_rng(2).standard_normal((BATCH, SIDE)).astype(np.float32)
    left, right = (
        ort.InferenceSession(path).run(None, {"x0": x})[0].ravel().astype(float)
        for path in (model, output)
    )
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def main(gigabytes: float, modes: tuple[str, ...]) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(folder, gigabytes)
        print(
            "| Mode | Seconds | Peak memory | Output | Cosine |\n| --- | ---: | ---: | ---: "
            "| ---: |"
        )
        for mode in modes:
            output, seconds, peak = convert(folder, model, mode)
            size = sum(path.stat().st_size for path in folder.glob(f"{output.name}*")) / 1e9
            print(
                f"| {mode} | {seconds:.0f} | {peak:.1f} GB | {size:.2f} GB | "
                f"{cosine(model, output):.5f} |",
                flush=True,
            )
            for path in folder.glob(f"{output.name}*"):
                path.unlink()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.2, tuple(sys.argv[2:]) or MODES)
