"""THE table of sections and keys: one dataclass a section, one field a key, one field of `Config` a section.

A new key is one row here: the reader, the messages, the warnings and the reference are made from the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from converter.config.values import (
    InputFolders,
    Kind,
    boolean,
    channel_values,
    input_folders,
    integer,
    names,
    number_between,
    one_of,
    path,
)

QuantType = Literal["WEIGHT_QUANT", "FULL_QUANT", "DYNAMIC_QUANT"]
ActivationQuantMethod = Literal[
    "MAX_MIN", "KL", "REMOVAL_OUTLIER", "PERCENTILE", "MSE", "MOVING_AVERAGE", "RANGE_ABS_MAX", "AUTO"
]
InputType = Literal["IMAGE", "BIN", "NPY"]
ImageFormat = Literal["RGB", "GRAY", "BGR"]
TargetDevice = Literal["CPU", "CPU_VNNI", "ARM", "OPENVINO", "NVGPU", "DSP"]
WeightRounding = Literal["GPTQ", "NEAREST"]
ResizeMethod = Literal["NEAREST", "LINEAR", "CUBIC"]

QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
TARGET_DEVICES: tuple[TargetDevice, ...] = get_args(TargetDevice)

_PIXELS = integer(1, 65535, 224)


@dataclass(frozen=True)
class Scope:
    """Where a key has an effect: in these modes, if also `test` holds, which `condition` says in words."""

    modes: tuple[QuantType, ...]
    condition: str = ""
    test: Callable[[Config], bool] = lambda config: True

    def holds(self, config: Config) -> bool:
        """Whether the key has an effect under `config`."""
        return config.common.quant_type in self.modes and self.test(config)

    def __str__(self) -> str:
        return ", ".join(self.modes) + self.condition


_ALWAYS = Scope(QUANT_TYPES)
_WEIGHT = Scope(("WEIGHT_QUANT",))
_MIXED_BIT = Scope(("WEIGHT_QUANT",), " with bit_num = 0", lambda config: config.common.bit_num == 0)
_FULL = Scope(("FULL_QUANT",))
_IMAGES = Scope(("FULL_QUANT",), " with input_type = IMAGE", lambda config: config.preprocess.input_type == "IMAGE")
_RESIZED = Scope(
    ("FULL_QUANT",), " with input_type = IMAGE and a size to resize to", lambda config: config.preprocess.resizes
)


def _key(kind: Kind, meaning: str, scope: Scope = _ALWAYS) -> dict[str, Any]:
    """Return what the table says of a key beside its name and default; a key without a default is required."""
    return {"kind": kind, "meaning": meaning, "scope": scope}


@dataclass(frozen=True)
class CommonQuantParam:
    """`[common_quant_param]`: what to do, and to which operators."""

    quant_type: QuantType = field(
        metadata=_key(
            one_of(*QUANT_TYPES),
            "WEIGHT_QUANT stores the weights in fewer bits; FULL_QUANT computes in integers; DYNAMIC_QUANT does so "
            "with activation ranges measured at run time.",
        )
    )
    bit_num: int = field(
        default=8,
        metadata=_key(
            replace(integer(0, 16, 8), allowed="an integer from 0 to 16 (8 for FULL_QUANT and DYNAMIC_QUANT)"),
            "Bits of a quantized weight; 0 chooses the bits of every layer (mixed bits).",
        ),
    )
    min_quant_weight_size: int = field(
        default=0,
        metadata=_key(integer(0, 65535), "Only weights with more elements than this are quantized.", _WEIGHT),
    )
    min_quant_weight_channel: int = field(
        default=16,
        metadata=_key(integer(0, 65535, 16), "Only weights with more channels than this are quantized.", _WEIGHT),
    )
    skip_quant_node: tuple[str, ...] = field(
        default=(),
        metadata=_key(
            names("conv_1,/head/*"),
            "Nodes to leave in float: names, or patterns with `*`, `?` and `[...]`; put a name with a comma in quotes.",
        ),
    )
    skip_quant_type: tuple[str, ...] = field(
        default=(), metadata=_key(names("Gemm,MatMul"), "Operator types to leave in float, as ONNX writes them.")
    )
    debug_info_save_path: Path | None = field(
        default=None,
        metadata=_key(path("debug"), "Folder for the debug reports, seen from the current folder; unset: no reports."),
    )
    thread_num: int | None = field(
        default=None, metadata=_key(integer(1, 1024, 4), "Threads to compute with; unset: all cores.")
    )
    providers: tuple[str, ...] = field(
        default=(),
        metadata=_key(
            names("CPUExecutionProvider"), "ONNX Runtime execution providers to calibrate with; unset: the CPU.", _FULL
        ),
    )
    calibration_memory: int = field(
        default=512,
        metadata=_key(
            integer(16, 1 << 20, 512), "Megabytes of activations to hold at a time while calibrating.", _FULL
        ),
    )
    calibration_cache: Path | None = field(
        default=None,
        metadata=_key(
            path("calibration.npz"),
            "File that keeps what calibration found, so that the next conversion of the same model and data, with "
            "other range methods, targets or skips, need not calibrate; unset: none.",
            _FULL,
        ),
    )


@dataclass(frozen=True)
class MixedBitWeightQuantParam:
    """`[mixed_bit_weight_quant_param]`: how the bits of a layer are chosen."""

    init_scale: float = field(
        default=0.02,
        metadata=_key(
            number_between(0, 1, 0.02),
            "Where the search for bits starts: a larger value gives a smaller, less exact model.",
            _MIXED_BIT,
        ),
    )
    auto_tune: bool = field(
        default=False,
        metadata=_key(
            boolean(), "Search the init_scale that keeps the outputs' cosine similarity near 0.995.", _MIXED_BIT
        ),
    )


@dataclass(frozen=True)
class FullQuantParam:
    """`[full_quant_param]`: how activations and weights become integers."""

    activation_quant_method: ActivationQuantMethod = field(
        default="MAX_MIN",
        metadata=_key(
            one_of(*get_args(ActivationQuantMethod)),
            "How an activation's range follows from the data: MAX_MIN for data like the real one, KL or "
            "REMOVAL_OUTLIER for noisy data.",
            _FULL,
        ),
    )
    outlier_ratio: float = field(
        default=0.0001,
        metadata=_key(
            number_between(0, 0.5, 0.0001), "Share of the values that REMOVAL_OUTLIER takes off at each end.", _FULL
        ),
    )
    bias_correction: bool = field(
        default=True,
        metadata=_key(boolean(), "Correct the shift that quantization causes in a layer's mean output.", _FULL),
    )
    per_channel: bool = field(
        default=True,
        metadata=_key(boolean(), "One scale for every output channel of a weight; false: one for a weight.", _FULL),
    )
    weight_rounding: WeightRounding = field(
        default="GPTQ",
        metadata=_key(
            one_of(*get_args(WeightRounding)),
            "GPTQ rounds weights so that errors cancel out in the layer's output, NEAREST each by itself.",
            _FULL,
        ),
    )
    equalize: bool = field(
        default=True,
        metadata=_key(
            boolean(), "Even out the channels of neighbouring layers before rounding, where per_channel = false.", _FULL
        ),
    )
    overflow_safe: bool = field(
        default=True,
        metadata=_key(
            boolean(), "Keep weights small enough that no x86 processor's 8-bit kernels saturate (target CPU).", _FULL
        ),
    )
    power_of_two_scale: bool = field(
        default=False,
        metadata=_key(boolean(), "Make every scale a power of two, for hardware that shifts.", _FULL),
    )
    require_full_integer: bool = field(
        default=False,
        metadata=_key(boolean(), "Fail, naming the nodes, where any node would stay float.", _FULL),
    )
    max_drop: float | None = field(
        default=None,
        metadata=_key(
            number_between(0, 1, 0.01),
            "Most that the output may lose over the calibration data: of its cosine similarity, or of the share of "
            "right answers if label_file is given; the fewest nodes that achieve it stay float. Unset: no bound.",
            _FULL,
        ),
    )
    target_device: TargetDevice | None = field(
        default=None,
        metadata=_key(
            one_of(*TARGET_DEVICES), "Hardware that sets the integer types and operators; unset: CPU.", _FULL
        ),
    )


@dataclass(frozen=True)
class DataPreprocessParam:
    """`[data_preprocess_param]`: the calibration data, and what is done to a picture before it enters the model."""

    calibrate_path: InputFolders = field(
        default=(),
        metadata=_key(
            input_folders(),
            "Data of every model input, required for FULL_QUANT. A relative folder is seen from the configuration "
            "file's folder if it exists there, else from the current folder; in quotes it may hold commas and colons.",
            _FULL,
        ),
    )
    calibrate_size: int | None = field(
        default=None,
        metadata=_key(integer(1, 65535, 100), "Number of samples to calibrate with, required for FULL_QUANT.", _FULL),
    )
    input_type: InputType | None = field(
        default=None,
        metadata=_key(
            one_of(*get_args(InputType)),
            "Type of the files: pictures, raw buffers or NumPy arrays; required for FULL_QUANT.",
            _FULL,
        ),
    )
    label_file: Path | None = field(
        default=None,
        metadata=_key(
            path("labels.csv"),
            "CSV with a line `file,label` for every calibration file; label is a class index.",
            _FULL,
        ),
    )
    image_to_format: ImageFormat | None = field(
        default=None,
        metadata=_key(
            one_of(*get_args(ImageFormat)),
            "Channels of the preprocessed picture; unset: RGB, or GRAY for a model input of one channel.",
            _IMAGES,
        ),
    )
    normalize_mean: tuple[float, ...] = field(
        default=(),
        metadata=_key(
            channel_values(), "Mean of each channel: (pixel - mean) / std, with pixels from 0 to 255.", _IMAGES
        ),
    )
    normalize_std: tuple[float, ...] = field(
        default=(),
        metadata=_key(channel_values(nonzero=True), "Standard deviation of each channel, beside the mean.", _IMAGES),
    )
    resize_width: int | None = field(
        default=None, metadata=_key(_PIXELS, "Width to resize to, beside resize_height.", _IMAGES)
    )
    resize_height: int | None = field(
        default=None, metadata=_key(_PIXELS, "Height to resize to, beside resize_width.", _IMAGES)
    )
    resize_short_side: int | None = field(
        default=None,
        metadata=_key(
            _PIXELS, "Shorter side to resize to, keeping the proportions; instead of width and height.", _IMAGES
        ),
    )
    resize_method: ResizeMethod = field(
        default="LINEAR",
        metadata=_key(one_of(*get_args(ResizeMethod), NEARST="NEAREST"), "Interpolation when resizing.", _RESIZED),
    )
    center_crop_width: int | None = field(
        default=None,
        metadata=_key(_PIXELS, "Width cut from the centre after resizing, beside center_crop_height.", _IMAGES),
    )
    center_crop_height: int | None = field(
        default=None,
        metadata=_key(_PIXELS, "Height cut from the centre after resizing, beside center_crop_width.", _IMAGES),
    )

    @property
    def resizes(self) -> bool:
        """Whether pictures are resized."""
        return self.input_type == "IMAGE" and bool(self.resize_width or self.resize_short_side)


def _section(name: str) -> dict[str, str]:
    """Return what marks a field of `Config` as a section: its name in the file."""
    return {"section": name}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration file: its sections, where it was read from, and sentences about keys without effect."""

    common: CommonQuantParam = field(metadata=_section("common_quant_param"))
    mixed_bit: MixedBitWeightQuantParam = field(
        default_factory=MixedBitWeightQuantParam, metadata=_section("mixed_bit_weight_quant_param")
    )
    full_quant: FullQuantParam = field(default_factory=FullQuantParam, metadata=_section("full_quant_param"))
    preprocess: DataPreprocessParam = field(
        default_factory=DataPreprocessParam, metadata=_section("data_preprocess_param")
    )
    path: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Key:
    """A row of the table; `default` is `dataclasses.MISSING` for a required key."""

    section: str
    name: str
    kind: Kind
    meaning: str
    default: Any
    scope: Scope


@dataclass(frozen=True)
class Section:
    """A section: its name in the file, its field of `Config`, its dataclass and its keys by name."""

    name: str
    attribute: str
    table: type[Any]
    keys: dict[str, Key]


def _as_section(row: Field[Any], table: type[Any]) -> Section:
    name = row.metadata["section"]
    keys = {key.name: Key(name, key.name, default=key.default, **key.metadata) for key in fields(table)}
    return Section(name, row.name, table, keys)


_TABLES = get_type_hints(Config)
SECTIONS: dict[str, Section] = {
    row.metadata["section"]: _as_section(row, _TABLES[row.name]) for row in fields(Config) if "section" in row.metadata
}
