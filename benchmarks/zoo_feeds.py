"""What the models of `zoo.py` are fed with: pictures, drawn pages and lines of text, signals, token
ids.

A feed makes samples of a split, `calib` or `dev`: {input name: array}. The same split and count
give the same samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import DATA
from PIL import Image, ImageDraw, ImageFont

Sample = dict[str, np.ndarray]
Feed = Callable[[str, int], list[Sample]]
Draw = Callable[[np.random.Generator, int], Image.Image]
SEEDS = {"calib": 0, "dev": 1}
RATE, HOP = 16_000, 256
MONO = ((127.5,) * 3, (127.5,) * 3)
UNIT = ((0.0,) * 3, (255.0,) * 3)
RAW = ((0.0,) * 3, (1.0,) * 3)


def photos(split: str, count: int, faces: bool = False) -> list[Path]:
    """Files of ImageNet pictures; `faces` puts portraits in front of them to calibrate on."""
    folder = DATA / "images" / "imagenet" / split
    portraits = sorted((DATA / "images" / "faces").iterdir()) if faces and split == "calib" else []
    return [*portraits, *sorted(folder.iterdir())][:count]


def pixels(
    image: Image.Image, mean: Sequence[float], std: Sequence[float], order: str = "BGR"
) -> np.ndarray:
    """A picture as float32 (1, 3, height, width)."""
    x = np.asarray(image.convert("RGB"), np.float32)
    x = x if order == "RGB" else x[..., ::-1]
    return ((x - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]


def pictures(
    name: str,
    size: tuple[int, int],
    scaling: tuple[Sequence[float], Sequence[float]],
    order: str = "BGR",
    faces: bool = False,
    square: bool = False,
) -> Feed:
    """Photographs stretched to `size` (width, height); `square` pads them to a square before."""

    def load(path: Path) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        if square:
            padded = Image.new("RGB", (max(image.size),) * 2)
            padded.paste(image)
            image = padded
        return pixels(image.resize(size, Image.Resampling.BILINEAR), *scaling, order)

    return lambda split, count: [{name: load(path)} for path in photos(split, count, faces)]


def crops(name: str, side: int, mean: Sequence[float], std: Sequence[float]) -> Feed:
    """Photographs as a classifier sees them: the centre of each, in the order of the labels."""

    def load(path: Path) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        scale = side / 0.875 / min(image.size)
        image = image.resize([round(s * scale) for s in image.size], Image.Resampling.BICUBIC)
        left, top = ((s - side) // 2 for s in image.size)
        return pixels(image.crop((left, top, left + side, top + side)), mean, std, "RGB")

    def files(split: str, count: int) -> list[Path]:
        folder = DATA / "images" / "imagenet" / split
        return [folder / name for name, _ in labelled(split)[:count]]

    return lambda split, count: [{name: load(path)} for path in files(split, count)]


def labelled(split: str) -> list[tuple[str, int]]:
    """Files of ImageNet pictures with their classes."""
    lines = (DATA / "images" / "imagenet" / f"{split}.csv").read_text().split()[1:]
    return [(file, int(label)) for file, label in (line.rsplit(",", 1) for line in lines)]


# --- drawn text


@cache
def words() -> tuple[str, ...]:
    """English words, of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    text = " ".join(topics[key] for key in sorted(topics))
    return tuple(re.findall(r"[A-Za-z]{2,12}[,.]?", text))


def phrase(rng: np.random.Generator, count: int) -> str:
    """Consecutive words."""
    start = int(rng.integers(len(words()) - count))
    return " ".join(words()[start : start + count])


