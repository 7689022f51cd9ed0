"""For Python programs: one conversion, as the command does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.config import load_config
from converter.config.keys import default_config
from converter.config.rules import conversion_rules
from converter.errors import UsageError
from converter.job import Job, Shape, Watch, output_path

if TYPE_CHECKING:
    from converter.measure.results import Outcome

EdgeType = Literal["DEFAULT", "FLOAT", "FLOAT32", "UINT8", "INT8"]


def convert(
    model: str | Path,
    config: str | Path | None,
    output: str | Path | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
    input_shapes: Mapping[str, Shape] | None = None,
    input_format: Literal["NCHW", "NHWC"] | None = None,
    input_type: EdgeType = "DEFAULT",
    output_type: EdgeType = "DEFAULT",
    fp16: bool = False,
    verify: bool = True,
    watch: Watch | None = None,
) -> Outcome:
    """Converts the ONNX file `model` as the INI file `config` says and writes `output`, by default
    MODEL_quant.onnx.

    `overrides` replaces values of the config: {"full_quant_param.activation_quant_method": "KL"}.
    The keywords after it are the command's flags, and with `fp16` there may be no config; a
    dimension of `input_shapes` that stays dynamic is None. `watch` is told what the command prints.
    Raises QConvertError, whose text is the command's error message; then `output` is as it was.
    """
    from threadpoolctl import threadpool_limits

    from converter.pipeline import convert as pipeline  # takes long to import

    if config is None and not fp16:
        msg = "Without a config only fp16=True is possible; give the path of an INI file."
        raise UsageError(msg)
    given, rules = Path(model), conversion_rules(fp16)
    job = Job(
        model=given,
        output=output_path(given, None if output is None else str(output)),
        config=default_config()
        if config is None
        else load_config(Path(config), overrides, rules=rules),
        input_shapes=input_shapes or {},
        input_format=input_format,
        input_type=input_type,
        output_type=output_type,
        fp16=fp16,
        verify=verify,
    )
    # Like the command: one thread in BLAS makes sums the same on any machine.
    with threadpool_limits(1, "blas"):
        return pipeline.convert(job, watch)
