"""Loading, saving and asking about ONNX models; the only module that reads or writes model files,
with `mapped`, which reads large ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from calib import CalibError
from calib.affine import Array
from calib.session import open_session
from converter.errors import ModelError, QConvertError, UsageError
from converter.graph import mapped
from converter.graph.edit import initializers_of, not_none, values_by_name, weight_bytes
from converter.job import Watch

# Puts a tensor in the place of another.
Put = Callable[[ir.TensorProtocol], None]


# A protobuf message ends at 2 GiB; above this many bytes of weights the tensors go to a file beside
# the model.
EXTERNAL_DATA_ABOVE = 1_500_000_000


# The version of the standard operators in a model that imports none of them.
DEFAULT_OPSET = 13


# Where weights may begin in a file, so that runtimes can map them.
ALIGNMENT = 1 << 12


# Until this version of the file format every initializer is an input as well.
INITIALIZERS_ALONE = 4


# Where a model keeps the types of outputs that onnx_ir cannot hold, serialized, and the default
# values of inputs, both by name, and what the ONNX checker has against a model that runs.
MAPS = "types of maps"
DEFAULTS = "defaults of inputs"
UNCHECKED = "what the checker says"


# Operators whose outputs onnx_ir cannot hold.
MAKERS_OF_MAPS = {"ZipMap", "CastMap"}


# What the checker says of operators that only the runtime knows, in the version that is imported.
ONLY_RUNTIME = re.compile("No Op registered for|is deprecated in domain_version")


def load(path: Path, output: Path | None = None) -> ir.Model:
    """The valid model at `path`, in memory but for external weights of a large model (mapped).

    Raises ModelError, and UsageError where writing `output` would destroy one of the model's own
    files.
    """
    if not path.is_file():
        msg = f"{path}: there is no such model file; check --modelFile."
        raise ModelError(msg)
    if output is not None:
        _protect(path, output)
    try:
        model = _parsed(path)
        # An empty or foreign file can parse as a message without a graph.
        if not model.graph.outputs:
            msg = f"{path}: this is not an ONNX model (it has no graph outputs)."
            raise ModelError(msg)
        for name in _undefined(model):
            msg = (
                f"{path}: tensor '{name}' is read but nothing defines it (sparse weights are not "
                "supported)."
            )
            raise ModelError(msg)
        for tensor in _external_tensors(model, path):
            if output is not None:
                _protect(Path(tensor.path), output)
        _check_or_repair(model, path)
        return _brought_in(model)
    except (QConvertError, MemoryError):
        raise
    except Exception as error:
        msg = f"{path}: this is not a readable ONNX model ({first_line(error)})."
        raise ModelError(msg) from error


def _parsed(path: Path) -> ir.Model:
    """The model as it stands in the file, but that negative dimensions are unknown ones.

    onnx_ir knows no maps, as a ZipMap makes of probabilities: outputs of such types have none here,
    and get theirs back when the model is written. So do inputs with their default values, which
    are plain inputs here.
    """
    proto = mapped.read(path)
    graph = proto.graph
    maps = {value.name: value.type.SerializeToString() for value in _maps_in(graph.output)}
    for value in (*_maps_in(graph.output), *_maps_in(graph.value_info)):
        value.ClearField("type")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()
    model: ir.Model = ir.from_proto(proto)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == mapped.OWN:
            value.const_value = mapped.own_tensor(tensor, path)
    for node in model.graph.all_nodes():
        # A domain that is not imported, as some exporters forget: its first version is meant.
        model.graph.opset_imports.setdefault(node.domain, 1)
    model.graph.opset_imports.setdefault("", DEFAULT_OPSET)
    model.graph.meta[MAPS], model.graph.meta[DEFAULTS] = maps, _taken_defaults(model)
    return model


def _taken_defaults(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The values that inputs have where nothing is fed, taken out of the model.

    Some exporters still list every initializer as an input, as old formats wanted it: where all
    are, and there is a matrix among them, none is meant to be fed.
    """
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    shapes = [not_none(value.const_value).shape for value in listed]
    weights = any(sum(size != 1 for size in shape) > 1 for shape in shapes)
    all_are = len(listed) == len(model.graph.initializers)
    if model.ir_version < INITIALIZERS_ALONE or (all_are and weights):
        return {}
    defaults: dict[str, ir.TensorProtocol] = {}
    for value in listed:
        name = value.name or ""
        defaults[name] = not_none(value.const_value)
        del model.graph.initializers[name]
        value.const_value = None
    return defaults


