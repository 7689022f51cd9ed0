"""Integer inputs and outputs: the model takes raw pixels and hands out codes, without any
conversion around it.

A pixel p stands for the value (p - mean) / std. That is affine quantization as it is where mean is
one whole number and std one number for all channels. Otherwise the first convolutions take over
what the input cannot express: their weights std, and their biases the mean. Where they pad with
zeros, for which no pixel stands then, the nearest pixel does: the borders differ by that much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib.affine import UINT8, Array, QParams, along
from converter.config import DataPreprocessParam, TransformQuantParam
from converter.errors import UsageError
from converter.graph.edit import Names, constant, input_at, not_none, operand, replace_constant
from converter.job import Watch


@dataclass(frozen=True)
class Pixels:
    """How an input's pixels stand for its values, and what normalisation preprocessing has still to
    do. `border` is how far what pads pictures is from zero, in the values of the model's input.
    """

    qparams: QParams
    mean: tuple[float, ...]
    std: tuple[float, ...]
    border: float = 0.0

    def preprocess(self, wanted: DataPreprocessParam) -> DataPreprocessParam:
        """`wanted` with the normalisation that is left."""
        return replace(wanted, normalize_mean=self.mean, normalize_std=self.std)


def fold_normalisation(model: ir.Model, wanted: DataPreprocessParam) -> Pixels:
    """Makes the model's image inputs take pixels, in place, exactly but for what pads pictures;
    raises UsageError where that cannot be.
    """
    mean, std = wanted.normalize_mean or (0.0,), wanted.normalize_std or (1.0,)
    whole = len(set(mean)) == 1 and float(mean[0]).is_integer() and 0 <= mean[0] <= 255
    if whole and len(set(std)) == 1 and std[0] > 0:
        return Pixels(
            _pixel_qparams(1 / std[0], mean[0]),
            wanted.normalize_mean,
            wanted.normalize_std,
        )
    readers = [conv for value in model.graph.inputs for conv in _first_convolutions(value)]
    if not whole and any(map(_is_padded, readers)):
        return _nearest_pixel(
            readers,
            np.array(mean),
            np.array(std),
            Names(model),
        )
    names = Names(model)
    for conv in readers:
        _fold(
            conv,
            np.zeros(len(mean)) if whole else np.array(mean),
            np.array(std),
            names,
        )
    if whole:
        return Pixels(
            _pixel_qparams(1.0, mean[0]),
            mean,
            (1.0,) * len(mean),
        )
    return Pixels(_pixel_qparams(1.0, 0.0), (), ())


def _nearest_pixel(readers: list[ir.Node], mean: Array, std: Array, names: Names) -> Pixels:
    """Lets padded convolutions take over mean and std; what they pad with, zero, becomes the pixel
    nearest to the means.
    """
    pixel = float(np.clip(np.rint(mean.mean()), 0, 255))
    for conv in readers:
        _fold(conv, mean - pixel, std, names)
    off = float(np.abs((mean - pixel) / std).max())
    return Pixels(
        _pixel_qparams(1.0, pixel),
        (pixel,) * len(mean),
        (1.0,) * len(mean),
        off,
    )


def trained_pixels(wanted: TransformQuantParam, watch: Watch) -> Pixels | None:
    """What pixels stand for by `mean` and `std_dev`, None without; warns where no pixel stands for
    zero.
    """
    if wanted.mean is None or wanted.std_dev is None:
        return None
    zero = round(wanted.mean)
    if zero != wanted.mean:
        watch.warn(
            f"mean = {wanted.mean:g} lies between two pixels: a pixel p stands for (p - {zero}) / "
            f"{wanted.std_dev:g}, "
            f"{abs(zero - wanted.mean) / wanted.std_dev:.2g} off."
        )
    return Pixels(_pixel_qparams(1 / wanted.std_dev, zero), (), ())


def _pixel_qparams(scale: float, zero_point: float) -> QParams:
    return QParams(
        np.array(scale, np.float32),
        np.array(zero_point, np.uint8),
        UINT8,
    )


def _first_convolutions(value: ir.Value) -> list[ir.Node]:
    """The convolutions that read `value`, also through a Transpose or a Pad with zeros; raises
    UsageError for any other reader.
    """
    convolutions = []
    for use in value.uses():
        if use.node.op_type == "Transpose" or _pads_with_zeros(use.node):
            convolutions += _first_convolutions(use.node.outputs[0])
        elif _can_fold(use.node):
            convolutions.append(use.node)
        else:
            msg = (
                f"--inputDataType: '{use.node.name}' ({use.node.op_type}) reads the input and "
                "cannot take over a mean "
                "and std that differ by channel or are not whole; use one whole mean and one std, "
                "or a float input."
            )
            raise UsageError(msg)
    return convolutions


def _can_fold(node: ir.Node) -> bool:
    """Whether it is a convolution, not in groups, of constants alone."""
    plain = node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1
    return plain and all(value is None or constant(value) is not None for value in node.inputs[1:])


def _pads_with_zeros(node: ir.Node) -> bool:
    if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "constant":
        return False
    fill = operand(node, 2)
    return input_at(node, 2) is None or (fill is not None and not fill.any())


def _is_padded(conv: ir.Node) -> bool:
    """Whether zeros surround what it reads."""
    maker = not_none(conv.inputs[0]).producer()
    before = maker is not None and maker.op_type == "Pad"
    return before or any(conv.attributes.get_ints("pads", ())) or _pads_itself(conv)


def _pads_itself(conv: ir.Node) -> bool:
    return conv.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")


def _fold(conv: ir.Node, mean: Array, std: Array, names: Names) -> None:
    weight, bias = not_none(operand(conv, 1)), operand(conv, 2)
    scaled = weight.astype(np.float64) / along(std, 1, weight.shape)
    shift = (scaled * along(mean, 1, weight.shape)).sum(axis=tuple(range(1, weight.ndim)))
    replace_constant(conv, 1, scaled.astype(np.float32), names)
    replace_constant(
        conv,
        2,
        ((0.0 if bias is None else bias) - shift).astype(np.float32),
        names,
    )
