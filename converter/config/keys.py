"""THE table of sections and keys: one dataclass a section, one field a key, one field of `Config` a
section.

A new key is one row here: the reader, the messages, the warnings and the reference are made from
the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from converter.config import values as kinds
from converter.config.values import InputFolders, Kind, NamePairs

QuantType = Literal["WEIGHT_QUANT", "FULL_QUANT", "DYNAMIC_QUANT"]
ActivationQuantMethod = Literal[
    "MAX_MIN",
    "KL",
    "REMOVAL_OUTLIER",
    "PERCENTILE",
    "MSE",
    "MOVING_AVERAGE",
    "RANGE_ABS_MAX",
    "AUTO",
]
TargetDevice = Literal["CPU", "CPU_VNNI", "ARM", "OPENVINO", "NVGPU", "DSP", "QNN"]

QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)

# Samples that are distilled from a model where nothing says how many.
DISTILLED = 32
_PIXELS = kinds.integer(1, 65535, 224)
# Where relative paths start, whatever the key.
_SEEN = (
    "A relative path is seen from the configuration file's folder if it exists there, else from "
    "the current folder."
)


@dataclass(frozen=True)
class Scope:
    """Where a key has an effect: in these modes, if also `test` holds, which `condition` says in
    words.
    """

    modes: tuple[str, ...]
    condition: str = ""
    test: Callable[[Config], bool] = lambda config: True

    def holds(self, config: Config) -> bool:
        """Whether the key has an effect under `config`."""
        return config.mode in self.modes and self.test(config)

    def __str__(self) -> str:
        return "all" if self == _ALWAYS else ", ".join(self.modes) + self.condition


_ALWAYS = Scope((*QUANT_TYPES, "FLOAT32"))
_WEIGHT = Scope(("WEIGHT_QUANT",))
_MIXED_BIT = Scope(_WEIGHT.modes, " with bit_num = 0", lambda config: config.common.bit_num == 0)
_SENSITIVITY = Scope(
    _WEIGHT.modes,
    " with search = SENSITIVITY",
    lambda config: config.mixed_bit.search == "SENSITIVITY",
)
_FULL = Scope(("FULL_QUANT",))
_ON_TARGET = Scope(
    QUANT_TYPES,
    " (the first and the last with NVGPU alone)",
    lambda config: config.mode == "FULL_QUANT" or config.full_quant.target_device == "NVGPU",
)
_TRAINED = Scope(("FULL_QUANT", "FLOAT32"))
_STORED = Scope(
    _WEIGHT.modes,
    " with dequant_strategy = ON_THE_FLY",
    lambda config: config.weight_quant.on_the_fly,
)
_DYNAMIC = Scope(("DYNAMIC_QUANT",))
_TRAINING = Scope(
    _FULL.modes,
    " with fine_tune",
    lambda config: config.fine_tune.fine_tune != "OFF",
)
_LEARNING = ("WEIGHT_QUANT", "FULL_QUANT")
_TUNED = Scope(
    _LEARNING,
    " with fine_tune",
    lambda config: config.fine_tune.fine_tune != "OFF",
)
_WITH_DATA = Scope(
    _ALWAYS.modes,
    " with calibrate_path",
    lambda config: bool(config.preprocess.calibrate_path),
)
_IMAGES = Scope(
    QUANT_TYPES,
    " with input_type = IMAGE",
    lambda config: config.preprocess.input_type == "IMAGE",
)
_PICTURES = Scope(
    QUANT_TYPES,
    " with input_type = IMAGE or distilled samples",
    lambda config: config.preprocess.input_type == "IMAGE" or config.distils,
)
_RESIZED = Scope(
    QUANT_TYPES,
    " with input_type = IMAGE and a size to resize to",
    lambda config: (
        _IMAGES.holds(config)
        and bool(config.preprocess.resize_width or config.preprocess.resize_short_side)
    ),
)


@dataclass(frozen=True)
class Key:
    """A row of the table."""

    kind: Kind
    meaning: str
    default: Any
    scope: Scope

    @property
    def default_text(self) -> str:
        """The default as it is written in the file; an empty one is a dash."""
        if self.default is None or self.default == ():
            return "-"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


@dataclass(frozen=True)
class Section:
    """A section: its name in the file, its dataclass, its field of `Config` and its keys by
    name.
    """

    name: str
    table: type[Any]
    attribute: str
    keys: dict[str, Key]


def _key(kind: Kind | None, meaning: str, default: Any = None, scope: Scope | None = None) -> Any:
    """A row: a field of its section's dataclass; without a scope it has the section's."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "scope": scope})