def default_inputs(model: ir.Model) -> dict[str, Array]:
    """The values of inputs that need not be fed, by name."""
    return {name: tensor.numpy() for name, tensor in model.graph.meta.get(DEFAULTS, {}).items()}


def fed_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that have no value unless one is fed."""
    defaults = model.graph.meta.get(DEFAULTS, {})
    return [v for v in model.graph.inputs if not v.is_initializer() and v.name not in defaults]


def _maps_in(values: Iterable[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    """The values that are maps, or sequences of them."""

    def is_map(kind: onnx.TypeProto) -> bool:
        inner = kind.sequence_type if kind.HasField("sequence_type") else kind.optional_type
        nested = kind.HasField("sequence_type") or kind.HasField("optional_type")
        return kind.HasField("map_type") or (nested and is_map(inner.elem_type))

    return [value for value in values if is_map(value.type)]


def _protect(source: Path, output: Path) -> None:
    if output.exists() and source.exists() and output.samefile(source):
        msg = f"--outputFile {output} is the float model itself; give another name."
        raise UsageError(msg)


def _undefined(model: ir.Model) -> Iterator[str]:
    """Tensors that are read but neither computed, fed nor constant."""
    for value in (v for node in model.graph.all_nodes() for v in node.inputs if v is not None):
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            yield value.name or ""


def _external_tensors(model: ir.Model, path: Path) -> list[ir.ExternalTensor]:
    """The tensors in other files; raises ModelError for one that is not whole, or outside of the
    model's folder.

    From here on they are known by their real files: what is made of the model lies elsewhere.
    """
    external = list[ir.ExternalTensor]()
    for tensor, put in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and not isinstance(tensor, mapped.OwnTensor):
            tensor.base_dir = _home(tensor, path)
            if problem := _problem(tensor, path):
                msg = (
                    f"{path}: the weight '{tensor.name}' is kept in '{tensor.location}', which "
                    f"{problem}."
                )
                raise ModelError(msg)
            # onnx_ir follows no link out of the model's folder.
            put(_in_file(tensor, Path(tensor.path).resolve(), tensor.offset))
            external.append(tensor)
    return external


def _tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol | None, Put]]:
    """Every tensor that the model holds, with what puts another in its place."""
    defaults = model.graph.meta[DEFAULTS]
    for name in defaults:
        yield defaults[name], partial(defaults.__setitem__, name)
    yield from _graph_tensors(model)


def _graph_tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol | None, Put]]:
    """Those of initializers and attributes, also in subgraphs and functions."""
    functions = model.functions.values()
    inner = (graph for function in functions for graph in function.subgraphs())
    for value in (v for g in (*model.graphs(), *inner) for v in g.initializers.values()):
        yield value.const_value, partial(setattr, value, "const_value")
    nodes = (function.all_nodes() for function in functions)
    for node in itertools.chain(model.graph.all_nodes(), *nodes):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value, partial(_put_attribute, node, name)


def _put_attribute(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.AttrTensor(name, tensor)


def _home(tensor: ir.ExternalTensor, path: Path) -> Path:
    """The folder that a tensor's file is named in: the model's or, where nothing is there, that of
    the real file which a link of the model's name leads to.
    """
    folder, real = path.absolute().parent, path.resolve().parent
    return folder if os.path.lexists(folder / tensor.location) else real


def _in_file(tensor: ir.ExternalTensor, file: Path, offset: int | None) -> ir.ExternalTensor:
    """The tensor at another place."""
    return _external(tensor, file, offset, tensor.length)


def _external(
    tensor: ir.TensorProtocol, file: Path, offset: int | None, length: int | None
) -> ir.ExternalTensor:
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    return ir.ExternalTensor(
        file.name,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(sizes),
        name=tensor.name or "",
        base_dir=file.parent,
    )


def _brought_in(model: ir.Model) -> ir.Model:
    """The model with the tensors of other files in memory, but for the large weights of a large
    model, which stay mapped.
    """
    weights = (v.const_value for g in model.graphs() for v in g.initializers.values())
    least = mapped.LEAST_MAPPED if _are_many(model) else sys.maxsize
    kept = {id(tensor) for tensor in weights if tensor is not None and tensor.nbytes >= least}
    for tensor, put in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and id(tensor) not in kept:
            put(ir.external_data.convert_tensors_from_external([tensor])[0])
    return model


def _problem(tensor: ir.ExternalTensor, path: Path) -> str | None:
    """What is wrong with the file of an external tensor; a pipe or a device must not even be
    opened.

    Its name must lie inside of the model's folder. A link of that name may lead to where the real
    model file lies, as in the caches of model hubs, and nowhere else.
    """
    file, start = Path(tensor.path), tensor.offset or 0
    name = Path(os.path.normpath(tensor.location))
    homes = (path.absolute().parent.resolve(), path.resolve().parent)
    inside = any(file.resolve().is_relative_to(home) for home in homes)
    if name.is_absolute() or name.is_relative_to("..") or not inside:
        return (
            "is outside of the model's folder, where nothing is read; put the file beside the model"
        )
    if not file.is_file():
        return "is no file; put it beside the model"
    if file.stat().st_nlink > 1:
        return "has several names (hard links), which nothing is read through; copy the file"
    if (
        start < 0
        or tensor.length not in (None, tensor.nbytes)
        or start + tensor.nbytes > file.stat().st_size
    ):
        return f"does not hold its {tensor.nbytes} bytes; copy the whole file again"
    return None


def _check_or_repair(model: ir.Model, path: Path) -> None:
    """Raises ModelError for a file that is not valid ONNX, unless all that it lacks is order,
    shapes and a name, its weights are behind links, or the runtime takes it as it is.
    """
    try:
        _check_file(model, path)
    except ModelError as error:
        model.graph.name = model.graph.name or "graph"
        problem: ModelError | None = error
        with contextlib.suppress(Exception):
            common.TopologicalSortPass()(model)
            problem = _problem_of_copy(model, str(path))
        if problem and not ONLY_RUNTIME.search(str(problem)):
            raise problem from None
        if problem or any(value.shape is None for value in model.graph.outputs):
            _ask_runtime(model, problem or error)
        model.graph.meta.update({UNCHECKED: str(problem)} if problem else {})


def _check_file(model: ir.Model, path: Path) -> None:
    """Raises ModelError for a file that is not valid ONNX; of a large one a copy without weights
    is looked at.
    """
    tensors = (tensor for tensor, _ in _graph_tensors(model))
    if not any(isinstance(tensor, mapped.OwnTensor) for tensor in tensors):
        check(path, str(path))
    elif problem := _problem_of_copy(model, str(path)):
        raise problem


def _problem_of_copy(model: ir.Model, name: str) -> ModelError | None:
    """What the ONNX checker has against the model but for shapes that are not declared.

    It looks at no weights: a file of nothing stands for all other files.
    """
    complete, most = model.clone(), 0
    for value in (*complete.graph.inputs, *complete.graph.outputs):
        value.shape = value.shape or ir.Shape(())
    with tempfile.TemporaryDirectory(prefix="qconvert-") as folder:
        file, weights = Path(folder) / "model.onnx", Path(folder) / "weights"
        for tensor, put in _graph_tensors(complete):
            if isinstance(tensor, ir.ExternalTensor):
                put(_in_file(tensor, weights, 0))
                most = max(most, tensor.nbytes)
        with weights.open("wb") as stream:
            stream.truncate(most)
        ir.save(complete, file)
        _complete(file, complete)
        try:
            check(file, name)
        except ModelError as error:
            return error
    return None


def _ask_runtime(model: ir.Model, problem: ModelError) -> None:
    """Gives outputs without a shape the one that ONNX Runtime infers; raises `problem` where it
    does not take the model either.
    """
    try:
        with saved(_brought_in(model)) as file:
            session = open_session(file, optimize=False)
    except CalibError:
        raise problem from None
    outputs = {output.name: output.shape for output in session.get_outputs()}
    for value in model.graph.outputs:
        if value.shape is None and value.dtype is not None:
            sizes = [size if isinstance(size, int) else None for size in outputs[value.name]]
            value.shape = ir.Shape(sizes)


def save(
    model: ir.Model, path: Path, accept: Callable[[Path], None] = lambda written: None
) -> None:
    """Writes `model` beside `path` under a temporary name, then renames: the old file or the whole
    new one. `accept` may look at the new file before, and raise an error for one not to be kept.

    Weights in a file of their own have their fingerprint in its name: until the model file is
    replaced, the old one finds its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(path),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        data = f"{path.name}.{digest_of(model)[:16]}.data" if _is_large(model) else None
        _write(_told_once(model.clone()), Path(folder) / path.name, data)
        if UNCHECKED not in model.graph.meta:
            check(Path(folder) / path.name)
        accept(Path(folder) / path.name)
        # The weights first: a model file never stands without them.
        parts = sorted(Path(folder).iterdir(), reverse=True)
        for part in parts:
            part.replace(path.parent / part.name)
    kept = {part.name for part in parts}
    old = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    for other in path.parent.iterdir():
        if old.fullmatch(other.name) and other.name not in kept:
            other.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the disk that names no file, as a full one's, name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def digest_of(model: ir.Model, more: str = "") -> str:
    """SHA-256 over more, and the whole model."""
    digest = hashlib.sha256(more.encode())
    for part in _parts(model):
        digest.update(part)
    return digest.hexdigest()


