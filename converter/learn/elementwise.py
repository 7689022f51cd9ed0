"""Gradients of functions of single numbers, and of arithmetic that broadcasts: what is too wide is
summed later.
"""

from __future__ import annotations

import functools
import math
import operator

from converter.learn.site import Rule, Site, by_input, factor
from converter.learn.terms import Term

GELU_CUBIC = 0.044715
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def clip(site: Site, index: int) -> Term:
    """Inside of the bounds, as the output tells; the bounds themselves take what lies beyond."""
    if index > 0:
        x, bound = site.x(), site.x(index)
        return site.dy * (x < bound if index == 1 else x > bound)
    inside = [site.y > site.x(1)] if site.has(1) else []
    inside += [site.y < site.x(2)] if site.has(2) else []
    return site.dy * functools.reduce(operator.and_, inside) if inside else site.dy


def leaky(site: Site) -> Term:
    """Derivative of LeakyRelu."""
    alpha = site.real("alpha", 0.01)
    return alpha + (1 - alpha) * _positive(site.x())


def elu(site: Site) -> Term:
    """Derivative of Elu: alpha e^x = y + alpha where x is negative."""
    return (site.x() > 0).chosen(
        site.dy.like(1),
        site.y + site.real("alpha", 1.0),
    )


def selu(site: Site) -> Term:
    """Derivative of Selu."""
    alpha, gamma = site.real("alpha", SELU_ALPHA), site.real("gamma", SELU_GAMMA)
    return (site.x() > 0).chosen(
        site.dy.like(gamma),
        site.y + alpha * gamma,
    )


def prelu_slope(site: Site) -> Term:
    """The gradient of PRelu's slope."""
    return site.dy * site.x().op("Min", site.dy.like(0))


def prelu_input(site: Site) -> Term:
    """The gradient of PRelu's input."""
    return site.dy * (site.x() > 0).chosen(site.dy.like(1), site.x(1))


def hard_sigmoid(site: Site) -> Term:
    """Derivative of HardSigmoid."""
    inside = (site.y > 0) & (site.y < 1)
    return site.dy.like(site.real("alpha", 0.2)) * inside


def hard_swish(site: Site) -> Term:
    """Derivative of x HardSigmoid(x)."""
    x = site.x()
    gate = x.op("HardSigmoid", alpha=1 / 6, beta=0.5)
    return gate + x * ((gate > 0) & (gate < 1)) * (1 / 6)


def gelu(site: Site) -> Term:
    """Derivative of Gelu, exact or by tanh."""
    x = site.x()
    if site.text("approximate", "none") == "none":
        density = (x * x * -0.5).op("Exp") * (1 / math.sqrt(2 * math.pi))
        return 0.5 + 0.5 * (x * math.sqrt(0.5)).op("Erf") + x * density
    root = math.sqrt(2 / math.pi)
    tanh = (x * (1 + GELU_CUBIC * x * x) * root).op("Tanh")
    inner = root * (1 + 3 * GELU_CUBIC * x * x)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner


def mish(site: Site) -> Term:
    """Derivative of x tanh(softplus(x))."""
    x = site.x()
    tanh = x.op("Softplus").op("Tanh")
    return tanh + x * (1 - tanh * tanh) * x.op("Sigmoid")


def power(site: Site) -> Term:
    """The gradient of the base of Pow."""
    base, exponent = site.x(), site.x(1).cast(site.dy.dtype)
    return site.dy * exponent * base.power(exponent - 1)


def exponent(site: Site) -> Term:
    """The gradient of the exponent of Pow, 0 where the base is 0."""
    base = site.x()
    usable = (base > 0).chosen(base, base.like(1))
    return site.dy * site.y * usable.op("Log")


def extreme(site: Site, index: int) -> Term:
    """Min and Max: equal ones share the gradient."""
    hits = [
        site.x(i).equals(site.y).cast(site.dy.dtype)
        for i in range(len(site.node.inputs))
        if site.has(i)
    ]
    return site.dy * site.x(index).equals(site.y) / functools.reduce(operator.add, hits)


def average(site: Site, index: int) -> Term:
    """Mean of several tensors."""
    return site.dy * (1 / len(site.node.inputs))


def passed(site: Site, index: int) -> Term:
    """Every input's gradient is the output's."""
    return site.dy


def cast(site: Site) -> Term:
    """Back to the type of the input."""
    return site.dy.cast(site.x().dtype)


def _choice(site: Site, index: int) -> Term:
    zero = site.dy.like(0)
    return site.x().chosen(*((site.dy, zero) if index == 1 else (zero, site.dy)))


def _positive(x: Term) -> Term:
    return (x > 0).cast(x.dtype)


RULES: dict[str, Rule] = {
    "Relu": by_input(lambda s: s.dy * (s.y > 0)),
    "Clip": clip,
    "LeakyRelu": factor(leaky),
    "PRelu": by_input(prelu_input, prelu_slope),
    "Elu": factor(elu),
    "Selu": factor(selu),
    "ThresholdedRelu": by_input(lambda s: s.dy * (s.x() > s.real("alpha", 1.0))),
    "Sigmoid": factor(lambda s: s.y * (1 - s.y)),
    "HardSigmoid": factor(hard_sigmoid),
    "HardSwish": factor(hard_swish),
    "Tanh": factor(lambda s: 1 - s.y * s.y),
    "Erf": factor(lambda s: (s.x() * s.x() * -1).op("Exp") * (2 / math.sqrt(math.pi))),
    "Gelu": factor(gelu),
    "Mish": factor(mish),
    "Softplus": factor(lambda s: s.x().op("Sigmoid")),
    "Softsign": by_input(lambda s: s.dy / (1 + s.x().op("Abs")) / (1 + s.x().op("Abs"))),
    "Sqrt": by_input(lambda s: s.dy * 0.5 / s.y),
    "Exp": factor(lambda s: s.y),
    "Log": by_input(lambda s: s.dy / s.x()),
    "Sin": factor(lambda s: s.x().op("Cos")),
    "Cos": factor(lambda s: -s.x().op("Sin")),
    "Neg": by_input(lambda s: -s.dy),
    "Abs": factor(lambda s: s.x().op("Sign")),
    "Reciprocal": factor(lambda s: -(s.y * s.y)),
    "Identity": by_input(lambda s: s.dy),
    "Cast": by_input(cast),
    "Add": passed,
    "Sub": by_input(lambda s: s.dy, lambda s: -s.dy),
    "Mul": by_input(lambda s: s.dy * s.x(1), lambda s: s.dy * s.x(0)),
    "Div": by_input(lambda s: s.dy / s.x(1), lambda s: -(s.dy * s.y / s.x(1))),
    "Pow": by_input(power, exponent),
    "Sum": passed,
    "Mean": average,
    "Min": extreme,
    "Max": extreme,
    "Where": _choice,
    "Expand": by_input(lambda s: s.dy),
}
