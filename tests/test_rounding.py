"""Weight rounding: against plain Optimal Brain Quantization, brute force on tiny problems and dense
searches.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.affine import INT8, INT8_NARROW, IntFormat
from converter.weights.gptq import DAMPING, Grid, compensated, nearest, search_scales

INT3 = IntFormat(3, signed=True, narrow=True)
INT4 = IntFormat(4, signed=True, narrow=True)
PLAIN, PAIRED = Grid(INT8_NARROW), Grid(INT8_NARROW, 128)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def grids(draw):
    fmt = draw(st.sampled_from([INT3, INT4, INT8_NARROW, INT8]))
    return Grid(fmt, draw(st.integers(-fmt.qmin, fmt.qmax + 2)))


def problem(seed, groups=1, rows=4, columns=8, size=1.0, correlation=1.0):
    """Weights of standard deviation `size` and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.1, 2, (groups, 1, columns))
    common = correlation * rng.standard_normal((groups, 4 * columns, 1))
    inputs = np.maximum((rng.standard_normal((groups, 4 * columns, columns)) + common) * spread, 0)
    moments = np.einsum("gni,gnj->gij", inputs, inputs) / inputs.shape[1]
    return rng.standard_normal((groups, rows, columns)) * size, moments


def ones(weight):
    return np.ones(weight.shape[:2])


def damped(moments):
    return np.array([h + DAMPING * np.trace(h) / len(h) * np.eye(len(h)) for h in moments])


def output_error(weight, codes, moments):
    error = weight - codes
    return np.einsum("gri,gij,grj->gr", error, moments, error)


def pair_sums(codes):
    return np.abs(codes[..., :-1:2] + codes[..., 1::2])


def assert_on_grid(codes, grid):
    assert np.array_equal(codes, np.rint(codes))
    assert codes.min() >= grid.format.qmin
    assert codes.max() <= grid.format.qmax
    if grid.pair_limit is not None and codes.shape[-1] > 1:
        assert pair_sums(codes).max() <= grid.pair_limit


def allowed_codes(grid, columns):
    """Every vector of codes the grid allows, by trying all."""
    span = range(grid.format.qmin, grid.format.qmax + 1)
    codes = np.array(list(product(span, repeat=columns)), float)
    if grid.pair_limit is None:
        return codes
    return codes[(pair_sums(codes) <= grid.pair_limit).all(axis=1)]


# Nearest codes


def test_nearest_rounds_half_to_even_and_clips():
    scaled = np.array([0.5, 1.5, -2.5, 127.4, 300.0, -128.0])
    assert nearest(scaled, PLAIN).tolist() == [0, 2, -2, 127, 127, -127]


@pytest.mark.parametrize(
    ("pair", "codes"),
    [
        ((60, 60), (60, 60)),
        ((64, 64), (64, 64)),
        ((100, 40), (94, 34)),
        ((-100, -40), (-94, -34)),
        ((127, -127), (127, -127)),
        (
            (200, 10),
            (127, 1),
        ),  # the first ends at the highest code, so that the second has to give way for both
        ((10, 200), (1, 127)),
        ((-10, -200), (-1, -127)),
        ((200, -10), (127, -10)),
        ((300, 300), (64, 64)),
    ],
)
def test_a_pair_gives_way_by_equal_parts(pair, codes):
    assert nearest(np.array(pair, float), PAIRED).tolist() == list(codes)


@settings(deadline=None)
@given(grids(), st.lists(st.floats(-300, 300), min_size=2, max_size=2))
def test_nearest_is_the_nearest_pair_of_all(grid, pair):
    scaled = np.array(pair) * grid.format.qmax / 127
    codes = nearest(scaled, grid)
    best = (np.square(allowed_codes(grid, 2) - scaled).sum(axis=1)).min()
    assert_on_grid(codes, grid)
    assert np.square(codes - scaled).sum() <= best * (1 + 1e-9) + 1e-9


@settings(deadline=None)
@given(
    grids(),
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9),
    st.sampled_from([np.float32, np.float64]),
)
def test_nearest_never_breaks_the_bound(grid, scaled, dtype):
    scaled = np.array(scaled, dtype)
    codes = nearest(scaled, grid)
    assert codes.dtype == dtype
    assert_on_grid(codes, grid)


