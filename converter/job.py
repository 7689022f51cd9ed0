"""What one conversion is asked to do, and whom it tells how far it is; plain data without heavy imports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from converter.config import Config

T = TypeVar("T")
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Job:
    """One conversion: the files, the config and the flags."""

    model: Path
    output: Path
    config: Config
    input_shapes: Mapping[str, Shape] = field(default_factory=dict)
    input_format: str | None = None
    input_type: str = "DEFAULT"
    output_type: str = "DEFAULT"
    fp16: bool = False


@dataclass(frozen=True)
class Resources:
    """What a run may use: worker threads, ONNX Runtime's execution providers, bytes of activations at a time."""

    threads: int
    providers: tuple[str, ...]
    memory: int


class Watch(Protocol):
    """Receives progress and remarks while a job runs."""

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Hands the items on and shows how many of `total` are done."""

    def say(self, text: str) -> None:
        """A detail for those who want to follow."""

    def tell(self, text: str) -> None:
        """A sentence that belongs to the result."""

    def warn(self, text: str) -> None:
        """One sentence the user should know."""


class Silent:
    """A watch that shows nothing."""

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Hands the items on."""
        yield from items

    def say(self, text: str) -> None:
        """Ignored."""

    def tell(self, text: str) -> None:
        """Ignored."""

    def warn(self, text: str) -> None:
        """Ignored."""
