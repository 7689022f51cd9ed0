"""Real models that are fed as they were trained: no check may find anything. Models and data are
those at hand, as `benchmarks/fed.py` says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import ROOT

from converter.config import load_config
from converter.config.rules import DATA_RULES
from converter.doctor.examine import examine, findings
from converter.job import Job, Watch

sys.path.insert(0, str(ROOT / "benchmarks"))
import fed

# Enough that a check of answers looks at them, and that ranges follow.
SAMPLES = 16


def found(name: str, folder: Path, cheap: bool) -> list[str]:
    model = fed.found(name)
    if model is None or not (fed.IMAGES / "imagenet").is_dir():
        pytest.skip(f"{name} or its data is not at hand")
    config = folder / "c.cfg"
    config.write_text(fed.config_text(name, folder, SAMPLES))
    job = Job(model, folder / "o.onnx", load_config(config, rules=DATA_RULES))
    return [str(finding) for finding in findings(examine(job, Watch(), cheap))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*fed.PICTURED, *fed.HEARD])
def test_a_conversion_warns_of_nothing_where_all_is_right(name, tmp_path):
    assert found(name, tmp_path, cheap=True) == []


# Those on which it is told which way of many suits best: by labels, answers or BatchNorms.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10", "mnist_cnn", "ultraface", "ppocr_cls"])
def test_the_doctor_proposes_nothing_where_all_is_right(name, tmp_path):
    assert found(name, tmp_path, cheap=False) == []
