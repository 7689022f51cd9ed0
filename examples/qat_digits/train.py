"""Trains a small network on scikit-learn's handwritten digits, with and without fake quantization
of 1 to 8 bits.

Run it in an environment of its own (it is not needed to use the example):

    pip install torch scikit-learn onnx onnxruntime
    python examples/qat_digits/train.py

Everything lands next to this file: `float.onnx`, `qat_1.onnx` … `qat_8.onnx`, `calib/images.npy`,
`held_out.npz` and `post_training.csv`, the accuracy of the float network after plain rounding of
weights and activations.
"""

from __future__ import annotations

import copy
import csv
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
SEED = 7
HELD_OUT, CALIBRATION = 450, 100
FLOAT_EPOCHS, TUNING_EPOCHS, BATCH = 60, 40, 32
LEARNING_RATE, TUNING_RATE = 4e-3, 2e-3
AVERAGING = 0.05  # weight of the newest batch in an activation's range
BITS = range(1, 9)


class Grid(nn.Module):
    """Fake quantization of one tensor to `bits`, unsigned with a zero point; 0 bits leave it
    alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits, self.watching = 0, False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def watch(self, x: Tensor, averaging: float) -> None:
        """Moves the range towards that of `x`; it always holds zero."""
        known = bool(self.high > self.low)
        for bound, seen in ((self.low, x.min().clamp(max=0)), (self.high, x.max().clamp(min=0))):
            bound += (seen - bound) * (averaging if known else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid; gradients pass straight through the rounding."""
        if not self.bits:
            return x
        if self.watching:
            self.watch(x.detach(), AVERAGING)
        top = 2.0**self.bits - 1
        scale = float((self.high - self.low).clamp(min=1e-6) / top)
        zero = round(-float(self.low) / scale)
        near = torch.clamp(torch.round(x / scale + zero), 0, top)
        if self.training:
            y = x / scale + zero
            near = y.clamp(0, top) + (near - y.clamp(0, top)).detach()
        return (near - zero) * scale


class Weighted(nn.Module):
    """A convolution or a linear layer on a grid, BatchNorm and Relu where wanted, and a grid for
    the output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, last: bool = False):
        super().__init__()
        self.layer, self.weight_grid, self.grid = layer, Grid(), Grid()
        self.norm = nn.Identity() if last else nn.BatchNorm2d(layer.weight.shape[0])
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output on its grid; the last layer's stays float."""
        if self.weight_grid.watching:
            self.weight_grid.watch(self.layer.weight.detach(), 1.0)
        weight = self.weight_grid(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight, self.layer.bias)
        x = functional.conv2d(x, weight, None, self.layer.stride, self.layer.padding)
        y: Tensor = self.grid(torch.relu(self.norm(x)))
        return y


class Network(nn.Module):
    """8x8 pictures from 0 to 1 -> ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.input_grid = Grid()
        self.layers = nn.Sequential(
            Weighted(nn.Conv2d(1, 8, 3, padding=1, bias=False)),
            Weighted(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)),
            Weighted(nn.Conv2d(16, 12, 3, stride=2, padding=1, bias=False)),
            nn.Flatten(),
            Weighted(nn.Linear(48, 10), last=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10)."""
        y: Tensor = self.layers(self.input_grid(x))
        return y

    def grids(self) -> Iterator[Grid]:
        """All its grids."""
        return (module for module in self.modules() if isinstance(module, Grid))

    def quantize(self, bits: int, watching: bool) -> Network:
        """Itself with `bits` in every grid."""
        for grid in self.grids():
            grid.bits, grid.watching = bits, watching
        return self


def train(network: Network, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Adam with a cosine schedule; pictures are shifted by up to one pixel."""
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            shift = [int(n) for n in torch.randint(-1, 2, (2,))]
            loss = functional.cross_entropy(network(torch.roll(x[rows], shift, (2, 3))), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def accuracy(network: Network, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((network(x).argmax(1) == y).float().mean())


def export(network: Network, x: Tensor, path: Path) -> None:
    """Writes the network with its fake quantization as the arithmetic that it is."""
    network.quantize(next(network.grids()).bits, watching=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (x[:1],),
            path,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )


def main() -> None:
    """Trains, writes and prints."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pictures, digits = load_digits(return_X_y=True)
    images = (pictures.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    parts = train_test_split(
        images, digits.astype(np.int64), test_size=HELD_OUT, stratify=digits, random_state=SEED
    )
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    (HERE / "calib").mkdir(exist_ok=True)
    np.save(HERE / "calib" / "images.npy", x[:CALIBRATION].numpy())
    np.savez_compressed(HERE / "held_out.npz", images=x_test.numpy(), labels=y_test.numpy())

    network = Network()
    train(network, x, y, FLOAT_EPOCHS, LEARNING_RATE)
    export(network, x, HERE / "float.onnx")
    print(f"float {accuracy(network, x_test, y_test):.4f}")
    with (HERE / "post_training.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["bits", "accuracy"])
        for bits in BITS:
            rounded = copy.deepcopy(network).quantize(bits, watching=True)
            with torch.no_grad():
                rounded(x[:CALIBRATION])
            plain = accuracy(rounded.quantize(bits, watching=False), x_test, y_test)
            rows.writerow([bits, f"{plain:.4f}"])
            tuned = copy.deepcopy(network).quantize(bits, watching=True)
            train(tuned, x, y, TUNING_EPOCHS, TUNING_RATE)
            export(tuned, x, HERE / f"qat_{bits}.onnx")
            print(
                f"{bits} bits: rounded {plain:.4f}, trained {accuracy(tuned, x_test, y_test):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
