"""The `compress` section of a recipe: the settings of `geta.analyze`, `geta.quantize` and the optimizers under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from geta.optim import Budget, Saliency, Schedule
from geta.optim.forget import Forgetting
from geta.quant import DGE, DSQ, STE, Bits, FixedBits, Fourier, Surrogate
from geta.recipes.settings import Settings

_OF_QUANTIZERS = (
    "end_bits exclude surrogate granularity group_size nonlinear initial_bits percentile results calibration_batches "
    "quant_lr forgetting tighten follow"
).split()
_OF_CRIC = ("max_cycles", "sampling_steps", "tolerance", "hybrid_steps", "probe_weight")


def read_bits(value: Any) -> Any:
    """Bit widths from what a recipe says: [4, 8] is a range, {allowed: [4, 8]} these alone, 8 exactly that, {fixed: 2} not learned.

    Raises ConfigError for anything else.
    """
    if isinstance(value, Mapping) and set(value) == {"fixed"}:
        return FixedBits(value["fixed"])
    if isinstance(value, Mapping) and set(value) == {"allowed"} and isinstance(value["allowed"], list | tuple):
        return Bits.of(set(value["allowed"]))
    return Bits.of(value)


def _checked_bits(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, Mapping) and set(value) not in ({"fixed"}, {"allowed"})):
        raise ValueError("write a range [4, 8], {allowed: [4, 8]} for these two alone, one number for exactly that, {fixed: 2}, or null")
    if value is not None:
        read_bits(value)
    return value


def _checked_saliency(value: dict[str, float] | None) -> dict[str, float] | None:
    Saliency.of(value)
    return value


BitsSetting = Annotated[Any, AfterValidator(_checked_bits)]


class SurrogateSettings(Settings):
    """The gradient of rounding: a name (ste, fourier, dsq, dge), or {name: ..., and the numbers of that class}."""

    name: Literal["ste", "fourier", "dsq", "dge"]
    a: tuple[float, ...] | None = None
    alpha: float | None = None
    k: float | None = None
    clip: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> SurrogateSettings:
        self.build()
        return self

    def build(self) -> Surrogate:
        """The surrogate. Raises ConfigError for numbers it doesn't have or can't take."""
        own = {"ste": (), "fourier": ("a",), "dsq": ("alpha",), "dge": ("k", "clip")}[self.name]
        given = {key: value for key, value in self.model_dump(exclude={"name"}).items() if value is not None}
        other = [key for key in given if key not in own]
        if other:
            raise ValueError(f"'{other[0]}' is no number of '{self.name}'" + (f", which has {', '.join(own)}" if own else ""))
        made: Any = {"ste": STE, "fourier": Fourier, "dsq": DSQ, "dge": DGE}[self.name]
        found: Surrogate = made(**given)
        return found


class TargetSettings(Settings):
    """What the compact network may cost at most, see `geta.Budget`. latency: a table that `geta latency` wrote, for latency_ms."""

    bops: float | int | None = None
    macs: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    latency_ms: float | None = None
    latency: str | None = None
    bit_weight: float = 1.0

    @model_validator(mode="after")
    def _possible(self) -> TargetSettings:
        if self.latency is None:
            self.build()
        return self

    def build(self) -> Budget:
        """The budget. Raises ConfigError for impossible limits, CheckpointError when the table can't be read."""
        from geta.cost.latency import LatencyTable

        values = self.model_dump()
        table = None if self.latency is None else LatencyTable.load(self.latency)
        return Budget(**{**values, "latency": table})


class StageSettings(Settings):
    """Lengths of the stages, see `geta.Schedule`: whole numbers are steps, fractions shares of the run; null = the library's default."""

    warmup: int | float | None = Field(default=None, ge=0)
    projection: int | float | None = Field(default=None, ge=0)
    joint: int | float | None = Field(default=None, ge=0)
    projection_periods: int | None = Field(default=None, ge=1)
    joint_periods: int | None = Field(default=None, ge=1)
    initial_bits: int | None = None
    bit_step: float | None = Field(default=None, gt=0.0)

    def build(self, steps: int) -> Schedule:
        """The stage plan of a run of so many optimizer steps. Raises ConfigError when it doesn't fit."""
        return Schedule(total_steps=steps, **{key: value for key, value in self.model_dump().items() if value is not None})


