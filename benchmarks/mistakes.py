#!/usr/bin/env python3
"""Mistakes of preprocessing, made on purpose on real models: are they named, by the checks of a
conversion and by `qconvert doctor`?

    python benchmarks/mistakes.py [MODEL ...] [--samples N] [--only NAME ...]

Models are those of `fed.py` that are there. `right` must find nothing. A mistake that changes
nothing (mean and std exchanged where they are equal) is left out. Each is made with labels, where
there are any, and without. A line has the processor seconds of the checks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fed
import numpy as np
from fed import HALF, IMAGENET, PICTURED, Numbers, Pictured
from PIL import Image

from converter.config import Config, load_config
from converter.config.rules import DATA_RULES
from converter.doctor.examine import examine
from converter.errors import DataError
from converter.job import Job, Watch


@dataclass(frozen=True)
class Case:
    """A model as it is fed: its pictures, how many, and labels, None for no label file."""

    model: Pictured
    folder: Path
    labels: dict[str, int] | None
    size: int


def right(case: Case, _: Path) -> Case:
    """No mistake."""
    return case


def scaled(mean: Numbers, std: Numbers) -> Callable[[Case, Path], Case]:
    """Other constants, as many as there are channels."""

    def made(case: Case, _: Path) -> Case:
        channels = len(case.model.scaling[0])
        return _with(case, scaling=(mean[:channels], std[:channels]))

    return made


def _with(case: Case, **changed: object) -> Case:
    return replace(case, model=replace(case.model, **changed))


def constants_of_unit(case: Case, _: Path) -> Case:
    """Constants for pixels of 0..1."""
    return _with(case, scaling=tuple(tuple(x / 255 for x in v) for v in case.model.scaling))


def exchanged(case: Case, _: Path) -> Case:
    """Mean and std exchanged."""
    return _with(case, scaling=case.model.scaling[::-1])


def other_order(case: Case, _: Path) -> Case:
    """BGR for RGB, and the other way round."""
    return _with(case, format={"RGB": "BGR", "BGR": "RGB"}[case.model.format])


def offset(step: int) -> Callable[[Case, Path], Case]:
    """Labels off by so many."""
    return lambda case, _: replace(case, labels={k: v + step for k, v in case.labels.items()})


def shuffled(case: Case, _: Path) -> Case:
    """Labels of other pictures."""
    keys, values = list(case.labels), list(case.labels.values())
    return replace(case, labels=dict(zip(keys, values[7:] + values[:7], strict=True)))


def out_of_range(case: Case, _: Path) -> Case:
    """A label that is no class."""
    return replace(
        case, labels={k: v + 5000 * (n == 0) for n, (k, v) in enumerate(case.labels.items())}
    )


def few(count: int) -> Callable[[Case, Path], Case]:
    """So many pictures."""
    return lambda case, _: replace(case, size=count)


def redrawn(change: Callable[[Image.Image, int], Image.Image]) -> Callable[[Case, Path], Case]:
    """Pictures of which `change` makes others."""

    def made(case: Case, folder: Path) -> Case:
        for number, path in enumerate(sorted(case.folder.iterdir())[: case.size]):
            with Image.open(path) as image:
                changed = change(image.convert("RGB"), number)
            changed.save((folder / path.name).with_suffix(".png"))
        labels = {Path(k).with_suffix(".png").name: v for k, v in (case.labels or {}).items()}
        return replace(case, folder=folder, labels=case.labels and labels)

    return made


def black(image: Image.Image, _: int) -> Image.Image:
    """Nothing."""
    return Image.new("RGB", image.size)


def same(image: Image.Image, _: int) -> Image.Image:
    """One picture for all."""
    return Image.linear_gradient("L").resize(image.size).convert("RGB")


def unit(image: Image.Image, _: int) -> Image.Image:
    """Numbers of 0..1 saved as bytes."""
    return Image.fromarray((np.asarray(image) / 255).astype(np.uint8))


def tiny(image: Image.Image, _: int) -> Image.Image:
    """Thumbnails."""
    return image.resize((16, 16))


MISTAKES: dict[str, Callable[[Case, Path], Case]] = {
    "right": right,
    "constants of 0..1": constants_of_unit,
    "no normalisation": scaled(*fed.RAW),
    "pixels of 0..1": scaled(*fed.UNIT),
    "pixels of -1..1": scaled(*HALF),
    "ImageNet's constants": scaled(*IMAGENET),
    "mean alone": scaled(IMAGENET[0], (1.0,) * 3),
    "other channel order": other_order,
    "mean and std exchanged": exchanged,
    "labels 1 too small": offset(-1),
    "labels 1 too great": offset(1),
    "labels of others": shuffled,
    "a label out of range": out_of_range,
    "black pictures": redrawn(black),
    "one picture for all": redrawn(same),
    "numbers of 0..1 saved": redrawn(unit),
    "thumbnails of 16x16": redrawn(tiny),
    "1 picture": few(1),
    "3 pictures": few(3),
}
OF_LABELS = [name for name in MISTAKES if "label" in name]


def cases(model: Pictured) -> Iterator[tuple[str, str, Callable[[Case, Path], Case]]]:
    """Every mistake with and without labels, but for those that change nothing."""
    start = Case(model, Path(), {}, 0)
    for name, make in MISTAKES.items():
        if name != "right" and not _changes(name, start):
            continue
        if model.labels is not None:
            yield name, "labels", make
        if name not in OF_LABELS:
            yield name, "none", make


def _changes(name: str, start: Case) -> bool:
    """Whether a mistake is one: other constants that are the same, or twice one channel, are
    none.
    """
    if name == "other channel order":
        return len(start.model.scaling[0]) == 3
    if name not in OF_CONSTANTS:
        return True
    wrong = MISTAKES[name](start, Path()).model.scaling
    return not (0 in wrong[1] or np.allclose(wrong, start.model.scaling, rtol=0.05, atol=1))


OF_CONSTANTS = [*list(MISTAKES)[1:7], "mean and std exchanged"]


def configured(case: Case, folder: Path) -> Config:
    """The config of a case."""
    path, changed = folder / "c.cfg", {}
    path.write_text(fed.section(fed.picture_lines(case.model, case.folder, case.size)))
    if case.labels is not None:
        rows = "".join(f"{file},{label}\n" for file, label in case.labels.items())
        (folder / "labels.csv").write_text(f"file,label\n{rows}")
        changed["data_preprocess_param.label_file"] = str(folder / "labels.csv")
    return load_config(path, changed, rules=DATA_RULES)


def tell(
    name: str, mistake: str, labelled: str, make: Callable[[Case, Path], Case], n: int
) -> None:
    """Makes one mistake and prints what is found."""
    model, path = PICTURED[name], fed.found(name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        pictures = folder / "pictures"
        pictures.mkdir()
        labels = model.classes() if labelled == "labels" else None
        start = Case(model, model.folder(folder, n), labels, n)
        job = Job(path, folder / "out.onnx", configured(make(start, pictures), folder))
        for title, cheap in (("conversion", True), ("doctor", False)):
            began = time.process_time()
            words = " | ".join(look(job, cheap)) or "-"
            spent = f"{time.process_time() - began:5.1f}"
            print(
                f"{name[:12]:12} {mistake:22} {labelled:6} {title:10} {spent} {words}", flush=True
            )


def look(job: Job, cheap: bool) -> list[str]:
    """What is found, by its check, or why the data cannot be used."""
    try:
        examined = examine(job, Watch(), cheap)
    except DataError as error:
        return [str(error)[:150]]
    found = [(check.title, one) for check, each in examined for one in each]
    return [f"{title}: {' '.join(str(one).split())[:150]}" for title, one in found]


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(PICTURED), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="N at the most")
    parser.add_argument("--only", nargs="+", default=list(MISTAKES), help="these mistakes")
    args = parser.parse_args()
    for name in (name for name in args.models if fed.found(name)):
        for mistake, labelled, make in cases(PICTURED[name]):
            if mistake in args.only:
                tell(name, mistake, labelled, make, args.samples)


if __name__ == "__main__":
    main()
