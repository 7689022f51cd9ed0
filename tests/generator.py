"""Random valid float models over the operators that conversions know, and some that they leave
alone.

A graph grows node by node from its inputs. Every shape is known while it grows, weights are scaled
so that activations neither vanish nor explode, and whatever nothing reads in the end is an output.
Equal seeds make equal models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
MOST_ELEMENTS = 6000


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: Shape


@dataclass
class Growth:
    """A graph that grows: its nodes, constants and the tensors computed so far."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    count: int = 0

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *choices: object) -> object:
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def constant(self, array: np.ndarray, kind: str = "const") -> str:
        name = self.fresh(kind)
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, shape: Shape, fan_in: int) -> str:
        """A weight, sometimes one that another node has already, of channels that differ in
        size.
        """
        tied = [
            name
            for name, array in self.constants.items()
            if array.shape == shape and name.startswith("weight")
        ]
        if tied and self.chance(0.3):
            return tied[0]
        spread = np.exp(self.rng.normal(0, 0.5, (shape[0],) + (1,) * (len(shape) - 1)))
        values = self.rng.standard_normal(shape) * spread / np.sqrt(max(1, fan_in))
        return self.constant(values.astype(np.float32), "weight")

    def bias(self, channels: int) -> str:
        tied = [
            name
            for name, array in self.constants.items()
            if array.shape == (channels,) and "bias" in name
        ]
        if tied and self.chance(0.2):
            return tied[0]
        return self.constant(self.rng.normal(0, 0.3, channels).astype(np.float32), "bias")

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        shape: Shape | Sequence[Shape],
        **attributes: object,
    ) -> Tensor:
        """A node; its first output."""
        shapes = [shape] if not shape or isinstance(shape[0], int) else list(shape)
        outputs = [Tensor(self.fresh(op_type.lower()), tuple(s)) for s in shapes]
        name = "" if self.chance(0.1) else self.fresh(f"n_{op_type}")
        node = helper.make_node(
            op_type, list(inputs), [o.name for o in outputs], name, **attributes
        )
        self.nodes.append(node)
        self.read.update(inputs)
        self.tensors += outputs
        return outputs[0]


Grow = Callable[[Growth, Tensor], object]


# --- operators with weights


