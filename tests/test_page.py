"""report.html: what stands in it, that nothing a model's author writes becomes markup, and that a
browser draws it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from converter.measure.errors import Speed, TensorError
from converter.measure.results import (
    Changed,
    Findings,
    Here,
    NodeFinding,
    TensorFinding,
    Verification,
)
from converter.report.page import _tensor, charts_library, page

HOSTILE = "</script><script>document.title='taken'</script><b onclick=\"x\">&amp;'`$${1}"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def node(name: str, **changes: Any) -> NodeFinding:
    error = TensorError(name, 0.99, 20.0)
    return replace(
        NodeFinding(name, "Conv", True, "integer", 8, 4000, 1000, error, error, 0.5, ""), **changes
    )


def tensor(counts: list[int], name: str = "x", **changes: Any) -> TensorFinding:
    found = TensorFinding(name, "conv", 8, np.array(counts), -1.0, 3.0, (-0.5, 2.0), 0.25)
    return replace(found, **changes)


VERIFIED = Verification(
    samples=12,
    held_back=True,
    outputs=(TensorError("probs", 0.98765, 31.25),),
    fused_difference=0.0,
    speed=Speed(1.5, 1.4, 1.6),
    top1=(0.84, 0.835),
    agreement=0.96,
    kernels={"QLinearConv": 3, "QuantizeLinear": 1},
    conversions=("late_quantize",),
    saturated=(),
)
FINDINGS = Findings(
    {"Mode": "FULL_QUANT"}, (8_000_000, 2_000_000), VERIFIED, (node("conv"),), (tensor([1, 2]),), ()
)


class Reader(HTMLParser):
    """The text of every cell and heading, and the content of the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self._cell = True
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and not data.isspace():
            self.scripts[-1] += data
        elif self._cell:
            self.rows[-1][-1] += data
        if self.lasttag not in {"script", "style"}:
            self.text += " ".join(data.split()) + "\n" if data.strip() else ""

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0], parse_constant=pytest.fail)


def read(findings: Findings, title: str = "model.onnx") -> Reader:
    return Reader(page(findings, title).replace(charts_library(), "PLOTLY"))


def test_the_first_figures_are_the_important_ones() -> None:
    text = read(FINDINGS).text
    expected = [
        "0.98765",
        "31.2 dB, output probs",
        "83.5 %",
        "84.0 % before",
        "96.0 %",
        "25 %",
        "8.00 → 2.00 MB",
        "1.50x",
    ]
    places = [text.index(figure) for figure in expected]
    assert places == sorted(places)
    assert places[-1] < text.index("What to do next")


def test_verification_is_told() -> None:
    lines = read(FINDINGS).text.splitlines()
    told = dict(pairwise(lines))
    assert told["Samples"] == "12 samples held back from calibration"
    assert told["Output probs"] == "cosine 0.987650, 31.2 dB"
    assert told["Q/DQ left alone"] == "late_quantize"
    assert told["Can saturate"] == "nothing"
    assert told["Mode"] == "FULL_QUANT"


def test_what_saturates_is_named_but_not_all_of_a_hundred() -> None:
    found = replace(VERIFIED, saturated=tuple(f"conv_{i}" for i in range(100)), held_back=False)
    text = read(replace(FINDINGS, verification=found)).text
    assert "conv_0, conv_1, conv_2, conv_3, conv_4, conv_5, conv_6, conv_7 and 92 more" in text
    assert "12 calibration samples" in text


def test_what_this_processor_computes_otherwise_is_told() -> None:
    assert "On this processor" not in read(FINDINGS).text
    found = replace(VERIFIED, here=Here(TensorError("probs", 0.875, 12.9), 0.5))
    told = dict(pairwise(read(replace(FINDINGS, verification=found)).text.splitlines()))
    assert told["On this processor"] == "cosine 0.875000, 12.9 dB, as its kernels saturate"


def test_without_verification_there_is_still_a_page() -> None:
    text = read(replace(FINDINGS, verification=None, nodes=(), tensors=())).text
    assert "Switched off for this conversion." in text
    assert "Cosine similarity" not in text
    assert "25 %" in text


def test_advice_comes_whole_and_in_order() -> None:
    text = read(replace(FINDINGS, advice=("Skip conv.", "Use MSE."))).text
    assert text.index("Skip conv.") < text.index("Use MSE.")
    assert "Nothing stands out." not in text
    assert "Nothing stands out." in read(FINDINGS).text


def test_node_table() -> None:
    nodes = (
        node("conv", advice="Clips much."),
        node(
            "soft",
            quantized=False,
            bits=None,
            bytes_before=0,
            bytes_after=0,
            own=None,
            output=None,
            share=None,
        ),
    )
    header, *rows = read(replace(FINDINGS, nodes=nodes)).rows
    assert header == []
    assert rows[0] == [
        "conv",
        "Conv",
        "8",
        "4.0",
        "1.0",
        "20.0",
        "20.0",
        "50.0 %",
        "integerClips much.",
    ]
    assert rows[1] == ["soft", "Conv", "", "", "", "", "", "", "integer"]