def drawn(name: str, draw: Draw, scaling: tuple[Sequence[float], Sequence[float]]) -> Feed:
    """Pictures that `draw` makes of random numbers and the number of the picture."""

    def feed(split: str, count: int) -> list[Sample]:
        streams = [np.random.default_rng([SEEDS[split], i]) for i in range(count)]
        return [{name: pixels(draw(rng, i), *scaling)} for i, rng in enumerate(streams)]

    return feed


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A photograph, or paper of some colour."""
    if rng.random() < 0.5:
        return Image.new("RGB", size, tuple(rng.integers(150, 256, 3).tolist()))
    files = photos("calib", 100)
    return Image.open(files[rng.integers(len(files))]).convert("RGB").resize(size)


def line_of_text(width: int, height: int, turned: bool = False) -> Draw:
    """A line of text that fills the picture; `turned` puts every other upside down."""

    def draw(rng: np.random.Generator, number: int) -> Image.Image:
        font = ImageFont.load_default(int(rng.integers(height // 2, height - 14)))
        text = phrase(rng, 8)
        while len(text) > 3 and font.getlength(text) > width - 8:
            text = text[:-1]
        image = Image.new("RGB", (width, height), tuple(rng.integers(150, 256, 3).tolist()))
        ink = tuple(rng.integers(0, 90, 3).tolist())
        ImageDraw.Draw(image).text((4, height // 2), text.strip(), ink, font, "lm")
        return image.rotate(180) if turned and number % 2 else image

    return draw


def scene(width: int, height: int) -> Draw:
    """Some lines of text of different sizes on a photograph or on paper."""

    def draw(rng: np.random.Generator, number: int) -> Image.Image:
        image = _background(rng, (width, height))
        pen, top = ImageDraw.Draw(image), int(rng.integers(10, 40))
        while top < height - 40:
            size = int(rng.integers(14, 44))
            place, text = (int(rng.integers(4, width // 2)), top), phrase(rng, 4)
            ink = tuple(rng.integers(0, 256, 3).tolist())
            pen.text(place, text, ink, ImageFont.load_default(size))
            top += int(size * rng.uniform(1.3, 3))
        return image

    return draw


def page(width: int, height: int) -> Draw:
    """A printed page: a title, columns of paragraphs, pictures and tables with their captions."""

    def draw(rng: np.random.Generator, number: int) -> Image.Image:
        image = Image.new("RGB", (2 * width, 2 * height), "white")
        pen = ImageDraw.Draw(image)
        pen.text((width, 60), phrase(rng, 6).title(), "black", ImageFont.load_default(44), "mm")
        columns = int(rng.integers(1, 3))
        gap = 60
        across = (2 * width - gap) // columns - gap
        for column in range(columns):
            left, top = gap + column * (across + gap), 140
            while top < 2 * height - 260:
                block = (_paragraph, _paragraph, _figure, _table)[rng.integers(4)]
                top = block(rng, image, left, top, across, 2 * height - 60) + 44
        return image.resize((width, height), Image.Resampling.BOX)

    return draw


def _paragraph(
    rng: np.random.Generator, image: Image.Image, left: int, top: int, across: int, end: int
) -> int:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(20)
    if rng.random() < 0.4:
        heading = f"{rng.integers(1, 9)} {phrase(rng, 3).title()}"
        pen.text((left, top), heading, "black", ImageFont.load_default(28))
        top += 48
    for _ in range(int(rng.integers(4, 12))):
        text = phrase(rng, 30)
        while font.getlength(text) > across:
            text = text[: text.rindex(" ")]
        if top < end:
            pen.text((left, top), text, "black", font)
        top += 27
    return top


def _caption(
    rng: np.random.Generator, image: Image.Image, kind: str, centre: int, top: int
) -> None:
    text = f"{kind} {rng.integers(1, 9)}. {phrase(rng, 5)}"
    ImageDraw.Draw(image).text((centre, top), text, "black", ImageFont.load_default(18), "mt")


def _figure(
    rng: np.random.Generator, image: Image.Image, left: int, top: int, across: int, end: int
) -> int:
    tall = min(int(rng.integers(240, 420)), end - top - 40)
    image.paste(_photo(rng, (across, tall)), (left, top))
    _caption(rng, image, "Figure", left + across // 2, top + tall + 10)
    return top + tall + 30


def _photo(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    files = photos("calib", 100)
    return Image.open(files[rng.integers(len(files))]).convert("RGB").resize(size)


def _table(
    rng: np.random.Generator, image: Image.Image, left: int, top: int, across: int, end: int
) -> int:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    _caption(rng, image, "Table", left + across // 2, top)
    top, columns = top + 30, int(rng.integers(3, 6))
    rows = min(int(rng.integers(4, 10)), (end - top) // 34)
    for row in range(rows):
        pen.line((left, top + 34 * row, left + across, top + 34 * row), "black", 2)
        for column in range(columns):
            place = (left + column * across // columns + 8, top + 34 * row + 6)
            pen.text(place, f"{rng.uniform(0, 100):.1f}" if row else phrase(rng, 1), "black", font)
    bottom = top + 34 * rows
    pen.line((left, bottom, left + across, bottom), "black", 2)
    return bottom


# --- signals: sequences of frames, of which a model hands its states on


def speech(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Syllables of harmonics whose pitch glides, in noise: float32 of `RATE` samples a second."""
    time = np.arange(int(RATE * seconds)) / RATE
    pitch = 120 + 60 * np.sin(2 * np.pi * rng.uniform(0.3, 1.2) * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = rng.uniform([300, 900, 2200], [800, 1800, 3200])
    voice = np.zeros_like(time)
    for k in range(1, 25):
        loud = np.exp(-(((k * pitch[:, None] - formants) / 250) ** 2)).sum(axis=1)
        voice += loud / k**0.5 * np.sin(k * phase)
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(1.5, 4) * time), 0, None) ** 0.5
    noise = rng.standard_normal(len(time)) * rng.uniform(0.01, 0.1)
    clean = voice * syllables
    return np.float32(0.3 * clean / np.abs(clean).max() + 0.3 * noise)


