"""How much each column of a weight counts where it is rounded by itself: the mean square of the
input that it multiplies, over samples.

A model that looks tokens up shows it on random ones as well: which channels are large is a matter
of its weights, most of all in front of an attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.samples import Dataset
from converter.calibrate.data import token_data
from converter.graph.edit import not_none
from converter.job import Watch
from converter.plan.ops import rule_of
from converter.plan.plan import QuantPlan
from converter.plan.units import planned
from converter.weights.smoothing import observe_channels

# Random samples that show it, the tokens in each, and samples of data that are looked at.
RANDOM_SAMPLES, RANDOM_LENGTH, MOST_SAMPLES = 4, 32, 64
# With more bits it makes no difference.
MOST_BITS = 6


def importance_of(
    model: ir.Model, plan: QuantPlan, data: Dataset, *, threads: int, watch: Watch
) -> Mapping[ir.Value, Array]:
    """By weight of a product in the main graph (columns,), float64; none where neither data nor
    random tokens tell.
    """
    products = [
        (node, unit.inputs[0])
        for node, unit in planned(model, plan)
        if node.graph is model.graph
        and rule_of(node).product
        and unit.weight is not None
        and unit.weight.format.bits <= MOST_BITS
    ]
    names = list(dict.fromkeys(name for _, name in products))
    given = data.part(0, MOST_SAMPLES)
    samples = given if len(given) else token_data(model, RANDOM_SAMPLES, RANDOM_LENGTH)
    if not names or not len(samples):
        return {}
    try:
        channels = observe_channels(model, names, samples, threads)
    except CalibError as error:
        watch.warn(f"Weights are rounded as if all columns counted alike: {error}")
        return {}
    return {not_none(node.inputs[1]): channels[name].square for node, name in products}