def _choice(meaning: str, default: Any = None, scope: Scope | None = None) -> Any:
    """A row whose field's type, a bool or a Literal, says which values there are."""
    return _key(None, meaning, default, scope)


@dataclass(frozen=True)
class CommonQuantParam:
    """`[common_quant_param]`: what to do, and to which operators."""

    quant_type: QuantType | None = _choice(
        "WEIGHT_QUANT stores the weights in fewer bits; FULL_QUANT computes in integers; "
        "DYNAMIC_QUANT does so "
        "with activation ranges measured at run time. Required unless export_precision_mode is set."
    )
    bit_num: int = _key(
        replace(
            kinds.integer(0, 16, 8),
            allowed="an integer from 0 to 16 (8 for FULL_QUANT and DYNAMIC_QUANT)",
        ),
        "Bits of a quantized weight; 0 chooses the bits of every layer (mixed bits).",
        8,
    )
    min_quant_weight_size: int = _key(
        kinds.integer(0, 65535),
        "Only weights with more elements than this are quantized.",
        0,
        _WEIGHT,
    )
    min_quant_weight_channel: int = _key(
        kinds.integer(0, 65535, 16),
        "Only weights with more channels than this are quantized.",
        16,
        _WEIGHT,
    )
    skip_quant_node: tuple[str, ...] = _key(
        kinds.names("conv_1,/head/*"),
        "Nodes to leave in float: names, or patterns with `*`, `?` and `[...]`; put a name "
        "with a comma in quotes.",
        (),
    )
    skip_quant_type: tuple[str, ...] = _key(
        kinds.names("Gemm,MatMul"),
        "Operator types to leave in float, as ONNX writes them.",
        (),
    )
    debug_info_save_path: Path | None = _key(
        kinds.path("debug"),
        f"Folder for the debug reports; unset: no reports. {_SEEN}",
    )
    opset: int | None = _key(
        kinds.integer(13, 99, 21),
        "Opset of the result, for runtimes or tools that want a newer one than the float model's; "
        "unset: the model's own, or what the integers need.",
    )
    export_recipe: Path | None = _key(
        kinds.path("recipe.cfg"),
        "File that what a search, max_drop or MIXED decided is written to, as sections [node:…] to "
        "put into a configuration; beside it, as .json, the whole plan for programs. Unset: none. "
        f"{_SEEN}",
        scope=Scope(("WEIGHT_QUANT", "FULL_QUANT")),
    )
    thread_num: int | None = _key(
        kinds.integer(1, 1024, 4), "Threads to compute with; unset: all cores."
    )
    providers: tuple[str, ...] = _key(
        kinds.names("CPUExecutionProvider"),
        "ONNX Runtime execution providers to calibrate with; unset: the CPU.",
        (),
        _FULL,
    )
    calibration_memory: int = _key(
        kinds.integer(16, 1 << 20, 512),
        "Megabytes of activations to hold at a time while calibrating.",
        512,
        _FULL,
    )
    calibration_cache: Path | None = _key(
        kinds.path("calibration.npz"),
        "File that keeps what calibration found, so that the next conversion of the same model "
        "and data, with "
        f"other range methods, targets or skips, need not calibrate; unset: none. {_SEEN}",
        scope=_FULL,
    )


