#!/usr/bin/env python3
"""Rounding that learns, of other tools beside this one: mobilenet_v1 with weights of 4 bits.

    python benchmarks/peers.py [TOOL ...] [--python PYTHON] [--pictures 25] [--share 0.1]

TOOL: nearest, adaround and qat of onnxsim, aimet_nearest and aimet_adaround of AIMET; PYTHON is one
where `pip install onnxsim aimet-onnx` has been run. `--share` is that of the steps which each tool
recommends: 15,000 a layer of AIMET's AdaRound, 1,000 a block of onnxsim's training. All learn from
the same pictures of `calib`. Columns: top-1 and agreement on dev, times smaller, seconds, processor
seconds and megabytes of memory. onnxsim has a scale for every 32 weights and leaves float what it
cannot part so; AIMET, a scale a channel, hands out float weights as they were rounded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

MODEL = "mobilenet_v1_0.75_224"
AIMET_STEPS, ONNXSIM_STEPS = 15_000, 1_000
LEAST_OPSET = 21

Samples = list[dict[str, np.ndarray]]
Make = Callable[[str, Samples, float], Any]


def _newer(model: str) -> onnx.ModelProto:
    """The model in an opset with integers of 4 bits."""
    return onnx.version_converter.convert_version(onnx.load(model), LEAST_OPSET)


def _rounded(newer: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    return onnxsim.quantize_weight_only_int4(newer)


def onnxsim_nearest(model: str, samples: Samples, share: float) -> Any:
    """Rounded to nearest."""
    return _rounded(_newer(model))


def onnxsim_adaround(model: str, samples: Samples, share: float) -> Any:
    """Its AdaRound, with the steps that are its default: 300 a layer."""
    import onnxsim

    newer = _newer(model)
    return onnxsim.apply_adaround(newer, _rounded(newer), samples)


def onnxsim_qat(model: str, samples: Samples, share: float) -> Any:
    """Its training of all blocks, one after the other."""
    from onnxsim.qat import apply_qat_all_blocks

    newer, steps = _newer(model), round(ONNXSIM_STEPS * share)
    tuned, blocks = apply_qat_all_blocks(
        newer, _rounded(newer), calibration_data=samples, num_iterations=steps, batch_size=8
    )
    reasons = sorted({block.skipped_reason or "trained" for block in blocks})
    print(f"onnxsim found {len(blocks)} blocks: {'; '.join(reasons)}")
    return tuned


def _simulated(model: str) -> Any:
    import aimet_onnx

    sim = aimet_onnx.QuantizationSimModel(onnx.load(model), param_type=aimet_onnx.int4)
    for name in sim.activation_names:
        sim.qc_quantize_op_dict[name].enabled = False
    sim._compute_param_encodings(overwrite=False)
    return sim


def aimet_nearest(model: str, samples: Samples, share: float) -> Any:
    """Rounded to nearest."""
    return _simulated(model).to_onnx_qdq()


def aimet_adaround(model: str, samples: Samples, share: float) -> Any:
    """Its AdaRound."""
    import aimet_onnx

    sim = _simulated(model)
    aimet_onnx.apply_adaround(sim, samples, num_iterations=round(AIMET_STEPS * share))
    return sim.to_onnx_qdq()


TOOLS: dict[str, Make] = {
    "nearest": onnxsim_nearest,
    "adaround": onnxsim_adaround,
    "qat": onnxsim_qat,
    "aimet_nearest": aimet_nearest,
    "aimet_adaround": aimet_adaround,
}


def convert(tool: str, model: str, samples: str, out: str, share: str) -> None:
    """One tool's work, in a process of its own and by another Python."""
    inputs = np.load(samples)
    name = inputs.files[0]
    feeds = [{name: x[None]} for x in inputs[name]]
    onnx.save(TOOLS[tool](model, feeds, float(share)), out)


def compare(tools: list[str], python: str, pictures: int, share: float) -> None:
    """Prints the table."""
    from common import CLASSIFIERS, Cost, measure, outputs, qconvert, score, told

    classifier = CLASSIFIERS[MODEL]
    data, labels = classifier.samples("dev")
    reference = outputs(classifier.path, data)

    def tell(name: str, out: Path, cost: Cost) -> None:
        judged = score(reference, outputs(out, data), labels)
        print(f"{name:15} {told(judged, classifier.path, out, cost)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = classifier.config(
            home, "WEIGHT_QUANT", pictures, "min_quant_weight_channel=0\nbit_num=4"
        )
        cost = qconvert(classifier.path, config, home / "own.onnx", "--quiet")
        tell("qconvert", home / "own.onnx", cost)
        calib, _ = classifier.samples("calib", pictures)
        feeds = [calib.sample(i) for i in range(len(calib))]
        (name,) = feeds[0]
        np.savez(home / "x.npz", **{name: np.concatenate([feed[name] for feed in feeds])})
        for tool in tools or TOOLS:
            out = home / f"{tool}.onnx"
            command = [python, __file__, "--one", tool, str(classifier.path)]
            try:
                cost = measure([*command, str(home / "x.npz"), str(out), str(share)])
            except RuntimeError as error:
                print(f"{tool:15} fails: {str(error).strip().splitlines()[-1]}", flush=True)
            else:
                tell(tool, out, cost)
                said = [line for line in cost.output.splitlines() if line.startswith("onnxsim")]
                print("".join(f"  {line}\n" for line in said), end="", flush=True)


def main() -> None:
    """Reads the arguments."""
    if sys.argv[1:2] == ["--one"]:
        convert(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", choices=[*TOOLS, []])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--pictures", type=int, default=25)
    parser.add_argument("--share", type=float, default=0.1)
    wanted = parser.parse_args()
    print(f"{'':15} top-1  agree   ratio seconds    CPU     MB")
    compare(wanted.tools, wanted.python, wanted.pictures, wanted.share)


if __name__ == "__main__":
    main()
