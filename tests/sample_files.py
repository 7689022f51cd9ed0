"""Calibration files for tests: tiny ones, whose content says which file they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calib.samples import Dataset, ImageOptions, InputSpec, open_dataset

PLAIN = ImageOptions()


def spec(
    *shape: int | None, name: str = "x", dtype: Any = np.float32, layout: str | None = None
) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape, layout)


def opened(
    given: InputSpec, path: Path, kind: str, size: int = 1, image: ImageOptions = PLAIN
) -> Dataset:
    return open_dataset([given], {given.name: path}, size, kind=kind, image=image)


def only(dataset: Dataset, name: str = "x") -> np.ndarray:
    assert len(dataset) == 1
    return dataset.sample(0)[name]


def grey(path: Path, level: int, width: int = 2, height: int = 2) -> None:
    Image.new("L", (width, height), level).save(path)


def grey_folder(folder: Path, levels: range) -> Path:
    folder.mkdir(exist_ok=True)
    for level in levels:
        grey(folder / f"img{level}.png", level)
    return folder


def levels(dataset: Dataset, name: str = "x") -> list[float]:
    return [float(dataset.sample(i)[name].flat[0]) for i in range(len(dataset))]


def colour(path: Path, height: int = 3, width: int = 4) -> np.ndarray:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels
