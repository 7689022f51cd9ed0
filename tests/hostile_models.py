"""Model files as bad exporters, interrupted downloads and attackers make them; each function writes
one and names it.

BROKEN holds files that no conversion may accept, with a word that the refusal must hold; ODD holds
valid models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(
    nodes: Iterable[onnx.NodeProto],
    inputs: dict[str, tuple[object, ...]],
    outputs: Iterable[str],
    constants: dict[str, np.ndarray],
    opset: int = 17,
    dtype: int = FLOAT,
    output: int | None = None,
    output_shape: tuple[object, ...] | None = None,
    **more: object,
) -> onnx.ModelProto:
    """A model whose inputs are of `dtype`; outputs have no declared shape."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, output or dtype, output_shape) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), *more.pop("imports", [])]  # type: ignore[misc]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=8 if opset < 21 else 10, **more
    )
    found = onnx.shape_inference.infer_shapes(model).graph.output
    for value, inferred in zip(model.graph.output, found, strict=True):
        value.CopyFrom(inferred)
    return model


def node(
    op_type: str, inputs: str, outputs: str, name: str = "", **attributes: object
) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(","), outputs.split(","), name, **attributes)


def _id(domain: str) -> onnx.OperatorSetIdProto:
    return helper.make_opsetid(domain, 1)


def plain(opset: int = 17, **more: object) -> onnx.ModelProto:
    """Two convolutions and a product, the model that most cases are variants of."""
    nodes = [
        node("Conv", "x,w,b", "c", "first", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r", "relu"),
        node("Conv", "r,v", "d", "second"),
        node("Flatten", "d", "f", "flat"),
        node("Gemm", "f,m,n", "y", "last"),
    ]
    return model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], constants(), opset, **more)


def constants() -> dict[str, np.ndarray]:
    return {
        "w": normal(20, 3, 3, 3) / 5,
        "b": normal(20),
        "v": normal(18, 20, 3, 3) / 13,
        "m": normal(648, 20) / 25,
        "n": normal(20),
    }


