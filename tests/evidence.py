"""A tiny model to calibrate, its samples, everything that can be wanted of it, and when evidence is
equal.
"""

from __future__ import annotations

import numpy as np
from graphs import normal

from converter.calibrate.observe import Wanted

GRAPH = """g (float[N,4] x) => (float[N,6] y) {
    [one] m = MatMul (x, w)  [two] r = Relu (m)  [three] s = Add (r, b)  [four] y = Sigmoid (s)
}"""
CONSTANTS = {"w": normal(4, 6), "b": normal(6)}
SAMPLES = [{"x": normal(3, 4, seed=i)} for i in range(7)]
EVERYTHING = Wanted(("x", "m", "r", "b", "y"), (("m", 1), ("s", -1)), histogram=True, samples=True)


def assert_equal(left, right):
    """The same evidence to the bit, in any order."""
    assert left.statistics.keys() == right.statistics.keys()
    assert left.means.keys() == right.means.keys()
    for name, stats in left.statistics.items():
        found, wanted = stats.to_arrays(), right.statistics[name].to_arrays()
        assert found.keys() == wanted.keys()
        for key, array in found.items():
            np.testing.assert_array_equal(array, wanted[key], err_msg=f"{name} {key}")
    for name, mean in left.means.items():
        np.testing.assert_array_equal(mean, right.means[name], err_msg=name)
