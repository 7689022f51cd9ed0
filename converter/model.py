"""Loading, saving and asking about ONNX models; the only module that reads or writes model files."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from calib.affine import Array
from converter.errors import ModelError

# A protobuf message ends at 2 GiB; above this many bytes of weights the tensors go to a file beside the model.
EXTERNAL_DATA_ABOVE = 1_500_000_000


def load(path: Path) -> ir.Model:
    """The model at `path`, in memory but for external weights of a large model (mapped); raises ModelError."""
    if not path.is_file():
        msg = f"{path}: there is no such model file; check --modelFile."
        raise ModelError(msg)
    try:
        model = ir.load(path)
        # An empty or foreign file can parse as a message without a graph.
        if not model.graph.outputs:
            msg = f"{path}: this is not an ONNX model (it has no graph outputs)."
            raise ModelError(msg)
        return model if weight_bytes(model) > EXTERNAL_DATA_ABOVE else ir.external_data.load_to_model(model)
    except ModelError:
        raise
    except Exception as error:
        msg = f"{path}: this is not a readable ONNX model ({first_line(error)})."
        raise ModelError(msg) from error


def save(model: ir.Model, path: Path) -> None:
    """Writes `model` beside `path` under a temporary name, then renames: the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        _write(model, Path(folder) / path.name)
        check(Path(folder) / path.name)
        # The weights first: a model file never stands without them.
        for part in sorted(Path(folder).iterdir(), reverse=True):
            part.replace(path.parent / part.name)


def _write(model: ir.Model, path: Path) -> None:
    """One file, or two where the weights are too many for one."""
    if weight_bytes(model) > EXTERNAL_DATA_ABOVE:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        # What is still in the float model's data file would be written as a reference to it.
        ir.save(ir.external_data.load_to_model(model), path)


def check(path: Path) -> None:
    """Raises ModelError where the ONNX checker does not accept the file."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        msg = f"The converted model is not valid ONNX: {first_line(error)}."
        raise ModelError(msg) from error


@contextlib.contextmanager
def saved(model: ir.Model, taps: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary file of `model` whose tensors `taps` are graph outputs as well."""
    clone = model.clone()
    known = {value.name for value in clone.graph.outputs}
    values = values_by_name(clone.graph)
    clone.graph.outputs.extend(values[name] for name in dict.fromkeys(taps) if name not in known)
    with tempfile.TemporaryDirectory(prefix="qconvert-") as folder:
        path = Path(folder) / "model.onnx"
        _write(clone, path)
        yield path


def submodel(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """A copy of the part of `model` between tensors; it shares the weights' memory."""
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    return ir.Model(graph, ir_version=model.ir_version)


def serialized(model: ir.Model) -> bytes:
    """The model as bytes; it must be small."""
    return bytes(ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString())


def serialized_parts(model: ir.Model) -> Iterator[bytes]:
    """The graph and then every weight as bytes, for fingerprints: a model of any size."""
    for graph in model.graphs():
        for node in graph:
            names = [v and v.name for v in (*node.inputs, *node.outputs)]
            yield repr((node.op_identifier(), names, node.attributes)).encode()
        for name, value in graph.initializers.items():
            yield (name or "").encode()
            yield value.const_value.tobytes() if value.const_value else b""


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every named value of the top-level graph: inputs, initializers and node outputs."""
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name: value for value in values if value.name}


def values_read(node: ir.Node) -> list[ir.Value]:
    """The values of its own graph that `node` reads, those that its subgraphs take from there included."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inner = [n for graph in graphs for n in graph.all_nodes()]
    return [v for n in (node, *inner) for v in n.inputs if v is not None and v.graph is node.graph]


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of its tensors in other files."""
    tensors = [v.const_value for g in ir.load(path).graphs() for v in g.initializers.values()]
    return path.stat().st_size + sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(v.const_value.nbytes for g in model.graphs() for v in g.initializers.values() if v.const_value)


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer, None for anything computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def is_float(value: ir.Value | None) -> bool:
    """Whether the value holds float32 (an unknown type counts: exporters often leave it out)."""
    return value is not None and value.dtype in (None, ir.DataType.FLOAT)


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, None if there are several, it is a graph output or read in a subgraph."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    reader = next(iter(value.uses())).node
    return reader if reader.graph is value.graph else None


class Names:
    """Hands out names that no value or node of the model bears, subgraphs included."""

    def __init__(self, model: ir.Model) -> None:
        nodes = [node for graph in model.graphs() for node in graph.all_nodes()]
        values = [v for g in model.graphs() for v in (*g.inputs, *g.initializers.values())]
        self._taken = {n.name for n in nodes} | {v.name for n in nodes for v in n.outputs} | {v.name for v in values}

    def fresh(self, wish: str) -> str:
        """`wish`, or the first free of `wish_2`, `wish_3`, …; taken from now on."""
        name = wish
        for number in itertools.count(2):
            if name not in self._taken:
                break
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name


def add_constant(graph: ir.Graph, name: str, array: Array, kind: ir.DataType | None = None) -> ir.Value:
    """Registers an initializer, stored as `kind` where given; `name` must be free (see Names)."""
    tensor = ir.tensor(np.asarray(array, order="C"), kind, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def bias_add(node: ir.Node) -> ir.Node | None:
    """The Add that gives a MatMul with constant right operand one constant bias a channel."""
    weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
    add = only_consumer(node.outputs[0])
    if weight is None or weight.ndim != 2 or add is None or add.op_type != "Add" or add.domain:
        return None
    bias, shape = constant(next(v for v in add.inputs if v is not node.outputs[0])), node.outputs[0].shape
    # A bias of more dimensions than the product would add them to it.
    if bias is None or not 1 <= bias.ndim <= (shape.rank() if shape else 1):
        return None
    return add if bias.size == bias.shape[-1] == weight.shape[1] else None


def replace_constant(node: ir.Node, index: int, array: Array, names: Names) -> None:
    """Gives `node` another constant operand; a node that reads the same constant keeps the old one."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value, old.shape = ir.tensor(array, name=old.name), ir.Shape(array.shape)
        return
    assert isinstance(node.graph, ir.Graph)
    name = names.fresh(old.name if old and old.name else f"{node.name}.bias")
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, add_constant(node.graph, name, array))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a closing full stop."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(". ") if text else type(error).__name__