def _is_large(model: ir.Model) -> bool:
    return weight_bytes(model) > EXTERNAL_DATA_ABOVE


def _are_many(model: ir.Model) -> bool:
    """Whether there are so many weights that they are better not held in memory."""
    return weight_bytes(model) > mapped.MAPPED_ABOVE


def _write(model: ir.Model, path: Path, data: str | None = None) -> None:
    """One file, or two where the weights are too many for one."""
    if _is_large(model):
        ir.save(model, path, external_data=data or f"{path.name}.data")
    else:
        # What is still in the float model's data file would be written as a reference to it.
        ir.save(mapped.in_memory(model), path)
    _complete(path, model)


def _told_once(model: ir.Model) -> ir.Model:
    """The model, whose constants have no types but their tensors': onnx_ir would write both."""
    for value in initializers_of(model):
        if not (value.is_graph_input() or value.is_graph_output()):
            value.shape = value.type = None
    return model


def _complete(path: Path, model: ir.Model) -> None:
    """Gives a written file what the model in memory keeps aside: types of maps and defaults."""
    if not (model.graph.meta.get(MAPS) or model.graph.meta.get(DEFAULTS)):
        return
    proto = onnx.load(path, load_external_data=False)
    for output in proto.graph.output:
        if kind := model.graph.meta.get(MAPS, {}).get(output.name):
            output.type.ParseFromString(kind)
    inputs = {value.name for value in proto.graph.input}
    for name, array in default_inputs(model).items():
        if name in inputs:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)


