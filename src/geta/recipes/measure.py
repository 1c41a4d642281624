"""What a run measured: the record that becomes `result.json`, and the table that people see."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

import geta
from geta.cost import Cost
from geta.quant import FixedQuantizer, Quantizer
from geta.quant.blocks import expanded
from geta.quant.fixed_ops import effective_scale
from geta.quant.targets import INPUT_QUANTIZER, OUTPUT_QUANTIZER
from geta.recipes.evaluation import evaluate
from geta.recipes.prepare import EXAMPLES, Job
from geta.recipes.processes import Place
from geta.recipes.tasks.task import Call
from geta.report.files import folder_bytes
from geta.report.latency import interleaved
from geta.subnet import CompactModel
from geta.subnet.comparison import max_difference

_LATENCY_BATCHES, _LATENCY_SECONDS = (1, 64), 30.0
_COMPARED = 512
"""Test examples on which zeroed and compact network are compared, at most."""
_LIBRARIES = ("geta", "torch", "numpy", "scipy", "safetensors", "scikit-learn", "transformers", "timm", "datasets")


def measure(job: Job, compact: CompactModel, folder: Path, notes: list[str]) -> dict[str, Any]:
    """Measure both networks alike and return one record of plain data.

    All sizes are in bytes, costs are per example, latencies are milliseconds on this CPU. folder: where the compact network is saved.
    """
    dense_cost, compact_cost = job.cost, compact.cost
    metric, disk_bytes = job.task.metric, folder_bytes(folder)
    score = partial(evaluate, task=job.task, split=job.data.test, size=job.evaluation_batch, place=job.place)
    scores = {
        "dense": None if job.dense is None else score(job.dense.eval()),
        "compact": score(copy.deepcopy(compact).to(job.place.device)),
    }
    difference = None if scores["dense"] is None or scores["compact"] is None else scores["compact"] - scores["dense"]
    call = job.task.call(job.data.test.batch(range(min(len(job.data.test), _COMPARED))))
    saved = geta.load(folder)
    progress = job.optimizer.progress()
    return {
        "format": 1,
        "name": job.recipe.name,
        "task": job.task.name,
        "metric": {
            "name": metric.name,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            **scores,
            "difference": difference,
        },
        "params": {"dense": dense_cost.params, "compact": compact_cost.params},
        "macs": {"dense": dense_cost.macs / EXAMPLES, "compact": compact_cost.macs / EXAMPLES},
        "bops": {"dense": dense_cost.bops / EXAMPLES, "compact": compact_cost.bops / EXAMPLES},
        "bytes": {"dense_state_dict": job.state_bytes, "compact_weights": compact_cost.weight_bytes, "compact_folder": disk_bytes},
        "relative": compact_cost.relative_to(dense_cost)
        | {
            "weights_to_dense_state_dict": compact_cost.weight_bytes / job.state_bytes,
            "folder_to_dense_state_dict": disk_bytes / job.state_bytes,
        },
        "groups": {name: progress[name] for name in ("groups", "target_groups", "pruned_groups")},
        "notes": notes,
        "bits": dict(compact.bits),
        "kept": {family: len(indices) for family, indices in compact.kept.items()},
        "latency_ms": latencies(job, compact) if job.recipe.output.latency else {},
        "max_rel_difference": relative_difference(job.model, saved, call, torch.float64),
        "max_rel_difference_float32": relative_difference(job.model, saved, call, torch.float32),
        "reloaded_equal": _equal(saved, compact, call),
        "seconds": 0.0,  # the run knows
        "versions": versions(),
        "seed": job.recipe.train.seed,
    }


def versions() -> dict[str, str]:
    """Of Python, and of the libraries that are installed here."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@torch.no_grad()
def relative_difference(zeroed: nn.Module, compact: nn.Module, call: Call, dtype: torch.dtype) -> float:
    """Compare the network as trained, its removed groups zero, with the compact one: max|zeroed - compact| / max|zeroed|.

    call: inputs, on the CPU.
    dtype: float64 proves the construction. In float32 a sum taken in another order can move an activation across a rounding
           boundary, and then the outputs differ by what a whole quantization step makes of it.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, call)
    first = _converted(zeroed, dtype).eval()(*args, **kwargs)
    second = copy.deepcopy(compact).eval().to(dtype)(*args, **kwargs)
    return max_difference(pytree.tree_leaves(first), pytree.tree_leaves(second))[1]


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype that computes with the weight codes of this one.

    Quantized anew with more digits, a weight that lies on a rounding boundary would get another code: another network.
    """
    model = copy.deepcopy(model).to("cpu")
    for chain in [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]:
        for place, quantizer in enumerate(chain):
            if isinstance(quantizer, Quantizer | FixedQuantizer):
                d = quantizer.d if isinstance(quantizer, Quantizer) else effective_scale(quantizer.scale, quantizer.scale.dtype)
                d = expanded(d, chain.original.shape, quantizer.blocks) if quantizer.blocks else d
                chain.original = nn.Parameter(quantizer.codes(chain.original).to(dtype) * d.to(dtype))
                chain[place] = nn.Identity()  # removing the parametrization would take it from the copied model too
    return model.to(dtype)


