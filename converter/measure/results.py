"""What is known of a quantized model beside its float one: plain data that every report is written
from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from calib.affine import Array
from calib.intervals import Interval, share_interval
from converter.measure.errors import Speed, TensorError, worst_of
from converter.measure.gates import Figures
from converter.plan.plan import QuantPlan


@dataclass(frozen=True)
class Here:
    """What a processor whose kernels saturate makes of a file that is exact elsewhere: the output
    that is least like the float model's, and the share of same answers, None where there are none.
    """

    worst: TensorError
    agreement: float | None


@dataclass(frozen=True)
class Changed:
    """A sample whose answer changed: its file, empty where it has none, its class if that is known,
    and the likeliest classes of both models with their scores, best first.
    """

    file: str
    label: int | None
    before: tuple[tuple[int, float], ...]
    after: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class View:
    """An output for a sample, to look at: what the sample is called, the picture that the model is
    fed, uint8 (height, width, channels), what both models make of it, and how alike that is.

    Pictures are uint8 (height, width, channels), masks classes (height, width), boxes rows of left,
    top, right, bottom in parts of the picture, score and class.
    """

    name: str
    source: Array
    before: Array
    after: Array
    figure: str


@dataclass(frozen=True)
class Views:
    """An output that can be looked at, as `kind` says: picture, mask or boxes, which take all
    outputs together; the samples that changed most, and how much all did, in words.
    """

    output: str
    kind: str
    overall: str
    shown: tuple[View, ...]


@dataclass(frozen=True)
class Verification:
    """Both models run on the same samples.

    `slices` are the parts of those outputs that hold values of different sizes. `held_back` says
    whether calibration saw none of the samples; `fused_difference` is the largest difference
    between the quantized model with and without the runtime's optimizations, relative to the
    output's largest value; `speed`, `top1` and `agreement` (shares from 0 to 1, of samples with an
    answer) are None where they were not measured, `drop` is the 95 % interval of the share of right
    answers that is lost. `given` says that nothing was fitted to any sample, `changed` are the
    first samples with another answer, `views` outputs to look at. `kernels` counts the operators
    that the runtime really executes by name, `conversions` names the Q/DQ nodes among them that
    stayed on their own, and `saturated` the nodes whose weights let kernels of some processors that
    the model is for saturate. `random` says that there was no data, `distilled` that all samples
    were made of the model, `closed_loop` that samples are frames and each model was fed its own
    states. All figures but `kernels`, `conversions` and `speed` are those of exact kernels; `here`
    has this processor's, None where they are the same.
    """

    samples: int
    held_back: bool
    outputs: tuple[TensorError, ...]
    fused_difference: float
    speed: Speed | None
    top1: tuple[float, float] | None
    agreement: float | None
    kernels: Mapping[str, int]
    conversions: tuple[str, ...]
    saturated: tuple[str, ...]
    random: bool = False
    closed_loop: bool = False
    distilled: bool = False
    here: Here | None = None
    slices: tuple[TensorError, ...] = ()
    drop: Interval | None = None
    given: bool = False
    changed: tuple[Changed, ...] = ()
    views: tuple[Views, ...] = ()

    @property
    def agreement_interval(self) -> Interval:
        """The 95 % interval of the share of same answers."""
        return share_interval(round((self.agreement or 0.0) * self.samples), self.samples)

    @property
    def judged(self) -> list[TensorError]:
        """The errors of outputs and, in place of those that hold several kinds of values, of their
        slices.
        """
        cut = {part.name for part in self.slices}
        return [*(error for error in self.outputs if error.name not in cut), *self.slices]

    @property
    def worst(self) -> TensorError | None:
        """The output, or slice, that is least like the float model's."""
        return worst_of(self.judged)

    @property
    def cosine(self) -> float | None:
        """The least cosine similarity of an output or slice."""
        return min((error.cosine for error in self.judged if error.compared), default=None)

    @property
    def left_out(self) -> Iterator[str]:
        """What could not be compared, in words."""
        for error in self.outputs:
            if not (error.compared or error.apart or error.left_out):
                yield f"output '{error.name}' holds nothing that can be compared"
            if error.apart:
                yield (
                    f"{error.apart} of {self.samples} samples of output '{error.name}' have "
                    "another shape"
                )
            if error.left_out:
                yield f"{error.left_out} values of output '{error.name}' are not finite"
            if error.lost:
                yield (
                    f"{error.lost} values of output '{error.name}' are finite in one of the two "
                    "models only"
                )

    @property
    def where(self) -> str:
        """What the models were run on, in words."""
        kind = "random samples" if self.random else "calibration samples"
        kind = "samples distilled from the model" if self.distilled else kind
        kind = "samples held back from calibration" if self.held_back else kind
        kind = "samples of calibrate_path" if self.given and not self.random else kind
        loop = ", each model fed its own states" if self.closed_loop else ""
        return f"{self.samples} {kind}{loop}"


