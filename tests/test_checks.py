"""The last look at the graph: every rule of a target is refused when it is broken, and only
then.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import IMAGES, decided

from converter.emit.qdq import emit
from converter.errors import ModelError
from converter.graph.edit import constant
from converter.measure.target_checks import check
from converter.plan.targets import TARGETS

GRAPH = """g (float[1,4,7,7] x) => (float[] y) {
    [one] a = Conv (x, w, b)  r = Relu (a)  [deep] c = Conv <group=6> (r, d)  [two] y = Conv (c, v)
}"""


def quantized(target, **constants):
    model, plan = decided(GRAPH, IMAGES, target, **constants)
    emit(model, plan)
    return model, plan


def store(value, array):
    """Another array under the same name."""
    value.const_value = ir.tensor(array, name=value.name)


def conversion(model, op_type="QuantizeLinear"):
    return next(node for node in model.graph if node.op_type == op_type)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_is_emitted_suits_its_target(target):
    check(*quantized(target.name), target)


def refused(model, plan, target):
    with pytest.raises(ModelError) as caught:
        check(model, plan, TARGETS[target])
    message = str(caught.value)
    assert message.startswith(f"The converted model does not suit target {target}: ")
    assert "\n" not in message
    return message.removeprefix(f"The converted model does not suit target {target}: ")


def with_codes(plan, unit, codes):
    return replace(plan, weights={**plan.weights, unit: replace(plan.weights[unit], codes=codes)})


def test_pairs_that_overflow():
    model, plan = quantized("CPU")
    codes = np.zeros((6, 4, 3, 3), np.int8)
    # Channels 0 and 1 of one kernel position are a pair, 1 and 2 are none.
    codes[0, 1, 0, 0], codes[0, 2, 0, 0] = 127, 127
    check(model, with_codes(plan, "one", codes), TARGETS["CPU"])
    codes[0, 0, 0, 0] = 1
    check(model, with_codes(plan, "one", codes), TARGETS["CPU"])
    codes[0, 0, 0, 0] = -100
    check(model, with_codes(plan, "one", codes), TARGETS["CPU"])
    codes[0, 0, 0, 0] = 2
    assert (
        refused(model, with_codes(plan, "one", codes), "CPU")
        == "two weights of one can overflow together."
    )
    codes[0, 0, 0, 0], codes[0, 1, 0, 0] = -2, -127
    refused(model, with_codes(plan, "one", codes), "CPU")


def test_pairs_of_a_depthwise_convolution_and_of_other_targets_do_not_overflow():
    model, plan = quantized("CPU")
    check(model, with_codes(plan, "deep", np.full((6, 1, 3, 3), 127, np.int8)), TARGETS["CPU"])
    model, plan = quantized("ARM")
    check(model, with_codes(plan, "one", np.full((6, 4, 3, 3), 127, np.int8)), TARGETS["ARM"])


@pytest.mark.parametrize(
    ("target", "dtype"), [("CPU", np.uint16), ("CPU", np.int16), ("NVGPU", np.uint8)]
)
def test_types_the_target_does_not_have(target, dtype):
    model, plan = quantized(target)
    node = conversion(model)
    store(node.inputs[2], np.zeros((), dtype))
    assert refused(model, plan, target) == f"{node.name} uses the type {np.dtype(dtype)}."


@pytest.mark.parametrize("target", ["NVGPU", "OPENVINO"])
def test_biases_stored_as_integers_where_they_must_not_be(target):
    model, plan = quantized("DSP")
    floats = quantized(target)[0]
    assert not any(
        constant(n.inputs[0]).dtype == np.int32
        for n in floats.graph
        if n.op_type == "DequantizeLinear" and constant(n.inputs[0]) is not None
    )
    message = refused(model, plan, target)
    if target == "OPENVINO":
        assert message.endswith("uses the type int32.")


def test_a_zero_point_that_is_not_0_where_all_must_be():
    model, plan = quantized("NVGPU")
    node = conversion(model)
    store(node.inputs[2], np.array(3, np.int8))
    assert refused(model, plan, "NVGPU") == f"{node.name} has a zero point that is not 0."
    other, plan = quantized("CPU")
    store(conversion(other).inputs[2], np.array(3, np.uint8))
    check(other, plan, TARGETS["CPU"])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("op_type", ["QuantizeLinear", "DequantizeLinear"])
def test_scales_that_are_no_positive_numbers(scale, op_type):
    model, plan = quantized("CPU")
    node = conversion(model, op_type)
    old = constant(node.inputs[1])
    store(node.inputs[1], np.full(old.shape, scale, np.float32))
    assert refused(model, plan, "CPU").endswith(" has a scale that is not a positive number.")


def test_one_bad_scale_of_many_channels():
    model, plan = quantized("CPU")
    node = next(
        n
        for n in model.graph
        if n.op_type == "DequantizeLinear" and constant(n.inputs[1]).size == 6
    )
    scale = constant(node.inputs[1]).copy()
    scale[3] = 0
    store(node.inputs[1], scale)
    assert refused(model, plan, "CPU") == f"{node.name} has a scale that is not a positive number."


def test_a_scale_computed_at_run_time():
    model, plan = quantized("CPU")
    node = conversion(model)
    node.replace_input_with(1, model.graph.inputs[0])
    assert refused(model, plan, "CPU") == f"{node.name} has a scale that is not a positive number."
