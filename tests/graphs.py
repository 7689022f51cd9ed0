"""Tiny models in ONNX's text syntax, and how to prove that two of them compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from calib.affine import Array
from converter.calibrate.exact import exact_here
from converter.prepare import prepare

ort.set_default_logger_severity(4)


def build(graph: str, opset: int = 13, ir_version: int = 8, **constants: Array) -> ir.Model:
    """`graph` as 'g (inputs) => (outputs) { nodes }', its `constants` as initializers."""
    text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "local" : 1]> {graph}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()
    )
    return ir.from_proto(proto)


def prepared(graph: str, **constants: Array) -> ir.Model:
    """The model in normal form."""
    return prepare(build(graph, **constants))


def normal(*shape: int, seed: int = 0) -> Array:
    """Normally distributed float32."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> Array:
    """float32 in [0.5, 1.5)."""
    return (np.random.default_rng([seed, *shape]).random(shape) + 0.5).astype(np.float32)


def uneven(*shape, axis=0, seed=0):
    """A weight whose channels along `axis` differ a thousandfold in size."""
    sizes = np.geomspace(0.03, 30, shape[axis])
    np.random.default_rng(seed).shuffle(sizes)
    return (
        normal(*shape, seed=seed) * np.moveaxis(sizes.reshape(-1, *[1] * (len(shape) - 1)), 0, axis)
    ).astype(np.float32)


def frozen(model: ir.Model) -> bytes:
    """What the model is now, whatever happens to it afterwards."""
    return bytes(ir.to_proto(model).SerializeToString())


def changes(work: Callable[[ir.Model], None], model: ir.Model) -> bool:
    """Does the work; whether the model is another one then."""
    before = frozen(model)
    work(model)
    return frozen(model) != before


def exactly(model: ir.Model | bytes | Path) -> bytes | Path:
    """The model, or what computes the same where this processor's kernels saturate."""
    given = model
    if isinstance(model, Path):
        model = ir.load(model)
    elif isinstance(model, bytes):
        model = ir.from_proto(onnx.ModelProto.FromString(model))
    other = exact_here(model)
    if other is model:
        return frozen(given) if isinstance(given, ir.Model) else given
    return frozen(ir.external_data.load_to_model(other))


def run(
    model: ir.Model | bytes, feeds: Mapping[str, Array], optimize: bool = False
) -> dict[str, Array]:
    """All outputs by name, with ONNX Runtime's own graph optimizations off or on."""
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(exactly(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def assert_same(
    before: ir.Model | bytes, after: ir.Model | bytes, feeds: Mapping[str, Array]
) -> None:
    """Both models give the same outputs under the same names, optimized by the runtime or not."""
    wanted = run(before, feeds)
    for other, optimize in ((before, True), (after, False), (after, True)):
        found = run(other, feeds, optimize)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert found[name].shape == value.shape
            np.testing.assert_allclose(
                found[name], value, rtol=1e-5, atol=2e-6 * max(1.0, np.abs(value).max())
            )


def types(model: ir.Model) -> list[str]:
    """The operator types of the main graph, in order."""
    return [node.op_type for node in model.graph]


def node(model: ir.Model, name: str) -> ir.Node:
    """The one node of that name."""
    (found,) = (n for graph in model.graphs() for n in graph if n.name == name)
    return found