def written(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


# --- files that are no models


def _truncated(share: float) -> Callable[[Path], Path]:
    def case(folder: Path) -> Path:
        whole = plain().SerializeToString()
        return written(folder, whole[: int(len(whole) * share)])

    return case


def _file(content: bytes) -> Callable[[Path], Path]:
    return lambda folder: written(folder, content)


def _folder(folder: Path) -> Path:
    (folder / "m.onnx").mkdir()
    return folder / "m.onnx"


def _nothing(folder: Path) -> Path:
    return folder / "m.onnx"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


def _dangling(folder: Path) -> Path:
    (folder / "m.onnx").symlink_to(folder / "gone.onnx")
    return folder / "m.onnx"


def _circle(folder: Path) -> Path:
    (folder / "m.onnx").symlink_to(folder / "m.onnx")
    return folder / "m.onnx"


def _unreadable(folder: Path) -> Path:
    return Path("/proc/self/mem")


def external(
    location: str, data: bytes | None = None, offset: int = 0, length: int | None = None
) -> onnx.ModelProto:
    """The plain model, whose first weight lies in a file beside it."""
    model = plain()
    weight = model.graph.initializer[0]
    size = len(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entries = {
        "location": location,
        "offset": str(offset),
        "length": str(size if length is None else length),
    }
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    return model


WEIGHT_BYTES = constants()["w"].tobytes()


def _external_missing(folder: Path) -> Path:
    return written(folder, external("gone.bin"))


def _external_truncated(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES[:100])
    return written(folder, external("w.bin"))


def _external_short(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    return written(folder, external("w.bin", length=100))


def _external_negative(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    return written(folder, external("w.bin", offset=-8))


def _external_huge(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    return written(folder, external("w.bin", offset=1 << 62))


def _external_words(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    model = external("w.bin")
    model.graph.initializer[0].external_data[1].value = "many"
    return written(folder, model)


def _external_above(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    return written(inner, external("../w.bin"))


def _external_absolute(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    return written(folder, external(str(folder / "w.bin")))


def _external_symlink(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    (inner / "w.bin").symlink_to(folder / "w.bin")
    return written(inner, external("w.bin"))


def _external_folder(folder: Path) -> Path:
    (folder / "w.bin").mkdir()
    return written(folder, external("w.bin"))


def _external_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return written(folder, external("w.bin"))


def _external_no_location(folder: Path) -> Path:
    model = external("w.bin")
    del model.graph.initializer[0].external_data[:]
    return written(folder, model)


def _in_attribute(folder: Path) -> Path:
    """External data in a Constant node's attribute, outside of the folder."""
    inner = folder / "inner"
    inner.mkdir()
    (folder / "w.bin").write_bytes(WEIGHT_BYTES)
    model = external("../w.bin")
    weight = model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    del model.graph.initializer[0]
    return written(inner, model)


def _dims_too_large(folder: Path) -> Path:
    model = plain()
    model.graph.initializer[0].dims[0] = 1 << 40
    return written(folder, model)


def _dims_negative(folder: Path) -> Path:
    model = plain()
    model.graph.initializer[0].dims[0] = -20
    return written(folder, model)


def _dims_wrong(folder: Path) -> Path:
    model = plain()
    model.graph.initializer[0].dims[0] = 21
    return written(folder, model)


def _type_wrong(folder: Path) -> Path:
    model = plain()
    model.graph.initializer[0].data_type = 99
    return written(folder, model)


def _type_undefined(folder: Path) -> Path:
    model = plain()
    model.graph.initializer[0].data_type = 0
    return written(folder, model)


def _weights_of_strings(folder: Path) -> Path:
    model = plain()
    strings = helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"b"])
    model.graph.initializer[0].CopyFrom(strings)
    return written(folder, model)


def _unknown_operator(folder: Path) -> Path:
    model = plain()
    model.graph.node[1].op_type = "Frobnicate"
    return written(folder, model)


def _undefined_tensor(folder: Path) -> Path:
    model = plain()
    model.graph.node[1].input[0] = "nobody"
    return written(folder, model)


def _cycle(folder: Path) -> Path:
    model = plain()
    model.graph.node[0].input[0] = "y"
    return written(folder, model)


def _twice_defined(folder: Path) -> Path:
    model = plain()
    model.graph.node[2].output[0] = "r"
    model.graph.node[3].input[0] = "r"
    return written(folder, model)


def _output_undefined(folder: Path) -> Path:
    model = plain()
    model.graph.output[0].name = "nobody"
    return written(folder, model)


def _no_inputs_to_conv(folder: Path) -> Path:
    model = plain()
    del model.graph.node[0].input[1:]
    return written(folder, model)


def _attribute_of_wrong_type(folder: Path) -> Path:
    model = plain()
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("pads", "one"))
    return written(folder, model)


def _group_zero(folder: Path) -> Path:
    model = plain()
    model.graph.node[0].attribute.append(helper.make_attribute("group", 0))
    return written(folder, model)


def _opset(version: int) -> Callable[[Path], Path]:
    def case(folder: Path) -> Path:
        model = plain()
        model.opset_import[0].version = version
        return written(folder, model)

    return case


def _no_opset(folder: Path) -> Path:
    model = plain()
    del model.opset_import[:]
    return written(folder, model)


def _deep(folder: Path) -> Path:
    """Graphs in graphs, deeper than any reader's stack."""
    inner = helper.make_graph(
        [node("Identity", "x", "y")], "g", [], [helper.make_tensor_value_info("y", FLOAT, None)]
    )
    for level in range(90):
        branch = helper.make_node(
            "If", ["k"], ["y"], f"n{level}", then_branch=inner, else_branch=inner
        )
        if level < 2:
            inner = helper.make_graph(
                [branch], "g", [], [helper.make_tensor_value_info("y", FLOAT, None)]
            )
            continue
        then = helper.make_node(
            "If", ["k"], ["y"], f"n{level}", then_branch=inner, else_branch=_leaf()
        )
        inner = helper.make_graph(
            [then], "g", [], [helper.make_tensor_value_info("y", FLOAT, None)]
        )
    nodes = list(inner.node)
    return written(folder, model_of(nodes, {"x": (2,)}, ["y"], {"k": np.array(True)}))


def _leaf() -> onnx.GraphProto:
    output = helper.make_tensor_value_info("y", FLOAT, None)
    return helper.make_graph([node("Identity", "x", "y")], "leaf", [], [output])


def _shape_mismatch(folder: Path) -> Path:
    model = plain()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    return written(folder, model)


def _no_nodes_at_all(folder: Path) -> Path:
    return written(folder, onnx.ModelProto())


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{
        f"truncated_{int(100 * share)}": (_truncated(share), "m.onnx")
        for share in (0.001, 0.01, 0.3, 0.5, 0.9, 0.999)
    },
    "empty": (_file(b""), "m.onnx"),
    "zeros": (_file(bytes(5000)), "m.onnx"),
    "text": (_file(b"import torch\n" * 100), "m.onnx"),
    "ones": (_file(b"\xff" * 5000), "m.onnx"),
    "random": (_file(np.random.default_rng(1).bytes(20000)), "m.onnx"),
    "zip": (_file(b"PK\x03\x04" + bytes(100)), "m.onnx"),
    "enormous_length": (_file(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 64), "m.onnx"),
    "folder": (_folder, "m.onnx"),
    "missing": (_nothing, "m.onnx"),
    "fifo": (_fifo, "m.onnx"),
    "dangling_link": (_dangling, "m.onnx"),
    "circular_link": (_circle, "m.onnx"),
    "external_missing": (_external_missing, "gone.bin"),
    "external_truncated": (_external_truncated, "w.bin"),
    "external_short": (_external_short, "w"),
    "external_negative": (_external_negative, "m.onnx"),
    "external_huge_offset": (_external_huge, "w"),
    "external_words": (_external_words, "m.onnx"),
    "external_above": (_external_above, "w.bin"),
    "external_absolute": (_external_absolute, "w.bin"),
    "external_symlink": (_external_symlink, "w.bin"),
    "external_folder": (_external_folder, "w.bin"),
    "external_fifo": (_external_fifo, "w.bin"),
    "external_no_location": (_external_no_location, "w"),
    "external_in_attribute": (_in_attribute, "w.bin"),
    "dims_too_large": (_dims_too_large, "w"),
    "dims_negative": (_dims_negative, "w"),
    "dims_wrong": (_dims_wrong, "w"),
    "type_wrong": (_type_wrong, "m.onnx"),
    "type_undefined": (_type_undefined, "w"),
    "weights_of_strings": (_weights_of_strings, "tensor(string)"),
    "unknown_operator": (_unknown_operator, "Frobnicate"),
    "undefined_tensor": (_undefined_tensor, "nobody"),
    "cycle": (_cycle, "m.onnx"),
    "twice_defined": (_twice_defined, "r"),
    "output_undefined": (_output_undefined, "nobody"),
    "conv_without_weight": (_no_inputs_to_conv, "first"),
    "attribute_of_wrong_type": (_attribute_of_wrong_type, "pads"),
    "group_zero": (_group_zero, "group"),
    "opset_0": (_opset(0), "domain_version of 0"),
    "opset_6": (_opset(6), "opset"),
    "opset_negative": (_opset(-3), "domain_version of -3"),
    "opset_of_the_future": (_opset(1000), "opset"),
    "no_opset": (_no_opset, "opset"),
    "shape_mismatch": (_shape_mismatch, "takes another"),
    "empty_model": (_no_nodes_at_all, "m.onnx"),
}

# --- odd but valid

Make = Callable[[], onnx.ModelProto]
ODD: dict[str, Make] = {}


def odd(make: Make) -> Make:
    """Registers a case under the function's name."""
    ODD[make.__name__] = make
    return make


for _version in (7, 8, 9, 10, 11, 12, 13, 15, 18, 20, 21, 22, 23, 24, 25, 26):
    ODD[f"opset_{_version}"] = lambda version=_version: plain(version)


@odd
def unnamed_nodes() -> onnx.ModelProto:
    model = plain()
    for each in model.graph.node:
        each.name = ""
    return model


@odd
def unsorted_nodes() -> onnx.ModelProto:
    model = plain()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@odd
def no_graph_name() -> onnx.ModelProto:
    model = plain()
    model.graph.name = ""
    return model


@odd
def no_declared_output_shape() -> onnx.ModelProto:
    """As exporters leave it out where inference finds it."""
    model = plain()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


@odd
def one_name_for_all_nodes() -> onnx.ModelProto:
    model = plain()
    for each in model.graph.node:
        each.name = "n"
    return model


@odd
def nodes_named_like_tensors() -> onnx.ModelProto:
    model = plain()
    for each, name in zip(model.graph.node, ("w", "x", "y", "w_quantized", "r_scale"), strict=True):
        each.name = name
    return model


@odd
def hostile_names() -> onnx.ModelProto:
    """Names that are HTML, formulas, paths, format strings, control characters."""
    model = plain()
    names = [
        "<script>alert(1)</script>",
        "=1+1",
        "../../etc/passwd",
        "%s%n{0}\n\x00",
        '"; DROP TABLE nodes; --',
    ]
    for each, name in zip(model.graph.node, names, strict=True):
        each.name = name
        if each.output[0] != "y":
            old, each.output[0] = each.output[0], name
            for other in model.graph.node:
                other.input[:] = [name if value == old else value for value in other.input]
    return model


@odd
def weights_as_inputs() -> onnx.ModelProto:
    model = plain()
    for weight in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, FLOAT, weight.dims))
    return model


@odd
def constant_nodes() -> onnx.ModelProto:
    model = plain()
    made = [
        helper.make_node("Constant", [], [weight.name], value=weight)
        for weight in model.graph.initializer
    ]
    nodes = [*made, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@odd
def functions() -> onnx.ModelProto:
    body = [node("Conv", "x,w", "c", "conv", pads=[1, 1, 1, 1]), node("Relu", "c", "y", "relu")]
    block = helper.make_function(
        "local", "Block", ["x", "w"], ["y"], body, [helper.make_opsetid("", 17)]
    )
    nodes = [
        helper.make_node("Block", ["x", "w"], ["a"], domain="local"),
        node("Flatten", "a", "f"),
    ]
    nodes += [node("Gemm", "f,m", "y", "last")]
    arrays = {"w": normal(20, 3, 3, 3) / 5, "m": normal(1280, 20) / 36}
    local = [helper.make_opsetid("local", 1)]
    return model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], arrays, imports=local, functions=[block])


def _in_type(dtype: int, opset: int = 17) -> onnx.ModelProto:
    model = plain(opset)
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if dtype == HALF:
            weight.CopyFrom(numpy_helper.from_array(array.astype(np.float16), weight.name))
        else:
            weight.CopyFrom(helper.make_tensor(weight.name, dtype, array.shape, array.ravel()))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = dtype
    return model


@odd
def float16() -> onnx.ModelProto:
    return _in_type(HALF)


@odd
def bfloat16() -> onnx.ModelProto:
    return _in_type(BFLOAT16, 22)


@odd
def double() -> onnx.ModelProto:
    model = _in_type(TensorProto.DOUBLE)
    return model


@odd
def float16_inside() -> onnx.ModelProto:
    """float32 at the edges, float16 between Casts."""
    nodes = [
        node("Cast", "x", "h", "down", to=HALF),
        node("Conv", "h,w", "c", "conv"),
        node("Cast", "c", "y", "up", to=FLOAT),
    ]
    return model_of(
        nodes, {"x": (1, 3, 8, 8)}, ["y"], {"w": (normal(20, 3, 3, 3) / 5).astype(np.float16)}
    )


@odd
def empty_tensors() -> onnx.ModelProto:
    """An empty weight, an empty constant that is joined, and a part of the model that computes
    nothing.
    """
    nodes = [
        node("Conv", "x,w", "c", "conv"),
        node("Concat", "c,e", "j", "join", axis=1),
        node("Slice", "j,zero,zero", "s", "nothing"),
        node("ReduceSum", "s", "t", "sum", keepdims=0),
        node("Flatten", "j", "f", "flat"),
        node("MatMul", "f,m", "p", "product"),
        node("Add", "p,t", "y", "add"),
    ]
    arrays = {
        "w": normal(20, 3, 3, 3) / 5,
        "e": normal(1, 0, 6, 6),
        "zero": np.array([0]),
        "m": normal(720, 20) / 27,
    }
    return model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], arrays)


