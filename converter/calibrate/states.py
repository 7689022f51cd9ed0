"""Models that hand their states on: what comes out at one frame goes in at the next.

The samples of such a model are consecutive frames. Its states need no files: they begin at zero, or
at the input's own value, and then are what the float model makes of the frames before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset, Sample
from converter.calibrate.runs import Opened
from converter.errors import DataError
from converter.graph.files import default_inputs, fed_inputs
from converter.plan.ops import rule_of

# Words that tell an input from the output that follows it.
MARKS = {"past", "present", "prev", "previous", "last", "next", "new", "updated", "n"} | {
    *("in", "ins", "input", "inputs", "out", "outs", "output", "outputs"),
    *("init", "initial", "cur", "current"),
}
# The least dimensions of a cache.
CACHE_AXES = 3
# What is left of them where they are written together, as in h0 and hn.
_LAST = re.compile(r"(?<=[a-z])[0n]$")
_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Recurrent:
    """A float model, outputs by the state inputs that they are fed to, and the bytes that the
    states of all frames may take.
    """

    model: Opened
    states: Mapping[str, str]
    memory: int


class Stream(Dataset):
    """Consecutive frames; `held` are the states before each, and behind the last."""

    def __init__(self, frames: Dataset, source: Recurrent, held: Sequence[Sample]) -> None:
        self._frames = frames
        self._source = source
        self._held = held
        self.states = source.states
        self.warnings = frames.warnings

    def __len__(self) -> int:
        return len(self._frames)

    def sample(self, index: int) -> Sample:
        """The frame, with the states that the float model has then."""
        return {**self._frames.sample(index), **self._held[index]}

    def files(self, index: int) -> tuple[Path, ...]:
        """Those of the frame."""
        return self._frames.files(index)

    def part(self, start: int, end: int) -> Dataset:
        """Frames number `start` to `end`."""
        frames = self._frames.part(start, end)
        held = self._held[start : start + len(frames) + 1]
        return Stream(frames, self._source, held)

    def further(self, size: int) -> Dataset:
        """The frames behind these, which go on from the last states."""
        frames = self._frames.further(size)
        return streamed(frames, self._source, self._held[-1])


def streamed(frames: Dataset, source: Recurrent, first: Sample) -> Stream:
    """The frames with the states that the model makes from each to the next, beginning with
    `first`; as many as fit the memory.
    """
    held = [first]
    room = source.memory
    for index in range(len(frames)):
        feeds = {**frames.sample(index), **held[-1]}
        made = source.model.fetch(source.states.values(), feeds)
        states = {name: made[output] for name, output in source.states.items()}
        held.append(states)
        room -= sum(x.nbytes for x in states.values())
        if room < 0:
            break
    return Stream(frames.part(0, len(held) - 1), source, held)


def first_states(model: ir.Model, states: Mapping[str, str]) -> Sample:
    """What the states are before the first frame: the inputs' own values, else zeros.

    A dimension that is open is 1, but 0 where it grows, or the output calls it by another name.
    """
    inputs = _by_name(model.graph.inputs)
    outputs = _by_name(model.graph.outputs)
    own = default_inputs(model)
    return {
        name: own[name] if name in own else _zeros(inputs[name], outputs[output])
        for name, output in states.items()
    }


def _by_name(values: Iterable[ir.Value]) -> dict[str | None, ir.Value]:
    return {value.name: value for value in values}


def _zeros(value: ir.Value, follower: ir.Value) -> Array:
    assert value.shape is not None
    assert value.dtype is not None
    after = list(follower.shape or value.shape)
    grows = growing_axes(value)
    sizes = []
    for axis, (size, then) in enumerate(zip(value.shape, after, strict=True)):
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(0 if axis in grows or _renamed(size, then) else 1)
    return np.zeros(sizes, value.dtype.numpy())


def _renamed(size: ir.SymbolicDim, then: ir.SymbolicDim | int) -> bool:
    if not isinstance(then, ir.SymbolicDim) or None in (size.value, then.value):
        return False
    return then != size


def growing_axes(value: ir.Value) -> set[int]:
    """The axes of an open size along which a cache is joined with what is new, or which its name
    says is one.
    """
    shape = value.shape
    if shape is None or shape.rank() < CACHE_AXES or value.dtype is None:
        return set()
    if value.dtype.is_integer():
        return set()
    readers = [use.node for use in value.uses()]
    joins = [node for node in readers if rule_of(node).joins and not node.domain]
    axes = {node.attributes.get_int("axis", 0) % shape.rank() for node in joins}
    if (value.name or "").startswith("past"):
        axes.update(range(1, shape.rank()))
    return {axis for axis in axes if axis and not isinstance(shape[axis], int)}


# --- which inputs are states


def states_of(
    model: ir.Model, wanted: Sequence[tuple[str, str]], given: Mapping[str, object], where: str
) -> dict[str, str]:
    """Outputs by the state input that they are fed to: those that are `wanted` and, of inputs that
    no data is `given` for, those whose names say so.

    Raises DataError, which begins with `where`, for a pair that does not fit.
    """
    states = {name: _checked(model, (name, output), given, where) for name, output in wanted}
    open_ones = [v for v in fed_inputs(model) if v.name not in states and v.name not in given]
    named = dict[str, str]()
    for value in open_ones:
        followers = [v.name or "" for v in model.graph.outputs if _follows(v, value)]
        taken = {*states.values(), *named.values()}
        if len(followers) == 1 and followers[0] not in taken:
            named[value.name or ""] = followers[0]
    # Something must be left that data is for.
    rest = given or len(named) < len(open_ones)
    return states | named if rest else states


def _checked(
    model: ir.Model, pair: tuple[str, str], given: Mapping[str, object], where: str
) -> str:
    name, output = pair
    inputs = _by_name(model.graph.inputs)
    outputs = _by_name(model.graph.outputs)
    for kind, wanted, known in (("input", name, inputs), ("output", output, outputs)):
        if wanted not in known:
            msg = f"{where}: the model has no {kind} '{wanted}'; write one of {_listed(known)}."
            raise DataError(msg)
    if name in given:
        msg = f"{where}: '{name}' has a folder in calibrate_path as well; remove one of the two."
        raise DataError(msg)
    if not _fits(outputs[output], inputs[name]):
        msg = (
            f"{where}: output '{output}' {_described(outputs[output])} does not fit input "
            f"'{name}' {_described(inputs[name])}; name the output that is fed to it."
        )
        raise DataError(msg)
    return output


def _follows(output: ir.Value, value: ir.Value) -> bool:
    """Whether an output is by its name what an input becomes."""
    stem = _stem(value.name or "")
    alike = stem == _stem(output.name or "")
    return bool(stem) and alike and _fits(output, value)


def _stem(name: str) -> str:
    """A name without what tells inputs from outputs; nothing where no letter is left."""
    words = _WORDS.split(name.replace("key_values", ""))
    lower = [word.lower() for word in words if word]
    kept = [_LAST.sub("", word) for word in lower if word not in MARKS]
    stem = ".".join(kept)
    return stem if re.search("[a-z]", stem) else ""


def _fits(output: ir.Value, value: ir.Value) -> bool:
    """Whether the one may be fed to the other, as far as types and shapes are known."""
    tensors = all(isinstance(each.type, ir.TensorType) for each in (output, value))
    if not tensors or output.dtype != value.dtype or value.shape is None:
        return False
    if output.shape is None:
        return True
    sizes = zip(output.shape, value.shape, strict=False)
    fixed = [pair for pair in sizes if all(isinstance(size, int) for size in pair)]
    alike = all(a == b for a, b in fixed)
    return alike and output.shape.rank() == value.shape.rank()


def _described(value: ir.Value) -> str:
    sides = [str(size) if isinstance(size, int) else "?" for size in value.shape or ()]
    dtype = value.dtype.numpy() if value.dtype else "untyped"
    return f"({dtype} [{', '.join(sides)}])"


def _listed(names: Mapping[str | None, object]) -> str:
    return ", ".join(f"'{name}'" for name in names)