def test_a_last_column_without_partner_keeps_its_code():
    assert nearest(np.array([100.0, 100.0, 120.0]), PAIRED).tolist() == [64, 64, 120]


def test_nearest_leaves_its_argument_alone():
    scaled = np.array([100.3, 90.2])
    nearest(scaled, PAIRED)
    assert scaled.tolist() == [100.3, 90.2]


# Compensated codes


def rounding_order(moments, width):
    """Columns of large moments first; the columns of a pair stay together, led by the larger."""
    columns = range(len(moments))
    pairs = [sorted(columns[k : k + width], key=lambda k: -moments[k, k]) for k in columns[::width]]
    return [k for pair in sorted(pairs, key=lambda pair: -moments[pair[0], pair[0]]) for k in pair]


def obq_target(w, inverse, k, partner, grid):
    """Where two weights together are too large: the first one after both moved the least costly way
    to the bound.
    """
    low, high = grid.format.qmin, grid.format.qmax
    total = min(max(w[k], low), high) + min(max(w[partner], low), high)
    if abs(total) <= grid.pair_limit:
        return w[k]
    limit = grid.pair_limit if total > 0 else -grid.pair_limit
    towards = inverse[k, k] + inverse[k, partner]
    moved = w[k] - (w[k] + w[partner] - limit) * towards / (
        towards + inverse[partner, partner] + inverse[partner, k]
    )
    return min(max(moved, limit - high, low), limit - low, high)


def obq(weight, moments, grid):
    """Optimal Brain Quantization of one row in a fixed order: the inverse shrinks by one column a
    step.
    """
    w, inverse, codes = weight.copy(), np.linalg.inv(moments), {}
    for k in rounding_order(moments, 1 if grid.pair_limit is None else 2):
        low, high, target, partner = grid.format.qmin, grid.format.qmax, w[k], k ^ 1
        if grid.pair_limit is not None and partner < len(w):
            if partner in codes:
                low, high = (
                    max(low, -grid.pair_limit - codes[partner]),
                    min(high, grid.pair_limit - codes[partner]),
                )
            else:
                target = obq_target(w, inverse, k, partner, grid)
        codes[k] = min(max(np.rint(target), low), high)
        w -= (w[k] - codes[k]) / inverse[k, k] * inverse[:, k]
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return [codes[k] for k in range(len(w))]


@pytest.mark.parametrize("grid", [PLAIN, PAIRED, Grid(INT4), Grid(INT4, 8)], ids=str)
@pytest.mark.parametrize(
    ("groups", "rows", "columns"), [(1, 5, 1), (1, 5, 2), (3, 2, 9), (1, 3, 71), (2, 2, 100)]
)
def test_compensated_is_optimal_brain_quantization(grid, groups, rows, columns):
    weight, moments = problem(columns, groups, rows, columns, size=0.6 * grid.format.qmax)
    codes = compensated(weight, ones(weight), moments, grid)
    expected = [
        [obq(row, h, grid) for row in group]
        for group, h in zip(weight, damped(moments), strict=True)
    ]
    assert np.array_equal(codes, expected)


def test_scales_divide_the_weights_of_their_row():
    weight, moments = problem(3, groups=2, rows=3, size=20)
    scale = np.array([[0.5, 1.0, 3.0], [0.01, 70.0, 1.5]])
    codes = compensated(weight * scale[..., None], scale, moments, PLAIN)
    assert np.array_equal(codes, compensated(weight, ones(weight), moments, PLAIN))


@pytest.mark.parametrize(("grid", "size"), [(PLAIN, 30), (PAIRED, 50), (Grid(INT4), 2)], ids=str)
def test_compensated_costs_the_output_less_than_nearest(grid, size):
    problems = [problem(seed, rows=8, columns=24, size=size) for seed in range(20)]
    ours = [output_error(w, compensated(w, ones(w), h, grid), h).sum() for w, h in problems]
    plain = [output_error(w, nearest(w, grid), h).sum() for w, h in problems]
    assert sum(ours) < 0.6 * sum(plain)
    assert np.mean(np.less(ours, plain)) >= 0.95


