"""Weighted operators as matrix products: against ONNX Runtime on small whole numbers, where float32
is exact.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from converter.plan.matrices import ConvView, ProductView
from converter.plan.ops import view_of

EVERY = 10**6
WHOLE = np.random.default_rng


def run(op_type, x, weight, attributes):
    """What ONNX Runtime computes for one operator."""
    node = helper.make_node(op_type, ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape)
            for name, a in (("x", x), ("w", weight))
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.astype(np.float32), "w": weight.astype(np.float32)})[0]


def view(op_type, shape, attributes, weight_index=1):
    node = ir.node(op_type, [ir.Value(name="x"), ir.Value(name="w")], attributes=attributes)
    return view_of(node, shape, weight_index)


def products(view, weight, columns, zero):
    """Weight times columns: (positions, groups * rows)."""
    matrix = view.matrix(weight)
    assert columns.shape[::2] == matrix.shape[::2]
    return np.concatenate((columns.astype(np.float64) - zero) @ matrix.swapaxes(1, 2), axis=1)


CONVOLUTIONS = {
    "pointwise": ((2, 4, 3, 5), (6, 4, 1, 1), {}),
    "3x3": ((1, 3, 6, 5), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strides": ((2, 2, 7, 9), (3, 2, 3, 3), {"strides": [2, 3]}),
    "dilations": ((1, 2, 9, 8), (3, 2, 3, 2), {"dilations": [2, 3]}),
    "asymmetric pads": ((1, 2, 5, 4), (3, 2, 3, 4), {"pads": [0, 3, 2, 1]}),
    "all of these": (
        (2, 4, 9, 8),
        (6, 2, 3, 2),
        {"pads": [2, 0, 1, 3], "strides": [2, 1], "dilations": [1, 2], "group": 2},
    ),
    "unequal kernel": ((1, 3, 5, 6), (2, 3, 1, 4), {}),
    "same upper": ((1, 2, 6, 7), (3, 2, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "same lower": ((1, 2, 6, 7), (3, 2, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    "same, kernel below stride": (
        (1, 2, 8, 8),
        (3, 2, 1, 1),
        {"auto_pad": "SAME_UPPER", "strides": [3, 2]},
    ),
    "valid": ((1, 2, 6, 7), (3, 2, 3, 2), {"auto_pad": "VALID", "strides": [2, 2]}),
    "groups": ((2, 6, 4, 5), (9, 2, 2, 3), {"group": 3, "pads": [1, 0, 0, 1]}),
    "depthwise": (
        (1, 5, 6, 6),
        (5, 1, 3, 3),
        {"group": 5, "pads": [1, 1, 1, 1], "strides": [2, 2]},
    ),
    "depthwise multiplied": ((1, 3, 4, 4), (6, 1, 2, 2), {"group": 3}),
    "1-D": ((2, 3, 11), (4, 3, 3), {"pads": [2, 1], "dilations": [2]}),
    "1-D same": ((1, 3, 10), (2, 3, 4), {"auto_pad": "SAME_LOWER", "strides": [3]}),
    "3-D": ((1, 2, 4, 5, 3), (3, 2, 2, 3, 2), {"pads": [1, 0, 1, 0, 2, 0], "strides": [1, 2, 1]}),
    "3-D grouped": ((2, 4, 3, 3, 3), (4, 2, 2, 2, 2), {"group": 2}),
}
CONVS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "attributes"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)


@CONVS
@pytest.mark.parametrize(
    ("dtype", "zero"), [(np.uint8, 0), (np.uint8, 113), (np.int8, -7), (np.float32, 0)]
)
def test_columns_times_matrix_is_the_convolution(x_shape, w_shape, attributes, dtype, zero):
    rng = WHOLE(0)
    x = rng.integers(0, 120, x_shape).astype(dtype)
    weight = rng.integers(-8, 9, w_shape).astype(np.float64)
    expected = run("Conv", x.astype(np.float32) - zero, weight, attributes)
    conv = view("Conv", w_shape, attributes)
    columns = conv.columns(x, EVERY, zero, rng)
    assert columns.dtype == dtype
    channels_last = np.moveaxis(expected, 1, -1).reshape(-1, w_shape[0])
    assert np.array_equal(products(conv, weight, columns, zero), channels_last)


@CONVS
def test_means_are_those_of_all_columns(x_shape, w_shape, attributes):
    x = WHOLE(4).integers(0, 99, x_shape).astype(np.float32)
    conv = view("Conv", w_shape, attributes)
    expected = conv.columns(x, EVERY, 0, WHOLE(0)).astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(conv.means(x), expected, rtol=1e-6)


def test_means_of_a_product_are_those_of_its_features():
    x = WHOLE(5).integers(0, 99, (2, 3, 7)).astype(np.float32)
    expected = x.reshape(6, 7).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(ProductView(False).means(x), expected[None])


def test_same_padding_counts_the_dilated_kernel():
    conv = view("Conv", (1, 1, 3), {"auto_pad": "SAME_UPPER", "dilations": [2]})
    columns = conv.columns(np.array([[[1, 2, 3, 4]]]), EVERY, 0, WHOLE(0))
    assert columns.tolist() == [[[0, 1, 3], [0, 2, 4], [1, 3, 0], [2, 4, 0]]]


@CONVS
def test_a_matrix_becomes_its_weight_again(x_shape, w_shape, attributes):
    weight = WHOLE(1).standard_normal(w_shape)
    conv = view("Conv", w_shape, attributes)
    assert np.array_equal(conv.weight(conv.matrix(weight)), weight)


def test_columns_go_by_position_and_then_by_channel():
    weight = np.arange(24).reshape(2, 3, 2, 2)
    matrix = view("Conv", weight.shape, {}).matrix(weight)
    first = [weight[0, channel, i, j] for i in (0, 1) for j in (0, 1) for channel in range(3)]
    assert matrix.shape == (1, 2, 12)
    assert matrix[0, 0].tolist() == first


def test_every_group_has_its_own_rows():
    weight = np.arange(8).reshape(4, 2, 1, 1)
    assert view("Conv", weight.shape, {"group": 2}).matrix(weight).tolist() == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]


def test_a_convolution_without_attributes_has_the_defaults_of_onnx():
    assert view("Conv", (4, 3, 5, 2), {}) == ConvView(
        (4, 3, 5, 2), 1, (1, 1), (1, 1), (0, 0, 0, 0), "NOTSET"
    )


def drawn_from(view, x, count, seed):
    return view.columns(x, count, 0, WHOLE(seed))[0]


@pytest.mark.parametrize(
    ("view", "x_shape"),
    [
        (ConvView((1, 2, 3, 3), 1, (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET"), (3, 2, 8, 9)),
        (ProductView(False), (4, 54, 7)),
    ],
    ids=["Conv", "MatMul"],
)
def test_a_draw_takes_different_outputs_and_repeats_with_its_generator(view, x_shape):
    x = np.arange(1, np.prod(x_shape) + 1).reshape(x_shape)
    everything = [tuple(row) for row in drawn_from(view, x, EVERY, 0)]
    assert len(everything) == 216
    drawn = drawn_from(view, x, 40, 1)
    assert len(drawn) == len({tuple(row) for row in drawn} & set(everything)) == 40
    assert np.array_equal(drawn, drawn_from(view, x, 40, 1))
    assert not np.array_equal(drawn, drawn_from(view, x, 40, 2))


def test_every_output_is_as_likely():
    x = np.arange(10)[:, None]
    times = np.bincount(
        np.concatenate([drawn_from(ProductView(False), x, 3, seed)[:, 0] for seed in range(1000)])
    )
    assert times.min() > 240
    assert times.max() < 360


@pytest.mark.parametrize("x_shape", [(5, 7), (2, 3, 7), (2, 1, 3, 7)])
def test_columns_times_matrix_is_the_product(x_shape):
    rng = WHOLE(2)
    x, weight = (
        rng.integers(0, 100, x_shape).astype(np.uint8),
        rng.integers(-8, 9, (7, 4)).astype(np.float64),
    )
    expected = run("MatMul", x.astype(np.float32) - 50, weight, {}).reshape(-1, 4)
    product = view("MatMul", weight.shape, {})
    assert np.array_equal(
        products(product, weight, product.columns(x, EVERY, 50, rng), 50), expected
    )
    assert np.array_equal(product.weight(product.matrix(weight)), weight)


@pytest.mark.parametrize("transposed", [0, 1])
def test_columns_times_matrix_is_the_gemm(transposed):
    rng = WHOLE(3)
    x = rng.integers(0, 100, (5, 7)).astype(np.uint8)
    weight = rng.integers(-8, 9, (4, 7) if transposed else (7, 4)).astype(np.float64)
    gemm = view("Gemm", weight.shape, {"transB": transposed})
    expected = run("Gemm", x, weight, {"transB": transposed})
    assert gemm.matrix(weight).shape == (1, 4, 7)
    assert np.array_equal(products(gemm, weight, gemm.columns(x, EVERY, 0, rng), 0), expected)
    assert np.array_equal(gemm.weight(gemm.matrix(weight)), weight)


@pytest.mark.parametrize(
    ("op_type", "shape", "weight_index"),
    [
        ("ConvTranspose", (2, 3, 3, 3), 1),
        ("MatMul", (4, 5), 0),
        ("MatMul", (2, 4, 5), 1),
        ("MatMul", (4,), 1),
    ],
)
def test_what_is_no_known_product_has_no_view(op_type, shape, weight_index):
    assert view(op_type, shape, {}, weight_index) is None