def check(path: Path, name: str = "The converted model") -> None:
    """Raises ModelError where the ONNX checker does not accept the file, which the message calls
    `name`.
    """
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        msg = f"{name} is not valid ONNX: {' '.join(str(error).split()).rstrip('. ')}."
        raise ModelError(msg) from error


def refusal(path: Path, optimize: bool = True) -> str | None:
    """Why ONNX Runtime does not load a file, None if it does."""
    try:
        open_session(path, optimize=optimize, pack=False)
    except CalibError as error:
        return str(error)
    return None


def accepting(float_model: Path, watch: Watch) -> Callable[[Path], None]:
    """A look at a file before it is kept: raises ModelError where ONNX Runtime refuses it but not
    the float model, warns where it refuses both.
    """

    def look(path: Path) -> None:
        if (reason := refusal(path)) is None:
            return
        if refusal(float_model) is None:
            msg = f"The converted model is not written, as it would not load: {reason}"
            raise ModelError(msg)
        watch.warn(f"Neither the float model nor the converted one can be tried: {reason}")

    return look


@contextlib.contextmanager
def saved(model: ir.Model, taps: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary file of `model` whose tensors `taps` are graph outputs as well."""
    clone = model.clone()
    known = {value.name for value in clone.graph.outputs}
    values = values_by_name(clone.graph)
    clone.graph.outputs.extend(values[name] for name in dict.fromkeys(taps) if name not in known)
    with contextlib.ExitStack() as stack:
        if _are_many(clone):
            weights = _WEIGHTS.get() or stack.enter_context(weights_written_once())
            path = weights.model(clone)
            stack.callback(path.unlink)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qconvert-"))
            path = Path(folder) / "model.onnx"
            _write(clone, path)
        yield path


@contextlib.contextmanager
def weights_written_once() -> Iterator[_Weights]:
    """While it lasts, temporary files of models with many weights share one file of these."""
    with tempfile.TemporaryDirectory(prefix="qconvert-") as folder:
        token = _WEIGHTS.set(weights := _Weights(Path(folder)))
        try:
            yield weights
        finally:
            _WEIGHTS.reset(token)


class _Weights:
    """A file of weights that models in the same folder refer to."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "weights"
        self._file.touch()
        self._held = dict[int, tuple[ir.TensorProtocol, ir.ExternalTensor]]()
        self._numbers = itertools.count()

    def model(self, model: ir.Model) -> Path:
        """Writes the model without its large weights, which it refers to from here on."""
        for value in initializers_of(model):
            if value.const_value is not None and value.const_value.nbytes >= mapped.LEAST_MAPPED:
                value.const_value = self._written(value.const_value)
        path = self._file.with_name(f"model{next(self._numbers)}.onnx")
        ir.save(model, path)
        _complete(path, model)
        return path

    def _written(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        if id(tensor) not in self._held:
            # Not to append: the system's way of copying between files refuses that.
            with self._file.open("r+b") as file:
                start = -(-file.seek(0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT
                file.seek(start)
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.tofile(file)
                else:
                    file.write(tensor.tobytes())
            written = _external(tensor, self._file, start, tensor.nbytes)
            # The tensor as well, or another could get its id.
            self._held[id(tensor)] = tensor, written
        return self._held[id(tensor)][1]


# The file that temporary models share at the time.
_WEIGHTS: ContextVar[_Weights | None] = ContextVar("weights", default=None)


def serialized(model: ir.Model) -> bytes:
    """The model as bytes; it must be small."""
    return bytes(ir.to_proto(mapped.in_memory(model)).SerializeToString())


def _parts(model: ir.Model) -> Iterator[bytes]:
    """The graph and then every weight as bytes: a model of any size."""
    for graph in model.graphs():
        for node in graph:
            names = [v and v.name for v in (*node.inputs, *node.outputs)]
            yield repr((node.op_identifier(), names, node.attributes)).encode()
        for name, value in graph.initializers.items():
            yield (name or "").encode()
            yield value.const_value.tobytes() if value.const_value else b""


def model_bytes(model: ir.Model) -> int:
    """Bytes of a model's file with all weights in it, within one for each of them."""
    graph, size = _told_once(model.clone()), 0
    for value in initializers_of(graph):
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            # Two lengths become longer: that of the numbers and that of all about the tensor.
            size += tensor.nbytes + 2 * (len(mapped.varint(tensor.nbytes)) - 1)
            value.const_value = _without_numbers(tensor)
    return len(serialized(graph)) + size


def _without_numbers(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """All that a file tells of a tensor but for the numbers."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.empty(0, np.uint8)),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of its tensors in other files."""
    return path.stat().st_size + sum(
        tensor.nbytes for tensor in _external_tensors(_parsed(path), path)
    )


def nodes_in(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, operator type and outputs of the main graph's nodes in a file that is read as it
    stands, unchecked and without its weights.
    """
    graph = onnx.load(path, load_external_data=False).graph
    return [(node.name, node.op_type, tuple(node.output)) for node in graph.node]


def external_files(path: Path) -> list[Path]:
    """The files beside a model file that hold its tensors; none if it is no readable model, as
    `load` will say.
    """
    with contextlib.suppress(Exception):
        return sorted({Path(tensor.path) for tensor in _external_tensors(_parsed(path), path)})
    return []


def first_line(error: BaseException) -> str:
    """The first line of the text of the error that began it all, without a closing full stop."""
    while error.__cause__:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0].rstrip(". ") if text else type(error).__name__
