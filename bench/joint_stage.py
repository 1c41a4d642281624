"""Does accuracy survive the joint stage? ResNet-20 and a VGG7 on real digits, several seeds: `python -m bench.joint_stage`.

Every run trains the same network plainly and with QASSO: half of all groups, weights of 4 to 8 bits, without and with 8-bit
activations. Reported per run: accuracy of the dense network at the end and its lowest after the epochs of QASSO's warm-up, QASSO's
lowest after warm-up, the final one of the compact network, and its real relative BOPs. `--rules` compares ways of forgetting.

The lowest accuracies are there twice: with the running statistics of the normalizations, and with statistics of the training images made
anew at every epoch. With PyTorch's momentum of 0.1 running statistics are of the network ten steps ago, which can be far from the one they
are used with, so these runs have 0.5, the dense ones too; how far the network itself fell shows with those made anew. Results:
bench/results/joint_stage_<date>.md and one record per run in bench/results/joint_stage/, which a later call reuses (`--fresh` doesn't).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import geta
from bench.digits import Digits, accuracy, load_digits
from geta.optim import Forgetting
from geta.recipes.nets.resnet import resnet20
from geta.recipes.norms import set_momentum
from geta.report.files import prepare_folder

from .facts import RESULTS, machine, recorded, results_folder, spread, table, versions, written

RECORDS = RESULTS / "joint_stage"
BATCH = 64
CALIBRATION_BATCHES = 8
_HEADER = (
    "network",
    "quantized",
    "forgetting",
    "seed",
    "dense, %",
    "dense's lowest, %",
    "lowest, %",
    "lowest with new statistics, %",
    "compact, %",
    "loss, points",
    "BOPs, %",
    "weight bits",
)


def vgg7() -> nn.Module:
    """64-64-pool-128-128-pool-256-256-pool with BatchNorm, then a linear classifier, for one-channel 8x8 images."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in (64, 128, 256):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


NETWORKS = {"resnet20": resnet20, "vgg7": vgg7}


@dataclass(frozen=True)
class Setting:
    """One run. activations: bit width of the activations, None = not quantized. forgetting: None = the dense network."""

    network: str
    activations: int | None
    forgetting: Forgetting | None
    seed: int
    epochs: int = 60
    sparsity: float = 0.5
    learning_rate: float = 0.02
    quant_lr: float = 1e-4
    warmup: float = 0.15
    projection: float = 0.1
    joint: float = 0.35
    norm_momentum: float = 0.5

    @property
    def name(self) -> str:
        rates = f"{self.learning_rate:g}-{self.norm_momentum:g}"
        if self.forgetting is None:
            return f"{self.network}-dense-{self.epochs}-{rates}-{self.seed}"
        quantized = "w" if self.activations is None else f"wa{self.activations}"
        shares = f"{self.warmup:g}-{self.projection:g}-{self.joint:g}"
        return f"{self.network}-{quantized}-{self.forgetting}-{self.epochs}-{rates}-{shares}-{self.seed}"