@pytest.mark.parametrize("limit", [None, 3, 4])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_compensated_is_close_to_the_best_of_all_codes(limit, columns):
    grid = Grid(INT3, limit)
    tried = allowed_codes(grid, columns)
    weight, moments = problem(7, groups=60, rows=3, columns=columns, size=1.5)
    hessian = damped(moments)
    found = output_error(weight, compensated(weight, ones(weight), moments, grid), hessian)
    error = weight[:, :, None] - tried
    best = np.einsum("grni,gij,grnj->grn", error, hessian, error).min(axis=2)
    assert (found >= best * (1 - 1e-9)).all()
    assert np.mean(found <= best * (1 + 1e-9)) > 0.5
    assert found.sum() < 1.25 * best.sum()


@settings(deadline=None)
@given(grids(), SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.floats(0.01, 3))
def test_compensated_never_breaks_the_bound(grid, seed, groups, rows, columns, size):
    weight, moments = problem(seed, groups, rows, columns, size * grid.format.qmax)
    assert_on_grid(compensated(weight, ones(weight), moments, grid), grid)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([PLAIN, PAIRED]), st.integers(1, 40))
def test_without_inputs_compensated_is_nearest(seed, grid, columns):
    weight, _ = problem(seed, groups=2, columns=columns, size=60)
    silent = np.zeros((2, columns, columns))
    assert np.array_equal(compensated(weight, ones(weight), silent, grid), nearest(weight, grid))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40))
def test_inputs_that_always_move_together_are_no_trouble(seed, columns):
    weight, _ = problem(seed, columns=columns, size=60)
    shape = np.random.default_rng(seed).standard_normal(columns)
    assert_on_grid(compensated(weight, ones(weight), np.outer(shape, shape)[None], PAIRED), PAIRED)


def test_a_dead_input_gets_its_nearest_code():
    weight, moments = problem(5, columns=6, size=30)
    moments[:, 2] = moments[:, :, 2] = 0
    codes = compensated(weight, ones(weight), moments, PLAIN)
    assert np.array_equal(codes[..., 2], np.rint(weight[..., 2]))


def test_a_row_of_zeros_stays_zero():
    weight, moments = problem(1, rows=3, size=30)
    weight[0, 1] = 0
    assert not compensated(weight, ones(weight), moments, PAIRED)[0, 1].any()


@pytest.mark.parametrize("exponent", [-800, -60, 60, 800])
def test_the_size_of_the_moments_does_not_matter(exponent):
    weight, moments = problem(2, columns=11, size=60)
    codes = compensated(weight, ones(weight), moments, PAIRED)
    assert np.array_equal(compensated(weight, ones(weight), moments * 2.0**exponent, PAIRED), codes)


def test_compensated_leaves_its_arguments_alone():
    weight, moments = problem(2, size=60)
    before = weight.copy(), moments.copy()
    compensated(weight, ones(weight), moments, PAIRED)
    assert np.array_equal(weight, before[0])
    assert np.array_equal(moments, before[1])


# Scales


def plain_codes(scaled, grid):
    """Nearest codes by trying all, pairs together."""
    if grid.pair_limit is None:
        return np.clip(np.rint(scaled), grid.format.qmin, grid.format.qmax)
    pairs, tried = scaled.reshape(*scaled.shape[:-1], -1, 2), allowed_codes(grid, 2)
    nearest_pair = np.square(pairs[..., None, :] - tried).sum(axis=-1).argmin(axis=-1)
    return tried[nearest_pair].reshape(scaled.shape)


def scale_errors(weight, importance, scales, grid):
    """Error of each row (scales, groups, rows) for `scales` of that shape."""
    error = weight - scales[..., None] * plain_codes(weight / scales[..., None], grid)
    return np.einsum("sgrk,gk->sgr", error**2, importance)


