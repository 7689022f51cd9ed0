"""Bit planes: exactly N bits a weight in the file, exactly the dequantized weight in the
runtime.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, run
from hypothesis import given
from hypothesis import strategies as st

from calib import trellis
from calib.affine import IntFormat, QParams, dequantize
from converter.emit.planes import PlaneWriter, to_planes
from converter.graph.edit import weight_bytes
from converter.plan.plan import QuantizedWeight


def weight_of(bits, shape, axis, seed=0):
    rng = np.random.default_rng([seed, bits, *shape])
    fmt = IntFormat(bits, signed=False)
    parts = () if axis is None else (shape[axis],)
    codes = rng.integers(0, fmt.qmax + 1, shape).astype(fmt.dtype)
    codes.flat[:2] = [0, fmt.qmax][: codes.size]
    zero = rng.integers(0, fmt.qmax + 1, parts).astype(fmt.dtype)
    scale = (rng.random(parts) + 0.5).astype(np.float32)
    return QuantizedWeight(codes, QParams(np.asarray(scale), np.asarray(zero), fmt, axis))


def meaning(weight):
    """(code - zero) * scale, along the axis, in float64."""
    q, rank = weight.qparams, weight.codes.ndim
    shape = [-1 if i == q.axis else 1 for i in range(rank)] if q.axis is not None else [1] * rank
    zero, scale = (
        q.zero_point.astype(np.float64).reshape(shape),
        q.scale.astype(np.float64).reshape(shape),
    )
    return (weight.codes - zero) * scale


def written(weight):
    """A model that adds the restored weight to its input."""
    shape = ",".join(map(str, weight.codes.shape))
    model = build(
        f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Add (x, w) }}",
        w=np.zeros(1, np.float32),
    )
    value = PlaneWriter(model)(model.graph, "w", weight)
    model.graph[len(model.graph) - 1].replace_input_with(1, value)
    del model.graph.initializers["w"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(8, 4), (3, 5), (4, 3, 2, 2), (1, 1)])
@pytest.mark.parametrize("bits", range(1, 17))
def test_the_runtime_restores_every_weight(bits, shape, axis):
    weight = weight_of(bits, shape, axis)
    model = written(weight)
    for optimize in (False, True):
        found = run(model, {"x": np.zeros(shape, np.float32)}, optimize)["y"]
        np.testing.assert_allclose(found, meaning(weight), rtol=2e-7, atol=0)


MEMORIES = [trellis.SHORT, trellis.LONG]


def coded(weight, memory):
    """The same codes, as those of a trellis."""
    q = weight.qparams
    return replace(weight, qparams=replace(q, format=replace(q.format, trellis=memory)))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((24, 10), 1), ((16, 24), 1), ((10, 24), 0), ((44, 3, 3, 3), 0), ((5, 7, 3), 1)],
)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("bits", range(2, 8))
def test_the_runtime_looks_up_the_levels_of_a_trellis(bits, memory, shape, axis):
    weight = coded(weight_of(bits, shape, axis), memory)
    expected = dequantize(
        weight.codes, weight.qparams
    )  # held against the definition in test_trellis
    for optimize in (False, True):
        found = run(written(weight), {"x": np.zeros(shape, np.float32)}, optimize)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((24, 10), 1), ((10, 24), 0), ((44, 32, 3, 3), 0), ((13, 768), 0), ((5, 7, 3), 1)],
)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("bits", range(2, 8))
def test_the_runtime_rotates_levels_back_without_any_error(bits, memory, shape, axis):
    weight = coded(weight_of(bits, shape, axis), memory)
    q = weight.qparams
    middle = np.full(q.scale.shape, trellis.middle(bits), np.float32)
    q = replace(q, format=replace(q.format, rotated=True), zero_point=middle)
    expected = dequantize(weight.codes, q)  # held against the definition in test_rotation
    model = written(QuantizedWeight(weight.codes, q))
    for optimize in (False, True):
        found = run(model, {"x": np.zeros(shape, np.float32)}, optimize)["y"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("bits", range(2, 8))
def test_zeros_in_the_middle_of_all_levels_are_not_stored(bits, memory):
    weight = coded(weight_of(bits, (44, 3, 3, 3), 0), memory)
    middle = np.full(44, (2**bits - 1) / 2, np.float32)
    weight = replace(weight, qparams=replace(weight.qparams, zero_point=middle))
    model = written(weight)
    assert "zero" not in model.graph.initializers
    assert "Sub" not in {node.op_type for node in model.graph}
    for optimize in (False, True):
        found = run(model, {"x": np.zeros(weight.codes.shape, np.float32)}, optimize)["y"]
        np.testing.assert_array_equal(found, dequantize(weight.codes, weight.qparams))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_trellis_takes_its_bits_in_the_file(memory):
    # The same as below, but that there may be twice the planes, a table and the order of bytes, and
    # that so many numbers are halves.
    shared = 4 * (8 + 64) + 2 * (2 * 64 * 4) + 2 * (16 << memory) + 4 * 8
    size = weight_bytes(written(coded(weight_of(4, (64, 64), 0), memory)))
    assert 64 * 64 / 2 < size <= 64 * 64 / 2 + 64 * (4 + 2) + shared


@pytest.mark.parametrize("bits", range(1, 17))
def test_a_weight_takes_its_bits_in_the_file(bits):
    size = 64 * 64
    shared = 4 * (8 + 64 * bits + 64)  # what all weights of a model have in common, at most
    scales = 64 * (4 + 2)
    assert weight_bytes(written(weight_of(bits, (64, 64), 0))) <= size * bits / 8 + scales + shared


@pytest.mark.parametrize("bits", range(2, 6))
@pytest.mark.parametrize("off", [0, 1])
def test_zeros_between_the_codes_take_a_byte_where_all_are_among_them(bits, off):
    shape, steps = (70, 6), np.arange(70) * 3 % 256
    weight = weight_of(bits, shape, 0)
    zero = ((steps - 200 * off) * 2.0 ** (bits - 8)).astype(np.float32)
    weight = replace(weight, qparams=replace(weight.qparams, zero_point=zero))
    model = written(weight)
    stored = next(v for k, v in model.graph.initializers.items() if k == "zero")
    assert stored.dtype == (ir.DataType.FLOAT16 if off else ir.DataType.UINT8)
    for optimize in (False, True):
        found = run(model, {"x": np.zeros(shape, np.float32)}, optimize)["y"]
        np.testing.assert_allclose(found, meaning(weight), rtol=2e-7, atol=1e-7)


def test_weights_of_one_model_share_what_they_have_in_common():
    model = build(
        "g (float[8] x) => (float[8] y) { a = Add (x, v)  y = Add (a, w) }",
        v=np.zeros(1),
        w=np.zeros(1),
    )
    writer = PlaneWriter(model)
    alone = weight_bytes(model)
    writer(model.graph, "v", weight_of(3, (8, 8), None))
    first = weight_bytes(model) - alone
    writer(model.graph, "w", weight_of(3, (8, 8), None, seed=1))
    assert weight_bytes(model) - alone - first < 8 * 8 * 3 / 8 + 16 < first


@given(
    st.integers(1, 16).flatmap(
        lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1))
    )
)
def test_planes_hold_the_bits_of_the_codes(drawn):
    bits, codes = drawn
    planes = to_planes(np.array(codes, np.uint16), bits)
    assert planes.shape == (-(-len(codes) // 8), bits, 1)
    bit = lambda i, p: int(planes[i // 8, p, 0]) >> (i % 8) & 1  # noqa: E731
    assert [sum(bit(i, p) << p for p in range(bits)) for i in range(len(codes))] == codes


def thinned(bits, shape, axis, kept, levels, seed):
    """A weight of which only a share is not zero, of few distinct codes."""
    weight = weight_of(bits, shape, axis, seed)
    rng = np.random.default_rng(seed)
    zero = (
        weight.qparams.zero_point
        if axis is None
        else np.moveaxis(
            np.broadcast_to(
                weight.qparams.zero_point, (*shape[:axis], *shape[axis + 1 :], shape[axis])
            ),
            -1,
            axis,
        )
    )
    some = rng.choice(weight.codes.reshape(-1), levels)
    codes = np.where(rng.random(shape) < kept, rng.choice(some, shape), zero).astype(
        weight.codes.dtype
    )
    return QuantizedWeight(codes, weight.qparams)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(
    ("bits", "kept", "levels", "most"),
    [
        (8, 0.2, 1000, 0.2 + 1.2 / 8),
        (5, 0.1, 1000, 0.1 + 1.2 / 5),
        (16, 0.05, 1000, 0.05 + 1.2 / 16),
        (16, 1.0, 200, 0.52),
        (8, 1.0, 11, 0.52),
        (8, 0.3, 3, (2 * 0.3 + 1.2) / 8),
    ],
)
def test_a_thin_weight_takes_less_and_is_still_exact(bits, kept, levels, most, axis):
    weight = thinned(bits, (64, 61, 3, 3), axis, kept, levels, seed=bits)
    model = written(weight)
    dense = weight.codes.size * bits / 8
    assert weight_bytes(model) - 10_000 < most * dense < dense
    for optimize in (False, True):
        found = run(model, {"x": np.zeros(weight.codes.shape, np.float32)}, optimize)["y"]
        np.testing.assert_allclose(found, meaning(weight), rtol=2e-7, atol=0)


@given(
    st.integers(1, 8),
    st.floats(0, 1),
    st.integers(1, 40),
    st.sampled_from([None, 0]),
    st.integers(0, 1000),
)
def test_zeros_at_either_end_and_weights_of_nothing_else(bits, kept, levels, axis, seed):
    weight = thinned(bits, (40, 701), axis, kept, levels, seed)
    found = run(written(weight), {"x": np.zeros(weight.codes.shape, np.float32)}, False)["y"]
    np.testing.assert_allclose(found, meaning(weight), rtol=2e-7, atol=0)
