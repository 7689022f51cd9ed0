"""Integer inputs and outputs: the model takes raw pixels and hands out codes, without any conversion around it.

A pixel p stands for the value (p - mean) / std. That is affine quantization as it is where mean is one whole number and
std one number for all channels. Otherwise the first convolutions take over what the input cannot express: their weights
std, and, unless they pad with zeros, their biases the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib.affine import UINT8, Array, QParams
from converter.config import DataPreprocessParam, TransformQuantParam
from converter.emit.integer_edges import feed_integers, hand_out_integers
from converter.errors import UsageError
from converter.job import Watch
from converter.model import Names, add_constant, constant, replace_constant

TYPES = {"UINT8": ir.DataType.UINT8, "INT8": ir.DataType.INT8}


@dataclass(frozen=True)
class Pixels:
    """How an input's pixels stand for its values, and what normalisation preprocessing has still to do."""

    qparams: QParams
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def preprocess(self, wanted: DataPreprocessParam) -> DataPreprocessParam:
        """`wanted` with the normalisation that is left."""
        return replace(wanted, normalize_mean=self.mean, normalize_std=self.std)


def fold_normalisation(model: ir.Model, wanted: DataPreprocessParam) -> Pixels:
    """Makes the model's image inputs take pixels, in place; raises UsageError where that cannot be exact."""
    mean, std = wanted.normalize_mean or (0.0,), wanted.normalize_std or (1.0,)
    whole = len(set(mean)) == 1 and float(mean[0]).is_integer() and 0 <= mean[0] <= 255
    if whole and len(set(std)) == 1 and std[0] > 0:
        return Pixels(_pixel_qparams(1 / std[0], mean[0]), wanted.normalize_mean, wanted.normalize_std)
    readers = [conv for value in model.graph.inputs for conv in _first_convolutions(value)]
    padded = [conv.name for conv in readers if any(conv.attributes.get_ints("pads", ())) or _pads_itself(conv)]
    if padded and not whole:
        msg = (
            f"--inputDataType: normalize_mean {list(mean)} is not one whole number from 0 to 255 for all channels, and "
            f"'{padded[0]}' pads with zeros, for which no pixel would stand; use such a mean or leave the input float."
        )
        raise UsageError(msg)
    names = Names(model)
    for conv in readers:
        _fold(conv, np.zeros(len(mean)) if whole else np.array(mean), np.array(std), names)
    if whole:
        return Pixels(_pixel_qparams(1.0, mean[0]), mean, (1.0,) * len(mean))
    return Pixels(_pixel_qparams(1.0, 0.0), (), ())


def trained_pixels(wanted: TransformQuantParam, watch: Watch) -> Pixels | None:
    """What pixels stand for by `mean` and `std_dev`, None without; warns where no pixel stands for zero."""
    if wanted.mean is None or wanted.std_dev is None:
        return None
    zero = round(wanted.mean)
    if zero != wanted.mean:
        watch.warn(
            f"mean = {wanted.mean:g} lies between two pixels: a pixel p stands for (p - {zero}) / {wanted.std_dev:g}, "
            f"{abs(zero - wanted.mean) / wanted.std_dev:.2g} off."
        )
    return Pixels(_pixel_qparams(1 / wanted.std_dev, zero), (), ())


def take_integers(model: ir.Model, name: str, kind: str, pixels: Pixels | None) -> None:
    """Graph input `name` becomes an integer input: pixels (INT8: less 128), or without `pixels` the plan's codes."""
    value = next(v for v in model.graph.inputs if v.name == name)
    pair = next((use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"), None)
    zero_point = constant(pair.inputs[2]) if pair and len(pair.inputs) > 2 else None
    direct = zero_point is not None and ir.DataType.from_numpy(zero_point.dtype) == TYPES[kind]
    if pixels and kind == "INT8":
        direct = False  # the plan's own int8 codes are no pixels
    if direct and len(value.uses()) == 1:
        feed_integers(model.graph, name)
    elif pixels:
        _dequantize_input(model, value, kind, pixels.qparams)
    else:
        msg = f"--inputDataType={kind}: input '{name}' is not quantized to {kind}; leave it float."
        raise UsageError(msg)


def give_integers(model: ir.Model, name: str, kind: str, q: QParams) -> str:
    """Graph output `name` becomes integers; says what they stand for."""
    value = next(v for v in model.graph.outputs if v.name == name)
    restore = value.producer()
    zero_point = constant(restore.inputs[2]) if restore and restore.op_type == "DequantizeLinear" else None
    if zero_point is None or ir.DataType.from_numpy(zero_point.dtype) != TYPES[kind]:
        _quantize_output(model, value, q)
    hand_out_integers(model.graph, name)
    quantize = next(v for v in model.graph.outputs if v.name == name).producer()
    assert quantize is not None
    scale, zero = (constant(v) for v in quantize.inputs[1:3])
    return f"Output '{name}' is {kind}: value = (code - {zero}) * {scale}."


def _pixel_qparams(scale: float, zero_point: float) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.uint8), UINT8)