def run(setting: Setting) -> dict[str, Any]:
    """Train one network; the record of what came out."""
    torch.set_num_threads(1)
    digits = load_digits()
    per_epoch = digits.steps_per_epoch(BATCH)
    steps = setting.epochs * per_epoch
    geta.seed_everything(setting.seed)
    model = NETWORKS[setting.network]()
    set_momentum(model, setting.norm_momentum)
    example = (digits.train_images[:2],)
    graph, optimizer = None, None
    if setting.forgetting is not None:
        graph = geta.analyze(model, example)
        prepare(model, setting, digits)
    base = torch.optim.SGD(model.parameters(), lr=setting.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    if graph is not None and setting.forgetting is not None:
        optimizer = geta.QASSO(
            base,
            graph,
            sparsity=setting.sparsity,
            schedule=geta.Schedule(steps, warmup=setting.warmup, projection=setting.projection, joint=setting.joint),
            saliency={"taylor_first": 1.0, "average_magnitude": 0.2},
            quant_lr=setting.quant_lr,
            forgetting=setting.forgetting,
        )
    used = base if optimizer is None else optimizer
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(used, steps)
    accuracies, anew = [], []
    for step, (images, labels) in enumerate(islice(digits.batches(BATCH, setting.seed), steps)):
        used.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        used.step()
        scheduler.step()
        if (step + 1) % per_epoch == 0:
            accuracies.append(accuracy(model, digits))
            if optimizer is not None:
                anew.append(accuracy(with_new_statistics(model, digits), digits))
    record = {"name": setting.name, "accuracies": accuracies, "final": accuracies[-1]}
    if graph is None or optimizer is None:
        return record
    optimizer.check()
    small = geta.compact(model.eval(), graph)
    first = math.ceil(optimizer.schedule.warmup_steps / per_epoch)
    return record | {
        "first": first,
        "lowest": min(accuracies[first:]),
        "lowest anew": min(anew[first:]),
        "compact": accuracy(small, digits),
        "bops": small.cost.relative_to(geta.cost(NETWORKS[setting.network](), example))["bops"],
        "bits": Counter(str(int(bits)) for name, bits in small.bits.items() if ":" not in name),
        "groups": optimizer.progress()["pruned_groups"],
        "notes": optimizer.notes,
    }


def with_new_statistics(model: nn.Module, digits: Digits) -> nn.Module:
    """A copy whose normalizations have the statistics of the training images for the weights as they are now."""
    same = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(list(digits.train_images.split(BATCH)), same)
    return same


def prepare(model: nn.Module, setting: Setting, digits: Digits) -> None:
    """Quantize; activation ranges from real images and running statistics that have seen some."""

    def batches() -> list[torch.Tensor]:
        return [images for images, _ in islice(digits.batches(BATCH, setting.seed), CALIBRATION_BATCHES)]

    if setting.activations is None:
        geta.quantize(model, weights=geta.Bits(4, 8), activations=None, exclude=())
        return
    torch.optim.swa_utils.update_bn(batches(), model)
    bits = geta.Bits(setting.activations, setting.activations)
    geta.quantize(model, weights=geta.Bits(4, 8), activations=bits, calibration=batches(), exclude=())


def settings(networks: Sequence[str], rules: Sequence[Forgetting], seeds: int, **others: Any) -> list[Setting]:
    """The dense runs first, then every combination."""
    dense = [Setting(network, None, None, seed, **others) for network, seed in itertools.product(networks, range(seeds))]
    kinds = itertools.product(networks, (None, 8), rules, range(seeds))
    return dense + [Setting(network, activations, rule, seed, **others) for network, activations, rule, seed in kinds]


def record(setting: Setting, folder: Path, *, fresh: bool) -> dict[str, Any]:
    """The record of a run, from its file if it is there."""
    return recorded(folder / f"{setting.name}.json", lambda: run(setting), fresh=fresh)


def render(chosen: Sequence[Setting], records: dict[str, dict[str, Any]]) -> list[str]:
    """The table of all runs, then mean +- standard deviation over the seeds."""
    rows: list[list[str]] = []
    groups: dict[tuple[str, str, str], list[tuple[float, ...]]] = {}
    for setting in chosen:
        if setting.forgetting is None:
            continue
        found = records[setting.name]
        plain = records[replace(setting, activations=None, forgetting=None).name]
        dense = plain["final"]
        kind = "weights" if setting.activations is None else f"weights, {setting.activations}-bit activations"
        numbers = (
            dense,
            min(plain["accuracies"][found["first"] :]),
            found["lowest"],
            found["lowest anew"],
            found["compact"],
            dense - found["compact"],
            100 * found["bops"],
        )
        groups.setdefault((setting.network, kind, str(setting.forgetting)), []).append(numbers)
        bits = ", ".join(f"{count} x {bits}" for bits, count in sorted(found["bits"].items(), key=lambda item: int(item[0])))
        rows.append([setting.network, kind, str(setting.forgetting), str(setting.seed), *(f"{n:.2f}" for n in numbers), bits])
    means = [[*key, str(len(found)), *(spread(column) for column in zip(*found, strict=True)), ""] for key, found in groups.items()]
    return [*table(_HEADER, means, left=(0, 1, 2)), "", "Single runs:", "", *table(_HEADER, rows, left=(0, 1, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--rules", nargs="+", default=["blend", "descent", "uniform", "cosine"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Setting.epochs)
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate)
    parser.add_argument("--norm-momentum", type=float, default=Setting.norm_momentum)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    protocol = {name: getattr(options, name) for name in ("epochs", "learning_rate", "norm_momentum")}
    chosen = settings(options.networks, options.rules, options.seeds, **protocol)
    folder = options.out / "joint_stage"
    prepare_folder(folder)
    records: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = {setting.name: pool.submit(record, setting, folder, fresh=options.fresh) for setting in chosen}
        for count, (name, future) in enumerate(waiting.items(), start=1):
            records[name] = future.result()
            print(f"{count}/{len(waiting)}  {name}  {records[name].get('compact', records[name]['final']):.2f} %", flush=True)
    shares = f"warm-up {Setting.warmup:.0%}, projection {Setting.projection:.0%} and joint stage {Setting.joint:.0%} of the steps"
    rate = f"SGD with a cosine learning rate from {options.learning_rate:g}"
    norms = f"running statistics with momentum {options.norm_momentum:g}"
    how = f"{options.epochs} epochs, batch {BATCH}, {rate}; {norms}; {shares}"
    facts = f"{versions('torch', 'geta')}; {machine()}; {how}."
    lines = ["# The joint stage on digits", "", facts, "", "Mean ± standard deviation over the seeds:", "", *render(chosen, records)]
    written("joint_stage", lines, options.out)


if __name__ == "__main__":
    main()
