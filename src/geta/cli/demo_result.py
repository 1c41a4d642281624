"""What the demo measured: the record that becomes `result.json`, and the table that people see."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

import geta
from geta.cli.demo_data import Digits
from geta.cli.demo_run import Trained, accuracy, example_input
from geta.cli.demo_settings import DemoSettings
from geta.quant import Quantizer
from geta.report.files import folder_bytes
from geta.report.latency import Latency, inference_latency

_LATENCY_BATCHES = (1, 64)


def measure(trained: Trained, settings: DemoSettings, digits: Digits, seconds: float) -> dict[str, Any]:
    """Measure both networks alike and return one record of plain data.

    All sizes are in bytes, costs are per image, accuracies are percentages of the test images, latencies are milliseconds.
    """
    dense, compact = trained.dense.eval(), trained.compact.eval()
    example = example_input(digits)
    dense_cost, compact_cost = geta.cost(dense, example), compact.cost
    images = len(example[0])
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in dense.state_dict().values())
    disk_bytes = folder_bytes(settings.out / "compact")
    accuracies = {"dense": accuracy(dense, digits), "compact": accuracy(compact, digits)}
    return {
        "settings": settings.model_dump(mode="json"),
        "accuracy": accuracies | {"difference": accuracies["compact"] - accuracies["dense"]},
        "params": {"dense": dense_cost.params, "compact": compact_cost.params},
        "macs": {"dense": dense_cost.macs / images, "compact": compact_cost.macs / images},
        "bops": {"dense": dense_cost.bops / images, "compact": compact_cost.bops / images},
        "bytes": {"dense_state_dict": dense_bytes, "compact_weights": compact_cost.weight_bytes, "compact_folder": disk_bytes},
        "relative": compact_cost.relative_to(dense_cost)
        | {"weights_to_dense_state_dict": compact_cost.weight_bytes / dense_bytes, "folder_to_dense_state_dict": disk_bytes / dense_bytes},
        "groups": {name: trained.progress[name] for name in ("groups", "target_groups", "pruned_groups")},
        "notes": trained.notes,
        "bits": dict(compact.bits),
        "kept": {family: len(indices) for family, indices in compact.kept.items()},
        "latency_ms": {str(batch): _latency(trained, digits.test_images[:batch]) for batch in _LATENCY_BATCHES},
        "max_rel_difference": relative_difference(trained.zeroed, settings.out / "compact", digits.test_images, torch.float64),
        "max_rel_difference_float32": relative_difference(trained.zeroed, settings.out / "compact", digits.test_images, torch.float32),
        "reloaded_equal": _reloads_equal(settings, compact, digits.test_images),
        "seconds": seconds,
        "versions": {name: version(name) for name in ("geta", "torch", "numpy", "scipy", "safetensors", "scikit-learn")}
        | {"python": platform.python_version()},
    }


@torch.no_grad()
def relative_difference(zeroed: nn.Module, saved: Path, images: torch.Tensor, dtype: torch.dtype) -> float:
    """Compare the network as trained, its removed groups zero, with the compact one: max|zeroed - compact| / max|zeroed|.

    saved: the folder of the compact network.
    dtype: float64 proves the construction. In float32 a sum taken in another order can move an activation across a rounding
           boundary, and then the outputs differ by what a whole quantization step makes of it.
    """
    first = _converted(zeroed, dtype).eval()(images.to(dtype))
    second = geta.load(saved).eval().to(dtype)(images.to(dtype))
    return float((first - second).abs().max() / first.abs().max())


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype that computes with the weight codes of this one.

    Quantized anew with more digits, a weight that lies on a rounding boundary would get another code: another network.
    """
    model = copy.deepcopy(model)
    for chain in [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]:
        for place, quantizer in enumerate(chain):
            if isinstance(quantizer, Quantizer):
                chain.original = nn.Parameter(quantizer.codes(chain.original).to(dtype) * quantizer.d.to(dtype))
                chain[place] = nn.Identity()  # removing the parametrization would take it from the copied model too
    return model.to(dtype)


def _latency(trained: Trained, images: torch.Tensor) -> dict[str, dict[str, float]]:
    times: Mapping[str, Latency] = inference_latency({"dense": trained.dense, "compact": trained.compact}, images)
    return {name: time.to_json() for name, time in times.items()}


@torch.no_grad()
def _reloads_equal(settings: DemoSettings, compact: nn.Module, images: torch.Tensor) -> bool:
    return torch.equal(geta.load(settings.out / "compact").eval()(images), compact(images))


def result_table(record: Mapping[str, Any]) -> Table:
    """Lay out the record as one table, dense against compact."""
    table = Table(title="Handwritten digits: the dense network and the one that compressed itself", title_justify="left")
    table.add_column("")
    for heading in ("dense", "compact", "compact / dense"):
        table.add_column(heading, justify="right")

    def row(label: str, dense: float, compact: float, form: str = ",.0f") -> None:
        table.add_row(label, format(dense, form), format(compact, form), f"{compact / dense:.2%}")

    accuracies, size, groups = record["accuracy"], record["bytes"], record["groups"]
    table.add_row(
        "test accuracy", f"{accuracies['dense']:.2f} %", f"{accuracies['compact']:.2f} %", f"{accuracies['difference']:+.2f} points"
    )
    for label, key in (("parameters", "params"), ("MACs per image", "macs"), ("BOPs per image", "bops")):
        row(label, record[key]["dense"], record[key]["compact"])
    row("weights, bytes", size["dense_state_dict"], size["compact_weights"])
    row("on disk, bytes", size["dense_state_dict"], size["compact_folder"])
    for batch, times in record["latency_ms"].items():
        row(f"CPU latency, batch {batch}, ms", times["dense"]["median"], times["compact"]["median"], ".2f")
    widths = [width for name, width in record["bits"].items() if ":" not in name]
    table.add_section()
    table.add_row("groups removed", f"0 of {groups['groups']}", f"{groups['pruned_groups']}", f"{groups['target_groups']} wanted")
    if widths:
        table.add_row("weight bits", "32", f"{min(widths)} to {max(widths)}", f"mean {sum(widths) / len(widths):.2f}")
    table.add_row("max |zeroed - compact|", "", f"{record['max_rel_difference']:.1e}", "relative, float64")
    table.caption = (
        "Latency is that of PyTorch in one thread of this CPU. It has no kernels for such integer networks: the compact one computes "
        "in floats and emulates every quantizer."
    )
    table.caption_justify = "left"
    return table