def figures_of(
    before: int, after: int, verification: Verification | None, why: str = ""
) -> Figures:
    """The figures of two models of so many bytes and what a verification found; `why` there is
    none.
    """
    if verification is None:
        return Figures(before, after, unmeasured=why)
    speed, top1 = verification.speed, verification.top1
    return Figures(
        before,
        after,
        cosine=verification.cosine,
        agreement=verification.agreement,
        speedup=speed.low if speed else None,
        accuracy_drop=top1[0] - top1[1] if top1 else None,
        noisy="" if speed is None or speed.sure else f"{speed.low:.2f} to {speed.high:.2f}",
    )


@dataclass(frozen=True)
class NodeFinding:
    """One node: what became of it, its own error, and what it alone costs the outputs (None where
    not measured).

    `share` is its part of the outputs' squared error, from 0 to 1; `bits` is None for a float node.
    `inside` says that it is computed in the kernel of another one, as an activation is.
    """

    name: str
    op_type: str
    quantized: bool
    reason: str
    bits: int | None
    bytes_before: int
    bytes_after: int
    own: TensorError | None
    output: TensorError | None = None
    share: float | None = None
    advice: str = ""
    inside: bool = False


@dataclass(frozen=True)
class TensorFinding:
    """One quantized activation or weight: its histogram (`counts` in equal bins from `low` to
    `high`) and its range.

    `range` are the least and greatest value that the quantized tensor can hold; `clipped` is the
    share of the float values that lie farther outside of it than rounding moves them. `restored`
    counts what became of the values, in the same bins, None where the quantized model lacks the
    tensor. `channels` are the least and greatest float value of each channel (channels, 2), None
    where there are none, `held` those of a weight once quantized. `nodes` read or make it.
    """

    name: str
    node: str
    bits: int
    counts: Array
    low: float
    high: float
    range: tuple[float, float]
    clipped: float
    restored: Array | None = None
    channels: Array | None = None
    held: Array | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerTime:
    """What ONNX Runtime computes in one go in one of the two models: nodes of the float model, and
    what a run takes in both, in microseconds.

    `node` is the one that the layer is called by, empty where kernels compute none, as conversions
    between types or layouts do; `kernels` are the operators that the float and the quantized model
    are executed with.
    """

    node: str
    op_type: str
    nodes: tuple[str, ...]
    before: float
    after: float
    kernels: tuple[str, str]


@dataclass(frozen=True)
class Findings:
    """Everything a report says: `facts` are named figures in words, `advice` sentences on what to
    do next, `errors` those of outputs and tensors inside, as far as they were measured on the way,
    `edges` pairs of nodes of which the second reads what the first makes, `layers` what the runtime
    spends its time on, in the order of the graph, `recipe` the configuration that made the
    quantized model with what was decided on the way, empty where that is not known.
    """

    facts: Mapping[str, str]
    sizes: tuple[int, int]
    verification: Verification | None
    nodes: tuple[NodeFinding, ...] = ()
    tensors: tuple[TensorFinding, ...] = ()
    advice: tuple[str, ...] = ()
    errors: tuple[TensorError, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    layers: tuple[LayerTime, ...] = ()
    recipe: str = ""

    @property
    def ranked(self) -> list[NodeFinding]:
        """The quantized nodes, those that cost the outputs most first."""
        return sorted(
            (node for node in self.nodes if node.quantized),
            key=lambda node: -(node.share or 0.0),
        )


@dataclass(frozen=True)
class Outcome:
    """What a conversion did: the decisions, the sizes in bytes and the tensors' errors, worst
    first; `unverified` says why there is no verification, `summary` all of it in words.
    """

    plan: QuantPlan
    size_before: int
    size_after: int
    errors: tuple[TensorError, ...]
    verification: Verification | None = None
    unverified: str = ""
    summary: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        return self.summary or repr(self)

    @property
    def figures(self) -> Figures:
        """What quality gates look at."""
        return figures_of(self.size_before, self.size_after, self.verification, self.unverified)
