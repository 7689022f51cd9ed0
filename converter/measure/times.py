"""What the runtime spends its time on: both models, layer by layer.

ONNX Runtime executes other nodes than the files hold: it fuses some and has them compute in layouts
of its own. What it executes is traced back to the nodes of the float model by the names that its
optimizer derives from theirs and by the tensors that are left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from calib.samples import Dataset
from converter.calibrate.runs import Kernel, timed
from converter.graph.qdq import CONVERSIONS, quantizes
from converter.measure.results import LayerTime
from converter.plan.ops import may_have_weight, rule_of

# Runs whose median counts.
RUNS = 15
# What the runtime puts behind a name: of a node or tensor that it copies or fuses, and, behind that
# of an output, of a convolution in blocks of channels, which a batch normalization becomes as well.
COPIED, BLOCKED = (
    re.compile(r"(_token_\d+|_nhwc|/\w*Fusion/?)+$"),
    re.compile(r"((.*?)(?:_bn)?)_nchwc(?:_token_\d+)?$"),
)
# Operators that the runtime puts between layouts.
LAYOUTS = {"ReorderInput", "ReorderOutput", "Transpose"}
# How integers are called that stand for a tensor.
INTEGERS = "_quantized"


@dataclass(frozen=True)
class _Side:
    """What executes one model, and the nodes of the float model in each kernel."""

    kernels: Sequence[Kernel]
    nodes: Sequence[Sequence[str]]


def layer_times(reference: ir.Model, other: ir.Model, data: Dataset) -> list[LayerTime]:
    """Both models by layer, those that compute no node of the float model last.

    A layer is the smallest set of nodes that no kernel of either model crosses. Raises CalibError
    where a model does not run.
    """
    names = [node.name or "" for node in reference.graph]
    makers = _makers(reference)
    models, sides = (reference, other), []
    for model, kernels in zip(models, timed(models, data.sample(0), RUNS), strict=True):
        same = {node.name or "": _same(node, names, makers) for node in model.graph}
        inside = contents(kernels, model)
        sides.append(_Side(kernels, [_known(nodes, same) for nodes in inside]))
    layers = [*_layers(reference, names, sides), *_others(sides)]
    return [layer for layer in layers if layer.before or layer.after]


def _makers(model: ir.Model) -> dict[str, str]:
    """The node that makes each tensor."""
    return {v.name or "": node.name or "" for node in model.graph for v in node.outputs}


def _same(node: ir.Node, names: Sequence[str], makers: Mapping[str, str]) -> str:
    """The node of the float model whose work `node` does, empty if it does none's."""
    if node.name in names:
        return node.name or ""
    if node.op_type in CONVERSIONS:
        return ""
    made = ((value.name or "").removesuffix(INTEGERS) for value in node.outputs)
    return next((makers[name] for name in made if name in makers), "")


def _known(nodes: Sequence[str], same: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(same[name] for name in nodes if same[name]))


def contents(kernels: Sequence[Kernel], model: ir.Model) -> list[list[str]]:
    """The names of the nodes of `model` that each kernel does the work of, in order.

    What no kernel is called by is fused: bounds, what makes integers and what a convolution adds
    into what they read, others into what reads them, or else into what they read.
    """
    makers, owner = _makers(model), dict[str, int]()
    nodes = {node.name or "": node for node in model.graph}
    for number, kernel in enumerate(kernels):
        for name in _origins(kernel, nodes.keys(), makers):
            owner.setdefault(name, number)
    read = {
        name: [makers.get(value.name or "", "") for value in node.inputs if value is not None]
        for name, node in nodes.items()
    }
    for name, node in nodes.items():
        sums = rule_of(node).adds
        taken = [x for x in read[name] if not sums or (x in owner and _adds(kernels[owner[x]]))]
        if sums or rule_of(node).bounds or quantizes(node):
            _adopt(name, taken, owner, max)
    for name, node in reversed(nodes.items()):
        readers = [use.node.name or "" for value in node.outputs for use in value.uses()]
        _adopt(name, readers, owner, min)
    for name in nodes:
        _adopt(name, read[name], owner, max)
    found: list[list[str]] = [[] for _ in kernels]
    for name in nodes.keys() & owner.keys():
        found[owner[name]].append(name)
    order = {name: place for place, name in enumerate(nodes)}
    return [sorted(each, key=order.__getitem__) for each in found]


def _adds(kernel: Kernel) -> bool:
    """Whether a kernel adds another tensor to its product."""
    return BLOCKED.match(kernel.name) is not None


def _adopt(
    name: str, others: Sequence[str], owner: dict[str, int], which: Callable[[list[int]], int]
) -> None:
    """Gives a node that has no kernel one of those of the others."""
    known = [owner[other] for other in others if other in owner]
    if known:
        owner.setdefault(name, which(known))


def _origins(kernel: Kernel, nodes: Container[str], makers: Mapping[str, str]) -> Iterator[str]:
    """The nodes that a kernel is called by."""
    if kernel.name not in nodes and kernel.op_type in LAYOUTS:
        return
    found = [name for name in (kernel.name, COPIED.sub("", kernel.name)) if name in nodes]
    if blocked := BLOCKED.match(kernel.name):
        found = [makers[name] for name in blocked.groups() if name in makers]
    yield from found[:1]
    for output in kernel.outputs:
        for made in (output, COPIED.sub("", output)):
            if made in makers:
                yield makers[made]


def _layers(model: ir.Model, names: Sequence[str], sides: Sequence[_Side]) -> Iterator[LayerTime]:
    """The layers in the order of their first nodes."""
    first = {name: name for name in names}

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    order = {name: place for place, name in enumerate(names)}
    for nodes in (nodes for side in sides for nodes in side.nodes):
        roots = sorted({root(name) for name in nodes}, key=order.__getitem__)
        first.update(dict.fromkeys(roots, roots[0] if roots else ""))
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(root(name), []).append(name)
    types = {node.name or "": node.op_type for node in model.graph}
    for start, nodes in members.items():
        own = [
            [k for k, n in zip(s.kernels, s.nodes, strict=True) if n and root(n[0]) == start]
            for s in sides
        ]
        heavy = next((name for name in nodes if may_have_weight(types[name])), nodes[0])
        yield _layer(heavy, types[heavy], nodes, own)


def _others(sides: Sequence[_Side]) -> Iterator[LayerTime]:
    """What computes no node, by operator."""
    free = [[k for k, n in zip(s.kernels, s.nodes, strict=True) if not n] for s in sides]
    for op_type in sorted({kernel.op_type for side in free for kernel in side}):
        own = [[kernel for kernel in side if kernel.op_type == op_type] for side in free]
        yield _layer("", op_type, (), own)


def _layer(
    node: str, op_type: str, nodes: Sequence[str], sides: Sequence[Sequence[Kernel]]
) -> LayerTime:
    before, after = (float(sum(kernel.time for kernel in side)) for side in sides)
    first, second = (_listed(side) for side in sides)
    return LayerTime(node, op_type, tuple(nodes), before, after, (first, second))


def _listed(kernels: Sequence[Kernel]) -> str:
    """Operators with their numbers, as 'Conv + 2 Transpose'."""
    counts = Counter(kernel.op_type for kernel in kernels)
    return " + ".join(f"{n} {op}" if n > 1 else op for op, n in counts.items())