@dataclass(frozen=True)
class MixedBitWeightQuantParam:
    """`[mixed_bit_weight_quant_param]`: how the bits of a layer are chosen."""

    init_scale: float = _key(
        kinds.number_between(0, 1, 0.02),
        "Relative error allowed in every layer: a larger value gives a smaller, less exact model.",
        0.02,
    )
    auto_tune: bool = _choice(
        "Search the largest init_scale whose outputs keep the cosine similarity min_cosine.",
        False,
    )
    min_cosine: float = _key(
        kinds.number_between(0, 1, 0.995),
        "Least cosine similarity of the outputs that a search accepts.",
        0.995,
    )
    search: Literal["ERROR", "SENSITIVITY"] = _choice(
        "ERROR gives every layer the bits that init_scale asks for; SENSITIVITY the bits its "
        "effect on the outputs "
        "is worth.",
        "ERROR",
    )
    target_ratio: float | None = _key(
        kinds.number_between(1, 32, 8),
        "How many times smaller SENSITIVITY makes the model; unset: as small as min_cosine allows.",
        scope=_SENSITIVITY,
    )


@dataclass(frozen=True)
class WeightQuantParam:
    """`[weight_quant_param]`: how stored weights are rounded, and when they become floats again."""

    dequant_strategy: Literal["ON_LOAD", "ON_THE_FLY"] = _choice(
        "ON_LOAD unpacks weights of any width when the model is loaded and runs at float speed; "
        "ON_THE_FLY keeps "
        "them as integers of 2, 4, 8 or 16 bits in memory.",
        "ON_LOAD",
    )
    per_channel: bool = _choice(
        "One scale for every output channel of a weight; false: one for a weight.", True
    )
    bias_correction: bool = _choice(
        "Keep the mean of every channel: of its outputs where GPTQ sees data, else mean and "
        "variance of its weights.",
        True,
    )
    quant_strategy: Literal["MAX_MIN", "GPTQ"] | None = _choice(
        "GPTQ rounds weights for least error of the outputs on calibration data, MAX_MIN for "
        "least error of the "
        "weights; unset: GPTQ if there is data."
    )
    block_size: int | None = _key(
        kinds.power_of_two(16, 256, 32),
        "Weights of a matrix product that share a scale; unset: a whole channel.",
        scope=_STORED,
    )

    table_bit_num: int = _key(
        kinds.integer(1, 16, 8),
        "Least bits of tables that rows are looked up in, and of a matrix that scores all rows of "
        "one; a bit_num of 0 chooses them as well.",
        8,
    )

    @property
    def on_the_fly(self) -> bool:
        """Whether weights stay integers in memory."""
        return self.dequant_strategy == "ON_THE_FLY"


@dataclass(frozen=True)
class DynamicQuantParam:
    """`[dynamic_quant_param]`: what activations and weights share a scale."""

    quant_strategy: Literal["ALWC", "ACWL"] = _choice(
        "ALWC: one scale for an activation, one for every output channel of a weight, which is "
        "the fastest; ACWL: one "
        "for every row of an activation, one for a weight.",
        "ALWC",
    )


