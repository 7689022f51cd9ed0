"""Fake quantization as an operator of a model: y = scale (clip(round(x / scale + zero), low, high)
- zero).

It is a function of standard operators that travels with the model, so that any runtime computes it.
Its gradient takes rounding for the identity (the straight-through estimator) and, for the scale,
follows Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153), equation 3: with v =
x / scale + zero, q its rounded and clipped value and `inside` where v is not clipped,

    dy/dx = inside    dy/dscale = q - zero - inside x / scale    dy/dzero = -scale (1 - inside)

The paper's factor that evens out the steps of scales and weights is left to who takes the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import Term

DOMAIN, NAME = "qconvert.learn", "FakeQuantize"
INPUTS = ("x", "scale", "zero", "low", "high")
_BODY = (
    ("Div", ("x", "scale"), "scaled"),
    ("Add", ("scaled", "zero"), "moved"),
    ("Round", ("moved",), "rounded"),
    ("Max", ("rounded", "low"), "raised"),
    ("Min", ("raised", "high"), "code"),
    ("Sub", ("code", "zero"), "centered"),
    ("Mul", ("centered", "scale"), "y"),
)


def fake_quantize(
    model: ir.Model, inputs: Sequence[ir.Value], name: str, output: ir.Value
) -> ir.Node:
    """A node of no graph yet that fake-quantizes the first of five inputs: x, scale, zero, low,
    high.

    All five broadcast, so that a scale a channel has the shape it broadcasts from. `model` gets the
    function that the node stands for.
    """
    function = _function(model.graph.opset_imports[""])
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports[DOMAIN] = 1
    return ir.node(NAME, inputs, domain=DOMAIN, name=name, outputs=[output])


def _function(opset: int) -> ir.Function:
    values = {name: ir.Value(name=name) for name in INPUTS}
    nodes = []
    for op_type, inputs, output in _BODY:
        values[output] = ir.Value(name=output)
        read = [values[name] for name in inputs]
        nodes.append(ir.node(op_type, read, outputs=[values[output]]))
    graph = ir.Graph(
        [values[name] for name in INPUTS],
        [values["y"]],
        nodes=nodes,
        opset_imports={"": opset},
        name=NAME,
    )
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=[])


def _moved(site: Site) -> Term:
    return site.x(0) / site.x(1) + site.x(2)


def _inside(site: Site) -> Term:
    moved = _moved(site)
    return moved.equals(moved.op("Max", site.x(3)).op("Min", site.x(4)))


def _scale(site: Site) -> Term:
    code = (
        _moved(site)
        .op("Round")
        .op("Max", site.x(3))
        .op(
            "Min",
            site.x(4),
        )
    )
    return site.dy * (code - site.x(2) - site.x(0) / site.x(1) * _inside(site))


def _zero(site: Site) -> Term:
    outside = 1 - _inside(site).cast(site.dy.dtype)
    return -(site.dy * site.x(1) * outside)


RULES: dict[str, Rule] = {
    NAME: by_input(lambda site: site.dy * _inside(site), _scale, _zero),
}
