"""calib.images against float64 resampling written out in the test and hand-computed pixels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calib import CalibError, images
from calib.images import ImageOptions, load_image

RNG = np.random.default_rng(7)


def picture(path: Path, pixels: object, mode: str | None = None, **save: object) -> Path:
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path, **save)
    return path


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, np.uint8)


def triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def cubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampled(line: np.ndarray, size: int, kernel: Callable[[float], float]) -> np.ndarray:
    """`line` (float64, first axis resampled) with the kernel stretched by the shrink factor:
    antialiased.
    """
    scale = len(line) / size
    stretch = max(1.0, scale)
    out = []
    for i in range(size):
        weights = np.array(
            [kernel((j + 0.5 - (i + 0.5) * scale) / stretch) for j in range(len(line))]
        )
        out.append(np.tensordot(weights / weights.sum(), line, 1))
    return np.array(out)


# Channels


def test_rgb_bgr_and_grey_of_a_colour_picture(tmp_path: Path) -> None:
    pixels = noise(3, 5)
    path = picture(tmp_path / "a.png", pixels)
    assert np.array_equal(load_image(path, ImageOptions(), 3), pixels)
    assert np.array_equal(load_image(path, ImageOptions("RGB"), 3), pixels)
    assert np.array_equal(load_image(path, ImageOptions("BGR"), 3), pixels[..., ::-1])
    red, green, blue = np.moveaxis(pixels.astype(np.float64), 2, 0)
    grey = load_image(path, ImageOptions("GRAY"), 1)
    assert grey.shape == (3, 5, 1) and grey.dtype == np.float32
    np.testing.assert_allclose(grey[..., 0], 0.299 * red + 0.587 * green + 0.114 * blue, rtol=1e-6)
    assert np.array_equal(load_image(path, ImageOptions(), 1), grey)


def test_a_grey_picture_is_exact_and_replicated(tmp_path: Path) -> None:
    pixels = noise(4, 6, 1)
    path = picture(tmp_path / "a.png", pixels)
    assert np.array_equal(load_image(path, ImageOptions("GRAY"), 1), pixels[..., None])
    assert np.array_equal(load_image(path, ImageOptions("BGR"), 3), np.stack([pixels] * 3, 2))


def test_mean_and_std_are_in_the_order_of_the_format(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", [[[10, 20, 30]]])
    mean, std = (1.0, 2.0, 3.0), (2.0, 4.0, 5.0)
    assert load_image(path, ImageOptions("BGR", mean, std), 3).ravel().tolist() == pytest.approx(
        [14.5, 4.5, 1.4]
    )
    assert load_image(path, ImageOptions("RGB", mean, std), 3).ravel().tolist() == pytest.approx(
        [4.5, 4.5, 5.4]
    )
    assert load_image(path, ImageOptions("RGB", mean), 3).ravel().tolist() == [9, 18, 27]
    assert load_image(path, ImageOptions("RGB", (), std), 3).ravel().tolist() == [5, 5, 6]


def test_the_result_is_contiguous_float32(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", noise(6, 8))
    array = load_image(path, ImageOptions("BGR", center_crop_width=3, center_crop_height=3), 3)
    assert array.flags.c_contiguous and array.flags.writeable and array.dtype == np.float32


# Modes of files


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", ImageOptions(), 3).tolist() == [
        [[9, 8, 7], [200, 100, 50]]
    ]


def test_palette_with_transparency_keeps_the_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert load_image(tmp_path / "a.png", ImageOptions(), 3).tolist() == [
        [[9, 8, 7], [200, 100, 50]]
    ]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = noise(3, 4, 4)
    assert np.array_equal(
        load_image(picture(tmp_path / "a.png", rgba), ImageOptions(), 3), rgba[..., :3]
    )
    grey_alpha = noise(3, 4, 2)
    Image.fromarray(grey_alpha, "LA").save(tmp_path / "b.png")
    assert np.array_equal(load_image(tmp_path / "b.png", ImageOptions(), 1), grey_alpha[..., :1])


def test_one_bit(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", [[0, 255], [255, 0]], "1")
    assert load_image(tmp_path / "a.png", ImageOptions(), 1)[..., 0].tolist() == [
        [0, 255],
        [255, 0],
    ]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_to_255(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 257, 1000, 65535]], np.uint16)).save(path)
    expected = [0, 1, 1000 / 257, 255]
    assert load_image(path, ImageOptions(), 1).ravel().tolist() == pytest.approx(expected)
    assert load_image(path, ImageOptions(), 3)[0, 2].tolist() == pytest.approx([1000 / 257] * 3)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif", ImageOptions(), 3)[0, 0].tolist() == [0, 255, 255]


def test_pixels_of_unknown_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "wide.tif")
    for name, reason in (
        ("float.tif", "floats of unknown scale"),
        ("wide.tif", "more than 16 bits"),
    ):
        with pytest.raises(CalibError, match=f"{name}: cannot be read as a picture .*{reason}"):
            load_image(tmp_path / name, ImageOptions(), 1)


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 90)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.tif", ImageOptions(), 1).ravel().tolist() == [10] * 4


# EXIF orientation (TIFF 6.0: 3 is half a turn, 6 a quarter turn clockwise, 8 one counter-clockwise)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_exif_orientation(tmp_path: Path, orientation: int, turns: int, sixteen_bit: bool) -> None:
    pixels = noise(3, 5, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = pixels.astype(np.uint16) * 257 if sixteen_bit else pixels
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png", ImageOptions(), 1)[..., 0]
    assert np.array_equal(loaded, np.rot90(pixels, turns))


def test_orientation_comes_before_the_resize(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", noise(20, 40), exif=exif)
    assert load_image(tmp_path / "a.jpg", ImageOptions(resize_short_side=10), 3).shape == (
        20,
        10,
        3,
    )


# Resize and crop


def test_linear_by_hand(tmp_path: Path) -> None:
    wide = picture(tmp_path / "a.png", [[0, 100]])
    enlarged = load_image(wide, ImageOptions(resize_width=4), 1)
    assert enlarged.ravel().tolist() == pytest.approx([0, 25, 75, 100])
    four = picture(tmp_path / "b.png", [[10, 20, 40, 80]])
    shrunk = load_image(four, ImageOptions(resize_width=2), 1)
    # The antialiased triangle spans two source pixels each way: weights 3, 3, 1 of 7.
    assert shrunk.ravel().tolist() == pytest.approx([(30 + 60 + 40) / 7, (20 + 120 + 240) / 7])


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 4), st.sampled_from([("LINEAR", triangle), ("CUBIC", cubic)])
)
def test_linear_and_cubic_against_float64(
    tmp_path_factory: pytest.TempPathFactory,
    sides: tuple[int, int, int, int],
    method: tuple[str, Callable[[float], float]],
) -> None:
    height, width, to_height, to_width = sides
    pixels = noise(height, width)
    path = picture(tmp_path_factory.getbasetemp() / "resize.png", pixels)
    options = ImageOptions(resize_width=to_width, resize_height=to_height, resize_method=method[0])
    columns = resampled(pixels.astype(np.float64).swapaxes(0, 1), to_width, method[1])
    expected = resampled(columns.swapaxes(0, 1), to_height, method[1])
    np.testing.assert_allclose(load_image(path, options, 3), expected, atol=1e-3)


def test_nearest_is_exact(tmp_path: Path) -> None:
    pixels = noise(7, 11)
    path = picture(tmp_path / "a.png", pixels)
    options = ImageOptions(resize_width=4, resize_height=17, resize_method="NEAREST")
    rows = np.floor((np.arange(17) + 0.5) * 7 / 17).astype(int)
    columns = np.floor((np.arange(4) + 0.5) * 11 / 4).astype(int)
    assert np.array_equal(load_image(path, options, 3), pixels[rows][:, columns])


def test_normalising_commutes_with_the_resize(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", noise(9, 13))
    plain = load_image(
        path, ImageOptions(resize_width=5, resize_height=20, resize_method="CUBIC"), 3
    )
    options = ImageOptions("RGB", (10, 20, 30), (2, 3, 4), 5, 20, resize_method="CUBIC")
    np.testing.assert_allclose(
        load_image(path, options, 3), (plain - [10, 20, 30]) / [2, 3, 4], atol=1e-4
    )


@pytest.mark.parametrize(
    ("sides", "short", "expected"),
    [
        ((375, 500), 256, (256, 341)),
        ((500, 375), 256, (341, 256)),
        ((10, 10), 4, (4, 4)),
        ((3, 7), 6, (6, 14)),
    ],
)
def test_short_side_keeps_the_proportions(
    tmp_path: Path, sides: tuple[int, int], short: int, expected: tuple[int, int]
) -> None:
    path = picture(tmp_path / "a.png", noise(*sides))
    assert load_image(path, ImageOptions(resize_short_side=short), 3).shape == (*expected, 3)


def test_crop_offsets_are_floored(tmp_path: Path) -> None:
    pixels = noise(6, 9)
    path = picture(tmp_path / "a.png", pixels)
    cropped = load_image(path, ImageOptions(center_crop_width=4, center_crop_height=3), 3)
    assert np.array_equal(cropped, pixels[1:4, 2:6])
    assert np.array_equal(
        load_image(path, ImageOptions(center_crop_width=9, center_crop_height=6), 3), pixels
    )


def test_usual_classifier_preprocessing(tmp_path: Path) -> None:
    """Against pillow's own 8-bit resize, which rounds to whole levels after each of its two
    passes.
    """
    smooth = Image.fromarray(noise(15, 20)).resize((500, 375), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg")
    resized = (
        Image.open(tmp_path / "a.jpg").convert("RGB").resize((341, 256), Image.Resampling.BILINEAR)
    )
    expected = (np.asarray(resized.crop((58, 16, 282, 240)), np.float64) - 127.5) / 127.5
    options = ImageOptions(
        "RGB",
        (127.5,) * 3,
        (127.5,) * 3,
        resize_short_side=256,
        center_crop_width=224,
        center_crop_height=224,
    )
    actual = load_image(tmp_path / "a.jpg", options, 3)
    assert np.abs(actual - expected).max() <= 1.01 / 127.5
    assert np.abs(actual - expected).mean() <= 0.4 / 127.5


# Errors


def test_crop_larger_than_the_picture(tmp_path: Path) -> None:
    path = picture(tmp_path / "small.png", noise(5, 8))
    with pytest.raises(
        CalibError, match=r"small\.png: the picture is 8x5 .* center_crop_height = 6x6"
    ):
        load_image(path, ImageOptions(center_crop_width=6, center_crop_height=6), 3)


@pytest.mark.parametrize("kept", [0, 10, 60, 0.5])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_files(tmp_path: Path, kept: float, suffix: str) -> None:
    path = picture(tmp_path / f"cut.{suffix}", noise(50, 50))
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(
        CalibError,
        match=rf"cut\.{suffix}: (is broken or not a picture of a known format|cannot be read)",
    ):
        load_image(path, ImageOptions(), 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_a_calib_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tif"]))
    path = picture(tmp_path_factory.getbasetemp() / f"damage.{suffix}", np.full((9, 9), 77))
    content = bytearray(path.read_bytes())
    for place, value in data.draw(
        st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255), max_size=9)
    ).items():
        content[place] = value
    path.write_bytes(content)
    try:
        assert load_image(path, ImageOptions(), 1).shape[2] == 1
    except CalibError as error:
        assert f"damage.{suffix}: " in str(error) and "\n" not in str(error)


def test_missing_file_and_text_file(tmp_path: Path) -> None:
    with pytest.raises(
        CalibError, match=r"none\.png: cannot be read as a picture \(No such file or directory\)\."
    ):
        load_image(tmp_path / "none.png", ImageOptions(), 3)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        CalibError, match=r"notes\.txt: is broken or not a picture of a known format\."
    ):
        load_image(tmp_path / "notes.txt", ImageOptions(), 3)


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "big.png", noise(20, 30))
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    assert load_image(path, ImageOptions(), 3).shape == (20, 30, 3)
    with pytest.raises(
        CalibError, match=r"big\.png: would be resized to 31x20 pixels, more than the 600 allowed"
    ):
        load_image(path, ImageOptions(resize_width=31), 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(CalibError, match=r"big\.png: has 30x20 pixels, more than the 599 allowed"):
        load_image(path, ImageOptions(), 3)


@pytest.mark.parametrize("limit", [599, 299])
def test_pillows_own_limit_is_a_calib_error_outside_of_tests_too(
    tmp_path: Path, limit: int
) -> None:
    """Pillow warns above its limit and fails above twice that; what becomes of warnings is the
    host program's matter.
    """
    path = picture(tmp_path / "big.png", noise(20, 30))
    code = (
        "import sys; from pathlib import Path; from PIL import Image; from calib import "
        "CalibError, images\n"
        f"Image.MAX_IMAGE_PIXELS = {limit}\n"
        "try: images.load_image(Path(sys.argv[1]), images.ImageOptions(), 3)\n"
        "except CalibError as error: sys.stdout.write(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "big.png: has more than the" in done.stdout


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        (
            ImageOptions("GRAY"),
            3,
            r"image_to_format = GRAY does not suit .* 3 channel.*write RGB or BGR\.",
        ),
        (ImageOptions("RGB"), 1, r"image_to_format = RGB does not suit .* 1 channel.*write GRAY\."),
        (
            ImageOptions(normalize_mean=(1.0,)),
            3,
            r"normalize_mean has 1 number.* 3 channel.*write 3\.",
        ),
        (
            ImageOptions(normalize_std=(1.0, 1.0, 1.0)),
            1,
            r"normalize_std has 3 number.* 1 channel.*write 1\.",
        ),
        (ImageOptions(normalize_std=(1.0, 0.0, 1.0)), 3, r"normalize_std must not hold 0"),
    ],
)
def test_options_that_do_not_suit_the_input(
    options: ImageOptions, channels: int, message: str
) -> None:
    with pytest.raises(CalibError, match=message):
        options.check(channels)
