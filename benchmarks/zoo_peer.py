#!/usr/bin/env python3
"""What onnxruntime's own tool makes of a model, in a process of its own.

    python benchmarks/zoo_peer.py static|dynamic|blocks MODEL OUT [INPUT=FOLDER ...]

`static` calibrates on the NumPy files of the folders, `dynamic` needs none, `blocks` stores the
weights of matrix products in 4 bits, 32 a scale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

LEAST_OPSET = 13


class Reader(CalibrationDataReader):
    """The samples, once."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.rows = self._samples(folders)

    def _samples(self, folders: dict[str, Path]) -> Iterator[dict[str, np.ndarray]]:
        files = [sorted(folder.iterdir()) for folder in folders.values()]
        for row in zip(*files, strict=True):
            yield dict(zip(folders, map(np.load, row), strict=True))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample, None behind the last."""
        return next(self.rows, None)


def prepare(model: str, clean: Path) -> None:
    """Writes the model as the tool wants it: of an opset that knows scales a channel, with shapes
    as far as they can be inferred.
    """
    loaded = onnx.load(model)
    opset = next(entry.version for entry in loaded.opset_import if not entry.domain)
    if opset < LEAST_OPSET:
        loaded = onnx.version_converter.convert_version(loaded, LEAST_OPSET)
    try:
        quant_pre_process(loaded, clean)
    except Exception:
        quant_pre_process(loaded, clean, skip_symbolic_shape=True)


def main() -> None:
    """Reads the arguments."""
    how, model, out, *feeds = sys.argv[1:]
    folders = {name: Path(folder) for name, folder in (feed.rsplit("=", 1) for feed in feeds)}
    if how == "blocks":
        tool = MatMulNBitsQuantizer(onnx.load(model), bits=4, block_size=32, is_symmetric=False)
        tool.process()
        tool.model.save_model_to_file(out)
        return
    clean = Path(out).with_suffix(".pre.onnx")
    prepare(model, clean)
    if how == "dynamic":
        quantize_dynamic(clean, out, per_channel=True, weight_type=QuantType.QInt8)
    else:
        quantize_static(clean, out, Reader(folders), per_channel=True)


if __name__ == "__main__":
    main()
