"""Every row of the operator table against the ONNX schema and against experiments with the operator
itself.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import build, normal, positive, run

from calib.affine import INT8_NARROW
from converter.plan.matrices import no_view
from converter.plan.ops import INTEGER_OPS, OPS, rule_of, view_of, weights_of
from converter.plan.targets import TARGETS

IMAGE = "g (float[2,4,6,6] x) => (float[] y)"
ROWS = "g (float[3,4] x) => (float[] y)"
BATCH = "g (float[2,3,4] x) => (float[] y)"

# Operators with a constant weight `w`: by table row, several settings each.
WEIGHTED = {
    "Conv": [
        (IMAGE, "y = Conv (x, w)", (5, 4, 3, 3)),
        (IMAGE, "y = Conv <group=2> (x, w)", (6, 2, 3, 3)),
        (IMAGE, "y = Conv <group=4> (x, w)", (4, 1, 3, 3)),
        ("g (float[2,4,9] x) => (float[] y)", "y = Conv (x, w)", (5, 4, 3)),
    ],
    "ConvTranspose": [(IMAGE, "y = ConvTranspose (x, w)", (4, 5, 2, 2))],
    "Gemm": [(ROWS, "y = Gemm (x, w)", (4, 4)), (ROWS, "y = Gemm <transB=1> (x, w)", (4, 4))],
    "MatMul": [
        (ROWS, "y = MatMul (x, w)", (4, 4)),
        (BATCH, "y = MatMul (x, w)", (4, 4)),
        (BATCH, "y = MatMul (x, w)", (2, 4, 4)),
    ],
    "LayerNormalization": [
        (ROWS, "y = LayerNormalization (x, w)", (4,)),
        (BATCH, "y = LayerNormalization (x, w)", (4,)),
    ],
}
CASES = [(op, *case) for op, cases in WEIGHTED.items() for case in cases]

# Operators that must hand on values they were given.
MOVES = {
    "MaxPool": "y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)",
    "Reshape": "y = Reshape (x, to)",
    "Flatten": "y = Flatten (x)",
    "Squeeze": "u = Unsqueeze (x, axis)  y = Squeeze (u, axis)",
    "Unsqueeze": "y = Unsqueeze (x, axis)",
    "Transpose": "y = Transpose <perm=[0,2,3,1]> (x)",
    "Slice": "y = Slice (x, from, until)",
    "Split": "y, z = Split <axis=1> (x)",
    "DepthToSpace": "y = DepthToSpace <blocksize=2> (x)",
    "SpaceToDepth": "y = SpaceToDepth <blocksize=2> (x)",
    "Gather": "y = Gather <axis=1> (x, axis)",
    "Tile": "y = Tile (x, until)",
    "Pad": "y = Pad (x, edges)",
    "Resize": 'y = Resize <mode="nearest"> (x, , scales)',
}
SETTINGS = {
    "to": np.array([2, -1]),
    "axis": np.array([0]),
    "from": np.array([0, 1, 1, 0]),
    "until": np.array([2, 3, 5, 6]),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "nought": np.float32(0),
    "some": np.float32(0.5),
    "low": np.float32(-0.5),
    "edges": np.array([0, 0, 1, 2, 0, 0, 0, 1]),
}

# Operators whose outputs lie within their inputs and zero.
WITHIN = {
    "Concat": "y = Concat <axis=0> (x, u)",
    "Max": "y = Max (x, u)",
    "Min": "y = Min (x, u)",
    "Relu": "y = Relu (x)",
    "Clip": "y = Clip (x, low, some)",
    "AveragePool": "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x)",
    "GlobalAveragePool": "y = GlobalAveragePool (x)",
    "ReduceMax": "y = ReduceMax (x)",
    "ReduceMean": "y = ReduceMean (x)",
    "ReduceMin": "y = ReduceMin (x)",
    "Tanh": "y = Tanh (x)",
    "Gelu": "y = Gelu (x)",
    "HardSwish": "y = HardSwish (x)",
}
# The opset that has an operator first, where that is a later one.
LATER = {"HardSwish": 14, "Gelu": 20}

# Operators that compute on all or on their first input.
OTHERS = {
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Concat",
        "PRelu",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMax",
    ),
    *(
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Sigmoid",
        "HardSigmoid",
        "Tanh",
        "LeakyRelu",
        "Relu",
        "Clip",
        "Softmax",
        "Abs",
        "Ceil",
    ),
    *("Exp", "Floor", "Neg", "Round", "Sqrt", "BatchNormalization", "InstanceNormalization"),
    *("Elu", "Gelu", "HardSwish", "Log", "Pow"),
}


def only_node(head, text, opset=13, **constants):
    model = build(f"{head} {{ {text} }}", opset, **constants)
    return model.graph[len(model.graph) - 1]


def output(head, text, **constants):
    model = build(f"{head} {{ {text} }}", **constants)
    fed = model.graph.inputs[0]
    return run(model, {fed.name: normal(*(int(d) for d in fed.shape))})["y"]


def test_these_tests_know_every_row():
    unknown = set(OPS) ^ {*WEIGHTED, *MOVES, *OTHERS}
    assert not unknown, f"{unknown}: add to WEIGHTED, MOVES or OTHERS above how it is written"
    assert {op for op, rule in OPS.items() if rule.weight is not None} == set(WEIGHTED)
    assert {op for op, rule in OPS.items() if rule.moves} == set(MOVES)
    assert {op for op, rule in OPS.items() if rule.within} == set(WITHIN)


def first_opset(op):
    return min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op)


@pytest.mark.parametrize(
    ("op", "opset"), [(op, n) for op in OPS for n in (13, 18, 21) if n >= first_opset(op)]
)
def test_rows_name_inputs_of_the_schema(op, opset):
    rule, schema = OPS[op], onnx.defs.get_schema(op, opset)
    roles = {"data": rule.data or (0,), "weight": (rule.weight,), "bias": (rule.bias,)}
    indices = {role: [i for i in given if i is not None] for role, given in roles.items()}
    for index in (i for given in indices.values() for i in given):
        assert "tensor(float)" in schema.inputs[index].types
    assert [schema.inputs[i].name for i in indices["weight"]] in ([], ["W"], ["B"], ["Scale"])
    assert [schema.inputs[i].name for i in indices["bias"]] in ([], ["B"], ["C"])
    if rule.bias is not None:
        assert schema.inputs[rule.bias].option == onnx.defs.OpSchema.FormalParameterOption.Optional
    if rule.data is None:
        assert all("tensor(float)" in given.types for given in schema.inputs)


@pytest.mark.parametrize(("op", "head", "text", "shape"), CASES)
def test_scaling_a_channel_of_the_weight_scales_that_channel_of_the_output(op, head, text, shape):
    weight = normal(*shape)
    axis = OPS[op].channel_axis(only_node(head, text, w=weight))
    plain = output(head, text, w=weight)
    for channel in range(shape[axis]):
        factor = np.ones(shape[axis], np.float32)
        factor[channel] = 4
        scaled = output(
            head,
            text,
            w=weight * factor.reshape([-1 if i == axis else 1 for i in range(len(shape))]),
        )
        ratio = np.moveaxis(scaled, OPS[op].output_axis, -1) / np.moveaxis(
            plain, OPS[op].output_axis, -1
        )
        assert ratio.shape[-1] == shape[axis]
        np.testing.assert_allclose(ratio, np.broadcast_to(factor, ratio.shape), rtol=1e-3)


@pytest.mark.parametrize(
    ("op", "head", "text", "shape"), [case for case in CASES if OPS[case[0]].bias is not None]
)
def test_the_bias_shifts_its_channel_of_the_output(op, head, text, shape):
    weight, rule = normal(*shape), OPS[op]
    plain = output(head, text, w=weight)
    bias = np.arange(plain.shape[rule.output_axis]).astype(np.float32)
    assert rule.bias == 2
    shift = output(head, text.replace(", w)", ", w, b)"), w=weight, b=bias) - plain
    shift = np.moveaxis(shift, rule.output_axis, -1)
    np.testing.assert_allclose(shift, np.broadcast_to(bias, shift.shape), atol=1e-4)


def test_one_scale_must_serve_a_weight_whose_channels_have_no_axis_of_their_own():
    transposed = only_node(IMAGE, "y = ConvTranspose <group=2> (x, w)", w=normal(4, 3, 2, 2))
    assert OPS["ConvTranspose"].channel_axis(transposed) is None
    vector = only_node(ROWS, "y = MatMul (x, w)", w=normal(4))
    assert OPS["MatMul"].channel_axis(vector) is None


@pytest.mark.parametrize("op", MOVES)
def test_moves_only_hand_on_values(op):
    # Negative values, so that a zero is seen where there is one: only Pad may add it, as every
    # range holds zero.
    model = build(f"{IMAGE} {{ {MOVES[op]} }}", **SETTINGS)
    assert model.graph[len(model.graph) - 1].op_type == op
    x = -positive(2, 4, 6, 6)
    assert np.isin(run(model, {"x": x})["y"], [*x.flat, 0] if op == "Pad" else x).all()


@pytest.mark.parametrize("op", WITHIN)
@pytest.mark.parametrize("far", [-3.0, 0.0, 3.0])
def test_outputs_lie_within_inputs_and_zero(op, far):
    x, u = normal(2, 4, 6, 6) + np.float32(far), normal(2, 4, 6, 6, seed=1) * 4
    text = f"{IMAGE} {{ {WITHIN[op]} }}"
    model = build(text, max(13, LATER.get(op, 0)), u=u, **SETTINGS)
    y = run(model, {"x": x})["y"]
    read = [x, u] if OPS[op].data is None else [x]
    assert min(0, *(a.min() for a in read)) <= y.min()
    assert y.max() <= max(0, *(a.max() for a in read))
    if OPS[op].joins:
        assert sorted(y.flat) == sorted([*x.flat, *u.flat])


# Bounds of what an operator makes and needs, where x lies in -2..5, u in 1..3 and y in -1..4.
SPANS = {
    "y = Add (x, u)": ((-1, 8), None),
    "y = Sub (x, u)": ((-5, 4), None),
    "y = Mul (x, u)": ((-6, 15), None),
    "y = Clip (x, low, some)": ((-0.5, 0.5), None),
    "y = Clip (x, low)": (None, None),
    "y = Softmax (x)": ((0, 1), None),
    "y = Tanh (x)": ((-1, 1), None),
    "y = Sigmoid (x)": ((0, 1), (-8, 8)),
    "y = HardSigmoid <alpha=0.25, beta=0.5> (x)": ((0, 1), (-2, 2)),
    "y = HardSwish (x)": (None, (-3, 4)),
    "y = LeakyRelu <alpha=0.5> (x)": (None, (-2, 4)),
    "y = Exp (x)": (None, None),
}


@pytest.mark.parametrize("text", SPANS)
def test_bounds_of_what_is_made_and_needed(text):
    node = only_node("g (float[2,4,6,6] x, float[2,4,6,6] u) => (float[] y)", text, **SETTINGS)
    made, needed = SPANS[text]
    read = [(-2.0, 5.0), (1.0, 3.0)][: 2 if OPS[node.op_type].data is None else 1]
    assert OPS[node.op_type].makes(node, read) == made
    assert OPS[node.op_type].needs(node, (-1.0, 4.0)) == needed


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("y = Relu (x)", 0.0),
        ("y = Clip (x, nought)", 0.0),
        ("y = Clip (x, low, some)", -0.5),
        ("y = Clip (x, , some)", None),
        ("y = Clip (x, given)", None),
    ],
)
def test_bounds_only_cut_off(text, floor):
    head = "g (float[2,4,6,6] x, float given) => (float[] y)"
    node = only_node(head, text, **SETTINGS)
    assert OPS[node.op_type].bounds
    assert OPS[node.op_type].floor(node) == floor
    x = normal(2, 4, 6, 6)
    y = run(
        build(f"{head} {{ {text} }}", **SETTINGS), {"x": x, "given": np.array(-0.5, np.float32)}
    )["y"]
    low = -0.5 if "given" in text else floor
    high = 0.5 if "some" in text else None
    np.testing.assert_array_equal(y, np.clip(x, low, high))


def test_probabilities_vanish_for_small_inputs():
    assert [op for op, rule in OPS.items() if rule.probabilities] == ["Softmax"]
    x = normal(3, 4)
    x[:, 0] = -200
    y = run(build(f"{ROWS} {{ y = Softmax (x) }}"), {"x": x})["y"]
    assert (y[:, 0] == 0).all()
    assert y.min() >= 0
    assert y.max() <= 1


def test_what_fills_up_says_with_which_number():
    constants = {**SETTINGS, "with": np.float32(7)}
    y = run(
        build(f"{IMAGE} {{ y = Pad (x, edges, with) }}", **constants), {"x": normal(2, 4, 6, 6)}
    )
    fills = {op: rule.fill for op, rule in OPS.items() if rule.fill is not None}
    assert fills == {"Pad": 2}
    assert (y["y"] == 7).any()


@pytest.mark.parametrize(
    ("attributes", "inputs"),
    [
        ('mode="linear"', "x, , scales"),
        ('mode="cubic"', "x, , scales"),
        (
            (
                'mode="nearest", coordinate_transformation_mode="tf_crop_and_resize", '
                "extrapolation_value=9.0"
            ),
            "x, roi, scales",
        ),
    ],
)
def test_a_resize_that_makes_new_values_has_an_obstacle(attributes, inputs):
    text = f"y = Resize <{attributes}> ({inputs})"
    constants = {**SETTINGS, "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)}
    x = -positive(2, 4, 6, 6)
    assert not np.isin(run(build(f"{IMAGE} {{ {text} }}", **constants), {"x": x})["y"], x).all()
    assert "new values" in OPS["Resize"].obstacle(only_node(IMAGE, text, **constants))


DYNAMIC = (
    "g (float[2,4,6,6] x, float[4,4,3,3] v, float[4,4] m, float[4] c, float given) => (float[] y)"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y = Conv (x, w)", None),
        ("y = Conv (x, w, b)", None),
        ("y = Conv (x, v)", "its weight is computed at run time"),
        ("y = Conv (x, w, c)", "its bias is not one constant a channel"),
        ("y = ConvTranspose (x, v)", "its weight is computed at run time"),
        ("y = ConvTranspose (x, w, b)", None),
        ("y = Gemm (m, k, b)", None),
        ("y = Gemm (k, m)", "its weight is computed at run time"),
        ("y = Gemm (m, k, c)", "its bias is not one constant a channel"),
        ("y = Gemm (m, k, scalar)", "its bias is not one constant a channel"),
        ("y = Gemm (m, k, one)", "its bias is not one constant a channel"),
        ("y = Gemm (m, k, k)", "its bias is not one constant a channel"),
        ("y = Gemm <transA=1> (m, k)", "transA is set"),
        ("y = Gemm <alpha=2.0> (m, k)", "alpha or beta is not 1"),
        ("y = Gemm <beta=0.5> (m, k)", "alpha or beta is not 1"),
        ("y = Gemm <alpha=1.0, beta=1.0, transA=0, transB=1> (m, k)", None),
        ("y = MatMul (m, m)", None),
        ("y = Resize (x, , scales)", None),
        ("y = Pad (x, edges)", None),
        ("y = Pad (x, edges, nought)", None),
        ('y = Pad <mode="reflect"> (x, edges)', None),
        ("y = Pad (x, edges, some)", "it pads with something else than zero"),
        ("y = Pad (x, edges, given)", "it pads with something else than zero"),
    ],
)
def test_obstacles(text, reason):
    constants = {
        "w": normal(4, 4, 3, 3),
        "k": normal(4, 4),
        "b": normal(4),
        "one": normal(1),
        "scalar": normal(),
        **SETTINGS,
    }
    found = only_node(DYNAMIC, text, **constants)
    assert OPS[found.op_type].obstacle(found) == reason


@pytest.mark.parametrize(
    ("attribute", "shape", "pairs"),
    [
        ("", (4, 4, 1, 1), True),
        ("<group=4>", (4, 1, 3, 3), False),
        ("<group=4>", (8, 1, 3, 3), True),
        ("<group=2>", (4, 2, 3, 3), True),
    ],
)
def test_only_a_plain_depthwise_convolution_adds_no_pairs(attribute, shape, pairs):
    node = only_node(IMAGE, f"y = Conv {attribute} (x, w)", w=normal(*shape))
    assert OPS["Conv"].pairs(node, shape) is pairs


def test_an_operator_of_another_domain_has_no_row():
    node = only_node(ROWS, "y = local.Relu (x)")
    assert rule_of(node) == rule_of(only_node(ROWS, "y = Unknown (x)"))
    assert not rule_of(node).bounds


@pytest.mark.parametrize("op", [op for op, rule in OPS.items() if rule.weight is not None])
def test_every_weight_says_how_it_is_rounded(op):
    assert OPS[op].view is not None, (
        f"converter/plan/ops.py: the row of {op} in OPS has a weight and says nothing of `view`: "
        "give it the View in converter/plan/matrices.py that writes it as a matrix product, so "
        "that rounding sees what its inputs do, or `no_view` to round it number by number."
    )


@pytest.mark.parametrize(("op", "head", "text", "shape"), CASES)
def test_a_rounding_view_is_the_product_that_the_operator_computes(op, head, text, shape):
    weight = normal(*shape)
    node = only_node(head, text, w=weight)
    view = view_of(node, shape, OPS[op].weight)
    if view is None:
        assert OPS[op].view is no_view or len(shape) > 2
        return
    assert view_of(node, shape, 0) is None
    matrix, many = view.matrix(weight), 10**6
    np.testing.assert_array_equal(view.weight(matrix), weight)
    x = normal(*(int(d) for d in build(f"{head} {{ {text} }}", w=weight).graph.inputs[0].shape))
    columns = view.columns(x, many, 0, np.random.default_rng(0))
    mine = np.einsum("grk,gnk->ngr", matrix, columns).reshape(columns.shape[1], -1)
    theirs = np.moveaxis(output(head, text, w=weight), OPS[op].output_axis, -1)
    np.testing.assert_allclose(mine, theirs.reshape(mine.shape), atol=1e-4)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets_speak_of_rows_of_the_table(target):
    unknown = (target.integer | target.bare) - set(OPS)
    assert not unknown, f"{unknown}: add a row to OPS in converter/plan/ops.py"
    assert all(OPS[op].moves for op in target.bare)
    assert target.float_output <= target.integer
    assert TARGETS[target.name] is target


def test_two_weights_within_the_pair_limit_never_overflow_16_bits():
    cpu = TARGETS["CPU"]
    assert (
        cpu.activation.qmax * cpu.pair_limit
        <= 2**15 - 1
        < cpu.activation.qmax * (cpu.pair_limit + 1)
    )
    assert cpu.weight == INT8_NARROW


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Conv (x, w)", {1: 0}),
        ("y = Gemm (m, k, b)", {1: 1}),
        ("y = Gemm <transB=1> (m, k, b)", {1: 0}),
        ("y = MatMul (m, k)", {1: 1}),
        ("y = MatMul (k, m)", {0: None}),
        ("y = MatMul (m, m)", {}),
        ("y = MatMul (m, b)", {}),
        ("y = Gather (k, axis)", {0: 0}),
        ("y = Gather <axis=1> (k, axis)", {0: 1}),
        ("y = Gather (until, axis)", {}),
        ("y = Add (m, k)", {}),
        ("y = local.Conv (x, w)", {}),
        ("y = LSTM <hidden_size=2> (seq, input, recurrent)", {1: 1, 2: 1}),
    ],
)
def test_weights_and_their_channel_axes(text, expected):
    constants = {"w": normal(4, 4, 3, 3), "k": normal(4, 4), "b": normal(4), **SETTINGS}
    gates = {"input": normal(1, 8, 4), "recurrent": normal(1, 8, 2)}
    assert weights_of(only_node(DYNAMIC, text, **constants, **gates)) == expected


@pytest.mark.parametrize("op", [op for op in INTEGER_OPS if onnx.defs.has(op)])
def test_rows_of_integer_operators_name_inputs_of_the_schema(op):
    schema, row = onnx.defs.get_schema(op, 13), INTEGER_OPS[op]
    names = [given.name.lower() for given in schema.inputs]
    for read in row.reads:
        codes, scale, zero_point = read
        assert "zero_point" in names[zero_point]
        if scale is not None:
            assert "scale" in names[scale]
            assert codes < scale < zero_point
    if row.writes:
        assert "scale" in names[row.writes[0]]
        assert "zero_point" in names[row.writes[1]]
    for product in row.products:
        codes, *_ = row.reads[product.signed]
        assert "tensor(int8)" in schema.inputs[codes].types
