#!/usr/bin/env python3
"""What operators cost in floats and in integers: the figures behind converter/plan/costs.py.

    python benchmarks/costs.py MODEL.onnx ...

Every model is quantized wholly (`only_where_it_pays = false`) on random samples, and both files run
under ONNX Runtime's profiler on one processor; each node counts with its least time. Two tables:
for convolutions and products, by kind, the time that was measured over the one that the table of
costs says; for other operators nanoseconds a value, the median of nodes of more than 20,000 values.
A processor without VNNI is what the table is of; on others integers are faster than it says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from common import qconvert

from converter.graph.edit import only_consumer
from converter.graph.files import load, save
from converter.plan.costs import cost
from converter.prepare import prepare

RUNS, SAMPLES, MANY, MOST_FUSED = 30, 3, 20_000, 3
# What the profiler adds to a node, in nanoseconds.
PROFILED = 3000.0


@dataclass(frozen=True)
class Timed:
    """A node as the runtime executed it; `values` are those of its largest tensor."""

    name: str
    kind: str
    nanoseconds: float
    values: int
    made: tuple[int, ...]


def random_samples(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """Normally distributed samples of a model's inputs, in a folder each; the last is returned."""
    rng, sample = np.random.default_rng(0), dict[str, np.ndarray]()
    for number, value in enumerate(ort.InferenceSession(path).get_inputs()):
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in value.shape]
        (folder / str(number)).mkdir(parents=True)
        for index in range(SAMPLES):
            sample[value.name] = rng.standard_normal(shape).astype(np.float32)
            np.save(folder / str(number) / f"{index}.npy", sample[value.name])
    return sample


def quantized(path: Path, folder: Path, names: list[str]) -> Path:
    """The model with every operator that has an integer kernel on integers."""
    paths = ",".join(f"{name!r}:{str(folder / str(k))!r}" for k, name in enumerate(names))
    config, out = folder / "c.cfg", folder / "q.onnx"
    config.write_text(
        "[common_quant_param]\nquant_type=FULL_QUANT\nthread_num=1\n"
        "[full_quant_param]\nonly_where_it_pays=false\n[data_preprocess_param]\n"
        f"input_type=NPY\ncalibrate_size={SAMPLES}\ncalibrate_path={paths}\n"
    )
    qconvert(path, config, out)
    return out


def profiled(path: Path, sample: dict[str, np.ndarray], folder: Path) -> Iterator[Timed]:
    """The nodes of the optimized model with the least time of each."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, sample)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e["name"].endswith("_kernel_time")]
    least: dict[str, float] = {}
    for event in nodes:
        least[event["name"]] = min(event["dur"], least.get(event["name"], float("inf")))
    for name, event in {e["name"]: e for e in nodes}.items():
        shapes = [
            tuple(shape)
            for key in ("output_type_shape", "input_type_shape")
            for each in event["args"][key]
            for shape in each.values()
        ]
        kind = event["args"]["op_name"]
        yield Timed(
            name.removesuffix("_kernel_time").split("_token_")[0],
            kind,
            1000 * least[name] - PROFILED,
            max(map(prod, shapes), default=0),
            shapes[0] if shapes else (),
        )


def kind_of(node: ir.Node) -> str:
    """The kind of a convolution or product, by which its costs differ."""
    shape = tuple(node.inputs[1].shape or ()) if node.inputs[1] is not None else ()
    if len(shape) < 3:
        return node.op_type
    groups, taps = node.attributes.get_int("group", 1), prod(shape[2:])
    if groups == shape[0] and shape[1] == 1:
        by = 16 if shape[0] % 16 == 0 else 4 if shape[0] % 4 == 0 else 1
        return f"depthwise {taps} taps, channels by {by}"
    return (
        f"{'grouped ' if groups > 1 else ''}{taps} taps, {'3' if shape[1] == 3 else 'more'} inputs"
    )


def by_name(model: ir.Model) -> dict[str, ir.Node]:
    """Convolutions and products by the names that the runtime gives them: their own, or those of
    values that they make once what follows is fused into them.
    """
    heavy = {}
    for node in model.graph:
        if node.op_type in {"Conv", "Gemm", "MatMul"}:
            heavy[node.name or ""] = last = node
            for _ in range(MOST_FUSED):
                heavy[f"{last.outputs[0].name}_nchwc"] = node
                last = only_consumer(last.outputs[0]) or last
    return heavy


def compare(path: Path, ratios: dict[str, list[float]], values: dict[str, list[float]]) -> None:
    """Adds what one model tells."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sample = random_samples(path, folder)
        model, floats = prepare(load(path)), folder / "floats.onnx"
        save(model, floats)
        heavy = by_name(model)
        for which, file in (("floats", floats), ("integers", quantized(path, folder, [*sample]))):
            for timed in profiled(file, sample, folder):
                node = heavy.get(timed.name)
                if node is not None:
                    made = timed.made
                    if which == "integers" and len(made) == 4:  # channels come last
                        made = made[0], made[3], made[1], made[2]
                    told = getattr(cost(node, made, timed.values), which)
                    ratios[f"{which}: {kind_of(node)}"].append(timed.nanoseconds / told)
                elif timed.values > MANY:
                    values[timed.kind].append(timed.nanoseconds / timed.values)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ratios: dict[str, list[float]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for path in parser.parse_args().models:
        print(path.name, file=sys.stderr)
        compare(path, ratios, values)
    print("| kind | nodes | measured over told: least | median | most |\n|---|---|---|---|---|")
    for kind, found in sorted(ratios.items()):
        middle = statistics.median(found)
        print(f"| {kind} | {len(found)} | {min(found):.2f} | {middle:.2f} | {max(found):.2f} |")
    print("\n| operator | nodes | nanoseconds a value |\n|---|---|---|")
    for kind, found in sorted(values.items()):
        print(f"| {kind} | {len(found)} | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