def _first_convolutions(value: ir.Value) -> list[ir.Node]:
    """The convolutions that read `value`, also through a Transpose; raises UsageError for any other reader."""
    found = []
    for use in value.uses():
        if use.node.op_type == "Transpose":
            found += _first_convolutions(use.node.outputs[0])
        elif _can_fold(use.node):
            found.append(use.node)
        else:
            msg = (
                f"--inputDataType: '{use.node.name}' ({use.node.op_type}) reads the input and cannot take over a mean "
                "and std that differ by channel or are not whole; use one whole mean and one std, or a float input."
            )
            raise UsageError(msg)
    return found


def _can_fold(node: ir.Node) -> bool:
    """Whether it is a convolution, not in groups, of constants alone."""
    operands = [value for value in node.inputs[1:] if value is not None]
    plain = node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1
    return plain and all(constant(value) is not None for value in operands)


def _pads_itself(conv: ir.Node) -> bool:
    return conv.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")


def _fold(conv: ir.Node, mean: Array, std: Array, names: Names) -> None:
    weight, bias = constant(conv.inputs[1]), constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    assert weight is not None
    per_input = (1, -1) + (1,) * (weight.ndim - 2)
    scaled = weight.astype(np.float64) / std.reshape(per_input)
    shift = (scaled * mean.reshape(per_input)).sum(axis=tuple(range(1, weight.ndim)))
    replace_constant(conv, 1, scaled.astype(np.float32), names)
    replace_constant(conv, 2, ((0.0 if bias is None else bias) - shift).astype(np.float32), names)


def _dequantize_input(model: ir.Model, value: ir.Value, kind: str, q: QParams) -> None:
    """A new integer input in front of the float one."""
    names, name = Names(model), value.name or ""
    shift = 128 if kind == "INT8" else 0
    zero = (q.zero_point.astype(np.int64) - shift).astype(TYPES[kind].numpy())
    parameters = [
        add_constant(model.graph, names.fresh(f"{name}_{part}"), array)
        for part, array in (("pixel_scale", q.scale), ("pixel_zero_point", zero))
    ]
    fed = ir.Value(name=name, shape=value.shape, type=ir.TensorType(TYPES[kind]))
    value.name = names.fresh(f"{name}_float")
    restored = ir.node("DequantizeLinear", [fed, *parameters], name=names.fresh(f"{name}_pixels"))
    restored.outputs[0].name = names.fresh(f"{name}_values")
    value.replace_all_uses_with(restored.outputs[0])
    model.graph.inputs[list(model.graph.inputs).index(value)] = fed
    model.graph.insert_before(model.graph[0], restored)


def _quantize_output(model: ir.Model, value: ir.Value, q: QParams) -> None:
    """A Q/DQ pair behind a float output, under the output's name."""
    names, name = Names(model), value.name or ""
    scale = add_constant(model.graph, names.fresh(f"{name}_scale"), q.scale)
    zero = add_constant(model.graph, names.fresh(f"{name}_zero_point"), q.zero_point)
    value.name = names.fresh(f"{name}_float")
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=names.fresh(f"{name}_QuantizeLinear"))
    quantize.outputs[0].name = names.fresh(f"{name}_codes")
    restored = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=names.fresh(f"{name}_values"))
    restored.outputs[0].name = name
    restored.outputs[0].type, restored.outputs[0].shape = value.type, value.shape
    model.graph.extend([quantize, restored])
    model.graph.outputs[list(model.graph.outputs).index(value)] = restored.outputs[0]
