"""What a model tells of itself for a configuration to begin with."""

from __future__ import annotations

from pathlib import Path

from calib.sources import as_item
from converter.calibrate.data import spec_of
from converter.calibrate.states import states_of
from converter.config.starter import Known, Scaling
from converter.doctor.preprocessing import as_list
from converter.doctor.scenes import suited
from converter.graph import files as models
from converter.graph.files import fed_inputs
from converter.prepare import make_plain


def known_of(path: Path, config: Path) -> Known:
    """What is known of the model at `path` for a configuration at `config`; raises ModelError."""
    model = models.load(path)
    states = states_of(model, (), {}, "")
    inputs = [spec_of(value) for value in fed_inputs(model) if value.name not in states]
    job = _files(path, config)
    if len(inputs) != 1:
        return Known(inputs, job)
    make_plain(model)
    way = suited(model, inputs[0])
    if way is None:
        return Known(inputs, job)
    reason = (
        f"Found from what the first BatchNorm remembers of training: pixels scaled to {way.title}. "
        "Whether the channels are in order RGB or BGR does not show."
    )
    return Known(
        inputs,
        job,
        Scaling(as_list(way.mean), as_list(way.std), reason),
    )


def _files(path: Path, config: Path) -> dict[str, str]:
    """The files of a conversion as the configuration sees them, none that it cannot write."""
    model, folder = path.resolve(), config.resolve().parent
    model = model.relative_to(folder) if model.is_relative_to(folder) else model
    files = {"model": model, "output": model.with_name(f"{model.stem}_quant.onnx")}
    written = {key: as_item(file.as_posix()) for key, file in files.items()}
    return {key: item for key, item in written.items() if item is not None}