def draw_weights(kind, seed, groups=2, rows=6, columns=96):
    rng = np.random.default_rng(seed)
    weight = getattr(rng, kind)(size=(groups, rows, columns)) - (0.5 if kind == "uniform" else 0)
    return weight * rng.uniform(0.1, 3, (groups, rows, 1)), rng.uniform(
        0, 2, (groups, columns)
    ) ** 2


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("grid", [PLAIN, Grid(INT4), Grid(INT3), Grid(INT3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace"])
def test_scales_are_as_good_as_a_dense_search(kind, grid, per_channel):
    weight, importance = draw_weights(kind, 11)
    covering = (
        np.abs(weight).max(axis=2)
        if per_channel
        else np.full(weight.shape[:2], np.abs(weight).max())
    )
    dense = np.linspace(0.15, 1.8, 300)[:, None, None] * covering / grid.format.qmax
    scales = search_scales(weight, importance, grid, per_channel)
    assert scales.shape == weight.shape[:2]
    assert (np.unique(scales).size == 1) == (not per_channel)
    best = scale_errors(weight, importance, dense, grid)
    found = scale_errors(weight, importance, scales[None], grid)[0]
    ratio = found / best.min(axis=0) if per_channel else found.sum() / best.sum(axis=(1, 2)).min()
    assert np.mean(ratio) < 1.05


def test_rows_beyond_one_chunk_get_the_scales_they_get_alone():
    weight, importance = draw_weights("normal", 4, groups=1, rows=40, columns=3000)
    together = search_scales(weight, importance, PAIRED, True)
    alone = [search_scales(weight[:, [r]], importance, PAIRED, True)[0, 0] for r in (0, 17, 39)]
    np.testing.assert_allclose(together[0, [0, 17, 39]], alone, rtol=1e-12)


def test_weights_that_no_one_hears_do_not_cost_the_others():
    weight, importance = draw_weights("uniform", 3)
    heard = np.abs(weight).max(axis=2)
    weight, importance = np.dstack([weight, 5 * heard]), np.hstack([importance, [[0], [0]]])
    assert (search_scales(weight, importance, PLAIN, True) < 1.2 * heard / 127).all()


@pytest.mark.parametrize("exponent", [-30, 30, 90])
def test_scales_follow_the_size_of_the_weights_and_not_of_the_importance(exponent):
    weight, importance = draw_weights("normal", 8)
    scales = search_scales(weight, importance, PAIRED, True)
    moved = search_scales(weight * 2.0**exponent, importance * 2.0 ** (3 * exponent), PAIRED, True)
    assert np.array_equal(moved, scales * 2.0**exponent)


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_a_row_of_nothing_gets_scale_one(weight):
    rows = np.array([[[weight, -weight], [1.27, 0.5]]])
    scales = search_scales(rows, np.ones((1, 2)), PLAIN, True)
    assert scales[0, 0] == 1
    assert scales[0, 1] == pytest.approx(0.01, rel=0.02)
    assert search_scales(np.zeros((1, 2, 3)), np.ones((1, 3)), PLAIN, False).tolist() == [[1, 1]]


def test_without_importance_the_scale_covers_the_largest_weight():
    assert search_scales(
        np.array([[[-2.54, 1.0]]]), np.zeros((1, 2)), PAIRED, True
    ) == pytest.approx(0.02)


def test_pairs_widen_the_scale_until_they_fit():
    weight = np.full((1, 1, 8), 1.27)
    assert search_scales(weight, np.ones((1, 8)), PLAIN, True)[0, 0] == pytest.approx(
        0.01, rel=0.001
    )
    widened = search_scales(weight, np.ones((1, 8)), PAIRED, True)
    assert (
        np.abs(weight - widened[..., None] * nearest(weight / widened[..., None], PAIRED)).max()
        < 0.005
    )


@pytest.mark.parametrize("limit", [None, 128])
def test_given_codes_stay_and_the_others_make_up_for_them(limit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7))
    weight, moments, grid = (
        rng.normal(size=(1, 5, 7)),
        (x.T @ x)[None] / 200,
        Grid(IntFormat(8, signed=True), limit),
    )
    fixed = np.where(rng.random(weight.shape) < 0.4, 0.0, np.nan)
    scale = np.full((1, 5), 0.05)
    codes = compensated(weight, scale, moments, grid, fixed=fixed)
    given = ~np.isnan(fixed)
    assert (codes[given] == 0).all()
    naive = np.where(given, 0.0, np.clip(np.rint(weight / 0.05), -127, 127))
    costs = [
        np.einsum("grk,gkl,grl->", e, moments, e)
        for e in (weight - 0.05 * c for c in (codes, naive))
    ]
    assert costs[0] < 0.95 * costs[1]
