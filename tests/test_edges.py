"""Integer inputs and outputs: pixels in, codes out, and the numbers are those of the preprocessing
they replace.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from command_line import CONFIG
from graphs import frozen, normal, positive, prepared, run, types
from PIL import Image
from running import Ear, job, write_config

from calib.affine import INT8, UINT8, QParams, Range, qparams_of
from converter.config import load_config
from converter.emit.integer_types import give_integers, take_integers
from converter.errors import QConvertError, UsageError
from converter.job import Job
from converter.pipeline.convert import convert
from converter.prepare.pixels import fold_normalisation

HEAD = "g (float[1,3,8,8] x) => (float[] y)"
CONSTANTS = {
    "w": normal(4, 3, 3, 3),
    "b": normal(4),
    "v": normal(5, 4, 1, 1),
    "u": normal(2, 3, 1, 1),
    "g": normal(6, 1, 3, 3),
}
PIXELS = np.random.default_rng(1).integers(0, 256, (1, 3, 8, 8), np.uint8)
PLAIN = "c = Conv (x, w, b)  r = Relu (c)  y = Conv (r, v)"
PADDED = "c = Conv <pads=[1,1,1,1]> (x, w)  r = Relu (c)  y = Conv (r, v)"
SAME = 'c = Conv <auto_pad="SAME_UPPER"> (x, w)  y = Conv (c, v)'
SHARED = "c = Conv (x, w, b)  d = Conv (x, w, b)  s = Conv (c, v)  t = Conv (d, v)  y = Add (s, t)"


def wishes(mean=(), std=()):
    """What a config says about pictures."""
    preprocess = load_config(CONFIG).preprocess
    return replace(
        preprocess, normalize_mean=tuple(map(float, mean)), normalize_std=tuple(map(float, std))
    )


def normalized(pixels, mean, std):
    """(pixel - mean) / std of each channel, in float32."""
    mean, std = (
        np.array(v or neutral, np.float64).reshape(1, -1, 1, 1)
        for v, neutral in ((mean, 0), (std, 1))
    )
    return ((pixels - mean) / std).astype(np.float32)


# --- the normalisation moves into the model

EXACT = {
    "none": ([], [], PADDED),
    "a whole mean and one std": ([128] * 3, [58.5] * 3, PADDED),
    "a grey mean": ([127], [2], PADDED),
    "stds that differ": ([128] * 3, [50, 60.5, 70], PADDED),
    "stds that differ, shared weights": ([3] * 3, [50, 60.5, 70], SHARED),
    "a mean that is not whole": ([123.7] * 3, [58] * 3, PLAIN),
    "means that differ": ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], PLAIN),
    "means that differ, shared constants": ([123, 116, 103], [58, 57, 57], SHARED),
    "a mean that no pixel has": ([-1] * 3, [58] * 3, PLAIN),
    "a mean above white": ([256] * 3, [58] * 3, PLAIN),
    "a negative std": ([128] * 3, [-1] * 3, PADDED),
    "stds alone, itself padding": ([0] * 3, [1, 2, 3], SAME),
}


@pytest.mark.parametrize(("mean", "std", "nodes"), EXACT.values(), ids=EXACT)
def test_pixels_give_what_preprocessed_pictures_gave(mean, std, nodes):
    model = prepared(f"{HEAD} {{ {nodes} }}", **CONSTANTS)
    before = frozen(model)
    pixels = fold_normalisation(model, wishes(mean, std))
    left = pixels.preprocess(wishes(mean, std))
    rest = normalized(PIXELS, left.normalize_mean, left.normalize_std)
    wanted = run(before, {"x": normalized(PIXELS, mean, std)})["y"]
    np.testing.assert_allclose(
        run(model, {"x": rest})["y"], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )
    # And what is left to do is just what the input's scale and zero point say.
    q = pixels.qparams
    assert (q.scale > 0, q.zero_point.dtype) == (True, np.uint8)
    np.testing.assert_allclose(
        rest, (PIXELS.astype(np.float64) - q.zero_point) * q.scale, rtol=1e-6
    )


def test_what_the_input_expresses_itself_leaves_the_weights_alone():
    model = prepared(f"{HEAD} {{ {PADDED} }}", **CONSTANTS)
    before = frozen(model)
    pixels = fold_normalisation(model, wishes([128] * 3, [64] * 3))
    assert frozen(model) == before
    assert (float(pixels.qparams.scale), int(pixels.qparams.zero_point)) == (1 / 64, 128)


def test_through_a_transpose():
    graph = (
        "g (float[1,8,8,3] x) => (float[] y) { t = Transpose <perm=[0,3,1,2]> (x)  y = Conv (t, "
        "w, b) }"
    )
    model, mean, std = prepared(graph, **CONSTANTS), [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]
    wanted = run(model, {"x": normalized(PIXELS, mean, std).transpose(0, 2, 3, 1)})["y"]
    pixels = fold_normalisation(model, wishes(mean, std))
    assert (pixels.mean, pixels.std) == ((), ())
    fed = PIXELS.transpose(0, 2, 3, 1).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": fed})["y"], wanted, rtol=1e-4, atol=1e-3)


BORDERS = {
    "half a pixel": ([127.5] * 3, [127.5] * 3, PADDED, 128),
    "means that differ": ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], PADDED, 114),
    "itself padding": ([127.5] * 3, [127.5] * 3, SAME, 128),
    "a pad before": (
        [127.5] * 3,
        [127.5] * 3,
        "p = Pad (x, sides)  y = Conv (p, w, b)",
        128,
    ),
}


@pytest.mark.parametrize(("mean", "std", "nodes", "pixel"), BORDERS.values(), ids=BORDERS)
def test_zeros_around_a_picture_become_the_nearest_pixel_and_all_else_stays(
    mean, std, nodes, pixel
):
    constants = {**CONSTANTS, "sides": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    used = {name: x for name, x in constants.items() if name in nodes}
    model = prepared(f"{HEAD} {{ {nodes} }}", **used)
    before = frozen(model)
    pixels = fold_normalisation(model, wishes(mean, std))
    assert int(pixels.qparams.zero_point) == pixel and float(pixels.qparams.scale) == 1
    assert pixels.border == pytest.approx(max(abs(np.subtract(mean, pixel)) / std))
    found = run(model, {"x": PIXELS.astype(np.float32) - pixel})["y"].astype(np.float64)
    wanted = run(before, {"x": normalized(PIXELS, mean, std)})["y"].astype(np.float64)
    inside = (..., slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-4 * np.abs(wanted).max())
    # At the borders: what the weights make of the step between zero and the pixel, at the most.
    most = np.abs(CONSTANTS["w"].astype(np.float64)).sum(axis=(1, 2, 3)).max() * pixels.border
    assert 0 < np.abs(found - wanted).max() <= most * 1.01


UNEVEN = ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4])
REFUSED = {
    "another operator": (*UNEVEN, "[first] y = Relu (x)", r"'first' \(Relu\) reads the input"),
    "one of several readers": (
        *UNEVEN,
        "c = Conv (x, w)  [other] y = Abs (x)",
        r"'other' \(Abs\) reads the input",
    ),
    "a grouped convolution": (
        *UNEVEN,
        "[first] y = Conv <group=3> (x, g)",
        r"'first' \(Conv\) reads the input",
    ),
    "stds before another operator": (
        [1] * 3,
        [1, 2, 3],
        "[first] y = Exp (x)",
        r"'first' \(Exp\) reads the input",
    ),
    "a weight of run time": (
        *UNEVEN,
        "k = Relu (w)  [first] y = Conv (x, k2)",
        r"'first' \(Conv\) reads the input",
    ),
}


@pytest.mark.parametrize(("mean", "std", "nodes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exact_is_refused(mean, std, nodes, words):
    graph = HEAD.replace(" x)", " x, float[2,3,1,1] k2)") if "k2" in nodes else HEAD
    model = prepared(f"{graph} {{ {nodes} }}", **CONSTANTS)
    with pytest.raises(UsageError, match=rf"^--inputDataType: .*{words}.*\.$"):
        fold_normalisation(model, wishes(mean, std))


# --- the graph's edges

TINY = "g (float[1,4] x) => (float[] y)"
HUNDRED = np.uint8(100)
CODES = np.array([[0, 100, 128, 255]], np.uint8)


def pair(read="x", made="d", zero="z"):
    return (
        f"q_{made} = QuantizeLinear ({read}, s, {zero})  {made} = DequantizeLinear (q_{made}, s, "
        f"{zero})"
    )


def edge_model(nodes, zero_point=HUNDRED):
    return prepared(f"{TINY} {{ {nodes} }}", s=np.float32(0.5), z=zero_point)


def test_codes_go_straight_in():
    model = edge_model(f"{pair()}  y = Neg (d)")
    take_integers(model, "x", "UINT8", None)
    assert types(model) == ["DequantizeLinear", "Neg"]
    np.testing.assert_array_equal(
        run(model, {"x": CODES})["y"], -(CODES.astype(np.float32) - 100) / 2
    )


@pytest.mark.parametrize(("kind", "shift"), [("UINT8", 0), ("INT8", 128)])
@pytest.mark.parametrize("quantized", [True, False])
def test_pixels_are_what_the_float_input_was(kind, shift, quantized):
    q = QParams(np.array(0.5, np.float32), np.array(100, np.uint8), UINT8)
    nodes = f"{pair()}  y = Neg (d)" if quantized else "y = Neg (x)"
    model = edge_model(nodes)
    wanted = run(model, {"x": (CODES.astype(np.float32) - 100) / 2})["y"]
    take_integers(model, "x", kind, replace(pixels_of(q), qparams=q))
    onnx.checker.check_model(onnx.load_from_string(frozen(model)), full_check=True)
    fed = (CODES.astype(np.int64) - shift).astype(kind.lower())
    for optimize in (False, True):
        np.testing.assert_array_equal(run(model, {"x": fed}, optimize)["y"], wanted)


def pixels_of(q):
    return replace(fold_normalisation(prepared(f"{HEAD} {{ y = Relu (x) }}"), wishes()), qparams=q)


def test_pixels_are_not_taken_for_the_targets_own_codes():
    # The plan's int8 scale is not the pixels'.
    model = edge_model(f"{pair()}  y = Neg (d)", zero_point=np.int8(0))
    q = QParams(np.array(0.25, np.float32), np.array(100, np.uint8), UINT8)
    wanted = run(model, {"x": (CODES.astype(np.float32) - 100) / 4})["y"]
    take_integers(model, "x", "INT8", pixels_of(q))
    np.testing.assert_array_equal(
        run(model, {"x": (CODES.astype(int) - 128).astype(np.int8)})["y"], wanted
    )


def test_a_float_reader_beside():
    q = QParams(np.array(0.5, np.float32), np.array(100, np.uint8), UINT8)
    model = edge_model(f"{pair()}  a = Neg (d)  b = Abs (x)  y = Add (a, b)")
    wanted = run(model, {"x": (CODES.astype(np.float32) - 100) / 2})["y"]
    take_integers(model, "x", "UINT8", pixels_of(q))
    np.testing.assert_array_equal(run(model, {"x": CODES})["y"], wanted)


@pytest.mark.parametrize(
    ("nodes", "kind"), [("y = Neg (x)", "UINT8"), (f"{pair()}  y = Neg (d)", "INT8")]
)
def test_an_input_that_is_not_quantized_so_stays_float(nodes, kind):
    with pytest.raises(
        UsageError, match=f"--inputDataType={kind}: input 'x' is not quantized to {kind}"
    ):
        take_integers(edge_model(nodes), "x", kind, None)


def test_codes_come_straight_out():
    model = edge_model(f"n = Neg (x)  {pair('n', 'y')}")
    wanted = run(model, {"x": normal(1, 4)})["y"]
    told = give_integers(
        model, "y", "UINT8", qparams_of(Range(np.array(-9.0), np.array(9.0)), UINT8, False)
    )
    assert types(model) == ["Neg", "QuantizeLinear"]
    assert told == "Output 'y' is UINT8: value = (code - 100) * 0.5."
    found = run(model, {"x": normal(1, 4)})["y"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal((found.astype(np.float32) - 100) * 0.5, wanted)


@pytest.mark.parametrize("nodes", ["y = Neg (x)", f"n = Neg (x)  {pair('n', 'y')}"])
def test_other_outputs_are_converted(nodes):
    model = edge_model(nodes)
    x = normal(1, 4)
    wanted = run(model, {"x": x})["y"]
    q = qparams_of(Range(np.array(-4.0), np.array(4.0)), INT8, False)
    told = give_integers(model, "y", "INT8", q)
    assert told == f"Output 'y' is INT8: value = (code - {q.zero_point}) * {q.scale}."
    found = run(model, {"x": x})["y"]
    assert found.dtype == np.int8
    np.testing.assert_allclose(
        (found.astype(int) - int(q.zero_point)) * q.scale, wanted, atol=float(q.scale) * 0.51
    )


# --- from end to end


def picture_job(folder, nodes, mean, std, **flags):
    """A conversion with pictures, and float32 tensors of the same ones."""
    pictures = np.random.default_rng(5).integers(0, 256, (12, 8, 8, 3), np.uint8)
    (folder / "pictures").mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    (folder / "m.onnx").write_bytes(frozen(prepared(f"{HEAD} {{ {nodes} }}", **CONSTANTS)))
    config = write_config(
        folder / "c.cfg",
        common_quant={"quant_type": "FULL_QUANT", "thread_num": 1},
        data_preprocess={
            "calibrate_path": f"x:{folder / 'pictures'}",
            "calibrate_size": 12,
            "input_type": "IMAGE",
            "normalize_mean": mean,
            "normalize_std": std,
        },
    )
    task = Job(folder / "m.onnx", folder / "out.onnx", load_config(config), **flags)
    return task, pictures.transpose(0, 3, 1, 2)


CASES = {
    "one mean and std": ([128] * 3, [64] * 3, PADDED),
    "stds that differ": ([128] * 3, [60, 62, 64], PADDED),
    "means that differ": ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], PLAIN),
}


@pytest.mark.parametrize("kind", ["UINT8", "INT8"])
@pytest.mark.parametrize(("mean", "std", "nodes"), CASES.values(), ids=CASES)
def test_a_model_that_takes_pixels_and_gives_codes(tmp_path, mean, std, nodes, kind):
    task, pictures = picture_job(tmp_path, nodes, mean, std, input_type=kind, output_type=kind)
    ear = Ear()
    convert(task, ear)
    scale, zero = scale_and_zero(ear.told)
    model = task.output.read_bytes()
    assert [onnx.load_from_string(model).graph.input[0].type.tensor_type.elem_type] == [
        getattr(onnx.TensorProto, kind)
    ]
    for picture in pictures[:4]:
        fed = (picture[None].astype(int) - (128 if kind == "INT8" else 0)).astype(kind.lower())
        codes = run(model, {"x": fed})["y"]
        assert codes.dtype == np.dtype(kind.lower())
        wanted = run(
            (tmp_path / "m.onnx").read_bytes(), {"x": normalized(picture[None], mean, std)}
        )["y"]
        error = (codes.astype(np.float64) - zero) * scale - wanted
        assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(wanted**2.0))


def scale_and_zero(told):
    """What the conversion said about its output."""
    (sentence,) = [text for text in told if text.startswith("Output")]
    zero, scale = re.fullmatch(
        r"Output 'y' is U?INT8: value = \(code - (-?\d+)\) \* (\S+)\.", sentence
    ).groups()
    return float(scale), int(zero)


def test_gpu_targets_take_pixels_too(tmp_path):
    task, pictures = picture_job(tmp_path, PLAIN, [128] * 3, [64] * 3, input_type="INT8")
    text = task.config.path.read_text() + "[full_quant_param]\ntarget_device = NVGPU\n"
    task.config.path.write_text(text)
    convert(replace(task, config=load_config(task.config.path)))
    x = (pictures[:1].astype(int) - 128).astype(np.int8)
    wanted = run((tmp_path / "m.onnx").read_bytes(), {"x": x.astype(np.float32) / 64})["y"]
    found = run(task.output.read_bytes(), {"x": x})["y"]
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.02 * np.sqrt(np.mean(wanted**2.0))


def test_arrays_go_in_as_the_plans_codes(tmp_path):
    model = prepared(f"{HEAD} {{ {PLAIN} }}", **CONSTANTS)
    data = {"x": positive(6, 3, 8, 8)}
    convert(replace(job(tmp_path, model, data), output=tmp_path / "float.onnx"))
    convert(replace(job(tmp_path, model, data), output=tmp_path / "codes.onnx", input_type="UINT8"))
    lo, hi = 0.0, float(data["x"].max())
    codes = np.clip(np.rint(data["x"][:1] / np.float32((hi - lo) / 255)), 0, 255).astype(np.uint8)
    wanted = run((tmp_path / "float.onnx").read_bytes(), {"x": data["x"][:1]})["y"]
    np.testing.assert_array_equal(
        run((tmp_path / "codes.onnx").read_bytes(), {"x": codes})["y"], wanted
    )


def test_what_a_border_of_another_pixel_costs_is_said(tmp_path):
    mean, std = [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]
    task, _ = picture_job(tmp_path, PADDED, mean, std, input_type="UINT8")
    ear = Ear()
    convert(task, ear)
    (told,) = (text for text in ear.told if text.startswith("Pixel "))
    assert re.fullmatch(
        r"Pixel 114 pads pictures, which is 0.18 off the zero of training: the outputs stay "
        r"[\d.]+ dB above the difference\.",
        told,
    )
    taken = onnx.load(task.output).graph.input[0].type.tensor_type.elem_type
    assert taken == onnx.TensorProto.UINT8


def test_what_no_convolution_can_take_over_stops_the_conversion(tmp_path):
    nodes = "y = Relu (x)"
    task, _ = picture_job(
        tmp_path, nodes, [123.7, 116.3, 103.5], [58.4, 57.1, 57.4], input_type="UINT8"
    )
    with pytest.raises(QConvertError, match="reads the input and"):
        convert(task)
    assert not task.output.exists()
