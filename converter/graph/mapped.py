"""Large model files without their weights in memory: a weight is read where it lies in the file,
when it is asked for.

A model file is one protobuf message (https://protobuf.dev/programming-guides/encoding): fields of a
number, a type and a content, which are read here as far as it takes to find the weights. What is
parsed is a copy in which these refer to bytes of the file itself.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from converter.graph.edit import initializers_of

# Smaller files are read as a whole, and smaller weights are part of what is parsed.
MAPPED_ABOVE, LEAST_MAPPED = 64 << 20, 1 << 12
# Field numbers of onnx.proto, and the types of contents: a number, 8 bytes, bytes, 4 bytes.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
VARINT, LONG, BYTES, SHORT = 0, 1, 2, 5
# Stands for the name of the model file itself.
OWN = "\x1fthis file"


class OwnTensor(ir.ExternalTensor):
    """A weight in the model file itself."""


def read(path: Path) -> onnx.ModelProto:
    """The message in a file; large weights of a large one are references to the file, which
    `own_tensor` makes tensors of.
    """
    if path.stat().st_size < MAPPED_ABOVE:
        return onnx.load(path, load_external_data=False)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return onnx.ModelProto.FromString(b"".join(_without_weights(data)))


def own_tensor(tensor: ir.ExternalTensor, path: Path) -> OwnTensor:
    """What a reference to the file at `path` stands for."""
    file = path.resolve()
    place, shape = (file.name, tensor.offset, tensor.length), ir.Shape(list(tensor.shape))
    return OwnTensor(
        *place,
        tensor.dtype,
        shape=shape,
        name=tensor.name,
        base_dir=file.parent,
    )


def release(values: Iterable[ir.Value]) -> None:
    """Lets go of the memory that mapped weights of initializers were read into, where no array of
    theirs is in use.
    """
    for tensor in (value.const_value for value in values):
        if isinstance(tensor, ir.ExternalTensor):
            with contextlib.suppress(BufferError):
                tensor.release()


def in_memory(model: ir.Model) -> ir.Model:
    """The model with its weights read, where onnx_ir refuses if arrays of them are in use."""
    for value in initializers_of(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
            with contextlib.suppress(BufferError):
                tensor.release()
    return model


def _without_weights(data: mmap.mmap) -> Iterator[bytes]:
    """The message with references in the place of large weights."""
    for number, kind, start, content, end in _fields(data, 0, len(data)):
        if (number, kind) == (GRAPH, BYTES):
            graph = b"".join(_graph(data, content, end))
            yield from (_key(GRAPH), varint(len(graph)), graph)
        else:
            yield data[start:end]


def _graph(data: mmap.mmap, begin: int, stop: int) -> Iterator[bytes]:
    for number, kind, start, content, end in _fields(data, begin, stop):
        large = (number, kind) == (INITIALIZER, BYTES) and end - content > LEAST_MAPPED
        tensor = _reference(data, content, end) if large else None
        if tensor is None:
            yield data[start:end]
        else:
            yield from (_key(INITIALIZER), varint(len(tensor)), tensor)


def _reference(data: mmap.mmap, begin: int, stop: int) -> bytes | None:
    """A tensor whose bytes are those of the file; None where they are written otherwise."""
    place, rest = None, list[bytes]()
    for number, kind, start, content, end in _fields(data, begin, stop):
        if (number, kind) == (RAW_DATA, BYTES):
            place = content, end - content
        elif end - start <= LEAST_MAPPED:
            rest.append(data[start:end])
        else:
            return None
    if place is None:
        return None
    tensor = onnx.TensorProto.FromString(b"".join(rest))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), (OWN, *place), strict=True):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString())


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, type, start, start of the content and end of every field; raises ValueError where
    they do not fit.
    """
    while start < stop:
        key, content = _number(data, start)
        number, kind = key >> 3, key & 7
        end = content + {LONG: 8, SHORT: 4}.get(kind, 0)
        if kind == VARINT:
            _, end = _number(data, content)
        elif kind == BYTES:
            length, content = _number(data, content)
            end = content + length
        elif kind not in (LONG, SHORT):
            end = stop + 1
        if end > stop:
            msg = "the file is cut off or no protobuf message"
            raise ValueError(msg)
        yield number, kind, start, content, end
        start = end


def _number(data: mmap.mmap, place: int) -> tuple[int, int]:
    """The number that is written in seven bits a byte, and the place behind it."""
    found = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        place += 1
        found |= (byte & 127) << shift
        if byte < 128:
            return found, place
        shift += 7
    msg = "the file is cut off or no protobuf message"
    raise ValueError(msg)


def _key(number: int) -> bytes:
    return varint(number << 3 | BYTES)


def varint(number: int) -> bytes:
    """A number as protocol buffers write it: 7 bits a byte."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
