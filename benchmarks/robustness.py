"""Everything that could break a conversion, many times: python benchmarks/robustness.py [random
models a setting].

Counts, kind by kind, what was tried, what was converted to a checked model with the right numbers,
what was refused with a sentence, and what was neither (there must be nothing), and names the
slowest case. The cases are the tests'.
"""

from __future__ import annotations

import contextlib
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from examination import examine
from hostile_models import BROKEN, ODD, plain, written
from test_hostile_models import LEAST_DB, MODES, NOT_COMPARED, config_of, decibels, feeds_of, run
from test_light_models import MODELS

from converter.cli import main

# A random model that takes longer hangs.
MOST_SECONDS = 120
SETTINGS = {
    "FULL_QUANT": {
        "default": {},
        "NVGPU": {"full_quant": {"target_device": "NVGPU"}},
        "OPENVINO": {"full_quant": {"target_device": "OPENVINO"}},
        "per tensor": {"full_quant": {"per_channel": "false"}},
        "nearest": {"full_quant": {"weight_rounding": "NEAREST", "bias_correction": "false"}},
    },
    "WEIGHT_QUANT": {
        "8 bits": {"common_quant": {"min_quant_weight_channel": 0}},
        "3 bits, data": {
            "common_quant": {"min_quant_weight_channel": 0, "bit_num": 3},
            "with_data": True,
        },
        "16 bits": {"common_quant": {"min_quant_weight_channel": 0, "bit_num": 16}},
        "mixed": {"common_quant": {"min_quant_weight_channel": 0, "bit_num": 0}},
    },
    "DYNAMIC_QUANT": {"ALWC": {}, "ACWL": {"dynamic_quant": {"quant_strategy": "ACWL"}}},
}


@dataclass
class Tally:
    """What became of one kind of cases."""

    converted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def count(self, name: str, seconds: float, outcome: str | None, refused: bool = False) -> None:
        """`outcome` says what is wrong."""
        self.slowest = max(self.slowest, (seconds, name))
        if outcome:
            self.wrong.append(f"{name}: {outcome}")
        elif refused:
            self.refused += 1
        else:
            self.converted += 1


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr of `qconvert` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, said.getvalue()


def attempt(
    folder: Path, name: str, mode: str, path: Path, data: dict[str, np.ndarray], tally: Tally
) -> None:
    """One conversion by the command, and what is wrong with it."""
    output, start = folder / "out" / "q.onnx", time.perf_counter()
    code, said = command(
        f"--modelFile={path}",
        f"--configFile={config_of(folder, mode, data)}",
        f"--outputFile={output}",
    )
    seconds = time.perf_counter() - start
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    if code:
        clear = len(errors) == 1 and "unforeseen" not in said and not output.exists()
        tally.count(f"{name} {mode}", seconds, None if clear else said, refused=True)
    else:
        tally.count(f"{name} {mode}", seconds, _fault(name, path, output, data))


def _fault(name: str, path: Path, output: Path, data: dict[str, np.ndarray]) -> str | None:
    try:
        onnx.checker.check_model(output)
        if name in NOT_COMPARED or not data:
            return None
        sample = {key: np.asarray(samples[0]) for key, samples in data.items()}
        wanted = run(path, sample, optimized=False)
        worst = min(
            (
                decibels(x, y)
                for fast in (False, True)
                for x, y in zip(wanted, run(output, sample, fast), strict=True)
            ),
            default=np.inf,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if worst > LEAST_DB else f"{worst:.1f} dB"


def broken(tally: Tally) -> None:
    """Files that are no models, whole ones cut off at many places, and whole ones with random bytes
    in them.
    """
    for name, (make, _) in BROKEN.items():
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                attempt(Path(folder), name, mode, make(Path(folder)), {}, tally)
    whole, rng = plain().SerializeToString(), np.random.default_rng(0)
    for number in range(400):
        content = bytearray(whole[: int(rng.integers(len(whole)))] if number % 2 else whole)
        for place in rng.integers(len(content), size=8) if content and number % 4 < 2 else ():
            content[place] = rng.integers(256)
        with tempfile.TemporaryDirectory() as folder:
            attempt(
                Path(folder),
                f"damaged {number}",
                "WEIGHT_QUANT",
                written(Path(folder), bytes(content)),
                {},
                tally,
            )


def odd(tally: Tally) -> None:
    """Valid models as no tutorial has them."""
    for name, make in ODD.items():
        model = make()
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                attempt(
                    Path(folder), name, mode, written(Path(folder), model), feeds_of(model), tally
                )


def light(tally: Tally) -> None:
    """The light models of onnx's backend tests."""
    for path in MODELS:
        model = onnx.load(path)
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                attempt(Path(folder), path.stem, mode, path, feeds_of(model), tally)


def one(seed: int, mode: str, setting: str) -> tuple[float, str | None]:
    """Seconds of one random model, and what is wrong with the result."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fault = examine(Path(folder), seed, mode, **SETTINGS[mode][setting]).fault
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
    return time.perf_counter() - start, fault


def generated(mode: str, setting: str, count: int) -> Callable[[Tally], None]:
    """Random models, in a process of their own that may be killed."""

    def work(tally: Tally) -> None:
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        for seed in range(1000, 1000 + count):
            try:
                seconds, fault = pool.submit(one, seed, mode, setting).result(MOST_SECONDS)
            except (BrokenProcessPool, TimeoutError) as error:
                seconds, fault = (
                    0.0,
                    f"the process {'hangs' if isinstance(error, TimeoutError) else 'was aborted'}",
                )
                pool.shutdown(wait=False, cancel_futures=True)
                pool = ProcessPoolExecutor(1, get_context("spawn"))
            tally.count(f"model {seed}", seconds, fault)
        pool.shutdown()

    return work


def kinds(count: int) -> Iterator[tuple[str, Callable[[Tally], None]]]:
    """Every kind of cases by its name."""
    yield "broken files", broken
    yield "odd models", odd
    yield "light models", light
    for mode, settings in SETTINGS.items():
        for setting in settings:
            yield f"random, {mode}, {setting}", generated(mode, setting, count)


def report(count: int) -> int:
    """Prints the table; the number of wrong cases."""
    print("| Cases | Tried | Converted | Refused with a sentence | Wrong | Slowest |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    wrong: list[str] = []
    for name, work in kinds(count):
        tally = Tally()
        work(tally)
        tried, (seconds, slowest) = (
            tally.converted + tally.refused + len(tally.wrong),
            tally.slowest,
        )
        figures = f"{tried} | {tally.converted} | {tally.refused} | {len(tally.wrong)}"
        print(f"| {name} | {figures} | {seconds:.1f} s, {slowest} |", flush=True)
        wrong += [f"{name}: {fault}" for fault in tally.wrong]
    print(*wrong, sep="\n")
    print(f"Peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB.")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(report(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
