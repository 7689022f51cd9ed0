"""Models that samples run through: the one place where a model gets a session of ONNX Runtime."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from onnxruntime import InferenceSession

from calib import CalibError
from calib.affine import Array
from calib.session import CPU_PROVIDERS, Sample, open_session, run
from converter.calibrate.exact import exact_here
from converter.graph.edit import weight_bytes
from converter.graph.files import nodes_in, saved

# Tensors tapped at once while their sizes are found out.
PROBED = 32
# Bytes of weights that make a model big: it is compared on one sample and not timed, which would
# take longer than the conversion, and held in memory once.
BIG = 500_000_000
# How ONNX Runtime's profiler ends the name of what tells the time of a node.
TIMED = "_kernel_time"


@dataclass(frozen=True)
class Opened:
    """A model that samples can run through; `outputs` are its own, beside which `session` may have
    taps.
    """

    session: InferenceSession
    outputs: tuple[str, ...]

    def fetch(self, names: Iterable[str], sample: Sample) -> dict[str, Array]:
        """The named tensors for a sample, and all that is fed; CalibError if the model fails."""
        wanted = [name for name in dict.fromkeys(names) if name not in sample]
        return {**sample, **run(self.session, wanted, sample)}

    def answer(self, sample: Sample) -> list[Array]:
        """Its outputs for a sample; CalibError if the model fails on it."""
        return list(run(self.session, self.outputs, sample).values())

    def sizes(self, names: Sequence[str], sample: Sample) -> dict[str, int]:
        """Bytes of each named tensor for a sample, those that are fed first."""
        sizes = {name: x.nbytes for name, x in sample.items() if name in names}
        for start in range(0, len(names), PROBED):
            part = names[start : start + PROBED]
            tensors = self.fetch(part, sample)
            # A map has no size of its own.
            sizes.update((name, getattr(tensors[name], "nbytes", 0)) for name in part)
        return sizes


def is_big(model: ir.Model) -> bool:
    """Whether it has so many weights that only what is needed should be found out."""
    return weight_bytes(model) > BIG


def opened(
    model: ir.Model,
    taps: Iterable[str] = (),
    *,
    optimize: bool = False,
    providers: Sequence[str] = CPU_PROVIDERS,
) -> Opened:
    """`model`, exact on this processor, with tensors to look at; CalibError if the runtime refuses
    it.

    Which operators ONNX Runtime fuses depends on what is tapped; without optimizations, taps do not
    change a bit.
    """
    fed = {value.name for value in model.graph.inputs}
    with saved(exact_here(model), [name for name in taps if name not in fed]) as path:
        session = open_session(path, optimize=optimize, providers=providers, pack=not is_big(model))
        return Opened(session, _outputs(model))


def _outputs(model: ir.Model) -> tuple[str, ...]:
    return tuple(value.name or "" for value in model.graph.outputs)


def file_opened(path: Path, outputs: tuple[str, ...], sample: Sample) -> Opened | None:
    """A model file as ONNX Runtime executes it; None where it does not give these outputs for the
    sample.
    """
    try:
        found = Opened(open_session(path), outputs)
        found.answer(sample)
    except CalibError:
        return None
    return found


@dataclass(frozen=True)
class Executed:
    """A model as ONNX Runtime executes it, optimized: `here` the file itself, `exact` what is exact
    on this processor, one where that is the same.

    `nodes` are name and operator type of what its optimizations leave.
    """

    here: Opened
    exact: Opened
    nodes: Sequence[tuple[str, str]]


def executed(model: ir.Model, look: bool) -> Executed:
    """The model as it is executed, its nodes with `look`; CalibError if the runtime refuses it."""
    with saved(model) as path:
        # In a form that the ONNX checker need not accept.
        optimized = path.with_name("optimized.onnx") if look else None
        session = open_session(path, optimized=optimized, pack=not is_big(model))
        here = Opened(session, _outputs(model))
        nodes = [node[:2] for node in nodes_in(optimized)] if optimized else []
    other = exact_here(model)
    return Executed(here, here if other is model else opened(other, optimize=True), nodes)


@dataclass(frozen=True)
class Kernel:
    """A node that ONNX Runtime executes after its optimizations: its name there, operator type and
    outputs, and the median time of a run in microseconds.
    """

    name: str
    op_type: str
    outputs: tuple[str, ...]
    time: float


def timed(models: Sequence[ir.Model], sample: Sample, runs: int) -> list[list[Kernel]]:
    """What executes each model, with the times of some runs in turn, behind a first one that does
    not count; CalibError if one fails on the sample.
    """
    with TemporaryDirectory(prefix="qconvert-") as path:
        folders = [Path(path) / str(number) for number, _ in enumerate(models)]
        both = [_profiled(*each) for each in zip(models, folders, strict=True)]
        for _ in range(1 + runs):
            for model in both:
                model.answer(sample)
        return [_kernels(*each) for each in zip(both, folders, strict=True)]


def _profiled(model: ir.Model, folder: Path) -> Opened:
    folder.mkdir()
    with saved(model) as path:
        optimized, profile = folder / "optimized.onnx", folder / "profile"
        return Opened(open_session(path, optimized=optimized, profile=profile), _outputs(model))


def _kernels(model: Opened, folder: Path) -> list[Kernel]:
    times = defaultdict[str, list[float]](list)
    for event in json.loads(Path(model.session.end_profiling()).read_bytes()):
        if event["cat"] == "Node" and event["name"].endswith(TIMED):
            times[event["name"].removesuffix(TIMED)].append(event["dur"])
    nodes = (node for node in nodes_in(folder / "optimized.onnx") if node[0] in times)
    return [Kernel(*node, statistics.median(times[node[0]][1:])) for node in nodes]


@dataclass(frozen=True)
class Passes:
    """Tensors of a model in groups, each of which is a pass over samples; `sizes` are their bytes
    in one.
    """

    model: ir.Model
    whole: Opened
    sizes: Mapping[str, int]
    groups: Sequence[list[str]]
    providers: Sequence[str]

    def __iter__(self) -> Iterator[tuple[list[str], Opened]]:
        """Every group with the model it is tapped in: what else is tapped takes memory though
        nobody asks for it.
        """
        for group in self.groups:
            alone = len(self.groups) > 1
            yield group, self._tapped(group) if alone else self.whole

    def _tapped(self, group: list[str]) -> Opened:
        return opened(self.model, group, providers=self.providers)


def passes(
    model: ir.Model,
    names: Sequence[str],
    sample: Sample,
    *,
    budget: int,
    providers: Sequence[str],
) -> Passes:
    """The named tensors in groups whose arrays fit `budget` bytes together, as in `sample`."""
    whole = opened(model, names, providers=providers)
    sizes = whole.sizes(names, sample)
    return Passes(model, whole, sizes, list(groups_within(sizes, budget)), providers)


def groups_within(sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Consecutive tensors that fit the budget together; one that alone does not fit is a group of
    its own.
    """
    group: list[str] = []
    room = budget
    for name, size in sizes.items():
        if group and size > room:
            yield group
            group, room = [], budget
        group.append(name)
        room -= size
    if group:
        yield group
