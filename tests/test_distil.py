"""Samples distilled from a model: statistics, losses and coordinates beside float64 arithmetic, and
samples of a small model whose training data is known.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from graphs import build, normal, positive
from numpy.lib.stride_tricks import sliding_window_view

from calib import CalibError
from converter.errors import ModelError
from converter.graph.edit import values_by_name
from converter.graph.files import serialized
from converter.job import Watch
from converter.learn.distil import Distiller, Place, Task, only_noise
from converter.learn.gradients import loss_model
from converter.learn.likeness import (
    OTHERS,
    OWN,
    STILL,
    TARGET,
    TEMPERATURE,
    Likeness,
    Scores,
    scores_of,
    targets,
)
from converter.learn.losses import LOSS
from converter.learn.spectrum import Spectrum
from converter.prepare import normal_form
from converter.prepare.fold_affine import Moments

SIZE, EPSILON = 16, 1e-5
HEAD = f"g (float[N,3,{SIZE},{SIZE}] x) => (float[] y)"
NORM = "BatchNormalization"


def parameters(channels, seed=0):
    """Gamma, beta, mean and variance."""
    names = ("gamma", "beta", "mean", "var")
    values = [positive, normal, normal, positive]
    return {
        n: f(channels, seed=seed + i) for i, (n, f) in enumerate(zip(names, values, strict=True))
    }


def known(graph, **constants):
    """A model in normal form, and what it knew."""
    model = build(graph, **constants)
    return model, normal_form(model)


def behind_norm(p):
    """Mean and deviation of the output of a normalisation whose input was as in training."""
    variance = p["var"].astype(np.float64)
    deviation = np.abs(p["gamma"].astype(np.float64)) * np.sqrt(variance / (variance + EPSILON))
    return p["beta"].astype(np.float64), deviation


# --- what is known of training


def test_a_folded_norm_tells_of_its_output():
    p = parameters(6)
    model, moments = known(
        f"{HEAD} {{ c = Conv (x, w)  y = {NORM} (c, gamma, beta, mean, var) }}",
        w=normal(6, 3, 3, 3),
        **p,
    )
    assert [node.op_type for node in model.graph] == ["Conv"]
    mean, deviation = behind_norm(p)
    np.testing.assert_allclose(moments["y"].mean, mean, rtol=1e-6)
    np.testing.assert_allclose(moments["y"].deviation, deviation, rtol=1e-6)


def test_what_is_folded_behind_a_norm_scales_what_it_tells():
    p, k, c = parameters(6), -positive(6, 1, 1), normal(6, 1, 1)
    nodes = f"c = Conv (x, w)  n = {NORM} (c, gamma, beta, mean, var)  m = Mul (n, k)"
    model, moments = known(
        f"{HEAD} {{ {nodes}  y = Add (m, c0) }}", w=normal(6, 3, 3, 3), k=k, c0=c, **p
    )
    assert [node.op_type for node in model.graph] == ["Conv"]
    mean, deviation = behind_norm(p)
    np.testing.assert_allclose(moments["y"].mean, mean * k.ravel() + c.ravel(), rtol=1e-5)
    np.testing.assert_allclose(moments["y"].deviation, deviation * -k.ravel(), rtol=1e-5)
    assert set(moments) == {"y"}


def test_a_norm_that_stays_tells_as_well():
    p = parameters(3)
    model, moments = known(
        f"{HEAD} {{ a = Relu (x)  n = {NORM} (a, gamma, beta, mean, var)  y = Relu (n) }}", **p
    )
    assert NORM in [node.op_type for node in model.graph]
    np.testing.assert_allclose(moments["n"].mean, behind_norm(p)[0], rtol=1e-6)
    np.testing.assert_allclose(moments["n"].deviation, behind_norm(p)[1], rtol=1e-6)


def test_arithmetic_without_a_norm_tells_nothing():
    _, moments = known(
        f"{HEAD} {{ c = Conv (x, w)  y = Mul (c, k) }}", w=normal(6, 3, 3, 3), k=positive(6, 1, 1)
    )
    assert not moments


# --- coordinates

PICTURE = Spectrum(
    (2, 3, 8, 7), (2, 3), np.array(0.5), np.array(2.0), np.array(-2.0), np.array(3.0)
)
SPECTRA = {
    "picture": PICTURE,
    "channels last": Spectrum(
        (1, 9, 8, 3), (1, 2), np.arange(3.0), np.ones(3), np.full(3, -3.0), np.full(3, 4.0)
    ),
    "no picture": Spectrum((4, 5), (), np.array(1.0), np.array(3.0), np.array(-9.0), np.array(9.0)),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_coordinates_stand_for_values(kind):
    spectrum = SPECTRA[kind]
    values = normal(*spectrum.shape).astype(np.float64)
    again = spectrum.values(spectrum.coordinates(values))
    np.testing.assert_allclose(again, values, atol=1e-12)


@pytest.mark.parametrize("kind", SPECTRA)
def test_gradients_of_coordinates_are_slopes_up_to_positive_factors(kind):
    spectrum, h = SPECTRA[kind], 1e-3
    slope = normal(*spectrum.shape, seed=1).astype(np.float64)
    at = spectrum.coordinates(normal(*spectrum.shape).astype(np.float64))
    gradient = spectrum.gradient(slope)
    rng = np.random.default_rng(0)
    for place in zip(*(rng.integers(0, n, 40) for n in at.shape), strict=True):
        moved = at.copy()
        moved[place] += h
        found = ((spectrum.values(moved) - spectrum.values(at)) * slope).sum() / h
        # Some parts of a real picture's frequencies are zero whatever their coordinates say.
        assert abs(found) < 1e-9 or np.sign(found) == np.sign(gradient[place])


@pytest.mark.parametrize("kind", SPECTRA)
def test_noise_lies_within_the_bounds_and_is_the_same_for_the_same_seed(kind):
    spectrum = SPECTRA[kind]
    one, two = (spectrum.values(spectrum.noise(np.random.default_rng(4))) for _ in range(2))
    assert (one == two).all()
    assert (one >= spectrum.low - 1e-9).all()
    assert (one <= spectrum.high + 1e-9).all()
    assert one.std() > 0.2 * spectrum.reach.mean()


def test_neighbours_are_alike_in_the_first_noise_of_a_picture():
    spectrum = Spectrum(
        (1, 1, 32, 32), (2, 3), np.array(0.0), np.array(1.0), np.array(-9.0), np.array(9.0)
    )
    noise = spectrum.values(spectrum.noise(np.random.default_rng(0)))[0, 0]
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.8


# --- the loss


def test_the_loss_is_that_of_all_samples_together():
    graph = f"g (float[1,3,{SIZE},{SIZE}] x) => (float[] y) {{ t = Relu (x)  y = Neg (t) }}"
    model, _ = known(graph)
    moments = {"t": Moments(np.array([0.3, 0.5, 7.0]), np.array([0.7, 0.4, STILL * 0.1]))}
    pictures = normal(4, 1, 3, SIZE, SIZE)
    loss = Likeness(moments, ()).loss(4)
    session = onnxruntime.InferenceSession(
        serialized(loss_model(model, loss, (), {"x": (1, 3, SIZE, SIZE)}, keep=[OWN]))
    )
    # The last channel does not vary and counts nothing.
    normed = np.maximum(pictures.astype(np.float64), 0)[:, 0, :2]
    normed = (normed - np.array([0.3, 0.5])[:, None, None]) / np.array([0.7, 0.4])[:, None, None]
    mean, deviation = normed.mean(axis=(0, 2, 3)), normed.std(axis=(0, 2, 3))
    expected = ((mean**2 + (deviation - 1) ** 2) / 2).sum()

    own = np.zeros((4, 2, 3), np.float32)
    for i, x in enumerate(pictures):
        own[i] = session.run([OWN], {"x": x, OTHERS: own[0]})[0]
    for i, x in enumerate(pictures):
        others = (own.sum(0) - own[i]) / 4
        found = session.run([LOSS], {"x": x, OTHERS: others})[0]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("axis", [1, None])
def test_scores_shall_be_sure(axis):
    model, _ = known("g (float[2,3,4] x) => (float[] y) { y = Neg (x) }")
    loss = Likeness({}, [Scores("y", axis)]).loss(1)
    session = onnxruntime.InferenceSession(
        serialized(loss_model(model, loss, (), {"x": (2, 3, 4)}))
    )
    x = normal(2, 3, 4) * 5
    shape = (2, 3, 4) if axis else (2, 12)
    target = targets(shape, 3)
    scores = (-x.astype(np.float64) / TEMPERATURE).reshape(shape)
    log = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    expected = -0.1 * (log * target).sum() / 2
    found = session.run([LOSS], {"x": x, TARGET.format(0): target})[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_every_class_has_its_turn():
    seen = [targets((1, 5), number).ravel() for number in range(5)]
    assert (np.sum(seen, axis=0) == 1).all()
    assert all(x.sum() == 1 for x in seen)
    assert (targets((2, 5), 7).sum(axis=1) == 1).all()


SCORES = {
    "softmax": ("c = Conv (x, w)  y = Softmax <axis=1> (c)", [Scores("c", 1)]),
    "softmax, then moved": (
        "c = Conv (x, w)  s = Softmax <axis=1> (c)  y = Flatten (s)",
        [Scores("c", 1)],
    ),
    "sigmoid": ("c = Conv (x, w)  y = Sigmoid (c)", [Scores("c", None)]),
    "rows of a product": ("f = Flatten (x)  y = Gemm (f, m)", [Scores("y", 1)]),
    "rows of a convolution": ("c = Conv (x, w)  y = Flatten (c)", [Scores("y", 1)]),
    "a picture": ("y = Conv (x, w)", []),
    "what is computed further": ("f = Flatten (x)  g0 = Gemm (f, m)  y = Tanh (g0)", []),
}


@pytest.mark.parametrize("kind", SCORES)
def test_where_a_model_says_how_sure_it_is(kind):
    nodes, expected = SCORES[kind]
    model, _ = known(
        f"g (float[1,3,2,2] x) => (float[] y) {{ {nodes} }}", w=normal(5, 3, 2, 2), m=normal(12, 4)
    )
    assert list(scores_of(model)) == expected


# --- whole samples


def convolved(x, weight):
    """A convolution of 3 x 3 without padding, in float64."""
    windows = sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64), optimize=True)


W, V = normal(6, 3, 3, 3) / 4, normal(5, 6, 3, 3, seed=1) / 5


def layers(x):
    """What enters the two normalisations of the model trained on `x`; they norm by what they know."""
    first = convolved(x, W)
    return first, lambda mean, var: convolved(
        np.maximum((first - along(mean)) / along(var) ** 0.5, 0), V
    )


def along(values):
    return np.asarray(values, np.float64)[:, None, None]


def moments_of(x):
    return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))


def trained():
    """A model, and what its normalisations have seen: soft pictures of uneven channels."""
    rng = np.random.default_rng(0)
    seeds = rng.standard_normal((64, 3, 4, 4)) * along([0.5, 1.0, 2.0]) + along([1.0, 0.0, -1.0])
    pictures = seeds.repeat(SIZE // 4, axis=2).repeat(SIZE // 4, axis=3)
    first, second = layers(pictures)
    one = moments_of(first)
    two = moments_of(second(one[0], one[1] + EPSILON))
    nodes = f"""
        a = Conv (x, w)  b = {NORM} (a, ones6, zeros6, m0, v0)  r = Relu (b)
        c = Conv (r, v)  y = {NORM} (c, ones5, zeros5, m1, v1)
    """
    plain = {
        f"{k}{n}": np.full(n, f, np.float32) for k, f in (("ones", 1), ("zeros", 0)) for n in (5, 6)
    }
    numbers = dict(
        zip(("m0", "v0", "m1", "v1"), (x.astype(np.float32) for x in (*one, *two)), strict=True)
    )
    return (*known(f"{HEAD} {{ {nodes} }}", w=W, v=V, **plain, **numbers), one, two)


def unlike(x, one, two):
    """The largest distance of a mean, in deviations, and of a deviation from its share 1, of what
    enters both normalisations.
    """
    first, second = layers(x)
    pairs = (first, one), (second(one[0], one[1] + EPSILON), two)
    found = [(moments_of(x), seen) for x, seen in pairs]
    means = [np.abs(m - mean) / np.sqrt(var) for (m, _), (mean, var) in found]
    deviations = [np.abs(np.sqrt(v / var) - 1) for (_, v), (_, var) in found]
    return max(x.max() for x in means), max(x.max() for x in deviations)


def joined(samples):
    return np.concatenate([sample["x"] for sample in samples])


def task_of(moments, count=8, first=0):
    place = Place((1, 3, SIZE, SIZE), (2, 3))
    return Task(Likeness(moments, ()), {"x": place}, [{}] * count, first)


def test_distilled_samples_show_the_model_what_its_training_did():
    model, moments, one, two = trained()
    task = task_of(moments)
    before = unlike(joined(only_noise(task)), one, two)
    after = unlike(joined(Distiller(model, task).samples(2, Watch())), one, two)
    assert min(before) > 0.3
    assert max(after) < 0.2


def test_samples_do_not_depend_on_the_number_of_threads_and_differ_from_each_other():
    model, moments, _, _ = trained()
    one, two = (joined(Distiller(model, task_of(moments, 5)).samples(n, Watch())) for n in (1, 3))
    assert (one == two).all()
    assert len({x.tobytes() for x in one}) == 5
    further = joined(Distiller(model, task_of(moments, 5, first=5)).samples(1, Watch()))
    assert not (further == one).any()


@pytest.mark.parametrize("reach", [0.02, 100.0])
def test_the_size_of_what_is_fed_is_found_where_nothing_says_it(reach):
    model, moments, one, two = trained()
    first = next(node for node in model.graph if node.op_type == "Conv")
    weight = values_by_name(model.graph)[first.inputs[1].name]
    weight.const_value = type(weight.const_value)(weight.const_value.numpy() / np.float32(reach))
    samples = joined(Distiller(model, task_of(moments)).samples(2, Watch())) / reach
    assert max(unlike(samples, one, two)) < 0.3


def test_a_sample_stays_within_its_bounds():
    model, moments, _, _ = trained()
    low, high = np.array([-1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.5])
    bounds = tuple(x.reshape(1, 3, 1, 1) for x in (low, high))
    task = Task(Likeness(moments, ()), {"x": Place((1, 3, SIZE, SIZE), (2, 3), bounds)}, [{}] * 4)
    found = joined(Distiller(model, task).samples(1, Watch()))
    assert (found >= bounds[0] - 1e-9).all()
    assert (found <= bounds[1] + 1e-9).all()


def test_a_loss_of_unknown_shape_is_refused_in_words():
    graph = f"{HEAD} {{ t = local.Thing (x)  y = Relu (t) }}"
    model, _ = known(graph)
    moments = {"y": Moments(np.zeros(3), np.ones(3))}
    with pytest.raises((ModelError, CalibError), match="No sample can be distilled, as the shape"):
        Distiller(model, task_of(moments, 1))


def test_what_is_not_finite_is_refused():
    model, _ = known(f"{HEAD} {{ y = Relu (x) }}")
    moments = {"y": Moments(np.full(3, np.nan), np.ones(3))}
    with pytest.raises(ModelError, match="gradients are not finite"):
        Distiller(model, task_of(moments, 2)).samples(1, Watch())
