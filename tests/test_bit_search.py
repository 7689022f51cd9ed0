"""Bits by sensitivity against exhaustive search; what a search measures, keeps and goes on from."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from graphs import build, normal
from running import Ear
from running import weights_converted as converted

from converter.weights.bit_search import divergence
from converter.weights.journal import Journal
from converter.weights.mixed_bits import WIDTHS, allocation, path

SENSITIVITY = {"search": "SENSITIVITY", "target_ratio": 4}
X = normal(12, 32)


def layers():
    """Three products, the last of which matters most."""
    text = """g (float[1,32] x) => (float[1,48] y) {
        a = MatMul (x, w1)  r = Relu (a)  b = MatMul (r, w2)  c = MatMul (x, w3)
          y = Add (b, c) }"""
    return build(text, w1=normal(32, 96), w2=normal(96, 48, seed=1) / 50, w3=normal(32, 48, seed=2))


def products(count, size):
    """Products one behind the other."""
    weights = {f"w{i}": normal(size, size, seed=i) for i in range(count)}
    steps = " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(count))
    text = f"g (float[1,{size}] x) => (float[1,{size}] h{count}) {{ h0 = Relu (x)  {steps} }}"
    return build(text, **weights)


def problem(seed, count=3):
    rng = np.random.default_rng(seed)
    names = [f"w{i}" for i in range(count)]
    worth = dict(zip(names, rng.uniform(0.1, 9, count) ** 3, strict=True))
    return worth, dict(zip(names, map(int, rng.integers(1, 500, count)), strict=True))


def total(worth, sizes, bits):
    return sum(sizes[n] * bits[n] for n in worth), sum(worth[n] * 4.0 ** -bits[n] for n in worth)


@pytest.mark.parametrize("seed", range(8))
def test_no_allocation_beats_a_step_of_the_path(seed):
    worth, sizes = problem(seed)
    everything = [
        total(worth, sizes, dict(zip(worth, bits, strict=True)))
        for bits in itertools.product(WIDTHS, repeat=3)
    ]
    bits = dict.fromkeys(worth, WIDTHS[0])
    for step in path(worth, sizes):
        assert step.bits == bits[step.name] + 1
        bits[step.name] = step.bits
        size, error = total(worth, sizes, bits)
        assert not [e for s, e in everything if s <= size and e < error * (1 - 1e-9)]
    assert set(bits.values()) == {WIDTHS[-1]}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("average", [2.0, 3.3, 4.5, 9.9])
def test_an_allocation_uses_its_room(seed, average):
    worth, sizes = problem(seed)
    most = average * sum(sizes.values())
    bits = allocation(path(worth, sizes), sizes, lambda name, n: n * sizes[name], most)
    size, _ = total(worth, sizes, bits)
    assert size <= most
    assert all(size + sizes[name] > most for name in sizes if bits[name] < WIDTHS[-1])


def test_worth_as_the_size_means_equal_bits():
    sizes = {"a": 10, "b": 300, "c": 7}
    steps = path(dict(sizes), sizes)
    bits = allocation(steps, sizes, lambda name, n: n * sizes[name], 5 * 317)
    assert set(bits.values()) == {5}


def test_an_allocation_counts_what_a_width_takes_beside_its_codes():
    sizes = {"a": 100, "b": 100}
    steps = path({"a": 2.0, "b": 1.0}, sizes)

    def cost(name, bits):
        return bits * sizes[name] + (1000 if bits > 2 and name == "a" else 0)

    assert allocation(steps, sizes, cost, 900) == {"a": 2, "b": 7}


def test_divergence_of_probabilities_and_of_anything_else():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence([p], [q]) == pytest.approx(expected)
    assert divergence([np.array([3.0, -4.0])], [np.array([3.0, -5.0])]) == pytest.approx(1 / 25)
    assert divergence([p, np.ones(3)], [p, np.zeros(3)]) == pytest.approx(1.0)


class Impatient(Ear):
    """Interrupts when the second allocation is measured."""

    def say(self, text):
        super().say(text)
        if sum("divergence" in line for line in self.said) > 1:
            raise KeyboardInterrupt


def test_a_search_tells_what_can_be_had(tmp_path):
    ear = Ear()
    outcome, data = converted(tmp_path, layers(), X, {"bit_num": 0}, mixed=SENSITIVITY, watch=ear)
    rows = [line for line in ear.told if line.startswith("Could be had")]
    assert len(rows) > 6
    assert [float(row.split()[3]) for row in rows] == sorted(float(row.split()[3]) for row in rows)
    assert sum("measured" in row for row in rows) in {2, 3}
    assert len(data) < 0.33 * (tmp_path / "model.onnx").stat().st_size
    bits = {name: stored.qparams.format.bits for (name, _), stored in outcome.plan.stored.items()}
    assert bits["c"] > bits["b"]


def test_a_ratio_out_of_reach_is_said(tmp_path):
    ear, mixed = Ear(), {"search": "SENSITIVITY", "target_ratio": 15.9}
    converted(tmp_path, layers(), X, {"bit_num": 0}, mixed=mixed, watch=ear)
    assert any("target_ratio = 15.9 is out of reach" in line for line in ear.warned)


@pytest.mark.parametrize("ratio", [6, 9.5, 11])
def test_the_file_is_so_many_times_smaller(tmp_path, ratio):
    mixed = {"search": "SENSITIVITY", "target_ratio": ratio}
    _, data = converted(tmp_path, products(4, 256), normal(12, 256), {"bit_num": 0}, mixed=mixed)
    # One more bit for a weight would be too many.
    most = (tmp_path / "model.onnx").stat().st_size / ratio
    assert most - 256 * 256 / 8 - 300 < len(data) <= most + 4


def test_what_float16_saves_beside_weights_is_theirs(tmp_path):
    mixed = {"search": "SENSITIVITY", "target_ratio": 5}
    common = {"bit_num": 0, "skip_quant_node": "h4"}
    outcome, data = converted(
        tmp_path, products(4, 256), normal(12, 256), common, mixed=mixed, fp16=True
    )
    assert len(outcome.plan.stored) == 3
    most = (tmp_path / "model.onnx").stat().st_size / 5
    assert most - 256 * 256 / 8 - 300 < len(data) <= most + 4


@pytest.mark.parametrize("ratio", [4.2, 6])
def test_integers_in_memory_get_all_the_bits_that_they_take(tmp_path, ratio):
    mixed = {"search": "SENSITIVITY", "target_ratio": ratio}
    keys = {"dequant_strategy": "ON_THE_FLY"}
    outcome, data = converted(
        tmp_path, products(6, 128), normal(12, 128), {"bit_num": 0, "opset": 21}, keys, mixed
    )
    widths = {weight.qparams.format.bits for weight in outcome.plan.stored.values()}
    assert widths == {4, 8}
    assert len(data) <= (tmp_path / "model.onnx").stat().st_size / ratio


@pytest.mark.parametrize(
    ("mixed", "apart"),
    [(SENSITIVITY, False), ({"search": "SENSITIVITY", "min_cosine": 0.9}, True)],
)
def test_samples_are_kept_apart_where_a_bound_is_judged(tmp_path, mixed, apart):
    ear = Ear()
    converted(tmp_path, layers(), normal(40, 32), {"bit_num": 0}, mixed=mixed, watch=ear)
    assert any("judge the search" in line for line in ear.told) == apart


def test_an_interrupted_search_goes_on(tmp_path):
    files = [(tmp_path / name, tmp_path / name / "out.onnx") for name in ("whole", "halted")]
    # A ratio at which all allocations differ.
    mixed = SENSITIVITY | {"target_ratio": 3.5}
    for folder, _ in files:
        folder.mkdir()
    _, whole = converted(files[0][0], layers(), X, {"bit_num": 0}, mixed=mixed)
    folder, output = files[1]
    with pytest.raises(KeyboardInterrupt):
        converted(folder, layers(), X, {"bit_num": 0}, mixed=mixed, watch=Impatient())
    assert output.stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size
    journal = folder / "out.onnx.search.json"
    known = json.loads(journal.read_text())["known"]
    assert len(known) == 3
    # What stands in the journal is believed: nothing of it is measured again.
    ear = Ear()
    _, resumed = converted(folder, layers(), X, {"bit_num": 0}, mixed=mixed, watch=ear)
    assert resumed == whole
    assert not journal.exists()


def test_a_journal_counts_for_its_job_alone(tmp_path):
    file = tmp_path / "j.json"
    assert Journal(file, "one").once("a", lambda: 1.5) == 1.5
    assert Journal(file, "one").once("a", lambda: 2.5) == 1.5
    assert Journal(file, "two").once("a", lambda: 2.5) == 2.5
    file.write_text("[broken")
    journal = Journal(file, "two")
    assert journal.once("a", lambda: 3.5) == 3.5
    journal.close()
    assert list(tmp_path.iterdir()) == []
