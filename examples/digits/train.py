"""Trains the example network on scikit-learn's handwritten digits; writes the model, the pictures
and their labels.

Run it in an environment of its own (it is not needed to use the example):

    pip install torch scikit-learn onnx onnxruntime pillow
    python examples/digits/train.py

Everything lands next to this file: `digits_cnn.onnx`, `calib/`, `dev/`, `calib.csv`, `dev.csv`.
"""

from __future__ import annotations

import csv
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
MODEL = HERE / "digits_cnn.onnx"
SEED = 7
SIDE = 28
CALIB_SIZE, DEV_SIZE = 150, 100
HELD_OUT = 450
EPOCHS, BATCH = 40, 64
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 1e-5
MAX_SHIFT = 2  # pixels, training augmentation

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ConvUnit(nn.Module):
    """Convolution without bias, BatchNorm and an activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, act: nn.Module, stride: int = 1, groups: int = 1
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class Residual(nn.Module):
    """Inverted residual: expand, depthwise, project, add, Relu; the shape is kept."""

    def __init__(self, channels: int, expanded: int):
        super().__init__()
        self.expand = ConvUnit(channels, expanded, 1, nn.ReLU6())
        self.depthwise = ConvUnit(expanded, expanded, 3, nn.ReLU6(), groups=expanded)
        self.project = ConvUnit(expanded, channels, 1, nn.Identity())
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape."""
        y: Tensor = self.relu(x + self.project(self.depthwise(self.expand(x))))
        return y


class DigitsCnn(nn.Module):
    """Grey 28x28 pictures, scaled to -1..1 -> ten class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvUnit(1, 16, 3, nn.ReLU())
        self.layer1 = ConvUnit(16, 16, 3, nn.ReLU6(), groups=16)
        self.layer2 = ConvUnit(16, 32, 1, nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.layer3 = Residual(32, 96)
        self.layer4 = ConvUnit(32, 64, 3, nn.ReLU(), stride=2)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)
        self.softmax = nn.Softmax(dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 10), before the Softmax."""
        x = self.pool(self.layer2(self.layer1(self.stem(x))))
        y: Tensor = self.fc(self.gap(self.layer4(self.layer3(x))).flatten(1))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 10), rows sum to 1."""
        y: Tensor = self.softmax(self.logits(x))
        return y


def load_pictures() -> tuple[Pixels, Labels]:
    """All 1797 digits, 8x8 with values 0..16, upscaled to (1797, 28, 28) uint8 by bicubic
    interpolation.
    """
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    big = [
        np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for p in small
    ]
    return np.stack(big), digits.target.astype(np.int64)


def normalise(pixels: Pixels) -> NDArray[np.float32]:
    """(N, 28, 28) uint8 -> (N, 1, 28, 28) float32 in -1..1."""
    return ((pixels.astype(np.float32) - 127.5) / 127.5)[:, None]


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to MAX_SHIFT pixels each way; the border is background (-1)."""
    padded = functional.pad(x, (MAX_SHIFT,) * 4, value=-1.0)
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2,), generator=generator).tolist()
    return padded[:, :, top : top + SIDE, left : left + SIDE]


def train(pixels: Pixels, labels: Labels) -> DigitsCnn:
    """A network trained with AdamW and a one-cycle learning rate, in evaluation mode."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(SEED)
    x, y = torch.from_numpy(normalise(pixels)), torch.from_numpy(labels)
    net = DigitsCnn()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x), generator=generator), BATCH):
            loss = functional.cross_entropy(net.logits(shifted(x[rows], generator)), y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    net.eval()
    return net


def export(net: DigitsCnn) -> None:
    """Writes the model with its BatchNormalization nodes left unfolded, and checks it."""
    with warnings.catch_warnings():
        # This exporter is deprecated, but it leaves BatchNorm unfolded and names nodes after their
        # modules.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.zeros(1, 1, SIDE, SIDE),),
            MODEL,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=17,
            input_names=["image"],
            output_names=["probs"],
            dynamic_axes={"image": {0: "N"}, "probs": {0: "N"}},
        )
    onnx.checker.check_model(onnx.load(MODEL), full_check=True)


def write_pictures(part: str, indices: Labels, pixels: Pixels, labels: Labels) -> None:
    """Writes `part`/digit_<index>.png and `part`.csv; the index is the row in scikit-learn's data
    set.
    """
    folder = HERE / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with (HERE / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "label"])
        for index in sorted(indices.tolist()):
            name = f"digit_{index:04d}.png"
            Image.fromarray(pixels[index]).save(folder / name, optimize=True)
            table.writerow([name, labels[index]])


def accuracy(pixels: Pixels, labels: Labels) -> float:
    """Share of pictures that the exported model, run by ONNX Runtime, labels right."""
    session = ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    (probs,) = session.run(["probs"], {"image": normalise(pixels)})
    return float(np.mean(np.argmax(probs, axis=1) == labels))


def main() -> None:
    """Splits the data, trains, exports, writes the pictures and prints the accuracy."""
    pixels, labels = load_pictures()
    everything = np.arange(len(labels))
    training, held_out = train_test_split(
        everything, test_size=HELD_OUT, stratify=labels, random_state=SEED
    )
    export(train(pixels[training], labels[training]))
    parts = {"calib": (training, CALIB_SIZE), "dev": (held_out, DEV_SIZE)}
    for part, (pool, size) in parts.items():
        chosen, _ = train_test_split(
            pool, train_size=size, stratify=labels[pool], random_state=SEED
        )
        write_pictures(part, chosen, pixels, labels)
        print(
            f"{part}: {len(chosen)} pictures, accuracy "
            f"{accuracy(pixels[chosen], labels[chosen]):.4f}"
        )
    print(
        f"held out: {HELD_OUT} pictures, accuracy "
        f"{accuracy(pixels[held_out], labels[held_out]):.4f}"
    )


if __name__ == "__main__":
    main()
