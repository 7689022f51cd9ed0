"""Times by layer: whose work a kernel of ONNX Runtime does, in models whose fusions are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, normal, prepared
from running import InMemory, job, weights_converted

from calib import CalibError
from converter.calibrate.runs import Kernel, timed
from converter.graph.files import load
from converter.measure.results import LayerTime
from converter.measure.times import contents, layer_times
from converter.pipeline.convert import convert

RESIDUAL = """g (float[1,8,12,12] x) => (float[1,4] y) {
    [first] a = Conv <pads = [1,1,1,1]> (x, w)
    [relu] b = Relu (a)
    [second] c = Conv <pads = [1,1,1,1]> (b, v)
    [sum] d = Add (c, b)
    [clip] e = Relu (d)
    [mean] f = GlobalAveragePool (e)
    [flat] h = Flatten (f)
    [gemm] y = Gemm (h, k)
}"""
WEIGHTS = {"w": normal(16, 8, 3, 3), "v": normal(16, 16, 3, 3), "k": normal(16, 4)}
DATA = normal(6, 8, 12, 12)


def by_node(layers: list[LayerTime]) -> dict[str, LayerTime]:
    return {layer.node or layer.op_type: layer for layer in layers}


def sample() -> InMemory:
    return InMemory([{"x": DATA[:1]}])


def test_every_node_is_in_one_layer_and_all_kernels_count() -> None:
    model = prepared(RESIDUAL, **WEIGHTS)
    layers = layer_times(model, model, sample())
    inside = [name for layer in layers for name in layer.nodes]
    assert sorted(inside) == sorted(node.name or "" for node in model.graph)
    assert all(layer.before > 0 and layer.after > 0 for layer in layers)
    assert all(layer.kernels[0] == layer.kernels[1] for layer in layers)
    order = [node.name for node in model.graph]
    places = [order.index(layer.nodes[0]) for layer in layers if layer.nodes]
    assert places == sorted(places)


def test_what_is_fused_stands_with_the_node_that_does_its_work() -> None:
    model = prepared(RESIDUAL, **WEIGHTS)
    found = by_node(layer_times(model, model, sample()))
    assert found["first"].nodes == ("first", "relu")
    assert found["second"].nodes[0] == "second"
    assert {"sum", "clip"} <= {*found["second"].nodes, *found.get("sum", found["second"]).nodes}
    assert "gemm" in found and found["gemm"].op_type == "Gemm"


def test_layouts_and_conversions_are_no_node_s_time(tmp_path: Path) -> None:
    task = job(tmp_path, build(RESIDUAL, **WEIGHTS), {"x": DATA}, None, only_where_it_pays="false")
    convert(task)
    reference = prepared(RESIDUAL, **WEIGHTS)
    layers = layer_times(reference, load(task.output), sample())
    found = by_node(layers)
    assert found["first"].kernels[1] == "QLinearConv"
    assert "relu" in found["first"].nodes
    free = [layer for layer in layers if not layer.node]
    assert "QuantizeLinear" in {layer.op_type for layer in free}
    assert all(layer.nodes == () for layer in free)
    assert layers[-len(free) :] == free


def test_weights_that_are_restored_take_no_time(tmp_path: Path) -> None:
    weights_converted(tmp_path, build(RESIDUAL, **WEIGHTS), common={"bit_num": 4})
    reference = prepared(RESIDUAL, **WEIGHTS)
    layers = layer_times(reference, load(tmp_path / "out.onnx"), sample())
    assert {layer.node for layer in layers} >= {"first", "second", "gemm"}
    assert not [layer for layer in layers if not layer.node and layer.after > layer.before == 0]


# Names as ONNX Runtime makes them.
@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([("b_nchwc", "Conv", ("reorder",))], [["first", "relu"]]),
        ([("b_nchwc", "Conv", ("r",)), ("Out", "ReorderOutput", ("b",))], [["first", "relu"], []]),
        ([("first_token_7", "QLinearConv", ("a_token_6",))], [["first", "relu"]]),
        ([("first", "Conv", ("a",)), ("relu", "Relu", ("b",))], [["first"], ["relu"]]),
        ([("relu/QuickGeluFusion/", "QuickGelu", ("t",))], [["first", "relu"]]),
        ([("a_bn_nchwc", "Conv", ("t",))], [["first", "relu"]]),
    ],
)
def test_names_of_the_optimizer(
    kernels: list[tuple[str, str, tuple[str, ...]]], expected: list[list[str]]
) -> None:
    graph = "g (float[1,2,4,4] x) => (float[] b) { [first] a = Conv (x, w)  [relu] b = Relu (a) }"
    model = build(graph, w=normal(2, 2, 1, 1))
    assert contents([Kernel(*kernel, 1.0) for kernel in kernels], model) == expected


def test_the_kernels_are_those_of_every_run_but_the_first() -> None:
    model = prepared(RESIDUAL, **WEIGHTS)
    (first, second) = timed([model, model], {"x": DATA[:1]}, 2)
    assert [kernel.op_type for kernel in first] == [kernel.op_type for kernel in second]
    assert {"y"} <= {name for kernel in first for name in kernel.outputs}


def test_a_model_that_does_not_run_is_an_error() -> None:
    model: ir.Model = prepared(RESIDUAL, **WEIGHTS)
    with pytest.raises(CalibError, match="fails on a sample"):
        timed([model], {"x": np.zeros((1, 9, 12, 12), np.float32)}, 1)