@odd
def empty_activation() -> onnx.ModelProto:
    """A product of no rows, whose sum is added."""
    nodes = [
        node("Slice", "x,zero,zero,zero", "s", "nothing"),
        node("MatMul", "s,w", "e", "empty"),
        node("ReduceSum", "e,zero", "t", "sum", keepdims=1),
        node("MatMul", "x,w", "p", "product"),
        node("Add", "p,t", "y", "add"),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 20), "zero": np.array([0])})


@odd
def empty_product() -> onnx.ModelProto:
    """A matrix product over no columns: its result is zeros."""
    nodes = [node("MatMul", "x,w", "h", "nothing"), node("MatMul", "h,v", "y", "zeros")]
    return model_of(nodes, {"x": (2, 40)}, ["y"], {"w": normal(40, 0), "v": normal(0, 30)})


@odd
def zero_batch() -> onnx.ModelProto:
    """A fixed dimension of size zero in the input."""
    model = plain()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 0
    return model


@odd
def dynamic_everything() -> onnx.ModelProto:
    nodes = [
        node("Conv", "x,w", "c", "conv"),
        node("GlobalAveragePool", "c", "p", "pool"),
        node("Flatten", "p", "f", "flat"),
        node("Gemm", "f,m", "y", "last"),
    ]
    arrays = {"w": normal(20, 3, 3, 3) / 5, "m": normal(20, 18)}
    return model_of(nodes, {"x": ("n", 3, "h", "w")}, ["y"], arrays)


