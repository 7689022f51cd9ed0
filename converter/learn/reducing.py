"""Gradients of reductions and normalizations."""

from __future__ import annotations

import numpy as np

from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import Shape, Term, normal_axes


def _axes(site: Site) -> tuple[int, ...]:
    """The axes of a reduction: an attribute, or from opset 13 or 18 on an input."""
    rank = site.x().rank
    given = site.ints("axes") or (tuple(site.array(1).tolist()) if site.has(1) else ())
    if not given:
        return () if site.whole("noop_with_empty_axes", 0) else tuple(range(rank))
    return normal_axes(given, rank)


def _kept(term: Term, site: Site) -> Term:
    """An output, or its gradient, with the axes that were dropped as 1."""
    axes = _axes(site)
    shape: Shape = tuple(1 if i in axes else d for i, d in enumerate(site.x().shape))
    return term.reshape(*shape)


def reduce_sum(site: Site) -> Term:
    """The same for all."""
    return _kept(site.dy, site).expand(*site.x().shape)


def reduce_mean(site: Site) -> Term:
    """The same for all, shared."""
    share = site.dy.size / site.x().size
    return (_kept(site.dy, site) * share).expand(*site.x().shape)


def reduce_extreme(site: Site) -> Term:
    """For the largest or smallest; equal ones share it."""
    hits = site.x().equals(_kept(site.y, site)).cast(site.dy.dtype)
    return hits * (_kept(site.dy, site) / hits.sum(_axes(site), keep=True))


def reduce_l2(site: Site) -> Term:
    """Along the vector itself, none where it is 0."""
    norm = _kept(site.y, site)
    return site.x() * (_kept(site.dy, site) / norm.op("Max", norm.like(_tiny(norm))))


def reduce_l1(site: Site) -> Term:
    """By sign."""
    return site.x().op("Sign") * _kept(site.dy, site)


def reduce_squares(site: Site) -> Term:
    """Twice the numbers."""
    return site.x() * (_kept(site.dy, site) * 2)


def reduce_log_sum(site: Site) -> Term:
    """Softmax of the numbers."""
    return (site.x() - _kept(site.y, site)).op("Exp") * _kept(site.dy, site)


def _tiny(term: Term) -> float:
    return float(np.finfo(term.dtype.numpy()).tiny)


def softmax(site: Site) -> Term:
    """y (dy - sum(y dy))."""
    product = site.dy * site.y
    return product - site.y * product.sum([site.whole("axis", -1)], keep=True)


def log_softmax(site: Site) -> Term:
    """dy less its sum shared as Softmax does."""
    return site.dy - site.y.op("Exp") * site.dy.sum([site.whole("axis", -1)], keep=True)


def _standardized(x: Term, axes: list[int], epsilon: float) -> tuple[Term, Term]:
    """Numbers of mean 0 and deviation 1 over axes, and what they were multiplied with."""
    centered = x - x.mean(axes)
    scale = 1 / ((centered * centered).mean(axes) + epsilon).op("Sqrt")
    return centered * scale, scale


def _through(dy: Term, normal: Term, scale: Term, axes: list[int]) -> Term:
    """The gradient behind a standardization."""
    return scale * (dy - dy.mean(axes) - normal * (dy * normal).mean(axes))


def layer_norm(site: Site) -> Term:
    """The gradient of LayerNormalization's input."""
    axes = _normalized_axes(site)
    normal, scale = _standardized(site.x(), axes, site.real("epsilon", 1e-5))
    return _through(site.dy * site.x(1), normal, scale, axes)


def layer_norm_scale(site: Site) -> Term:
    """The gradient of LayerNormalization's scale."""
    axes = _normalized_axes(site)
    return site.dy * _standardized(site.x(), axes, site.real("epsilon", 1e-5))[0]


def _normalized_axes(site: Site) -> list[int]:
    rank = site.x().rank
    return list(range(site.whole("axis", -1) % rank, rank))


def instance_norm(site: Site) -> Term:
    """The gradient of InstanceNormalization's input."""
    x, axes = site.x(), _positions(site)
    normal, scale = _standardized(x, axes, site.real("epsilon", 1e-5))
    return _through(
        site.dy * _by_channel(site.x(1), x),
        normal,
        scale,
        axes,
    )


def instance_norm_scale(site: Site) -> Term:
    """The gradient of InstanceNormalization's scale."""
    normal, _ = _standardized(
        site.x(),
        _positions(site),
        site.real("epsilon", 1e-5),
    )
    return channel_sum(site.dy * normal)


def _positions(site: Site) -> list[int]:
    return list(range(2, site.x().rank))


def _by_channel(term: Term, x: Term) -> Term:
    return term.reshape(-1, *(1,) * (x.rank - 2))


def channel_sum(term: Term) -> Term:
    """The sum of each channel, which axis 1 counts."""
    return term.sum([0, *range(2, term.rank)])


def _inverse_deviation(site: Site) -> Term:
    """1 / sqrt(variance + epsilon) of BatchNormalization, a channel."""
    return 1 / (site.x(4) + site.real("epsilon", 1e-5)).op("Sqrt")


def batch_norm(site: Site) -> Term:
    """The gradient of BatchNormalization's input, whose statistics are constants."""
    return site.dy * _by_channel(site.x(1) * _inverse_deviation(site), site.dy)


def batch_norm_scale(site: Site) -> Term:
    """The gradient of BatchNormalization's scale."""
    centered = site.x() - _by_channel(site.x(3), site.dy)
    return channel_sum(site.dy * centered) * _inverse_deviation(site)


RULES: dict[str, Rule] = {
    "ReduceSum": by_input(reduce_sum),
    "ReduceMean": by_input(reduce_mean),
    "ReduceMax": by_input(reduce_extreme),
    "ReduceMin": by_input(reduce_extreme),
    "ReduceL1": by_input(reduce_l1),
    "ReduceL2": by_input(reduce_l2),
    "ReduceSumSquare": by_input(reduce_squares),
    "ReduceLogSumExp": by_input(reduce_log_sum),
    "Softmax": by_input(softmax),
    "LogSoftmax": by_input(log_softmax),
    "LayerNormalization": by_input(layer_norm, layer_norm_scale, lambda s: s.dy),
    "InstanceNormalization": by_input(
        instance_norm, instance_norm_scale, lambda s: channel_sum(s.dy)
    ),
    "BatchNormalization": by_input(batch_norm, batch_norm_scale, lambda s: channel_sum(s.dy)),
}
