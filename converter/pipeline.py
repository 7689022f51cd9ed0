"""The whole story of a conversion on one screen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from calib import CalibError
from calib.images import ImageOptions
from calib.samples import Dataset, Folder, InputSpec, open_dataset
from converter import model as models
import time
from calib.ranges import RANGE_METHODS
from converter.layerwise import Walk
from converter.algorithms.weights import Options, decide_weights, products
from converter.calibrate import activation_qparams, observe
from converter.config import Config
from converter.emit.qdq import emit
from converter.errors import DataError
from converter.placement import Wishes, build_plan
from converter.plan import QuantPlan
from converter.prepare import prepare
from converter.targets import TARGETS

def convert(model_path: Path, config: Config, output: Path) -> None:
    model = prepare(models.load(model_path))
    target = TARGETS["CPU"]
    plan = build_plan(model.graph, target, Wishes(config.common.skip_quant_node, config.common.skip_quant_type, config.full_quant.per_channel))
    data = calibration_data(model, config)
    method = RANGE_METHODS[config.full_quant.activation_quant_method]
    evidence = observe(model, plan.groups(), products(model.graph, plan), data, method, 2)
    plan = plan.with_qparams(activation_qparams(plan, evidence.statistics, method))
    t=time.time()
    walk = Walk(model, plan, data, 100, 2)
    import os
    plan = decide_weights(model, plan, walk, evidence.means, Options(bool(int(os.environ.get("GPTQ","1"))), bool(int(os.environ.get("BC","1")))))
    print("walk", time.time()-t)
    emit(model, plan)
    models.save(model, output)
    for n in plan.nodes.values():
        if not n.quantized and "computed inside" not in n.reason: print(n.name, n.op_type, n.reason)

def calibration_data(model, config):
    p = config.preprocess
    specs = []
    for v in model.graph.inputs:
        specs.append(InputSpec(v.name, v.dtype.numpy(), tuple(d if isinstance(d, int) else None for d in v.shape)))
    image = ImageOptions(p.image_to_format, p.normalize_mean, p.normalize_std, p.resize_width, p.resize_height, p.resize_short_side, p.resize_method, p.center_crop_width, p.center_crop_height)
    return open_dataset(specs, [Folder(n, q) for n, q in p.calibrate_path], p.calibrate_size, p.input_type, image)
