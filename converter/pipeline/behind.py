"""What comes behind a finished result: measuring and reporting, which never lose it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from calib import CalibError
from converter.errors import QConvertError
from converter.graph.files import first_line
from converter.job import Watch

T = TypeVar("T")


@dataclass
class Behind:
    """Steps behind a finished result: one that fails costs a warning and nothing else.

    `kept` tells whoever interrupts them what there is already, `random` says that the models run on
    random samples. `reason` is why the last step that failed did.
    """

    watch: Watch
    random: bool
    kept: str = ""
    reason: str = ""

    def attempt(self, what: str, step: Callable[[], T]) -> T | None:
        """What `step` gives; None after a warning that says `what` is missing, and why."""
        try:
            return step()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.kept) from None
        except Exception as error:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.watch.say(line)
            self.reason = self._in_words(error)
            self.watch.warn(f"{what}: {self.reason}")
            return None

    def _in_words(self, error: Exception) -> str:
        if isinstance(error, CalibError | QConvertError) and self.random:
            return f"the model does not run on random samples; give data. {error}"
        if isinstance(error, CalibError | QConvertError | OSError):
            return str(error)
        return f"{type(error).__name__}: {first_line(error)}"