@odd
def no_shapes() -> onnx.ModelProto:
    model = plain()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model


@odd
def no_output_shape() -> onnx.ModelProto:
    model = unknown_domain()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


@odd
def undeclared_output() -> onnx.ModelProto:
    """An output whose shape follows from the graph."""
    model = plain()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


@odd
def runtime_normalization() -> onnx.ModelProto:
    """An operator of a later opset, as files that ONNX Runtime's optimizer wrote have."""
    nodes = [
        node("MatMul", "x,w", "h", "first"),
        node("LayerNormalization", "h,g,c", "n", "norm"),
        node("MatMul", "n,v", "y", "second"),
    ]
    arrays = {
        "w": normal(30, 40) / 5,
        "g": np.ones(40, np.float32),
        "c": np.zeros(40, np.float32),
        "v": normal(40, 30) / 6,
    }
    return model_of(nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 30), opset=12)


@odd
def negative_dimension() -> onnx.ModelProto:
    """A dimension written as -1, as Paddle exports it."""
    model = plain()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    return model


@odd
def default_input() -> onnx.ModelProto:
    """An input with a value for when nothing is fed, beside weights that are none."""
    nodes = [
        node("MatMul", "x,w", "h", "first"),
        node("Mul", "h,gain", "g", "scaled"),
        node("MatMul", "g,v", "y", "second"),
    ]
    arrays = {"w": normal(30, 40) / 5, "gain": np.float32(1.5), "v": normal(40, 30) / 6}
    model = model_of(nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 30))
    model.graph.input.append(helper.make_tensor_value_info("gain", 1, []))
    return model


