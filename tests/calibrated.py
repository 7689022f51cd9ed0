"""Tiny models whose plans have all numbers, from calibration and the walk over their layers."""

from __future__ import annotations

from graphs import normal, prepared
from running import Ear, InMemory, resources

from calib.affine import UINT8
from calib.ranges import RANGE_METHODS, RangeSpec
from converter.calibrate.observe import Wanted, activation_qparams, observe
from converter.calibrate.walk import Walk
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import TARGETS
from converter.weights.integer import Rounding
from converter.weights.layers import decide_weights, products

IMAGES = [{"x": normal(1, 4, 7, 7, seed=i) + 0.3} for i in range(6)]
TABLES = [{"x": normal(2, 3, 8, seed=i) + 0.3} for i in range(6)]
BATCHES = [{"x": normal(5, 8, seed=i) + 0.3} for i in range(6)]
CONSTANTS = {
    "w": normal(6, 4, 3, 3),
    "v": normal(6, 6, 1, 1, seed=1),
    "d": normal(6, 1, 3, 3, seed=2),
    "b": normal(6, seed=3) * 3,
    "m": normal(8, 6, seed=4),
    "t": normal(6, 6, seed=5),
}


def decided(
    graph, samples, target="CPU", rounding=None, correct=True, per_channel=True, **constants
):
    """The float model and its plan with all numbers."""
    model, data = prepared(graph, **{**CONSTANTS, **constants}), InMemory(samples)
    plan = build_plan(model.graph, TARGETS[target], Wishes(per_channel=per_channel))
    means = products(model.graph, plan) if correct else ()
    rounding = rounding or Rounding()
    evidence = observe(
        model,
        Wanted(tuple(plan.groups()), means, False, False),
        data,
        resources=resources(),
        watch=Ear(),
    )
    spec = RangeSpec(UINT8, False, rounding.power_of_two)
    plan = plan.with_qparams(
        activation_qparams(plan, evidence.statistics, RANGE_METHODS["MAX_MIN"], spec)
    )
    walk = Walk(model, plan, data, resources())
    return model, decide_weights(
        model, plan, walk, means=evidence.means, rounding=rounding, watch=Ear()
    )