@dataclass(frozen=True)
class FullQuantParam:
    """`[full_quant_param]`: how activations and weights become integers."""

    activation_quant_method: ActivationQuantMethod = _choice(
        "How an activation's range follows from the data: MAX_MIN for data like the real one, KL "
        "or "
        "REMOVAL_OUTLIER for noisy data.",
        "MAX_MIN",
    )
    outlier_ratio: float = _key(
        kinds.number_between(0, 0.5, 0.0001),
        "Share of the values that REMOVAL_OUTLIER takes off at each end.",
        0.0001,
    )
    bias_correction: bool = _choice(
        "Correct the shift that quantization causes in a layer's mean output.", True
    )
    per_channel: bool = _choice(
        "One scale for every output channel of a weight; false: one for a weight.", True
    )
    weight_rounding: Literal["GPTQ", "NEAREST"] = _choice(
        "GPTQ rounds weights so that errors cancel out in the layer's output, NEAREST each "
        "by itself.",
        "GPTQ",
    )
    equalize: bool = _choice(
        "Even out the channels of neighbouring layers before rounding, where per_channel = false.",
        True,
    )
    overflow_safe: bool = _choice(
        "Keep weights small enough that no x86 processor's 8-bit kernels saturate (target CPU).",
        True,
    )
    power_of_two_scale: bool = _choice(
        "Make every scale a power of two, for hardware that shifts.", False
    )
    only_where_it_pays: bool = _choice(
        "Leave float what integers would make no faster, by a table of costs (targets CPU and "
        "CPU_VNNI), and what would drown in the noise of 8-bit inputs; false: integers of all that "
        "has a kernel.",
        True,
    )
    require_full_integer: bool = _choice(
        "Fail, naming the nodes, where any node would stay float whose type is not in allow_float.",
        False,
    )
    allow_float: tuple[str, ...] = _key(
        kinds.names("Softmax,Sigmoid"),
        "Operator types that require_full_integer lets stay float, as they do by nature.",
        (),
        Scope(
            _FULL.modes,
            " with require_full_integer = true",
            lambda config: config.full_quant.require_full_integer,
        ),
    )
    max_drop: float | None = _key(
        kinds.number_between(0, 1, 0.01),
        "Most that the output may lose, on samples that nothing is fitted to: of its cosine "
        "similarity, or of the share of right answers if label_file is given and there are enough "
        "to tell; the fewest nodes that achieve it stay float. Unset: no bound.",
    )
    activation_bits: Literal["8", "16", "MIXED"] = _choice(
        "Bits of an activation. 16 lose next to nothing and are for NPUs (targets QNN and DSP); on "
        "the targets CPU, CPU_VNNI and ARM they cost speed. MIXED has 16 for the few nodes that "
        "gain the most, or as many as max_drop takes.",
        "8",
    )
    target_device: TargetDevice | None = _choice(
        "Hardware that sets the integer types and operators; unset: CPU. NVGPU holds in every "
        "mode.",
        scope=_ON_TARGET,
    )

    @property
    def bits(self) -> int:
        """Bits of activations, those that are not chosen one by one."""
        return 16 if self.activation_bits == "16" else 8


@dataclass(frozen=True)
class FineTuneParam:
    """`[fine_tune_param]`: what is learned of the float model after rounding, without labels."""

    fine_tune: Literal["OFF", "BLOCK", "END_TO_END", "AUTO"] = _choice(
        "Learn scales, biases and, where codes are stored, rounding from the float model on the "
        "calibration data: END_TO_END from its outputs, BLOCK from what blocks of layers hand on, "
        "AUTO both in turn, or from outputs alone where stored weights tell classes. A fifth of "
        "the samples is held back and judges: what is no better there is not kept.",
        "OFF",
    )
    time_limit: float = _key(
        kinds.number_between(0, 10080, 15),
        "Minutes after which the best so far is taken; where not all epochs fit, fewer are made.",
        15.0,
        _TUNED,
    )
    epochs: int = _key(
        kinds.integer(1, 65535, 100), "How often every sample is learned from.", 100, _TUNED
    )
    batch_size: int = _key(
        kinds.integer(1, 4096, 32), "Samples that one step of learning looks at.", 32, _TUNED
    )
    learning_rate: float = _key(
        kinds.number_between(0, 1, 0.0003),
        "The first step, as a share of what it changes; steps get smaller to the end, and in "
        "models of many channels.",
        0.0003,
        _TUNED,
    )
    seed: int = _key(
        kinds.integer(0, 2**31 - 1),
        "Of the order of samples and their views: the same seed gives the same file.",
        0,
        _TUNED,
    )
    weight_bits: int = _key(
        kinds.integer(2, 8, 4),
        "Bits of weights that compute in integers: fewer than 8 are trained, with their scales.",
        8,
        _TRAINING,
    )
    activation_bits: int = _key(
        kinds.integer(1, 8, 4),
        "Bits of activations likewise, whose ranges are learned, from those of the method MSE "
        "unless another is named; fewer than 8 stand in a byte each.",
        8,
        _TRAINING,
    )
    augment: bool | None = _choice(
        "Learn from other views of the samples as well: mirrored, cut out and mixed with one "
        "another; unset: of pictures, input_type = IMAGE.",
        scope=_TUNED,
    )

    @property
    def in_few_bits(self) -> bool:
        """Whether integers are trained for fewer than 8 bits."""
        return self.fine_tune != "OFF" and min(self.weight_bits, self.activation_bits) < 8


