#!/usr/bin/env python3
"""Mistakes of preprocessing, made on purpose on real classifiers: are they named, by the checks of
a conversion and by `qconvert doctor`?

    python benchmarks/mistakes.py [MODEL ...]

`right` must find nothing. A mistake that changes nothing (mean and std exchanged where they are
equal) is left out. Each is made with labels and without.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import CLASSIFIERS, DATA, Classifier
from PIL import Image

from converter.config import Config, load_config
from converter.config.rules import DATA_RULES
from converter.doctor.examine import examine, findings
from converter.errors import DataError
from converter.job import Job, Watch

Numbers = tuple[float, ...]
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HALF = (127.5,) * 3, (127.5,) * 3


@dataclass(frozen=True)
class Case:
    """A classifier as it is fed: its pictures, how many, and labels, None for no label file."""

    classifier: Classifier
    folder: Path
    labels: dict[str, int] | None
    size: int = 100


def right(case: Case, _: Path) -> Case:
    """No mistake."""
    return case


def fed(mean: Numbers, std: Numbers) -> Callable[[Case, Path], Case]:
    """Other constants."""
    return lambda case, _: replace(case, classifier=replace(case.classifier, mean=mean, std=std))


def constants_of_unit(case: Case, _: Path) -> Case:
    """Constants for pixels of 0..1."""
    mean, std = (tuple(x / 255 for x in v) for v in (case.classifier.mean, case.classifier.std))
    return replace(case, classifier=replace(case.classifier, mean=mean, std=std))


def exchanged(case: Case, _: Path) -> Case:
    """Mean and std exchanged."""
    c = case.classifier
    return replace(case, classifier=replace(c, mean=c.std, std=c.mean))


def other_order(case: Case, _: Path) -> Case:
    """BGR for RGB, and the other way round."""
    c = case.classifier
    order = {"RGB": "BGR", "BGR": "RGB"}[c.format]
    return replace(case, classifier=replace(c, format=order))


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
    "no normalisation": fed((0.0,) * 3, (1.0,) * 3),
    "pixels of 0..1": fed((0.0,) * 3, (255.0,) * 3),
    "pixels of -1..1": fed(*HALF),
    "ImageNet's constants": fed(*IMAGENET),
    "mean alone": fed(IMAGENET[0], (1.0,) * 3),
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


def cases(classifier: Classifier) -> Iterator[tuple[str, str, Callable[[Case, Path], Case]]]:
    """Every mistake with and without labels, but for those that change nothing."""
    same_constants = classifier.mean == classifier.std
    unchanged = {"mean and std exchanged"} if same_constants else set()
    for name, constants in (("pixels of -1..1", HALF), ("ImageNet's constants", IMAGENET)):
        if (classifier.mean, classifier.std) == constants:
            unchanged.add(name)
    if classifier.std == (1.0,) * 3:
        unchanged.add("mean alone")
    for name, make in MISTAKES.items():
        for labelled in ("labels", "none"):
            if name not in unchanged and (labelled == "labels" or name not in OF_LABELS):
                yield name, labelled, make


def configured(case: Case, folder: Path) -> Config:
    """The config of a case."""
    c, changed = case.classifier, {}
    path = c.config(folder, "FULL_QUANT", case.size)
    given = DATA / "images" / c.images / "calib"
    path.write_text(path.read_text().replace(f"'{given}'", f"'{case.folder}'"))
    if case.labels is not None:
        rows = "".join(f"{file},{label}\n" for file, label in case.labels.items())
        (folder / "labels.csv").write_text(f"file,label\n{rows}")
        changed["data_preprocess_param.label_file"] = str(folder / "labels.csv")
    return load_config(path, changed, rules=DATA_RULES)


def labels_of(classifier: Classifier) -> dict[str, int]:
    """The class of every picture."""
    with (DATA / "images" / classifier.images / "calib.csv").open(newline="") as file:
        return {r["file"]: int(r["label"]) + classifier.first_label for r in csv.DictReader(file)}


def row(
    name: str, labelled: str, classifier: Classifier, make: Callable[[Case, Path], Case]
) -> None:
    """Makes one mistake and prints what is found."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        pictures = folder / "pictures"
        pictures.mkdir()
        labels = labels_of(classifier) if labelled == "labels" else None
        start = Case(classifier, DATA / "images" / classifier.images / "calib", labels)
        config = configured(make(start, pictures), folder)
        job = Job(classifier.path, folder / "out.onnx", config)
        for title, cheap in (("conversion", True), ("doctor", False)):
            found = look(job, cheap)
            words = " | ".join(" ".join(str(f).split())[:150] for f in found) or "-"
            print(
                f"{classifier.name[:12]:12s} {name:23s} {labelled:6s} {title:10s} {words}",
                flush=True,
            )


def look(job: Job, cheap: bool) -> list[object]:
    """What is found, or why the data cannot be used."""
    try:
        return [*findings(examine(job, Watch(), cheap))]
    except DataError as error:
        return [error]


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CLASSIFIERS))
    for model in parser.parse_args().models:
        for name, labelled, make in cases(CLASSIFIERS[model]):
            row(name, labelled, CLASSIFIERS[model], make)


if __name__ == "__main__":
    main()