@odd
def half_constants() -> onnx.ModelProto:
    """float16 in the attributes of operators."""
    kinds = onnx.TensorProto
    filler = onnx.numpy_helper.from_array(np.array([0.5], np.float16))
    nodes = [
        node("MatMul", "x,w", "h", "first"),
        node("Shape", "h", "s", "shape"),
        helper.make_node("ConstantOfShape", ["s"], ["k"], "filled", value=filler),
        node("Add", "h,k", "a", "sum"),
        helper.make_node("RandomUniformLike", ["a"], ["r"], "noise", dtype=10, low=0.0, high=0.0),
        node("Add", "a,r", "b", "noisy"),
        node("MatMul", "b,v", "y", "second"),
    ]
    arrays = {"w": (normal(30, 40) / 5).astype("f2"), "v": (normal(40, 30) / 6).astype("f2")}
    model = model_of(nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 30))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kinds.FLOAT16
    return model


@odd
def custom_operator() -> onnx.ModelProto:
    """An operator that only ONNX Runtime has, between two products."""
    nodes = [
        node("MatMul", "x,w", "h", "first"),
        helper.make_node("Gelu", ["h"], ["g"], "gelu", domain="com.microsoft"),
        node("MatMul", "g,v", "y", "second"),
    ]
    arrays = {"w": normal(30, 40) / 5, "v": normal(40, 30) / 6}
    return model_of(
        nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 30), imports=[_id("com.microsoft")]
    )


@odd
def unknown_domain() -> onnx.ModelProto:
    """An operator that no runtime here knows: nothing can run, but weights can be stored in fewer
    bits.
    """
    nodes = [
        node("MatMul", "x,w", "h", "first"),
        helper.make_node("Secret", ["h"], ["g"], "secret", domain="acme"),
        node("MatMul", "g,v", "y", "second"),
    ]
    arrays = {"w": normal(30, 40) / 5, "v": normal(40, 30) / 6}
    return model_of(
        nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 30), imports=[_id("acme")]
    )


@odd
def quantized_already() -> onnx.ModelProto:
    """Q/DQ around a convolution with int8 weights."""
    arrays = {
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "wq": np.clip(np.rint(normal(20, 3, 3, 3) * 40), -127, 127).astype(np.int8),
        "ws": np.full(20, 0.005, np.float32),
        "wz": np.zeros(20, np.int8),
        "m": normal(720, 20) / 27,
    }
    nodes = [
        node("QuantizeLinear", "x,s,z", "xq", "q"),
        node("DequantizeLinear", "xq,s,z", "xd", "dq"),
        node("DequantizeLinear", "wq,ws,wz", "w", "wdq", axis=0),
        node("Conv", "xd,w", "c", "conv"),
        node("Flatten", "c", "f", "flat"),
        node("MatMul", "f,m", "y", "last"),
    ]
    return model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], arrays)


@odd
def quantized_operators() -> onnx.ModelProto:
    """QLinearMatMul, as tools wrote before Q/DQ."""
    arrays = {
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "w": np.random.default_rng(0).integers(100, 150, (30, 40)).astype(np.uint8),
    }
    nodes = [
        node("QuantizeLinear", "x,s,z", "xq", "q"),
        node("QLinearMatMul", "xq,s,z,w,s,z,s,z", "yq", "product"),
        node("DequantizeLinear", "yq,s,z", "y", "dq"),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], arrays)


@odd
def quantized_dynamically() -> onnx.ModelProto:
    arrays = {
        "w": np.random.default_rng(0).integers(-100, 100, (30, 40)).astype(np.int8),
        "ws": np.float32(0.01),
    }
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq,xs,xz", "q"),
        node("MatMulInteger", "xq,w,xz", "p", "product"),
        node("Cast", "p", "pf", "cast", to=FLOAT),
        node("Mul", "xs,ws", "s", "scale"),
        node("Mul", "pf,s", "y", "restore"),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], arrays)


