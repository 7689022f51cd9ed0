"""How every model at hand is fed as it was trained: what `mistakes.py` changes, and where no check
may find anything.

Pictures are files, so that a configuration says how they enter; what hears, reads or streams is
fed arrays. Models and data are looked for as in `zoo.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zoo
import zoo_feeds as feeds
from common import CLASSIFIERS, DATA, Classifier

Numbers = tuple[float, ...]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits"
IMAGES = DATA / "images"
HALF = (127.5,) * 3, (127.5,) * 3
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNIT, RAW = ((0.0,) * 3, (255.0,) * 3), ((0.0,) * 3, (1.0,) * 3)
GREY_UNIT, GREY_RAW = ((0.0,), (255.0,)), ((0.0,), (1.0,))


@dataclass(frozen=True)
class Pictured:
    """A model of pictures: the file, the input, the folder of pictures or how they are drawn, the
    constants, the order of the channels, and the lines that say a size.
    """

    file: str
    input: str
    source: Path | feeds.Draw
    scaling: tuple[Numbers, Numbers]
    format: str = "RGB"
    lines: str = ""
    labels: Path | None = None
    first_label: int = 0

    def folder(self, scratch: Path, count: int) -> Path:
        """The pictures; those that are drawn appear in `scratch`."""
        if isinstance(self.source, Path):
            return self.source
        made = scratch / "drawn"
        made.mkdir(exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([0, number])
            self.source(rng, number).convert("RGB").save(made / f"{number:03}.png")
        return made

    def classes(self) -> dict[str, int] | None:
        """The class of every picture."""
        if self.labels is None:
            return None
        with self.labels.open(newline="") as file:
            return {r["file"]: int(r["label"]) + self.first_label for r in csv.DictReader(file)}


@dataclass(frozen=True)
class Heard:
    """A model that is fed arrays: the file, samples, and lines that say more of them."""

    file: str
    feed: zoo.Load
    lines: str = ""

    def paths(self, scratch: Path, count: int) -> str:
        """Writes the samples; the value of calibrate_path."""
        rows = self.feed("calib", count)
        folders = {name: scratch / str(k) for k, name in enumerate(rows[0])}
        for name, folder in folders.items():
            folder.mkdir()
            for number, sample in enumerate(rows):
                np.save(folder / f"{number:04}.npy", sample[name])
        return ",".join(f"{name!r}:{str(folder)!r}" for name, folder in folders.items())


def _sized(width: int, height: int) -> str:
    return f"resize_width={width}\nresize_height={height}\n"


def _crop(side: int, short: int) -> str:
    cut = f"center_crop_width={side}\ncenter_crop_height={side}\n"
    return f"resize_short_side={short}\n{cut}"


def _classifier(c: Classifier) -> Pictured:
    labels = IMAGES / c.images / "calib.csv"
    return Pictured(
        f"{c.name}.onnx",
        c.input,
        IMAGES / c.images / "calib",
        (c.mean, c.std),
        c.format,
        _crop(c.crop, 256) if c.crop else "",
        labels,
        c.first_label,
    )


def _tuples(mean: Sequence[float], std: Sequence[float]) -> tuple[Numbers, Numbers]:
    return tuple(mean), tuple(std)


def _as_samples(arrays: Callable[[int], Iterable[dict[str, np.ndarray]]]) -> zoo.Load:
    return lambda split, count: list(arrays(count))


def _sentences(count: int) -> Iterable[dict[str, np.ndarray]]:
    with np.load(DATA / "sts" / "sts_dev.npz") as table:
        ids, mask = (table[f"a_{name}"] for name in ("input_ids", "attention_mask"))
    for row, seen in list(zip(ids, mask, strict=True))[:count]:
        row, seen = row[None], seen[None]
        yield {"input_ids": row, "attention_mask": seen, "token_type_ids": np.zeros_like(row)}


def _bytes(count: int) -> Iterable[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        text = feeds.phrase(rng, 12).encode()[:48].ljust(48)
        yield {"input": np.frombuffer(text, np.uint8)[None]}


FACES, PHOTOS = IMAGES / "faces", IMAGES / "imagenet" / "calib"
_LINE = feeds.line_of_text(192, 48, turned=True)
PICTURED: dict[str, Pictured] = {
    **{name: _classifier(c) for name, c in CLASSIFIERS.items()},
    "efficientnet_lite0": Pictured(
        "efficientnet_lite0.onnx",
        "input",
        PHOTOS,
        HALF,
        lines=_crop(224, 256),
        labels=IMAGES / "imagenet" / "calib.csv",
    ),
    "mobilenet_v2_qat": Pictured(
        "mobilenet_v2_1.0_224_qat_qdq.onnx",
        "input",
        PHOTOS,
        RAW,
        lines=_crop(224, 256),
        labels=IMAGES / "imagenet" / "calib.csv",
        first_label=1,
    ),
    "mnist_cnn": Pictured(
        "mnist_cnn.onnx",
        "Input3",
        EXAMPLE / "calib",
        GREY_RAW,
        "GRAY",
        _sized(28, 28),
        EXAMPLE / "calib.csv",
    ),
    "super_resolution": Pictured(
        "super_resolution_224.onnx", "input", PHOTOS, GREY_UNIT, "GRAY", _crop(224, 256)
    ),
    "nanodet_m": Pictured(
        "nanodet_m.onnx", "input.1", PHOTOS, _tuples(*zoo.NANODET), "BGR", _sized(416, 416)
    ),
    "fastestdet": Pictured("fastestdet.onnx", "input.1", PHOTOS, UNIT, "BGR", _sized(352, 352)),
    "yolov8n": Pictured("320n.onnx", "images", PHOTOS, UNIT, "RGB", _sized(320, 320)),
    "yunet_s_320": Pictured("yunet_s_320.onnx", "input", FACES, RAW, "BGR", _sized(320, 320)),
    "ultraface": Pictured(
        "ultraface_rfb_320.onnx",
        "input",
        FACES,
        ((127.0,) * 3, (128.0,) * 3),
        lines=_sized(320, 240),
    ),
    "sinet_portrait": Pictured(
        "sinet_portrait.onnx", "data", FACES, _tuples(*zoo.SINET), "BGR", _sized(320, 320)
    ),
    "deeplab_nchw": Pictured("deeplab_nchw.onnx", zoo.DEEPLAB, FACES, HALF, lines=_sized(513, 513)),
    "ppocr_cls": Pictured("ppocr_mobile_v2_cls.onnx", "x", _LINE, HALF, "BGR"),
    "ppocr_det": Pictured("PP-OCRv6_det_small.onnx", "x", feeds.scene(480, 352), HALF, "BGR"),
    "ppocr_rec": Pictured("PP-OCRv6_rec_small.onnx", "x", feeds.line_of_text(320, 48), HALF, "BGR"),
    "layout_cdla": Pictured("layout_cdla.onnx", "image", feeds.page(608, 800), IMAGENET, "BGR"),
}
HEARD: dict[str, Heard] = {
    "minilm_l6": Heard("minilm_l6.onnx", _as_samples(_sentences)),
    "byte_lstm": Heard("byte_sb_bidi_lstm.onnx", _as_samples(_bytes)),
    **{
        name: Heard(zoo.ROWS[name].file, zoo.ROWS[name].feed)
        for name in ("dtln_2", "gtcrn_stream", "piper")
    },
}


def config_text(name: str, scratch: Path, count: int) -> str:
    """[data_preprocess_param] of a model that is fed rightly, on `count` samples at the most."""
    model = PICTURED.get(name)
    if model is None:
        heard = HEARD[name]
        paths = heard.paths(scratch, count)
        return section(f"calibrate_path={paths}\ncalibrate_size={count}\ninput_type=NPY\n")
    return section(picture_lines(model, model.folder(scratch, count), count))


def section(lines: str) -> str:
    """A configuration of these lines about data."""
    return f"[common_quant_param]\nquant_type=FULL_QUANT\n[data_preprocess_param]\n{lines}"


def picture_lines(model: Pictured, folder: Path, count: int) -> str:
    """The lines about its pictures in a folder, of which `count` are taken at the most."""
    mean, std = map(list, model.scaling)
    size = min(count, len(list(folder.iterdir())))
    return (
        f"calibrate_path={model.input!r}:{str(folder)!r}\ncalibrate_size={size}\n"
        f"input_type=IMAGE\nimage_to_format={model.format}\n"
        f"normalize_mean={mean}\nnormalize_std={std}\n{model.lines}"
    )


def found(name: str) -> Path | None:
    """The file of a model, None where it is not there."""
    return zoo.found({**PICTURED, **HEARD}[name].file)
