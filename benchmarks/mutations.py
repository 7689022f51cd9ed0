"""Which test notices which mistake: python benchmarks/mutations.py [mutation ...].

Each mutation changes the arithmetic or the graph in one place of a copy of the sources, runs the
tests that should notice, and lists those that do. A mutation that no test notices is a hole in the
tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` (which occurs once) becomes `new`; `tests` are run, all of a file or those
    of an expression.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "codes rounded down",
        "calib/affine.py",
        "codes = np.rint(np.asarray(x, np.float64) / scale) + zero_point",
        "codes = np.floor(np.asarray(x, np.float64) / scale) + zero_point",
        ("test_affine.py", "test_emit.py"),
    ),
    Mutation(
        "half away from zero",
        "calib/affine.py",
        "codes = np.rint(np.asarray(x, np.float64) / scale) + zero_point",
        "codes = np.trunc(np.asarray(x, np.float64) / scale + np.copysign(0.5, x)) + zero_point",
        ("test_affine.py",),
    ),
    Mutation(
        "symmetric uint8 around 127",
        "calib/affine.py",
        "middle = 0 if fmt.signed else 1 << (fmt.bits - 1)",
        "middle = 0 if fmt.signed else (1 << (fmt.bits - 1)) - 1",
        ("test_affine.py", "test_full_quant.py"),
    ),
    Mutation(
        "zero point off by one",
        "calib/affine.py",
        "zero_point = np.clip(np.rint(fmt.qmin - lo / scale), fmt.qmin, fmt.qmax)",
        "zero_point = np.clip(np.rint(fmt.qmin - lo / scale) + 1, fmt.qmin, fmt.qmax)",
        ("test_affine.py", "test_generated.py"),
    ),
    Mutation(
        "scale of one level too few",
        "calib/affine.py",
        "scale = (hi - lo) / (fmt.qmax - fmt.qmin)",
        "scale = (hi - lo) / (fmt.qmax - fmt.qmin + 1)",
        ("test_affine.py",),
    ),
    Mutation(
        "channels of a Conv along its inputs",
        "converter/plan/ops.py",
        "channel_axis=lambda node: 0,\n        view=conv_view,",
        "channel_axis=lambda node: 1,\n        view=conv_view,",
        ("test_ops.py", "test_generated.py"),
    ),
    Mutation(
        "channels of a transposed Gemm along its inputs",
        "converter/plan/ops.py",
        "return 0 if is_transposed(node) else 1",
        "return 1 if is_transposed(node) else 0",
        ("test_ops.py", "test_generated.py"),
    ),
    Mutation(
        "a ConvTranspose with groups by channel",
        "converter/plan/ops.py",
        'return 1 if node.attributes.get_int("group", 1) == 1 else None',
        "return 1",
        ("test_ops.py", "test_placement.py", "test_generated.py"),
    ),
    Mutation(
        "bias scaled by the weight alone",
        "converter/emit/qdq.py",
        "scale = (data.scale * weight.qparams.scale).astype(np.float32)",
        "scale = (1.0 * weight.qparams.scale).astype(np.float32)",
        ("test_emit.py", "test_generated.py"),
    ),
    Mutation(
        "BatchNorm without epsilon",
        "converter/prepare/fold_affine.py",
        'scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))',
        "scale = gamma / np.sqrt(variance)",
        ("test_fold_affine.py",),
    ),
    Mutation(
        "BatchNorm with the mean added",
        "converter/prepare/fold_affine.py",
        "return scale, beta - mean * scale",
        "return scale, beta + mean * scale",
        ("test_fold_affine.py",),
    ),
    Mutation(
        "training-mode BatchNorm folded",
        "converter/prepare/fold_affine.py",
        'training = node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1',
        "training = False",
        ("test_fold_affine.py", "test_hostile_models.py -k batch_norm"),
    ),
    Mutation(
        "pairs that overflow by one",
        "converter/plan/targets.py",
        "PAIR_LIMIT = 128",
        "PAIR_LIMIT = 129",
        ("test_placement.py", "test_full_quant.py", "test_checks.py"),
    ),
    Mutation(
        "equalization the wrong way round",
        "converter/prepare/equalize.py",
        "np.sqrt(np.divide(out_range, in_range",
        "np.sqrt(np.divide(in_range, out_range",
        ("test_equalize.py",),
    ),
    Mutation(
        "bias correction with the other sign",
        "converter/algorithms/weights.py",
        "return np.asarray(shift if layer.bias is None else layer.bias + shift)",
        "return np.asarray(-shift if layer.bias is None else layer.bias - shift)",
        ("test_weights.py", "test_full_quant.py", "test_generated.py"),
    ),
    Mutation(
        "a bias for whoever watches the same tensor",
        "converter/algorithms/weights.py",
        " if _correctable(layer.unit) else None",
        "",
        ("test_generated.py",),
    ),
    Mutation(
        "a Softmax of integers with the data's range",
        "converter/calibrate.py",
        'source = softmax.inputs[0] if softmax and softmax.op_type == "Softmax" else None',
        'source = softmax.inputs[0] if softmax and softmax.op_type == "LogSoftmax" else None',
        ("test_generated.py",),
    ),
    Mutation(
        "planes without their last bit",
        "converter/emit/planes.py",
        "2.0 ** np.arange(bits)[:, None]",
        "2.0 ** np.arange(bits)[:, None] * (np.arange(bits) < bits - 1)[:, None]",
        ("test_planes.py", "test_generated.py"),
    ),
    Mutation(
        "rows scaled to 128",
        "converter/emit/dynamic.py",
        "np.float32(1 / INT8_NARROW.qmax)",
        "np.float32(1 / 120)",
        ("test_dynamic.py", "test_generated.py"),
    ),
    Mutation(
        "histograms that forget a merge",
        "calib/stats.py",
        "merged = counts.reshape(-1, 1 << min(steps, SIDE_BITS)).sum(axis=1)",
        "merged = counts.reshape(-1, 1 << min(steps, SIDE_BITS)).max(axis=1)",
        ("test_stats.py", "test_ranges.py"),
    ),
    Mutation(
        "files of external data outside of the folder",
        "converter/model.py",
        "inside = not Path(tensor.location).is_absolute() and "
        "file.resolve().is_relative_to(folder.resolve())",
        "inside = True",
        ("test_hostile_models.py -k external",),
    ),
    Mutation(
        "the output over the float model",
        "converter/model.py",
        "if output.exists() and source.exists() and output.samefile(source):",
        "if output == source:",
        ("test_interrupted.py -k overwritten", "test_cli.py -k overwritten"),
    ),
)


def noticed(mutation: Mutation, tree: Path) -> list[str] | None:
    """The tests that fail on the mutated copy; None where the text to change is not found once."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return None
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    failed: list[str] = []
    try:
        for tests in mutation.tests:
            file, *options = tests.split(" ", 1)
            chosen = [f"tests/{file}", *(options[0].split(" ", 1) if options else [])]
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--maxfail=3",
                *chosen,
            ]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, check=False
            )
            failed += re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    finally:
        path.write_text(text, encoding="utf-8")
    return failed


def main(wanted: list[str]) -> int:
    """Prints the table; the number of mutations that nothing noticed."""
    holes = 0
    print("| Mutation | In | Noticed by |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        kept_out = shutil.ignore_patterns(".git", "*.pyc", "__pycache__", "*.egg-info", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=kept_out)
        for mutation in MUTATIONS:
            if wanted and mutation.name not in wanted:
                continue
            found = noticed(mutation, tree)
            holes += not found
            shown = "**text not found**" if found is None else ", ".join(found) or "**nothing**"
            print(f"| {mutation.name} | {mutation.file} | {shown} |", flush=True)
    return holes


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
