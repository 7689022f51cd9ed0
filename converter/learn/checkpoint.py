"""What is learned so far, in a folder beside the output, so that an interrupted fine-tuning goes on
where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from calib.affine import Array
from converter.graph.edit import not_none

Arrays = dict[str, Array]
# How the names of its files end.
ENDING = ".learned.npz"


@dataclass(frozen=True)
class State:
    """Where one stage is: numbers that tell, and arrays by name."""

    numbers: dict[str, Any]
    arrays: Arrays

    def group(self, name: str) -> Arrays:
        """The arrays called `name/…`, by what follows."""
        start = f"{name}/"
        return {k.removeprefix(start): x for k, x in self.arrays.items() if k.startswith(start)}


class Checkpoint:
    """States by stage; those in the folder count if they are of the same `job`, any text that tells
    it. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, job: str) -> None:
        self.folder, self.job = folder, job

    def load(self, stage: str) -> State | None:
        """The state of a stage, None if it has not begun."""
        if self.folder is None:
            return None
        try:
            with self._file(stage).open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = dict(found)
            told = json.loads(str(arrays.pop("told")))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None  # none yet, or none of ours
        return State(told["numbers"], arrays) if told["job"] == self.job else None

    def save(self, stage: str, state: State) -> None:
        """Keeps the state of a stage in place of what was kept of it."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{stage}.new{ENDING}"
        told = np.array(json.dumps({"job": self.job, "numbers": state.numbers}))
        np.savez(unfinished, told=told, **state.arrays)  # type: ignore[arg-type]
        unfinished.replace(self._file(stage))

    def close(self) -> None:
        """Removes what was kept, as everything is learned, and the folder where that was all."""
        if self.folder is None or not self.folder.is_dir():
            return
        for file in self.folder.glob(f"*{ENDING}"):
            file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, stage: str) -> Path:
        return not_none(self.folder) / f"{stage}{ENDING}"