@dataclass(frozen=True)
class TransformQuantParam:
    """`[transform_quant_param]`: what becomes of a model that was trained with fake
    quantization.
    """

    export_precision_mode: Literal["QUANT", "FLOAT32"] | None = _choice(
        "QUANT makes a model that computes in integers with the ranges and weights it was trained "
        "with, FLOAT32 takes "
        "its quantization away; instead of a quant_type, and no data is needed."
    )
    mean: float | None = _key(
        kinds.number_between(-0.5, 255.5, 127.5),
        "Beside std_dev: the model takes uint8 pixels, and pixel p stands for (p - mean) / "
        "std_dev.",
        scope=_FULL,
    )
    std_dev: float | None = _key(
        kinds.number_between(0, 1e6, 127.5),
        "Beside mean: what the training divided pixels by.",
        scope=_FULL,
    )


@dataclass(frozen=True)
class DataPreprocessParam:
    """`[data_preprocess_param]`: the calibration data, and what is done to a picture before it
    enters the model.
    """

    calibrate_path: InputFolders = _key(
        kinds.input_folders(),
        "Data of every model input; without it FULL_QUANT distils samples from the model itself. "
        f"In quotes a folder may hold commas and colons. {_SEEN}",
        (),
    )
    calibrate_size: int | None = _key(
        kinds.integer(1, 65535, 100),
        "Number of samples to calibrate with, beside calibrate_path; without it, of those that are "
        f"distilled: {DISTILLED} where it is unset.",
    )
    verify_size: int | None = _key(
        kinds.integer(1, 65535, 100),
        "Number of samples to verify on, of those behind calibrate_size; unset: with label_file "
        "all, else up to 100. Where there are none, calibration samples are taken.",
        scope=_WITH_DATA,
    )
    input_type: Literal["IMAGE", "BIN", "NPY", "SYNTHETIC"] | None = _choice(
        "Type of the files: pictures, raw buffers or NumPy arrays, beside calibrate_path; "
        "SYNTHETIC distils samples from the model itself instead."
    )
    synthetic_size: int = _key(
        kinds.integer(0, 65535, 32),
        "Number of samples distilled from the model itself beside the real ones, where these are "
        "few.",
        0,
        _WITH_DATA,
    )
    state_inputs: NamePairs = _key(
        kinds.name_pairs("h_in:h_out"),
        "State inputs of a recurrent or streaming model, each with the output that is fed to it at "
        "the next sample; unset: inputs without a folder whose names say so, as h_in and h_out. "
        "Samples are consecutive frames then, in the order of the files, and states begin at zero.",
        (),
        _WITH_DATA,
    )
    label_file: Path | None = _key(
        kinds.path("labels.csv"),
        "CSV with a line `file,label` for every file that right answers are counted on, label "
        "being a class index; or a folder whose sub-folders are the classes, by their numbers or "
        f"else in natural order. {_SEEN}",
    )
    image_to_format: Literal["RGB", "GRAY", "BGR"] | None = _choice(
        "Channels of the preprocessed picture; unset: RGB, or GRAY for a model input of one "
        "channel.",
        scope=_IMAGES,
    )
    normalize_mean: tuple[float, ...] = _key(
        kinds.channel_values(),
        "Mean of each channel: (pixel - mean) / std, with pixels from 0 to 255.",
        (),
        _PICTURES,
    )
    normalize_std: tuple[float, ...] = _key(
        kinds.channel_values(nonzero=True),
        "Standard deviation of each channel, beside the mean.",
        (),
        _PICTURES,
    )
    resize_width: int | None = _key(
        _PIXELS, "Width to resize to, beside resize_height.", scope=_IMAGES
    )
    resize_height: int | None = _key(
        _PIXELS, "Height to resize to, beside resize_width.", scope=_IMAGES
    )
    resize_short_side: int | None = _key(
        _PIXELS,
        "Shorter side to resize to, keeping the proportions; instead of width and height.",
        scope=_IMAGES,
    )
    resize_method: Literal["NEAREST", "LINEAR", "CUBIC"] = _key(
        kinds.one_of("NEAREST", "LINEAR", "CUBIC", NEARST="NEAREST"),
        "Interpolation when resizing.",
        "LINEAR",
        _RESIZED,
    )
    center_crop_width: int | None = _key(
        _PIXELS,
        "Width cut from the centre after resizing, beside center_crop_height.",
        scope=_IMAGES,
    )
    center_crop_height: int | None = _key(
        _PIXELS,
        "Height cut from the centre after resizing, beside center_crop_width.",
        scope=_IMAGES,
    )


