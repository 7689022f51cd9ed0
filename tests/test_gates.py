"""Quality gates: what passes, what misses and with which words, from the command line too."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import CONFIG, MODEL, Command
from hypothesis import given
from hypothesis import strategies as st

from converter.measure.errors import TensorError
from converter.measure.gates import Figures, Gates, size_limit
from converter.measure.results import Verification, figures_of

GOOD = Figures(1000, 300, cosine=0.99, agreement=0.95, speedup=1.5, accuracy_drop=0.02)


@pytest.fixture
def qconvert(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (Gates(), ""),
        (Gates(0.99, 0.95, 1.5, 0.02, "30%"), ""),
        (Gates(max_accuracy_drop=0.01), "accuracy drop 0.02 is more (--max-accuracy-drop 0.01)"),
        (Gates(min_cosine=0.995), "cosine 0.99 is less (--min-cosine 0.995)"),
        (Gates(min_agreement=0.96), "agreement 0.95 is less (--min-agreement 0.96)"),
        (Gates(min_speedup=2), "speedup 1.5 is less (--min-speedup 2)"),
        (
            Gates(max_size="29.9%"),
            "size 0.0003 MB, 30% of the float model, is more (--max-size 29.9%)",
        ),
        (
            Gates(max_size="0.2KB"),
            "size 0.0003 MB, 30% of the float model, is more (--max-size 0.2KB)",
        ),
        (
            Gates(min_cosine=0.995, min_speedup=2),
            "cosine 0.99 is less (--min-cosine 0.995); speedup 1.5 is less (--min-speedup 2)",
        ),
    ],
)
def test_a_missed_gate_is_told_with_the_figures(gates: Gates, words: str) -> None:
    assert gates.missed(GOOD) == words


def test_a_busy_machine_cannot_judge_a_speed_and_is_said_to_be_one() -> None:
    figures = replace(GOOD, speedup=0.8, noisy="0.80 to 2.10")
    words = "speedup cannot be judged on so busy a machine: 0.80 to 2.10 (--min-speedup 1)"
    assert Gates(min_speedup=1).missed(figures) == words
    assert not Gates(min_speedup=0.7).missed(figures)


@pytest.mark.parametrize("flag", ["--min-agreement", "--min-cosine", "--max-accuracy-drop"])
def test_a_percentage_is_called_one(qconvert: Command, flag: str) -> None:
    result = qconvert.convert(CONFIG, Path("o.onnx"), MODEL, f"{flag}=99")
    assert result.code == 2
    assert f"99 is no share; write a number up to 1, as in {flag}=0.99 for 99 %" in result.err


@pytest.mark.parametrize("name", ["min_cosine", "min_agreement", "min_speedup"])
def test_what_was_not_measured_misses(name: str) -> None:
    figure = name.removeprefix("min_")
    assert (
        Gates(**{name: 0.0}).missed(Figures(2, 1))
        == f"{figure} was not measured (--min-{figure} 0)"
    )


def test_a_cosine_that_is_no_number_misses() -> None:
    assert "cosine nan is less" in Gates(min_cosine=0.5).missed(Figures(2, 1, cosine=math.nan))


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_a_bound_is_reached_from_its_own_value_on(bound: float, found: float) -> None:
    assert (Gates(min_cosine=bound).missed(Figures(2, 1, cosine=found)) == "") == (found >= bound)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5MB", 5e6),
        ("1.5 gb", 1.5e9),
        ("12KB", 12e3),
        ("30%", 300.0),
        ("0.5%", 5.0),
        (" 7MB ", 7e6),
    ],
)
def test_sizes(text: str, limit: float) -> None:
    assert size_limit(text, 1000) == limit


@pytest.mark.parametrize(
    "text", ["", "5", "MB", "-1MB", "5MiB", "1e3KB", "30 percent", "5MB or 30%"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=f"^'{re.escape(text)}' is no size; write for example 5MB"):
        size_limit(text, 1)


def test_figures_take_the_worst_output() -> None:
    outputs = tuple(TensorError("y", cosine, 9) for cosine in (0.999, 0.9, 0.99))
    found = Verification(8, True, outputs, 0, None, None, 0.75, {}, (), ())
    assert figures_of(8, 2, found) == Figures(8, 2, 0.9, 0.75, None)
    assert figures_of(8, 2, replace(found, outputs=())) == Figures(8, 2, None, 0.75, None)
    assert figures_of(8, 2, None) == Figures(8, 2)


def test_convert_exits_with_3_and_still_writes(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(CONFIG, tmp_path / "q.onnx", MODEL, "--max-size=1KB", "--quiet")
    share = 100 * (tmp_path / "q.onnx").stat().st_size / MODEL.stat().st_size
    assert result.code == 3
    assert result.err.startswith("ERROR: The model was written, but misses a quality gate: size ")
    assert f"{share:.4g}% of the float model, is more (--max-size 1KB)." in result.err
    assert "SUCCESS" not in result.out


def test_convert_passes_its_gates(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(
        CONFIG, tmp_path / "q.onnx", MODEL, "--max-size=60%", "--min-cosine=0.9", "--quiet"
    )
    assert (result.code, result.out) == (0, "CONVERT RESULT SUCCESS:0\n")


def test_a_bound_that_is_no_size_is_bad_usage(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(CONFIG, tmp_path / "q.onnx", MODEL, "--max-size=small")
    assert result.code == 2
    assert "--max-size" in result.err
    assert "'small' is no size; write for example 5MB, or 30% of the float model" in result.err
