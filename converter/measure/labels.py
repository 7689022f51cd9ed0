"""Which class each sample is of: by a table of files, or by the folder that it lies in."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from calib.samples import Dataset
from calib.sources import class_folders
from converter.errors import DataError


def read_labels(path: Path, data: Dataset) -> dict[str, int]:
    """The class index of every sample, by its first file.

    `path` is a CSV with the columns file and label, or the folder whose sub-folders are classes.
    Raises DataError where one has no label, or a file holds several samples.
    """
    table, labels = label_table(path), dict[str, int]()
    for file, times in Counter(data.files(index)[0] for index in range(len(data))).items():
        name = next((name for name in _names(file, path) if name in table), None)
        if name is None:
            msg = f"{path}: there is no label for {file.name}; {_advice(file, path)}."
            raise DataError(msg)
        if times > 1:
            msg = (
                f"{path}: {file} holds {times} samples, which one label cannot serve; give each "
                "a file of its own."
            )
            raise DataError(msg)
        labels[str(file)] = table[name]
    return labels


def label_table(path: Path) -> Mapping[str, int]:
    """The class of each file, by its name or the end of its path, or of each sub-folder; raises
    DataError.
    """
    if path.is_dir():
        return class_folders(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as table:
            return {
                Path(row["file"]).as_posix(): int(row["label"]) for row in csv.DictReader(table)
            }
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        msg = (
            f"{path}: the label file needs a header 'file,label' and an integer class a line "
            f"({error!r})."
        )
        raise DataError(msg) from error


def _names(file: Path, labels: Path) -> list[str]:
    """What a table may call a file: more of its path before less; in a folder of classes its
    sub-folder.
    """
    if labels.is_dir():
        # Links are not followed: it is where they stand that says the class.
        path, folder = (Path(os.path.abspath(each)) for each in (file, labels))  # noqa: PTH100
        return [path.relative_to(folder).parts[0]] if path.is_relative_to(folder) else []
    return ["/".join(file.parts[start:]).replace("//", "/") for start in range(len(file.parts))]


def _advice(file: Path, labels: Path) -> str:
    if labels.is_dir():
        return "name the folder whose sub-folders hold the files of each class"
    return f"add a line '{file.name},<class>'"