@dataclass(frozen=True)
class JobParam:
    """`[job]`: the files of one conversion, so that a configuration is a whole job of `qconvert
    batch`.
    """

    model: Path | None = _key(
        kinds.path_beside("model.onnx"),
        "Float model where no flag or manifest names one, seen from this file's folder.",
    )
    output: Path | None = _key(
        kinds.path_beside("model_quant.onnx"),
        "Output likewise; unset: MODEL_quant.onnx beside the model.",
    )


@dataclass(frozen=True)
class NodeRecipe:
    """`[node:PATTERN]` and `[type:OPERATOR]`: how some nodes are quantized; unset is as for all."""

    skip: bool | None = _choice("Leave the nodes float; false: do not, whatever says so before.")
    bit_num: int | None = _key(
        kinds.integer(1, 16, 8),
        "Bits of the nodes' weights; no search changes them.",
        scope=_WEIGHT,
    )
    activation_bits: Literal["8", "16"] | None = _choice(
        "Bits of what the nodes read and make.", scope=_FULL
    )
    activation_quant_method: ActivationQuantMethod | None = _choice(
        "How the ranges of what the nodes make follow from the data.", scope=_FULL
    )
    per_channel: bool | None = _choice(
        "One scale for every output channel of a weight; false: one for a weight.",
        scope=Scope((*_WEIGHT.modes, *_FULL.modes)),
    )
    block_size: int | None = _key(
        kinds.power_of_two(16, 256, 32),
        "Weights of a matrix product that share a scale.",
        scope=_STORED,
    )
    quant_strategy: Literal["MAX_MIN", "GPTQ"] | None = _choice(
        "What the nodes' weights are rounded for, as in [weight_quant_param].", scope=_WEIGHT
    )


@dataclass(frozen=True)
class TensorRecipe:
    """`[tensor:NAME]`: what is known of an activation."""

    range: tuple[float, float] | None = _key(
        kinds.interval(),
        "The range that its integers cover, instead of one from data.",
        scope=_FULL,
    )


@dataclass(frozen=True)
class Recipe:
    """A section about some nodes or tensors: its name in the file with its line, what it is about
    (node, type or tensor) and which, and its keys that have an effect.
    """

    section: str
    line: int
    kind: str
    pattern: str
    wishes: Mapping[str, Any]