@pytest.mark.parametrize(
    ("ratio", "shown", "key"), [(math.inf, "∞", "1e999"), (-math.inf, "-∞", "-1e999")]
)
def test_infinite_ratios_are_shown_and_sort_as_such(ratio: float, shown: str, key: str) -> None:
    error = TensorError("conv", 1.0, ratio)
    changed = replace(
        FINDINGS,
        nodes=(node("conv", own=error, share=None),),
        verification=replace(VERIFIED, outputs=(error,)),
    )
    assert read(changed).rows[1][5] == shown
    assert f'data-sort="{key}">{shown}' in page(changed, "m")
    assert read(changed).data["sensitivity"] == []


def test_sensitivity_is_the_share_of_the_error_largest_first() -> None:
    data = read(
        replace(FINDINGS, nodes=tuple(node(f"n{i}", share=i / 100) for i in range(30)))
    ).data
    assert data["sensitivity"][0] == ["n29", 0.29, "29.0%"]
    assert [row[0] for row in data["sensitivity"]] == [f"n{i}" for i in range(29, 17, -1)]


def test_a_share_that_is_no_number_is_left_out() -> None:
    nodes = (node("lost", share=math.nan), node("found", share=0.25))
    assert read(replace(FINDINGS, nodes=nodes)).data["sensitivity"] == [["found", 0.25, "25.0%"]]


def test_sensitivity_without_shares_is_the_noise_of_the_nodes_themselves() -> None:
    errors = {"good": 40.0, "bad": 20.0}
    nodes = tuple(
        node(name, share=None, own=TensorError(name, 1, db)) for name, db in errors.items()
    )
    data = read(replace(FINDINGS, nodes=nodes)).data
    assert data["sensitivity"] == [
        ["bad", pytest.approx(0.1), "20.0 dB"],
        ["good", pytest.approx(0.01), "40.0 dB"],
    ]


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=1000),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
)
def test_histograms_get_coarser_without_losing_a_value(
    counts: list[int], low: float, span: float
) -> None:
    drawn = _tensor(tensor(counts, low=low, high=low + span))
    assert len(drawn["counts"]) <= 160
    assert sum(drawn["counts"]) == sum(counts)
    # Every value stays in the bin that its place says.
    together = round(drawn["width"] / (span / len(counts)))
    assert drawn["counts"] == [
        sum(counts[i : i + together]) for i in range(0, len(counts), together)
    ]
    assert drawn["low"] == low


def test_answers_that_changed_stand_beside_their_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (9, 200, 30)).save(tmp_path / "a.jpg")
    before, after = ((3, 0.6), (1, 0.3)), ((1, 0.5), (3, 0.4))
    changed = (
        Changed(str(tmp_path / "a.jpg"), 3, before, after),
        Changed(str(tmp_path / "gone<b>.npy"), None, before, after),
    )
    html = page(replace(FINDINGS, verification=replace(VERIFIED, changed=changed)), "m")
    found = Reader(html.replace(charts_library(), ""))
    assert (
        "Answers that changed" in found.text and "Answers that changed" not in read(FINDINGS).text
    )
    assert found.tags.count("strong") == 2 and found.tags.count("img") == 1
    encoded = html.partition("data:image/png;base64,")[2].partition('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == (96, 64)
        assert np.abs(np.asarray(picture).mean((0, 1)) - [9, 200, 30]).max() < 4
    cells = [cell for row in found.rows for cell in row]
    assert "3: 0.61: 0.3" in cells and "1: 0.53: 0.4" in cells
    assert "gone<b>.npy" in cells


def test_the_page_stays_small() -> None:
    assert len(page(FINDINGS, "m").encode()) < 1_500_000


def hostile() -> Findings:
    found = replace(
        VERIFIED,
        outputs=(TensorError(HOSTILE, 0.9, 10.0),),
        kernels={HOSTILE: 1},
        saturated=(HOSTILE,),
    )
    nodes = (node(HOSTILE, reason=HOSTILE, advice=HOSTILE), node("plain"))
    return Findings(
        {HOSTILE: HOSTILE},
        (10, 5),
        found,
        nodes,
        (tensor([5, 1], HOSTILE, node=HOSTILE),),
        (HOSTILE,),
    )


def test_hostile_names_stay_text() -> None:
    found = read(hostile(), HOSTILE)
    assert found.tags.count("script") == 3
    assert found.tags.count("b") == read(FINDINGS).tags.count("b")
    assert found.rows[1][0] == HOSTILE
    assert found.data["kernels"] == [[HOSTILE, 1]]
    assert found.data["tensors"][0]["name"] == HOSTILE
    assert found.text.count("<script>document.title='taken'</script>") >= 8


def test_the_page_needs_no_network() -> None:
    html = page(hostile(), "m").replace(charts_library(), "")
    assert not re.findall(r"https?:|\ssrc=|<link|@import|url\(", html)
    assert "default-src 'none'" in html


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(hostile(), HOSTILE), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
    ]
    arguments = [str(BROWSER), *flags, "--dump-dom", (tmp_path / "report.html").as_uri()]
    dom = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True).stdout
    found = Reader(dom.replace(charts_library(), ""))
    drawn = re.findall(r'class="chart js-plotly-plot" id="(\w+)"', dom)
    assert drawn == ["bits", "kernels", "sensitivity", "histogram"]
    assert dom.count('class="point"') == 2 + 1 + 2 + 2
    assert "taken" not in re.findall("<title>(.*?)</title>", dom)
    assert "25.0 % clipped" in found.text
    assert found.tags.count("option") == 1