def _batch_norm(opset: int, outputs: str, **attributes: object) -> onnx.ModelProto:
    arrays = {
        "w": normal(20, 3, 3, 3) / 5,
        "g": normal(20) ** 2 + 0.5,
        "b": normal(20),
        "m": normal(20),
    }
    arrays["v"] = normal(20, seed=1) ** 2 + 0.5
    nodes = [
        node("Conv", "x,w", "c", "conv"),
        node("BatchNormalization", "c,g,b,m,v", outputs, "norm", **attributes),
        node("Relu", "n", "y", "relu"),
    ]
    return model_of(nodes, {"x": (2, 3, 8, 8)}, ["y"], arrays, opset)


@odd
def batch_norm_in_training() -> onnx.ModelProto:
    return _batch_norm(15, "n,mo,vo", training_mode=1)


@odd
def batch_norm_in_training_before_opset_14() -> onnx.ModelProto:
    return _batch_norm(9, "n,mo,vo,sm,sv")


@odd
def batch_norm_of_no_variance() -> onnx.ModelProto:
    model = _batch_norm(15, "n", epsilon=0.0)
    variance = next(t for t in model.graph.initializer if t.name == "v")
    array = numpy_helper.to_array(variance).copy()
    array[:3] = 1e-30
    variance.CopyFrom(numpy_helper.from_array(array, "v"))
    return model


@odd
def dropout_in_training() -> onnx.ModelProto:
    nodes = [node("MatMul", "x,w", "h", "product"), node("Dropout", "h,r,t", "y", "drop", seed=1)]
    arrays = {"w": normal(30, 40) / 5, "r": np.float32(0), "t": np.array(True)}
    return model_of(nodes, {"x": (4, 30)}, ["y"], arrays)


@odd
def tied_weights() -> onnx.ModelProto:
    """One matrix for two products and, transposed, a Gemm; one bias for all."""
    nodes = [
        node("Gemm", "x,w,b", "h", "first"),
        node("Relu", "h", "r", "relu"),
        node("Gemm", "r,w,b", "k", "second", transB=1),
        node("MatMul", "k,w", "p", "third"),
        node("Add", "p,b", "y", "add"),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 30) / 5, "b": normal(30)})


@odd
def tied_embedding() -> onnx.ModelProto:
    """A table that tokens are looked up in and that, transposed, gives the logits."""
    nodes = [
        node("Gather", "t,i", "e", "embed"),
        node("Gemm", "e,w", "h", "hidden"),
        node("Transpose", "t", "u", "transpose", perm=[1, 0]),
        node("MatMul", "h,u", "y", "logits"),
    ]
    arrays = {"t": normal(50, 20), "w": normal(20, 20) / 4}
    return model_of(nodes, {"i": (6,)}, ["y"], arrays, dtype=TensorProto.INT64, output=FLOAT)


@odd
def a_weight_is_an_output() -> onnx.ModelProto:
    model = plain()
    model.graph.output.append(helper.make_tensor_value_info("w", FLOAT, (20, 3, 3, 3)))
    return model


@odd
def an_input_is_an_output() -> onnx.ModelProto:
    model = plain()
    model.graph.output.append(helper.make_tensor_value_info("x", FLOAT, (1, 3, 8, 8)))
    return model


@odd
def one_output_twice() -> onnx.ModelProto:
    model = plain()
    model.graph.output.append(model.graph.output[0])
    return model


@odd
def every_tensor_is_an_output() -> onnx.ModelProto:
    model = plain()
    names = [name for each in model.graph.node[:-1] for name in each.output]
    model.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    return model


def _with_bias(shape: tuple[int, ...]) -> Make:
    def make() -> onnx.ModelProto:
        nodes = [
            node("Gemm", "x,w,b", "h", "first"),
            node("Relu", "h", "r"),
            node("Gemm", "r,w,b", "y", "second"),
        ]
        return model_of(
            nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 30) / 5, "b": normal(*shape)}
        )

    return make


def _with_added_bias(shape: tuple[int, ...]) -> Make:
    def make() -> onnx.ModelProto:
        nodes = [
            node("MatMul", "x,w", "p", "first"),
            node("Add", "b,p", "h", "add"),
            node("MatMul", "h,w", "y"),
        ]
        return model_of(
            nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 30) / 5, "b": normal(*shape)}
        )

    return make


for _shape in ((), (1,), (30,), (1, 1), (1, 30), (4, 1), (4, 30)):
    ODD[f"gemm_bias_{'x'.join(map(str, _shape)) or 'scalar'}"] = _with_bias(_shape)
    ODD[f"added_bias_{'x'.join(map(str, _shape)) or 'scalar'}"] = _with_added_bias(_shape)