class CompressSettings(Settings):
    """What is pruned and quantized, and how. Exactly one of `sparsity` and `target`; null bit widths leave numbers in floating point.

    method:      qasso prunes and quantizes; hesso and hesso-cric only prune. weight_bits, activation_bits: see `read_bits`.
    end_bits:    other widths for the first and last layers (`geta.end_layers`). results: `geta.quantize(results_of=)` as well.
    granularity: of scales, as in `geta.quantize`, "group" with group_size; prune_granularity: of groups, `geta.analyze(granularity=)`.
    saliency:    weight of every criterion; null = the library's. saliency_normalise, saliency_window: as in `geta.Saliency`.
    protect, prune, exact, depth: as in `geta.analyze`; layer_sparsity: share of the residual branches, see docs/depth.md.
    exclude, surrogate, nonlinear, initial_bits, percentile: as in `geta.quantize`.
    multiple_of, uniform, quant_lr, forgetting, tighten, follow: as in `geta.QASSO`. max_cycles ... probe_weight: as in `geta.HESSOCRIC`.
    calibration_batches: of training examples, for the ranges of activations.
    """

    method: Literal["qasso", "hesso", "hesso-cric"] = "qasso"
    sparsity: float | None = Field(default=None, ge=0.0, lt=1.0)
    target: TargetSettings | None = None
    weight_bits: BitsSetting = None
    activation_bits: BitsSetting = None
    end_bits: BitsSetting = None
    protect: tuple[str, ...] = ()
    prune: tuple[str, ...] | None = None
    prune_granularity: dict[str, str] | str | None = None
    exact: bool = True
    depth: bool = False
    layer_sparsity: float | None = Field(default=None, ge=0.0, lt=1.0)
    multiple_of: int | str = 1
    uniform: bool = False
    saliency: Annotated[dict[str, float] | None, AfterValidator(_checked_saliency)] = None
    saliency_normalise: Literal["global", "family"] = "global"
    saliency_window: int | None = Field(default=None, ge=1)
    schedule: StageSettings = StageSettings()
    exclude: tuple[str, ...] | None = None
    surrogate: SurrogateSettings = SurrogateSettings(name="ste")
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    group_size: int | None = None
    nonlinear: bool = False
    initial_bits: int = Field(default=16, ge=2, le=16)
    percentile: float = Field(default=99.9, gt=0.0, le=100.0)
    results: bool = False
    calibration_batches: int = Field(default=8, ge=1)
    quant_lr: float = Field(default=1e-3, ge=0.0)
    forgetting: Forgetting = "blend"
    tighten: bool = True
    follow: bool = True
    max_cycles: int = Field(default=3, ge=1)
    sampling_steps: int | None = Field(default=None, ge=1)
    tolerance: int = Field(default=0, ge=0)
    hybrid_steps: int | None = Field(default=None, ge=1)
    probe_weight: float = Field(default=0.0, ge=0.0)

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized."""
        return self.weight_bits is not None or self.activation_bits is not None

    @model_validator(mode="after")
    def _every_setting_counts(self) -> CompressSettings:
        if (self.sparsity is None) == (self.target is None):
            raise ValueError("give exactly one of sparsity (a share of the groups) and target (limits of costs)")
        if self.quantized and self.method != "qasso":
            raise ValueError(f"'{self.method}' only prunes: leave weight_bits and activation_bits out, or write method: qasso")
        if not self.quantized and self.sparsity == 0.0:
            raise ValueError("sparsity is 0 and no bit widths are given: nothing would become smaller")
        if self.results and self.activation_bits is None:
            raise ValueError("results has no effect without activation_bits: leave it out")
        idle = [key for key in _OF_QUANTIZERS if not self.quantized and self._changed(key)]
        if idle:
            raise ValueError(f"{', '.join(idle)} have no effect without weight_bits or activation_bits: leave them out")
        idle = [key for key in _OF_CRIC if self.method != "hesso-cric" and self._changed(key)]
        if idle:
            raise ValueError(f"{', '.join(idle)} have no effect on '{self.method}': leave them out, or write method: hesso-cric")
        if self.layer_sparsity is not None and not self.depth:
            raise ValueError("layer_sparsity has no effect without whole layers: write depth: true, or leave it out")
        self.criteria()
        return self

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def criteria(self) -> Saliency:
        """How groups are scored. Raises ConfigError for unknown criteria."""
        return Saliency(self.saliency, normalise=self.saliency_normalise, window=self.saliency_window)