@torch.no_grad()
def _equal(saved: nn.Module, compact: nn.Module, call: Call) -> bool:
    args, kwargs = call
    pair = [pytree.tree_leaves(model.eval()(*args, **kwargs)) for model in (saved, compact)]
    return all(torch.equal(a, b) for a, b in zip(*pair, strict=True) if isinstance(a, torch.Tensor))


def latencies(job: Job, compact: CompactModel) -> dict[str, Any]:
    """Milliseconds per call of both networks on this CPU, by batch size."""
    dense, place = job.float_network(), Place(torch.device("cpu"))
    found = {}
    for size in sorted({min(size, len(job.data.test)) for size in _LATENCY_BATCHES}):
        args, kwargs = place.move(job.task.call(job.data.test.batch(range(size))))
        models = {"dense": dense, "compact": compact}
        with torch.inference_mode():
            times = interleaved({name: partial(model, *args, **kwargs) for name, model in models.items()}, seconds=_LATENCY_SECONDS)
        found[str(size)] = {name: taken.to_json() for name, taken in times.items()}
    return found


@dataclass
class _Stored:
    """What one module stores."""

    params: int = 0
    bytes: int = 0


def costs_by_operation(job: Job, compact: CompactModel) -> dict[str, Any]:
    """`costs.json`: what every product costs per example, and what every module stores, in both networks.

    A module's parameters and bytes stand in its first row; modules that only store have a row with op "".
    """
    bits = compact.bits
    dense: dict[str, _Stored] = {}
    network = job.float_network()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        _add(dense, name, tensor, params=isinstance(tensor, nn.Parameter), width=8 * tensor.element_size())
    small: dict[str, _Stored] = {}
    for name, tensor in compact.tensors().items():
        weight = name.removesuffix("_codes")
        coded = weight != name and weight in bits
        of_quantizer = name.split(".")[-2:-1] in ([INPUT_QUANTIZER], [OUTPUT_QUANTIZER])
        own = name.rpartition(".")[0] if of_quantizer else name
        counted = coded or (isinstance(tensor, nn.Parameter) and not of_quantizer)
        _add(small, own, tensor, params=counted, width=bits[weight] if coded else 8 * tensor.element_size())
    return {"dense": {"operations": _operations(job.cost, dense)}, "compact": {"operations": _operations(compact.cost, small)}}


def _add(stored: dict[str, _Stored], name: str, tensor: torch.Tensor, *, params: bool, width: int) -> None:
    """Count a tensor for the module that it belongs to. width: bits of an element."""
    module = stored.setdefault(name.rpartition(".")[0], _Stored())
    module.params += tensor.numel() if params else 0
    module.bytes += math.ceil(tensor.numel() * width / 8)


def _operations(cost: Cost, stored: dict[str, _Stored]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in cost.per_op:
        here = stored.pop(row.name, _Stored())
        counts = {"macs": row.macs / EXAMPLES, "bops": row.bops / EXAMPLES, "params": here.params, "bytes": here.bytes}
        widths = {"weight_bits": row.weight_bits, "activation_bits": row.activation_bits}
        found.append({"name": row.name, "op": row.op, **counts, **widths})
    for name, here in stored.items():
        found.append({"name": name, "op": "", "macs": 0.0, "bops": 0.0, "params": here.params, "bytes": here.bytes})
    return found


def result_table(record: Mapping[str, Any]) -> Table:
    """Lay out the record as one table, dense against compact."""
    table = Table(title=f"{record['name']}: the dense network and the one that compressed itself", title_justify="left")
    table.add_column("")
    for heading in ("dense", "compact", "compact / dense"):
        table.add_column(heading, justify="right")

    def row(label: str, dense: float, compact: float, form: str = ",.0f") -> None:
        table.add_row(label, format(dense, form), format(compact, form), f"{compact / dense:.2%}" if dense else "")

    metric, size, groups = record["metric"], record["bytes"], record["groups"]
    unit = f" {metric['unit']}" if metric["unit"] else ""
    points = " points" if metric["unit"] == "%" else unit
    table.add_row(
        f"test {metric['name']}",
        "" if metric["dense"] is None else f"{metric['dense']:.2f}{unit}",
        f"{metric['compact']:.2f}{unit}",
        "" if metric["difference"] is None else f"{metric['difference']:+.2f}{points}",
    )
    for label, key in (("parameters", "params"), ("MACs per example", "macs"), ("BOPs per example", "bops")):
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
    if record["latency_ms"]:
        table.caption = (
            "Latency is that of PyTorch on this CPU, which has no kernels for such integer networks: the compact one computes in "
            "floats and emulates every quantizer."
        )
        table.caption_justify = "left"
    return table
