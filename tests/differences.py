"""Gradients by central differences in float64, computed by ONNX's reference implementation, and the
same gradients as graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from graphs import build, run
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from calib.affine import Array
from converter.learn.gradients import Gradients, gradient_model

STEP, DIRECTIONS = 1e-5, 4
# ONNX Runtime knows the weights of resized pixels in float32 only.
TOLERANCE = 5e-6

Feeds = Mapping[str, Array]


# What the reference implementation cannot do, or only in float32.


class Pad(OpRun):
    """Negative numbers cut off, which is only tried with zeros around."""

    op_domain = ""

    def _run(self, x, pads, value=None, axes=None, mode=None):
        axes = range(x.ndim) if axes is None else axes
        half = len(pads) // 2
        around, kept = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
        for i, axis in enumerate(axes):
            before, after = int(pads[i]), int(pads[half + i])
            around[axis] = (max(before, 0), max(after, 0))
            kept[axis] = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
        filled = {"constant_values": 0 if value is None else value} if mode == "constant" else {}
        return (np.pad(x[tuple(kept)], around, mode, **filled),)


class Erf(OpRun):
    """In the precision of its input."""

    op_domain = ""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    """In the precision of its input."""

    op_domain = ""

    def _run(self, x, approximate=None):
        root = math.sqrt(2 / math.pi)
        inner = x / math.sqrt(2) if approximate == "none" else root * (x + 0.044715 * x**3)
        function = math.erf if approximate == "none" else math.tanh
        return (x / 2 * (1 + np.vectorize(function, otypes=[x.dtype])(inner)),)


class ConvTranspose(OpRun):
    """Every input spreads its kernel over the outputs, one by one."""

    op_domain = ""

    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=None, kernel_shape=None,
             output_padding=None, output_shape=None, pads=None, strides=None):  # fmt: skip
        group, axes, kernel = group or 1, range(x.ndim - 2), w.shape[2:]
        steps, apart = (list(given or [1] * len(axes)) for given in (strides, dilations))
        more = list(output_padding or [0] * len(axes))
        reach = [(x.shape[i + 2] - 1) * steps[i] + (kernel[i] - 1) * apart[i] + 1 for i in axes]
        cut = list(pads or [0] * 2 * len(axes))
        if output_shape:  # as the standard says: an odd one more at the start
            total = [reach[i] + more[i] - output_shape[i] for i in axes]
            cut = [t - t // 2 for t in total] + [t // 2 for t in total]
        channels, columns = x.shape[1] // group, w.shape[1]
        full = [r + m + abs(c) for r, m, c in zip(reach, more, cut, strict=False)]
        y = np.zeros((x.shape[0], columns * group, *full), x.dtype)
        for channel in range(x.shape[1]):
            out = channel // channels * columns
            for place in np.ndindex(*x.shape[2:]):
                for k in np.ndindex(*kernel):
                    at = tuple(place[i] * steps[i] + k[i] * apart[i] for i in axes)
                    given = (
                        x[(slice(None), channel, *place)][:, None] * w[(channel, slice(None), *k)]
                    )
                    y[(slice(None), slice(out, out + columns), *at)] += given
        size = [reach[i] + more[i] - cut[i] - cut[i + len(axes)] for i in axes]
        y = y[(..., *(slice(cut[i], cut[i] + size[i]) for i in axes))]
        return (y if b is None else y + b.reshape(-1, *[1] * len(axes)),)


def double(graph: str, constants: Feeds, opset: int) -> ir.Model:
    """The model of `graph` in float64."""
    real = {k for k, v in constants.items() if v.dtype == np.float32 and not k.startswith("scales")}
    wide = {k: v.astype(np.float64) if k in real else v for k, v in constants.items()}
    return build(graph.replace("float[", "double["), opset, 10, **wide)


def reference(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """All outputs as ONNX's reference implementation computes them."""
    proto = ir.to_proto(model)
    names = [value.name for value in proto.graph.output]
    return dict(
        zip(
            names,
            ReferenceEvaluator(proto, new_ops=[Pad, Erf, Gelu, ConvTranspose]).run(
                None, dict(feeds)
            ),
            strict=True,
        )
    )


