"""What the outputs of the models of `zoo.py` mean, and how much of it a quantized model keeps.

A judge reads answers, one a sample, once, and returns figures by name, the task's own measure
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Outputs = list[np.ndarray]
Figures = dict[str, float]
# Boxes: rows of left, top, right, bottom, score, class.
Decode = Callable[[Outputs], np.ndarray]
SURE, OVERLAP = 0.5, 0.5


@dataclass(frozen=True)
class Answer:
    """The outputs of the float model and of another for one sample."""

    sample: dict[str, np.ndarray]
    wanted: Outputs
    given: Outputs


Judge = Callable[[Iterable[Answer]], Figures]


class Noise:
    """Signal to noise of each output, summed up while answers pass through."""

    def __init__(self) -> None:
        self.signal: dict[int, float] = {}
        self.noise: dict[int, float] = {}

    def heard(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The answers, on their way to a judge."""
        for answer in answers:
            for number, pair in enumerate(zip(answer.wanted, answer.given, strict=True)):
                self._add(number, *(np.asarray(x, np.float64).ravel() for x in pair))
            yield answer

    def _add(self, number: int, wanted: np.ndarray, given: np.ndarray) -> None:
        # What one has and the other lacks is all noise: a signal may come out shorter.
        size = max(len(wanted), len(given))
        a, b = (np.pad(x, (0, size - len(x))) for x in (wanted, given))
        self.signal[number] = self.signal.get(number, 0.0) + float(np.square(a).sum())
        self.noise[number] = self.noise.get(number, 0.0) + float(np.square(a - b).sum())

    @property
    def worst(self) -> float:
        """Decibels of the worst output that is not silent."""
        heard = [k for k, loud in self.signal.items() if loud]
        return min(10 * np.log10(self.signal[k] / max(self.noise[k], 1e-30)) for k in heard)


# --- boxes


def boxes(decode: Decode) -> Judge:
    """F1 and recall of boxes that the float model is sure of, found again with an overlap of
    half.
    """

    def judge(answers: Iterable[Answer]) -> Figures:
        hits = wanted = given = 0
        for answer in answers:
            ours, theirs = decode(answer.wanted), decode(answer.given)
            hits += _matches(ours, theirs)
            wanted, given = wanted + len(ours), given + len(theirs)
        f1, recall = 2 * hits / max(wanted + given, 1), hits / max(wanted, 1)
        return {"F1": f1, "recall": recall, "boxes": wanted}

    return judge


def _matches(wanted: np.ndarray, given: np.ndarray) -> int:
    free, hits = np.ones(len(given), bool), 0
    for box in wanted[wanted[:, 4].argsort()[::-1]]:
        overlap = _overlap(box, given) * (given[:, 5] == box[5]) * free
        if len(given) and overlap.max() >= OVERLAP:
            free[overlap.argmax()] = False
            hits += 1
    return hits


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    area = np.clip(others[:, 2:4] - others[:, :2], 0, None).prod(axis=1)
    return shared / ((box[2:4] - box[:2]).prod() + area - shared + 1e-9)


def _suppressed(found: np.ndarray, limit: float = 0.45) -> np.ndarray:
    """Boxes that no box of the same class with a higher score overlaps more than `limit`."""
    kept, rest = [], found[found[:, 4].argsort()[::-1]]
    while len(rest):
        kept.append(rest[0])
        same = rest[:, 5] == rest[0, 5]
        rest = rest[~(same & (_overlap(rest[0], rest) > limit))]
    return np.reshape(kept, (-1, 6))


