"""Whether two versions of the program make the same files: python benchmarks/same.py BEFORE AFTER.

BEFORE and AFTER are folders with a checkout each (`git worktree add ../before v0.1.0`). A dozen
models are converted with both, in every mode and for every target, a trained model and reports
among them; models, CSV files and what the command prints must be the same to the byte, but for
lines that hold times. Further words select cases by name. Models that are not part of the project
are left out where they are not found.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("QCONVERT_DATA", ROOT.parent / "shared" / "data"))
DIGITS, TRAINED = ROOT / "examples" / "digits", ROOT / "examples" / "qat_digits"
TARGETS = ("CPU", "CPU_VNNI", "ARM", "OPENVINO", "NVGPU", "DSP")
# What lines and which file hold times.
TIMES, TIMED = "time.csv", re.compile(r"^(Speed|.*(slower|seconds))")


@dataclass(frozen=True)
class Case:
    """One run of the command: a model, a config's text, and more flags."""

    name: str
    model: Path
    config: str
    flags: tuple[str, ...] = ()


def pictures(folder: Path, size: int, *more: str) -> str:
    """The section that calibrates on the pictures of a folder."""
    lines = (f"calibrate_path = '{folder}'", f"calibrate_size = {size}", "input_type = IMAGE")
    return "\n".join(["[data_preprocess_param]", *lines, *more, ""])


def mode(quant_type: str, *more: str) -> str:
    """The section that names a mode."""
    return "\n".join(["[common_quant_param]", f"quant_type = {quant_type}", *more, ""])


def digits_cases() -> Iterator[Case]:
    """The shipped example, in every mode and for every target."""
    model = DIGITS / "digits_cnn.onnx"
    grey = ("image_to_format = GRAY", "normalize_mean = [0]", "normalize_std = [255]")
    data = pictures(Path(f"image:{DIGITS / 'calib'}"), 40, *grey).replace("'image:", "image:'")
    full = mode("FULL_QUANT")
    settings = [f"target_device = {target}" for target in TARGETS]
    settings += [f"activation_quant_method = {name}" for name in ("KL", "MSE", "REMOVAL_OUTLIER")]
    for line in (*settings, "max_drop = 0.00001", "per_channel = false"):
        yield Case(f"full {line}", model, f"{full}[full_quant_param]\n{line}\n{data}")
    yield Case("full reports", model, mode("FULL_QUANT", "debug_info_save_path = r") + data)
    edges = ("--inputDataType=UINT8", "--outputDataType=UINT8")
    yield Case("full integer edges", model, full + data, edges)
    for bits in (8, 4, 2):
        few = mode("WEIGHT_QUANT", f"bit_num = {bits}", "min_quant_weight_channel = 0")
        yield Case(f"weight {bits} bits", model, few + data)
        yield Case(f"weight {bits} bits, no data", model, few)
    mixed = mode("WEIGHT_QUANT", "bit_num = 0", "min_quant_weight_channel = 0")
    search = "[mixed_bit_weight_quant_param]\nsearch = SENSITIVITY\ntarget_ratio = 6\n"
    yield Case("weight mixed", model, mixed + search + data)
    yield Case("dynamic", model, mode("DYNAMIC_QUANT") + data)
    yield Case("float16", model, "[common_quant_param]\n", ("--fp16=on",))


def other_cases() -> Iterator[Case]:
    """A trained model, and real models where they are found."""
    trained = "[transform_quant_param]\nexport_precision_mode = QUANT\n"
    for bits in (3, 8):
        yield Case(f"trained {bits} bits", TRAINED / f"qat_{bits}.onnx", trained)
    models = DATA / "models"
    folder = Path(f"input:{DATA / 'images' / 'cifar10' / 'calib'}")
    cifar = pictures(folder, 20, "image_to_format = RGB").replace("'input:", "input:'")
    resnet = models / "resnet20_cifar10.onnx"
    yield Case("resnet20 full", resnet, mode("FULL_QUANT") + cifar)
    yield Case("resnet20 weight 4 bits", resnet, mode("WEIGHT_QUANT", "bit_num = 4") + cifar)
    for name in ("mlperf_tiny_kws_dscnn", "byte_sb_bidi_lstm", "silero_vad", "mnist_cnn"):
        model = models / f"{name}.onnx"
        yield Case(f"{name} weight", model, mode("WEIGHT_QUANT", "bit_num = 8"))
        yield Case(f"{name} dynamic", model, mode("DYNAMIC_QUANT"))
    qat = models / "mobilenet_v2_1.0_224_qat_qdq.onnx"
    yield Case("mobilenet_v2 trained", qat, trained)


def outcome(tree: Path, case: Case, folder: Path) -> dict[str, bytes]:
    """What the version in `tree` makes of a case: every model and CSV file, and what it prints."""
    folder.mkdir()
    (folder / "job.cfg").write_text(case.config, encoding="utf-8")
    flags = (f"--modelFile={case.model}", "--configFile=job.cfg", "--outputFile=out.onnx")
    ran = subprocess.run(
        [sys.executable, "-m", "converter", *flags, *case.flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if not TIMED.match(line)]
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in {".onnx", ".csv"})
    kept = (path for path in files if path.name != TIMES)
    made = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    return {**made, "printed": "\n".join([f"exit code {ran.returncode}", *said]).encode()}


def differences(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[str]:
    """What differs, in words; of what was printed the lines."""
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, b""), after.get(name, b"")
        if old != new and name == "printed":
            lines = difflib.unified_diff(old.decode().splitlines(), new.decode().splitlines(), n=0)
            yield from (line for line in lines if not line.startswith(("---", "+++", "@@")))
        elif old != new:
            yield f"{name}: {len(old)} and {len(new)} bytes"


def main() -> None:
    """Prints a line a case and the number of cases that differ."""
    trees, wanted = [Path(given).resolve() for given in sys.argv[1:3]], sys.argv[3:]
    different = 0
    for case in (*digits_cases(), *other_cases()):
        if not case.model.exists() or not all(word in case.name for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for tree in trees:
                # One after the other under one name: paths are printed and recorded.
                place = Path(folder) / "job"
                found.append(outcome(tree, case, place))
                place.rename(Path(folder) / f"done{len(found)}")
        told = list(differences(*found))
        different += bool(told)
        failed = b"exit code 0" not in found[0]["printed"]
        print(f"{case.name:40} {'DIFFERENT' if told else 'same'}{' (failed)' if failed else ''}")
        print("".join(f"    {line}\n" for line in told), end="", flush=True)
    print(f"{different} cases differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