def freed(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose constants `names` are inputs."""
    proto = ir.to_proto(model)
    for tensor in [t for t in proto.graph.initializer if t.name in names]:
        kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(kind)
        proto.graph.initializer.remove(tensor)
    return ir.from_proto(proto)


def gradients(
    model: ir.Model, feeds: Feeds, seed: Array, wanted: Sequence[str], double: bool
) -> tuple[dict[str, Array], Gradients]:
    """The gradients of sum(seed * y) that the graph gives, in float64 or by ONNX Runtime."""
    shapes = {value.name: feeds[value.name].shape for value in model.graph.inputs}
    found = gradient_model(model, "y", wanted, shapes)
    names = {value.name for value in found.model.graph.inputs}
    given = {name: array for name, array in feeds.items() if name in names}
    if "y_seed" in names:
        kind = next(v.dtype for v in found.model.graph.inputs if v.name == "y_seed")
        given["y_seed"] = seed.astype(kind.numpy())
    if double:
        results = [reference(found.model, given)]
    else:
        results = [run(found.model, given, optimize) for optimize in (False, True)]
        for name, array in results[0].items():
            scale = max(1.0, np.abs(array).max(initial=0))
            np.testing.assert_allclose(results[1][name], array, rtol=1e-4, atol=2e-5 * scale)
    return {name: results[0][output] for name, output in found.outputs.items()}, found


def along(
    model: ir.Model, feeds: Feeds, seed: Array, name: str, direction: Array, step: float = STEP
) -> float:
    """How sum(seed * y) changes along a direction of one tensor."""

    def total(sign: int) -> float:
        moved = {**feeds, name: np.asarray(feeds[name] + sign * step * direction)}
        return float((reference(model, moved)["y"] * seed).sum())

    return (total(1) - total(-1)) / (2 * step)


def assert_gradients(
    graph: str,
    wanted: Sequence[str],
    opset: int = 17,
    runtime: bool = True,
    inputs: Feeds | None = None,
    **arrays: Array,
) -> Gradients:
    """The graph's gradients for `wanted` are those of central differences, in float64 closely and
    by ONNX Runtime in float32 about.

    `inputs` are the model's, all other arrays its constants.
    """
    inputs, rng = inputs or {}, np.random.default_rng(7)
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
    model = double(graph, arrays, opset)
    free = freed(model, wanted)
    constants = {k: np.asarray(v, np.float64) for k, v in arrays.items() if k in wanted}
    feeds = {**wide, **constants}
    y = reference(free, feeds)["y"]
    seed = rng.standard_normal(y.shape) if y.size > 1 else np.ones(y.shape)
    exact, found = gradients(model, feeds, seed, wanted, double=True)
    assert not found.gaps
    for name in wanted:
        assert exact[name].shape == feeds[name].shape
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(feeds[name].shape)
            difference = along(free, feeds, seed, name, direction)
            scale = max(1.0, float(np.abs(exact[name]).max()))
            assert abs(difference - (exact[name] * direction).sum()) < TOLERANCE * scale, name
    if runtime:
        single = build(graph, opset, 10, **arrays)
        narrow = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in feeds.items()}
        rough, _ = gradients(single, narrow, seed.astype(np.float32), wanted, double=False)
        for name in wanted:
            scale = max(1.0, float(np.abs(exact[name]).max()))
            np.testing.assert_allclose(rough[name], exact[name], rtol=1e-3, atol=1e-4 * scale)
    return found


def in_double(model: ir.Model) -> ir.Model:
    """A copy in float64."""
    proto, wide = ir.to_proto(model), onnx.TensorProto.DOUBLE
    for tensor in [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = wide
    return ir.from_proto(proto)