def _section(table: type[Any], name: str, scope: Scope) -> Any:
    """A field of `Config`: the section of that name, whose keys have this scope where they give
    none.
    """
    return field(
        default_factory=table,
        metadata={"section": name, "table": table, "scope": scope},
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration file: its sections, where it was read from, and sentences about keys without
    effect.
    """

    common: CommonQuantParam = _section(CommonQuantParam, "common_quant_param", _ALWAYS)
    mixed_bit: MixedBitWeightQuantParam = _section(
        MixedBitWeightQuantParam, "mixed_bit_weight_quant_param", _MIXED_BIT
    )
    weight_quant: WeightQuantParam = _section(WeightQuantParam, "weight_quant_param", _WEIGHT)
    full_quant: FullQuantParam = _section(FullQuantParam, "full_quant_param", _FULL)
    dynamic_quant: DynamicQuantParam = _section(DynamicQuantParam, "dynamic_quant_param", _DYNAMIC)
    fine_tune: FineTuneParam = _section(FineTuneParam, "fine_tune_param", Scope(_LEARNING))
    transform: TransformQuantParam = _section(
        TransformQuantParam, "transform_quant_param", _TRAINED
    )
    preprocess: DataPreprocessParam = _section(
        DataPreprocessParam, "data_preprocess_param", _ALWAYS
    )
    job: JobParam = _section(JobParam, "job", _ALWAYS)
    recipes: tuple[Recipe, ...] = ()
    path: Path
    warnings: tuple[str, ...] = ()
    lines: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def mode(self) -> str | None:
        """What is done to the model: the quant_type or, without one, FULL_QUANT or FLOAT32 for a
        model's own one.
        """
        precision = self.transform.export_precision_mode
        return self.common.quant_type or ("FULL_QUANT" if precision == "QUANT" else precision)

    @property
    def distils(self) -> bool:
        """Whether all samples are distilled from the model itself: it is asked for, or integers
        want ranges and there is no data.
        """
        data, full = self.preprocess, self.common.quant_type == "FULL_QUANT"
        open_ranges = full and not self.transform.export_precision_mode
        return data.input_type == "SYNTHETIC" or (open_ranges and not data.calibrate_path)

    @property
    def distilled(self) -> int:
        """How many samples are distilled from the model itself."""
        data = self.preprocess
        if self.distils:
            return data.calibrate_size or DISTILLED
        return data.synthetic_size if data.calibrate_path else 0

    @property
    def has_samples(self) -> bool:
        """Whether there are samples to calibrate with, real or distilled."""
        return bool(self.preprocess.calibrate_path) or self.distils

    def at(self, section: str, key: str) -> str:
        """Where a message about a key points: `file:line: [section] key`, without the line of a key
        that is not set.
        """
        line = self.lines.get((section, key))
        return (
            f"{self.path}:{line}: [{section}] {key}" if line else f"{self.path}: [{section}] {key}"
        )


def _implied(hint: Any) -> Kind:
    """The kind of values that a type, a bool or a Literal, allows."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return kinds.one_of(*get_args(literals[0])) if literals else kinds.boolean()


def _as_section(row: Field[Any]) -> Section:
    keys = _keys_of(row.metadata["table"], row.metadata["scope"])
    return Section(row.metadata["section"], row.metadata["table"], row.name, keys)


def _keys_of(table: type[Any], scope: Scope) -> dict[str, Key]:
    hints, keys = get_type_hints(table), {}
    for key in fields(table):
        about = key.metadata
        kind = about["kind"] or _implied(hints[key.name])
        keys[key.name] = Key(
            kind,
            about["meaning"],
            key.default,
            about["scope"] or scope,
        )
    return keys


SECTIONS = {row.metadata["section"]: _as_section(row) for row in fields(Config) if row.metadata}


_QUANTIZING = Scope(QUANT_TYPES)
# Sections about some nodes or tensors, by what their names begin with.
RECIPES = {
    "node": Section("node:PATTERN", NodeRecipe, "", _keys_of(NodeRecipe, _QUANTIZING)),
    "type": Section("type:OPERATOR", NodeRecipe, "", _keys_of(NodeRecipe, _QUANTIZING)),
    "tensor": Section("tensor:NAME", TensorRecipe, "", _keys_of(TensorRecipe, _QUANTIZING)),
}


def section_named(name: str) -> Section | None:
    """The row of a section as a file names it, None if there is none."""
    kind, colon, which = name.partition(":")
    return RECIPES.get(kind.strip()) if colon and which.strip() else SECTIONS.get(name)


def default_config(mode: QuantType | None = None) -> Config:
    """The configuration in which nothing is set but the mode."""
    return Config(path=Path("default settings"), common=CommonQuantParam(quant_type=mode))
