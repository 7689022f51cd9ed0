"""What a mode makes of a prepared float model: the same from every mode, for whoever verifies,
reports or saves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from calib.samples import Dataset
from converter.config import Config, default_config
from converter.plan.plan import QuantPlan


@dataclass(frozen=True)
class Tradeoff:
    """What a search found can be had: a file `ratio` times smaller, with `bits` a weight on
    average.

    `expected` is what the outputs lose as far as single layers tell, `measured` what they lost;
    None if not tried.
    """

    ratio: float
    bits: float
    expected: float
    measured: float | None


@dataclass(frozen=True)
class Quantized:
    """A quantized model beside the float one that it was made from.

    `data` are the calibration samples, none where the config names none. `tensors` maps float
    tensors inside `reference` to those of `model` that stand for them. `finish` gives `model` the
    input and output types of the job, after which the two no longer take the same samples.
    `compared` is the float model whose tensors `model` has inside, where values were moved between
    them and that is not `reference` itself. `trained` says that `reference` has quantization from
    training, which was taken over or taken away. `pareto` is what a search of bits found, smallest
    last. `exact` says that all processors which the model is for have kernels that do not saturate.
    `source` is the file that `reference` was read from. `fitted` says that `data` had a part in
    what `model` is; samples behind `last`, if not behind `data`, had none. `settings` are those it
    was made with, without a mode where they are not known. `decided` is what searches found, keys
    of a configuration by node.
    """

    reference: ir.Model
    model: ir.Model
    plan: QuantPlan
    data: Dataset
    tensors: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[], None] = lambda: None
    compared: ir.Model | None = None
    trained: bool = False
    pareto: tuple[Tradeoff, ...] = ()
    exact: bool = False
    settings: Config = field(default_factory=default_config)
    decided: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    source: Path | None = None
    fitted: bool = True
    last: Dataset | None = None
