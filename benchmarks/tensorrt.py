#!/usr/bin/env python3
"""Proof without a GPU that NVIDIA's runtime takes what target_device = NVGPU makes: TensorRT for
RTX parses and builds every result for a card of the 40 series (SM89).

    pip install tensorrt-rtx-cu13 && python benchmarks/tensorrt.py [MODEL ...] [--layers]

Rows are modes; the last one, a model for the target ARM, is to be refused. Columns: whether an
engine was built, or why not, seconds and layers. `--layers` prints instead for every model the
largest difference, over all layers, of exact int8 times int8 in int32 to what ONNX Runtime
computes, over the layer's largest output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from common import CLASSIFIERS, DATA, qconvert

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from integer_layers import differences

ULTRAFACE = "ultraface_rfb_320"
MODELS = (
    "resnet20_cifar10",
    "mobilenet_v1_0.75_224",
    "mobilenet_v2_1.0_224",
    "squeezenet1.1",
    ULTRAFACE,
)
FULL = "quant_type=FULL_QUANT\n[full_quant_param]\ntarget_device={}\n"
STORED = (
    "quant_type=WEIGHT_QUANT\nmin_quant_weight_channel=0\nbit_num={}\n[full_quant_param]\n"
    "target_device=NVGPU\n[weight_quant_param]\ndequant_strategy={}\n"
)
ROWS = {
    "FULL_QUANT": FULL.format("NVGPU"),
    **{
        f"WEIGHT_QUANT {strategy} {bits}": STORED.format(bits, strategy)
        for strategy in ("ON_LOAD", "ON_THE_FLY")
        for bits in (8, 4)
    },
    "FULL_QUANT for ARM": FULL.format("ARM"),
}


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--layers", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            if args.layers:
                print(f"{name:24s} {layers(name, Path(folder))}", flush=True)
                continue
            print(name)
            for label, lines in ROWS.items():
                print(f"  {label:26s} {built(converted(name, lines, Path(folder)))}", flush=True)


def converted(name: str, lines: str, folder: Path) -> Path:
    """A model made with these lines of a config."""
    config, out = folder / "c.cfg", folder / "out.onnx"
    path = DATA / "models" / f"{name}.onnx"
    data = data_of(name) if "FULL" in lines else ""
    config.write_text(f"[common_quant_param]\n{lines}\n{data}")
    qconvert(path, config, out, "--verify=off")
    return out


def data_of(name: str) -> str:
    """The section about calibration data."""
    if name in CLASSIFIERS:
        with tempfile.TemporaryDirectory() as folder:
            text = CLASSIFIERS[name].config(Path(folder), "FULL_QUANT", 32).read_text()
        return text.split("[common_quant_param]")[0]
    return (
        f"[data_preprocess_param]\ncalibrate_path=input:'{DATA / 'images' / 'faces'}'\n"
        "calibrate_size=10\ninput_type=IMAGE\nresize_width=320\nresize_height=240\n"
        "normalize_mean=[127,127,127]\nnormalize_std=[128,128,128]\n"
    )


def built(path: Path) -> str:
    """What TensorRT makes of a model, in words."""
    import tensorrt_rtx as trt

    start, logger = time.perf_counter(), trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return f"refused: {parser.get_error(0).desc()[:120]}"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for fed in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(fed.name, *[[max(side, 1) for side in fed.shape]] * 3)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        return "no engine"
    return f"built    {time.perf_counter() - start:5.1f} s  {network.num_layers} layers"


def layers(name: str, folder: Path) -> str:
    """How far exact integers are from ONNX Runtime, at the worst layer."""
    model = ir.load(converted(name, FULL.format("NVGPU"), folder))
    fed = model.graph.inputs[0]
    shape = [side if isinstance(side, int) else 1 for side in fed.shape or ()]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = dict(differences(model, {str(fed.name): x}))
    worst = max(found, key=lambda layer: found[layer])
    return f"{len(found):3d} layers, at most {found[worst]:.1e}, in {worst}"


if __name__ == "__main__":
    main()