def waves(split: str, count: int) -> Iterator[list[np.ndarray]]:
    """Sequences of 512 samples every 128: (1, 1, 512)."""
    for number in range(count):
        signal = speech(np.random.default_rng([SEEDS[split], number]), 1.2)
        yield [signal[i : i + 512][None, None] for i in range(0, len(signal) - 512, 128)]


def spectra(split: str, count: int) -> Iterator[list[np.ndarray]]:
    """Sequences of short-time spectra, real and imaginary parts: (1, 257, 1, 2)."""
    window = np.sqrt(np.hanning(2 * HOP))
    for number in range(count):
        signal = speech(np.random.default_rng([SEEDS[split], number]), 2.0)
        starts = range(0, len(signal) - 2 * HOP, HOP)
        found = [np.fft.rfft(signal[i : i + 2 * HOP] * window) for i in starts]
        yield [np.stack([x.real, x.imag], -1)[None, :, None].astype(np.float32) for x in found]


# --- ids


def phonemes(config: Path) -> Feed:
    """Sentences as a voice reads them: ids of letters, blanks between them, and no noise."""

    def feed(split: str, count: int) -> list[Sample]:
        ids = json.loads(config.read_text())["phoneme_id_map"]
        rng = np.random.default_rng(SEEDS[split])
        texts = [phrase(rng, int(rng.integers(4, 9))).lower() for _ in range(count)]
        return [_spoken([ids[c][0] for c in f"^{text}$" if c in ids]) for text in texts]

    return feed


def _spoken(letters: list[int]) -> Sample:
    ids = np.zeros((1, 2 * len(letters)), np.int64)
    ids[0, ::2] = letters
    length, scales = np.array([ids.size]), np.float32([0, 1, 0])
    return {"input": ids, "input_lengths": length, "scales": scales}


class Tokenizer:
    """Byte pair encoding; `path` holds the `tokens` and the `merges`, the first of which go
    first.
    """

    def __init__(self, path: Path) -> None:
        tables = json.loads(path.read_text())
        self.ids = {token: i for i, token in enumerate(tables["tokens"])}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(tables["merges"])}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        self.letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        parts = re.findall(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+", text)
        return [self.ids[token] for part in parts for token in self._merged(part)]

    def _merged(self, part: str) -> list[str]:
        tokens = [self.letters[b] for b in part.encode()]
        while len(tokens) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(tokens)]
            k = int(np.argmin(ranks))
            if ranks[k] == len(self.ranks):
                break
            tokens[k : k + 2] = [tokens[k] + tokens[k + 1]]
        return tokens


def decoder(tables: Path, layers: int, heads: int, width: int, length: int = 256) -> Feed:
    """Pieces of `length` tokens of English text, the caches empty."""

    def feed(split: str, count: int) -> list[Sample]:
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics)[SEEDS[split] :: 2])
        ids = Tokenizer(tables).encode(text[: 8 * length * count])
        pieces = np.reshape(ids[: length * count], (-1, 1, length))
        empty = np.zeros((1, heads, 0, width), np.float32)
        caches = {
            f"past_key_values.{i}.{what}": empty for i in range(layers) for what in ("key", "value")
        }
        return [{"input_ids": piece, **caches} for piece in pieces]

    return feed