ODD["added_bias_1x4x30"] = _with_added_bias((1, 4, 30))


def _weights_with(**values: tuple[str, float]) -> Make:
    def make() -> onnx.ModelProto:
        model = plain()
        for place, (name, value) in values.items():
            weight = next(t for t in model.graph.initializer if t.name == name)
            array = numpy_helper.to_array(weight).copy()
            array.flat[slice(None) if place == "all" else 0] = value
            weight.CopyFrom(numpy_helper.from_array(array, name))
        return model

    return make


ODD |= {
    "nan_weight": _weights_with(one=("w", np.nan)),
    "infinite_weight": _weights_with(one=("v", np.inf)),
    "nan_bias": _weights_with(one=("b", np.nan)),
    "infinite_bias": _weights_with(one=("b", -np.inf)),
    "zero_weights": _weights_with(all=("w", 0.0)),
    "zero_matrix": _weights_with(all=("m", 0.0)),
    "constant_weights": _weights_with(all=("v", 0.01)),
    "tiny_weights": _weights_with(all=("v", 1e-38)),
    "huge_weights": _weights_with(all=("v", 1e37)),
    "one_huge_weight": _weights_with(one=("v", 1e20)),
    "denormal_weights": _weights_with(all=("w", 1e-42)),
    "huge_bias": _weights_with(one=("b", 1e9)),
}


@odd
def infinity_in_a_mask() -> onnx.ModelProto:
    """An attention mask of minus infinity is no mistake."""
    nodes = [
        node("MatMul", "x,w", "h", "scores"),
        node("Add", "h,k", "a", "mask"),
        node("Softmax", "a", "s", "softmax"),
        node("MatMul", "s,v", "y", "values"),
    ]
    mask = np.triu(np.full((30, 30), -np.inf, np.float32), 1)
    return model_of(
        nodes, {"x": (30, 40)}, ["y"], {"w": normal(40, 30) / 6, "k": mask, "v": normal(30, 20)}
    )


@odd
def scalar_input() -> onnx.ModelProto:
    nodes = [node("Mul", "x,w", "h", "mul"), node("MatMul", "h,v", "y", "product")]
    return model_of(nodes, {"x": ()}, ["y"], {"w": normal(4, 30), "v": normal(30, 20)})


@odd
def no_weights() -> onnx.ModelProto:
    return model_of([node("Relu", "x", "y", "relu")], {"x": (2, 3)}, ["y"], {})


@odd
def no_nodes() -> onnx.ModelProto:
    return model_of([], {"x": (2, 3)}, ["x"], {}, output_shape=(2, 3))


@odd
def no_inputs() -> onnx.ModelProto:
    nodes = [
        node("RandomNormal", "", "r", "noise", shape=[4, 30], seed=1.0),
        node("MatMul", "r,w", "y", "product"),
    ]
    nodes[0].ClearField("input")
    return model_of(nodes, {}, ["y"], {"w": normal(30, 20)})


@odd
def everything_is_constant() -> onnx.ModelProto:
    nodes = [node("MatMul", "a,w", "y", "product"), node("Relu", "x", "z", "relu")]
    return model_of(nodes, {"x": (2,)}, ["y", "z"], {"a": normal(4, 30), "w": normal(30, 20)})


@odd
def unused_parts() -> onnx.ModelProto:
    model = plain()
    model.graph.node.append(node("Conv", "x,w", "nobody", "dead"))
    model.graph.initializer.append(numpy_helper.from_array(normal(100, 100), "unread"))
    model.graph.input.append(helper.make_tensor_value_info("unread_input", FLOAT, (2,)))
    return model


@odd
def integer_products() -> onnx.ModelProto:
    """MatMul of integers is no float product."""
    nodes = [node("MatMul", "x,w", "y", "product")]
    return model_of(
        nodes, {"x": (4, 30)}, ["y"], {"w": np.arange(600).reshape(30, 20)}, dtype=TensorProto.INT64
    )


@odd
def string_input() -> onnx.ModelProto:
    nodes = [
        node("Equal", "x,k", "e", "equal"),
        node("Cast", "e", "f", "cast", to=FLOAT),
        node("MatMul", "f,w", "y"),
    ]
    model = model_of(
        nodes,
        {"x": (4, 30)},
        ["y"],
        {"w": normal(30, 20)},
        19,
        dtype=TensorProto.STRING,
        output=FLOAT,
    )
    model.graph.initializer.append(helper.make_tensor("k", TensorProto.STRING, [1], [b"a"]))
    return model


@odd
def sequences() -> onnx.ModelProto:
    nodes = [
        node("MatMul", "x,w", "h", "product"),
        node("SplitToSequence", "h", "s", "split", axis=0),
        node("ConcatFromSequence", "s", "y", "join", axis=0),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 20)})


