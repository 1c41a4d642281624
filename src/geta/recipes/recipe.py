"""A recipe: one whole job, from the data to the files of the compact network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from geta.recipes.compress_settings import CompressSettings
from geta.recipes.data import DataSettings
from geta.recipes.settings import Settings
from geta.recipes.tasks import TaskSettings
from geta.recipes.train_settings import TrainSettings

VERSION = 1


class Provenance(Settings):
    """Where the settings come from. published: the source's own numbers, with `note` where one isn't known."""

    source: str
    setting: str | None = None
    published: dict[str, Any] | None = None
    note: str | None = None


class ModelSettings(Settings):
    """The network.

    source:  `python.path:factory`, `timm:NAME`, or `hf:WHAT` with a configuration file, model type, folder or name on the hub.
    options: arguments of the factory or of `timm.create_model`; of hf: keys of the configuration, and `class` for the class's name.
    weights: a safetensors file to start from.
    """

    source: str = Field(pattern=r"^[^:\s]+:\S.*$")
    options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class OutputSettings(Settings):
    """What a run leaves behind, and where. checkpoint_every: in epochs. latency: whether to time both networks on the CPU at the end."""

    folder: str = Field(min_length=1)
    checkpoint_every: float = Field(default=1.0, gt=0.0)
    tensorboard: bool = False
    latency: bool = True


class Recipe(Settings):
    """All settings of a job. baseline: also train the dense network, from the same start with the same batches, for comparison."""

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    provenance: Provenance | None = None
    model: ModelSettings
    data: DataSettings
    task: TaskSettings
    train: TrainSettings
    compress: CompressSettings
    baseline: bool = True
    output: OutputSettings

    @model_validator(mode="after")
    def _teacher_exists(self) -> Recipe:
        if self.train.distill is not None and not self.baseline:
            raise ValueError("train.distill learns from the dense baseline: write baseline: true, or leave distill out")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default filled in."""
        return self.model_dump(mode="json")
