"""What all tests have: the command in an empty folder, and no clock that could fail them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# The command sets it as well. It has to be there before NumPy is.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from command_line import Command
from hypothesis import HealthCheck, settings

# A shell has what it runs in the background ignore Ctrl-C, and its children after it; some tests are
# about it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more of the machine, and of what else runs on it, than of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("few", settings.get_profile("any machine"), max_examples=5)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def _no_stopwatch() -> Iterator[None]:
    """Which model is the faster depends on the machine too, and a tenth of a second goes into it;
    `test_compare` gives `speedup` a clock of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("converter.measure.verify.speedup", lambda reference, other, sample: None)
        yield


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """The command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys)