@odd
def optional_type() -> onnx.ModelProto:
    nodes = [
        node("MatMul", "x,w", "h", "product"),
        node("Optional", "h", "o", "wrap"),
        node("OptionalGetElement", "o", "y", "unwrap"),
    ]
    return model_of(nodes, {"x": (4, 30)}, ["y"], {"w": normal(30, 20)}, 18)


@odd
def sparse_weight() -> onnx.ModelProto:
    """A weight stored as a sparse initializer."""
    model = plain()
    values = numpy_helper.from_array(np.array([1.0, 2.0, 3.0], np.float32), "b")
    indices = numpy_helper.from_array(np.array([1, 5, 7]), "indices")
    sparse = helper.make_sparse_tensor(values, indices, [20])
    kept = [t for t in model.graph.initializer if t.name != "b"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.sparse_initializer.append(sparse)
    return model


@odd
def branches_of_if() -> onnx.ModelProto:
    """Products in both branches, one with a weight from outside, names used twice."""

    def branch(weight: str, own: bool) -> onnx.GraphProto:
        inner = [numpy_helper.from_array(normal(30, 20, seed=2), weight)] if own else []
        output = helper.make_tensor_value_info("p", FLOAT, None)
        return helper.make_graph(
            [node("MatMul", f"h,{weight}", "p", "product")], "b", [], [output], inner
        )

    condition = node("Greater", "s,zero", "k", "greater")
    choose = helper.make_node(
        "If", ["k"], ["c"], "if", then_branch=branch("v", False), else_branch=branch("u", True)
    )
    nodes = [
        node("MatMul", "x,w", "h", "product"),
        node("ReduceSum", "h", "s", "sum", keepdims=0),
        condition,
        choose,
    ]
    arrays = {
        "w": normal(30, 30) / 5,
        "v": normal(30, 20),
        "zero": np.float32(0),
        "t": normal(20, 20),
    }
    return model_of([*nodes, node("MatMul", "c,t", "y", "last")], {"x": (4, 30)}, ["y"], arrays)


@odd
def loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [
            node("MatMul", "h,w", "o", "product"),
            node("Tanh", "o", "ho", "tanh"),
            node("Identity", "c", "co"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("c", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("h", FLOAT, (4, 30)),
        ],
        [
            helper.make_tensor_value_info("co", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("ho", FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Loop", ["n", "k", "x"], ["l"], "loop", body=body),
        node("MatMul", "l,v", "y", "last"),
    ]
    arrays = {"w": normal(30, 30) / 5, "v": normal(30, 20), "n": np.array(3), "k": np.array(True)}
    return model_of(nodes, {"x": (4, 30)}, ["y"], arrays, output_shape=(4, 20))


@odd
def recurrent() -> onnx.ModelProto:
    nodes = [node("LSTM", "x,w,r,b", "h", "lstm", hidden_size=20), node("Squeeze", "h,one", "s")]
    nodes.append(node("MatMul", "s,m", "y", "last"))
    arrays = {
        "w": normal(1, 80, 10) / 3,
        "r": normal(1, 80, 20) / 4,
        "b": normal(1, 160),
        "one": np.array([1]),
    }
    return model_of(nodes, {"x": (5, 2, 10)}, ["y"], {**arrays, "m": normal(20, 18)})


@odd
def computed_weight() -> onnx.ModelProto:
    nodes = [node("Conv", "x,w", "y", "conv")]
    return model_of(nodes, {"x": (1, 3, 8, 8), "w": (20, 3, 3, 3)}, ["y"], {})


@odd
def a_thousand_nodes() -> onnx.ModelProto:
    nodes, arrays, last = [], {}, "x"
    for index in range(250):
        arrays[f"w{index}"] = normal(8, 8, 1, 1, seed=index) / 3
        nodes += [
            node("Conv", f"{last},w{index}", f"c{index}", f"conv{index}"),
            node("Relu", f"c{index}", f"r{index}"),
        ]
        nodes += [
            node("Add", f"r{index},{last}", f"a{index}"),
            node("Tanh", f"a{index}", f"t{index}"),
        ]
        last = f"t{index}"
    return model_of(nodes, {"x": (1, 8, 4, 4)}, [last], arrays)


@odd
def deep_graphs() -> onnx.ModelProto:
    """Twelve graphs, one in another."""
    inner = _leaf()
    output = helper.make_tensor_value_info("y", FLOAT, None)
    for level in range(12):
        branch = helper.make_node(
            "If", ["k"], ["y"], f"n{level}", then_branch=inner, else_branch=_leaf()
        )
        inner = helper.make_graph([branch], "g", [], [output])
    return model_of(list(inner.node), {"x": (2,)}, ["y"], {"k": np.array(True)})