def _rows(low: np.ndarray, high: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Boxes whose class is the best of `classes` (boxes, classes)."""
    best = np.stack([classes.max(axis=1), classes.argmax(axis=1)], axis=1)
    return np.concatenate([low, high, best], axis=1)


def _places(cells: np.ndarray, columns: int) -> np.ndarray:
    """Column and row of cells that are numbered row by row."""
    return np.stack([cells % columns, cells // columns], axis=1)


def distances(
    width: int,
    strides: Sequence[int],
    scores: Sequence[int],
    sides: Sequence[int],
) -> Decode:
    """Boxes as distances of four sides from a cell's centre, each the mean of a distribution over
    whole strides; `scores` and `sides` are the numbers of the outputs, by stride.
    """

    def of_stride(stride: int, classes: np.ndarray, spread: np.ndarray) -> np.ndarray:
        cells = np.flatnonzero(classes.max(axis=1) > SURE)
        spread = spread.reshape(len(classes), 4, -1)[cells]
        chance = np.exp(spread - spread.max(axis=2, keepdims=True))
        reach = chance @ np.arange(spread.shape[2]) / chance.sum(axis=2) * stride
        centre = (_places(cells, -(-width // stride)) + 0.5) * stride
        return _rows(centre - reach[:, :2], centre + reach[:, 2:], classes[cells])

    def decode(outputs: Outputs) -> np.ndarray:
        found = [
            of_stride(stride, outputs[score][0], outputs[side][0])
            for stride, score, side in zip(strides, scores, sides, strict=True)
        ]
        return _suppressed(np.concatenate(found))

    return decode


def yunet(outputs: Outputs) -> np.ndarray:
    """Faces: class, objectness, then centre and size of boxes, at strides 8, 16 and 32."""
    rows = []
    for k, stride in enumerate((8, 16, 32)):
        chance, certain, box = (outputs[k + 3 * i][0] for i in range(3))
        score = np.sqrt(np.clip(chance, 0, 1) * np.clip(certain, 0, 1))
        cells = np.flatnonzero(score[:, 0] > SURE)
        centre = (_places(cells, 320 // stride) + box[cells, :2]) * stride
        half = np.exp(box[cells, 2:]) * stride / 2
        rows.append(_rows(centre - half, centre + half, score[cells]))
    return _suppressed(np.concatenate(rows))


def ultraface(outputs: Outputs) -> np.ndarray:
    """Faces: scores of background and face, corners relative to the picture."""
    scores, corners = outputs[0][0, :, 1:], outputs[1][0] * [320, 240, 320, 240]
    sure = scores[:, 0] > SURE
    return _suppressed(_rows(corners[sure, :2], corners[sure, 2:], scores[sure]))


def fastestdet(outputs: Outputs) -> np.ndarray:
    """One map: objectness, shift and size of a box, then the classes."""
    found = outputs[0][0]
    columns = found.shape[2]
    cells = found.reshape(len(found), -1).T
    classes = np.clip(cells[:, :1], 0, None) ** 0.6 * np.clip(cells[:, 5:], 0, None) ** 0.4
    sure = np.flatnonzero(classes.max(axis=1) > SURE)
    centre = (_places(sure, columns) + np.tanh(cells[sure, 1:3])) * 352 / columns
    half = 352 / 2 / (1 + np.exp(-cells[sure, 3:5]))
    return _suppressed(_rows(centre - half, centre + half, classes[sure]))


def yolo(outputs: Outputs) -> np.ndarray:
    """One matrix: centre and size of boxes, then the classes, of all cells."""
    cells = outputs[0][0].T
    sure = cells[cells[:, 4:].max(axis=1) > SURE / 2]
    centre, half = sure[:, :2], sure[:, 2:4] / 2
    return _suppressed(_rows(centre - half, centre + half, sure[:, 4:]))


# --- masks, classes, text, sound


def masks(mask: Callable[[np.ndarray], np.ndarray]) -> Judge:
    """Intersection over union of what `mask` makes of the first output."""

    def judge(answers: Iterable[Answer]) -> Figures:
        shared = either = wanted = size = 0
        for answer in answers:
            a, b = mask(answer.wanted[0]), mask(answer.given[0])
            shared, either = shared + int((a & b).sum()), either + int((a | b).sum())
            wanted, size = wanted + int(a.sum()), size + a.size
        return {"IoU": shared / max(either, 1), "foreground": wanted / size}

    return judge


def best_class(output: np.ndarray) -> np.ndarray:
    """The mask of the pixels whose best class is not the first one."""
    return np.asarray(output[0].argmax(axis=0) > 0)


def likely(output: np.ndarray) -> np.ndarray:
    """The mask of the pixels of text."""
    return output[0, 0] > 0.3


def classes(labels: Callable[[], Sequence[int]]) -> Judge:
    """Right answers, and answers that are the float model's; labels start over at their end."""

    def judge(answers: Iterable[Answer]) -> Figures:
        best = np.array([[x[0].argmax() for x in (a.wanted, a.given)] for a in answers])
        right = np.resize(labels(), len(best))
        wanted, given = best.T
        return {
            "top-1": float((given == right).mean()),
            "same": float((given == wanted).mean()),
            "float": float((wanted == right).mean()),
        }

    return judge


def texts(answers: Iterable[Answer]) -> Figures:
    """Lines that are read the same, letter by letter."""
    same = [_read(answer.wanted[0]) == _read(answer.given[0]) for answer in answers]
    return {"same text": float(np.mean(same))}


def _read(output: np.ndarray) -> list[int]:
    """Letters of a line: the best of every place, repeated ones once, blanks left out."""
    best = output[0].argmax(axis=1)
    return [int(x) for i, x in enumerate(best) if x and (not i or x != best[i - 1])]


def lengths(answers: Iterable[Answer]) -> Figures:
    """Signals that are as long as the float model's."""
    same = [answer.wanted[0].shape == answer.given[0].shape for answer in answers]
    return {"same length": float(np.mean(same))}


def perplexity(answers: Iterable[Answer]) -> Figures:
    """How many tokens a decoder wavers between, and the float model."""
    losses = []
    for answer in answers:
        ids = answer.sample["input_ids"][0, 1:]
        losses.append([_loss(x[0][0, :-1], ids) for x in (answer.given, answer.wanted)])
    given, wanted = np.exp(np.mean(losses, axis=0))
    return {"perplexity": float(given), "float": float(wanted)}


def _loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean negative log likelihood of `ids`."""
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return float((total - logits[np.arange(len(ids)), ids]).mean())


def noise_only(answers: Iterable[Answer]) -> Figures:
    """No measure but the noise."""
    for _ in answers:
        pass
    return {}