def conv(g: Growth, x: Tensor) -> Tensor:
    channels, spatial = x.shape[1], x.shape[2:]
    group = int(g.pick(1, 1, 1, channels, 2 if channels % 2 == 0 else 1))
    out = group * g.number(1, max(1, 12 // group))
    kernel = [g.number(1, min(3, side)) for side in spatial]
    dilations = [
        g.number(1, 2) if 2 * (k - 1) < side else 1 for k, side in zip(kernel, spatial, strict=True)
    ]
    strides = [g.number(1, 2) for _ in spatial]
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    attributes: dict[str, object] = {"kernel_shape": kernel, "strides": strides, "group": group}
    if g.chance(0.2) and max(dilations) == 1:
        mode = str(g.pick("SAME_UPPER", "SAME_LOWER", "VALID"))
        attributes["auto_pad"] = mode
        grown = [0 if mode == "VALID" else None] * len(spatial)
        sides = [
            (s - e) // t + 1 if p == 0 else -(-s // t)
            for s, e, t, p in zip(spatial, extent, strides, grown, strict=True)
        ]
    else:
        pads = [g.number(0, e // 2) for e in extent] + [g.number(0, e // 2) for e in extent]
        attributes |= {"pads": pads, "dilations": dilations}
        half = len(spatial)
        sides = [
            (s + a + b - e) // t + 1
            for s, a, b, e, t in zip(
                spatial, pads[:half], pads[half:], extent, strides, strict=True
            )
        ]
    shape = (out, channels // group, *kernel)
    inputs = [x.name, g.weight(shape, int(np.prod(shape[1:])))]
    if g.chance(0.6):
        inputs.append(g.bias(out))
    return g.add("Conv", inputs, (x.shape[0], out, *sides), **attributes)


def conv_transpose(g: Growth, x: Tensor) -> Tensor:
    channels, spatial = x.shape[1], x.shape[2:]
    group = int(g.pick(1, 2 if channels % 2 == 0 else 1))
    each, stride, kernel = g.number(1, 5), g.number(1, 2), g.number(1, 3)
    sides = [stride * (side - 1) + kernel for side in spatial]
    inputs = [
        x.name,
        g.weight((channels, each, *[kernel] * len(spatial)), channels // group * kernel),
    ]
    if g.chance(0.5):
        inputs.append(g.bias(each * group))
    strides = [stride] * len(spatial)
    return g.add(
        "ConvTranspose", inputs, (x.shape[0], each * group, *sides), strides=strides, group=group
    )


def gemm(g: Growth, x: Tensor) -> Tensor:
    rows, columns = x.shape
    out, transposed = g.number(1, 24), g.chance(0.5)
    inputs = [x.name, g.weight((out, columns) if transposed else (columns, out), columns)]
    if g.chance(0.8):
        shape = [(out,), (1, out), (rows, 1), (1,), (rows, out)][int(g.pick(0, 0, 0, 1, 2, 3, 4))]
        # type: ignore[call-overload]
        inputs.append(g.constant(g.rng.normal(0, 0.3, shape).astype(np.float32), "bias_of_gemm"))
    scaled = {"alpha": 0.5, "beta": 2.0} if g.chance(0.2) else {}
    return g.add("Gemm", inputs, (rows, out), transB=int(transposed), **scaled)


def matmul(g: Growth, x: Tensor) -> Tensor:
    columns, out = x.shape[-1], g.number(1, 24)
    y = g.add("MatMul", [x.name, g.weight((columns, out), columns)], (*x.shape[:-1], out))
    if g.chance(0.6):
        pair = [y.name, g.bias(out)]
        y = g.add("Add", pair if g.chance(0.5) else pair[::-1], y.shape)
    return y


def matmul_left(g: Growth, x: Tensor) -> Tensor:
    """A constant times an activation."""
    rows, out = x.shape[-2], g.number(1, 12)
    return g.add("MatMul", [g.weight((out, rows), rows), x.name], (*x.shape[:-2], out, x.shape[-1]))


def attention(g: Growth, x: Tensor) -> Tensor | None:
    """Softmax(x x' / sqrt(d)) x."""
    if x.shape[-2] == 1:
        return None
    turned = (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2)
    size, columns = x.shape[-2], x.shape[-1]
    key = g.add("Transpose", [x.name], (*x.shape[:-2], columns, size), perm=list(turned))
    scores = g.add("MatMul", [x.name, key.name], (*x.shape[:-1], size))
    scaled = g.add("Div", [scores.name, g.constant(np.float32(columns**0.5))], scores.shape)
    weights = g.add("Softmax", [scaled.name], scores.shape, axis=-1)
    return g.add("MatMul", [weights.name, x.name], x.shape)


def recurrent(g: Growth, x: Tensor) -> Tensor:
    """LSTM or GRU over (length, batch, features)."""
    kind, gates = ("LSTM", 4) if g.chance(0.5) else ("GRU", 3)
    (length, batch, features), hidden = x.shape, g.number(2, 10)
    w = g.weight((1, gates * hidden, features), features)
    r = g.weight((1, gates * hidden, hidden), hidden)
    y = g.add(kind, [x.name, w, r], (length, 1, batch, hidden), hidden_size=hidden)
    return g.add("Squeeze", [y.name, g.constant(np.array([1]))], (length, batch, hidden))


# --- operators between them


def unary(g: Growth, x: Tensor) -> Tensor:
    return g.add(
        str(g.pick("Relu", "Relu", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Abs", "Neg", "Erf")),
        [x.name],
        x.shape,
    )


def clip(g: Growth, x: Tensor) -> Tensor:
    low, high = g.constant(np.float32(g.pick(0, 0, 0, -1))), g.constant(np.float32(g.pick(1, 6)))
    return g.add("Clip", [x.name, low, high], x.shape)


def swish(g: Growth, x: Tensor) -> Tensor:
    gate = g.add("Sigmoid", [x.name], x.shape)
    return g.add("Mul", [x.name, gate.name], x.shape)


def join(g: Growth, x: Tensor) -> Tensor:
    """Sum or product with another tensor of the shape, or itself."""
    other = g.pick(*[t for t in g.tensors if t.shape == x.shape])
    assert isinstance(other, Tensor)
    op_type = str(g.pick("Add", "Add", "Add", "Sub", "Mul", "Max"))
    return g.add(op_type, [x.name, other.name], x.shape)


def with_constant(g: Growth, x: Tensor) -> Tensor:
    shape = [(1,), (), (x.shape[-1],), (x.shape[1], *[1] * (len(x.shape) - 2))][
        int(g.pick(0, 1, 2, 3))
    ]  # type: ignore[call-overload]
    array = (g.rng.uniform(0.5, 1.5, shape) * g.rng.choice([-1, 1])).astype(np.float32)
    pair = [x.name, g.constant(array)]
    op_type = str(g.pick("Add", "Mul", "Sub", "Div"))
    return g.add(op_type, pair if op_type == "Div" or g.chance(0.7) else pair[::-1], x.shape)


def concat(g: Growth, x: Tensor) -> Tensor:
    axis = 1 if len(x.shape) > 2 else len(x.shape) - 1

    def rest(t: Tensor) -> Shape:
        return tuple(side for i, side in enumerate(t.shape) if i != axis)

    fitting = [t for t in g.tensors if len(t.shape) == len(x.shape) and rest(t) == rest(x)]
    other = g.pick(*fitting)
    assert isinstance(other, Tensor)
    shape = tuple(side + (other.shape[axis] if i == axis else 0) for i, side in enumerate(x.shape))
    return g.add("Concat", [x.name, other.name], shape, axis=axis)


def pool(g: Growth, x: Tensor) -> Tensor:
    op_type, spatial = str(g.pick("MaxPool", "AveragePool")), x.shape[2:]
    kernel = [min(2, side) for side in spatial]
    stride = g.number(1, 2)
    sides = [(side - k) // stride + 1 for side, k in zip(spatial, kernel, strict=True)]
    return g.add(
        op_type,
        [x.name],
        (*x.shape[:2], *sides),
        kernel_shape=kernel,
        strides=[stride] * len(spatial),
    )


def global_pool(g: Growth, x: Tensor) -> Tensor:
    shape = (*x.shape[:2], *[1] * (len(x.shape) - 2))
    return g.add("GlobalAveragePool", [x.name], shape)


def excite(g: Growth, x: Tensor) -> Tensor:
    """Squeeze and excitation."""
    pooled = global_pool(g, x)
    weight = g.weight((x.shape[1], x.shape[1], *[1] * (len(x.shape) - 2)), x.shape[1])
    mixed = g.add("Conv", [pooled.name, weight], pooled.shape)
    gate = g.add("Sigmoid", [mixed.name], pooled.shape)
    return g.add("Mul", [x.name, gate.name], x.shape)


def resize(g: Growth, x: Tensor) -> Tensor:
    mode, scales = str(g.pick("nearest", "linear")), [1.0, 1.0, *[2.0] * (len(x.shape) - 2)]
    sides = tuple(side * int(s) for side, s in zip(x.shape, scales, strict=True))
    inputs = [x.name, "", g.constant(np.array(scales, np.float32))]
    extra = (
        {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        if mode == "nearest"
        else {}
    )
    return g.add("Resize", inputs, sides, mode=mode, **extra)


def pad(g: Growth, x: Tensor) -> Tensor:
    mode = str(g.pick("constant", "constant", "edge"))
    edges = np.array([0, 0, *[1] * (len(x.shape) - 2)] * 2)
    inputs = [x.name, g.constant(edges)]
    if mode == "constant" and g.chance(0.3):
        inputs.append(g.constant(np.float32(g.pick(0.0, 0.7))))
    return g.add(
        "Pad",
        inputs,
        tuple(side + 2 * int(e) for side, e in zip(x.shape, edges, strict=False)),
        mode=mode,
    )


def cut(g: Growth, x: Tensor) -> Tensor:
    axis = len(x.shape) - 1
    end = g.number(1, x.shape[axis])
    inputs = [x.name, *(g.constant(np.array([v])) for v in (0, end, axis))]
    return g.add("Slice", inputs, (*x.shape[:-1], end))


def split(g: Growth, x: Tensor) -> Tensor | None:
    if x.shape[1] % 2:
        return None
    half = (x.shape[0], x.shape[1] // 2, *x.shape[2:])
    sizes = g.constant(np.array([half[1], half[1]]))
    return g.add("Split", [x.name, sizes], [half, half], axis=1)


def transpose(g: Growth, x: Tensor) -> Tensor:
    order = [0, *(1 + g.rng.permutation(len(x.shape) - 1)).tolist()]
    return g.add("Transpose", [x.name], tuple(x.shape[i] for i in order), perm=order)


def flatten(g: Growth, x: Tensor) -> Tensor:
    return g.add("Flatten", [x.name], (x.shape[0], int(np.prod(x.shape[1:]))))


def reshape(g: Growth, x: Tensor) -> Tensor:
    """Rows of the last axis, as one matrix or as a sequence."""
    shape = (
        (int(np.prod(x.shape[:-1])), x.shape[-1])
        if g.chance(0.5)
        else (1, int(np.prod(x.shape[:-1])), x.shape[-1])
    )
    return g.add("Reshape", [x.name, g.constant(np.array(shape))], shape)


def reduce_mean(g: Growth, x: Tensor) -> Tensor:
    return g.add("ReduceMean", [x.name], (*x.shape[:-1], 1), axes=[-1], keepdims=1)


def softmax(g: Growth, x: Tensor) -> Tensor | None:
    # Over one element, ONNX Runtime's integer kernel overflows.
    return None if x.shape[-1] == 1 else g.add("Softmax", [x.name], x.shape, axis=-1)


def layer_norm(g: Growth, x: Tensor) -> Tensor:
    size = x.shape[-1]
    gain = g.constant(g.rng.uniform(0.5, 1.5, size).astype(np.float32))
    return g.add("LayerNormalization", [x.name, gain, g.bias(size)], x.shape, axis=-1)


def batch_norm(g: Growth, x: Tensor) -> Tensor:
    channels = x.shape[1]
    gain, variance = (
        g.constant(g.rng.uniform(0.5, 1.5, channels).astype(np.float32)) for _ in range(2)
    )
    return g.add(
        "BatchNormalization", [x.name, gain, g.bias(channels), g.bias(channels), variance], x.shape
    )


def nothing(g: Growth, x: Tensor) -> Tensor:
    return g.add(str(g.pick("Identity", "Dropout")), [x.name], x.shape)


def branch(g: Growth, x: Tensor) -> Tensor:
    """An If over the sum's sign, with a product in one branch and a weight of the outer graph in
    both.
    """
    columns = x.shape[-1]
    total = g.add("ReduceSum", [x.name], (), keepdims=0)
    condition = g.fresh("condition")
    g.nodes.append(
        helper.make_node("Greater", [total.name, g.constant(np.float32(0))], [condition])
    )
    outer, name = g.weight((columns, columns), columns), g.fresh("chosen")
    bodies = {}
    for key, op_type in (("then_branch", "Tanh"), ("else_branch", "Relu")):
        product, result = g.fresh("inner"), g.fresh("inner")
        nodes = [
            helper.make_node("MatMul", [x.name, outer], [product], g.fresh("n_inner")),
            helper.make_node(op_type, [product], [result], g.fresh("n_inner")),
        ]
        bodies[key] = helper.make_graph(
            nodes, key, [], [helper.make_tensor_value_info(result, 1, None)]
        )
    g.nodes.append(helper.make_node("If", [condition], [name], g.fresh("n_If"), **bodies))
    g.read |= {x.name, total.name}
    g.tensors.append(Tensor(name, x.shape))
    return g.tensors[-1]


IMAGE: tuple[Grow, ...] = (
    *(conv,) * 8,
    *(unary, clip, join, concat, with_constant, pool, batch_norm) * 2,
    *(
        conv_transpose,
        swish,
        global_pool,
        excite,
        pad,
        split,
        cut,
        nothing,
        softmax,
        layer_norm,
        reduce_mean,
    ),
    *(flatten, reshape, transpose),
)
FLAT: tuple[Grow, ...] = (*IMAGE, resize)
MATRIX: tuple[Grow, ...] = (
    *(gemm, matmul) * 4,
    *(unary, join, with_constant, concat) * 2,
    *(clip, swish, softmax, layer_norm, cut, nothing, matmul_left, branch, transpose, reduce_mean),
)
SEQUENCE: tuple[Grow, ...] = (
    *(
        matmul,
        matmul,
        matmul,
        conv,
        recurrent,
        attention,
        layer_norm,
        matmul_left,
        branch,
        reshape,
        flatten,
    ),
    *(unary, join, with_constant, concat, softmax, cut, transpose, swish, split, nothing, pool),
)
BY_RANK = {2: MATRIX, 3: SEQUENCE, 4: FLAT, 5: IMAGE}


def random_model(
    seed: int, least: int = 3, most: int = 14
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of `least` to `most` random steps, and data for it: three samples along the first
    axis of each input.
    """
    g = Growth(np.random.default_rng(seed))
    shapes: list[Shape] = [
        (g.number(1, 2), g.number(2, 40)),
        (g.number(2, 5), g.number(1, 2), g.number(4, 20)),
    ]
    shapes += [(g.number(1, 2), g.number(1, 6), g.number(5, 12), g.number(5, 12))] * 4 + [
        (1, g.number(1, 4), 5, 5, 5)
    ]
    inputs = [Tensor(f"input_{i}", g.pick(*shapes)) for i in range(g.number(1, 2))]  # type: ignore[arg-type]
    g.tensors += inputs
    for _ in range(g.number(least, most)):
        # Mostly on from the newest, so that graphs get deep; else branches.
        x = g.tensors[-1] if g.chance(0.7) else g.pick(*g.tensors)
        assert isinstance(x, Tensor)
        if len(x.shape) in BY_RANK and 0 < np.prod(x.shape) < MOST_ELEMENTS:
            step = g.pick(*BY_RANK[len(x.shape)])
            assert callable(step)
            step(g, x)
    return _finished(g, inputs), {
        t.name: g.rng.standard_normal((3, *t.shape)).astype(np.float32)
        * np.float32(g.pick(0.1, 1.0, 30.0))
        for t in inputs
    }


def _finished(g: Growth, inputs: Sequence[Tensor]) -> onnx.ModelProto:
    """The model; leaves and, now and then, a tensor inside are outputs, inputs that nothing reads
    go through a Relu.
    """
    for t in [t for t in inputs if t.name not in g.read]:
        g.add("Relu", [t.name], t.shape)
    computed = [t for t in g.tensors if t not in inputs]
    outputs = [t for t in computed if t.name not in g.read or g.chance(0.05)]
    lifted = {name: a for name, a in g.constants.items() if a.size and g.chance(0.1)}
    makers = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
        for name, array in lifted.items()
    ]
    graph = helper.make_graph(
        [*makers, *g.nodes],
        "random",
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in inputs],
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in outputs],
        [
            numpy_helper.from_array(array, name)
            for name, array in g.constants.items()
            if name not in lifted
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
