"""Is a group important when it points along its gradient, `1 + cos(x_g, grad_g)`, or against it, `1 - cos(x_g, grad_g)`?

Small networks are trained on scikit-learn's handwritten digits, pruned at one snapshot by several criteria, and fine-tuned with the
removed groups kept at zero. Each criterion sees the same network, direction, sparsity and fine-tuning batches, so that differences are
paired. Two directions grad_g are tried: minus the step of the base optimizer (Adam), which is what the optimizers of geta look at, and
the plain gradient over the whole training set.

Run it with `python -m bench.saliency_cosine`; it writes bench/results/saliency_cosine_<date>.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geta
from bench.digits import Digits, load_digits
from bench.facts import RESULTS, dated, machine, results_folder, spread, table, versions
from geta.optim import CRITERIA, GroupIndex, GroupStatistics, Saliency
from geta.optim.saliency import DEFAULT_WEIGHTS, Criterion, group_statistics
from geta.optim.selection import Selector
from geta.report.files import write_atomically

BATCH = 64
RATE = 2e-3


def one_plus_cosine(groups: GroupStatistics) -> Tensor:
    """1 + cos(x_g, grad_g)."""
    return 2.0 - CRITERIA["cosine"](groups)


def noise(groups: GroupStatistics) -> Tensor:
    """No criterion at all: the same random numbers for every network of this size."""
    return torch.rand(groups.norm.shape, generator=torch.Generator().manual_seed(0), dtype=groups.norm.dtype)


def _five(cosine: Criterion) -> list[tuple[str | Criterion, float]]:
    """The default sum with another cosine term."""
    others: list[tuple[str | Criterion, float]] = [(name, weight) for name, weight in DEFAULT_WEIGHTS.items() if name != "cosine"]
    return [*others, (cosine, DEFAULT_WEIGHTS["cosine"])]


MINUS, PLUS = "1 - cos", "1 + cos"
PAIRS = ((MINUS, PLUS), (f"five with {MINUS}", f"five with {PLUS}"))
SALIENCIES: Mapping[str, Saliency] = {
    MINUS: Saliency("cosine"),
    PLUS: Saliency(one_plus_cosine),
    f"five with {MINUS}": Saliency(_five(CRITERIA["cosine"])),
    f"five with {PLUS}": Saliency(_five(one_plus_cosine)),
    "magnitude": Saliency("magnitude"),
    "random": Saliency(noise),
}


def mlp() -> nn.Module:
    """64-64-32-10: two families."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def conv_net() -> nn.Module:
    """Two convolutions of 12 and 24 channels and one linear layer after pooling: two families."""
    convolutions = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))


NETS: Mapping[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv net": conv_net}
DIRECTIONS = ("Adam's step", "full gradient")


class Key(NamedTuple):
    """What a number belongs to; runs of all seeds share a key."""

    net: str
    direction: str
    sparsity: float
    saliency: str


@dataclass(frozen=True)
class Accuracies:
    """Test accuracy in percent: of the dense network, right after pruning, after fine-tuning."""

    dense: float
    pruned: float
    tuned: float


def accuracy(model: nn.Module, data: Digits) -> float:
    """Percent of the test images recognised."""
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).double().mean()) * 100.0


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, steps: int, after: Callable[[], object] = lambda: None) -> None:
    """Train on random batches, the same ones for the same number of steps."""
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        optimizer.step()
        after()


def statistics_of(model: nn.Module, adam: torch.optim.Adam, index: GroupIndex, data: Digits, direction: str) -> GroupStatistics:
    """The groups of the model as it is; it is left unchanged."""
    before = [entry.tensor.detach().clone() for entry in index.parameters]
    adam.zero_grad()
    if direction == "full gradient":
        F.cross_entropy(model(data.train_images), data.train_labels).backward()
        after = [
            x - (torch.zeros_like(x) if (grad := entry.tensor.grad) is None else grad)
            for x, entry in zip(before, index.parameters, strict=True)
        ]
        return group_statistics(index, before, after)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(adam.state_dict())
    fit(model, adam, data, 1)
    found = group_statistics(index, before, [entry.tensor.detach().clone() for entry in index.parameters])
    model.load_state_dict(weights)
    adam.load_state_dict(state)
    return found


def prune_and_tune(
    model: nn.Module, removed: Mapping[str, Tensor], graph: geta.DependencyGraph, data: Digits, steps: int
) -> tuple[float, float]:
    """Accuracy right after zeroing the removed groups of a copy, and after fine-tuning it with them kept at zero."""
    twin = copy.deepcopy(model)
    graph.zero_(twin, removed)
    pruned = accuracy(twin, data)
    fit(twin, torch.optim.Adam(twin.parameters(), lr=RATE), data, steps, lambda: graph.zero_(twin, removed))
    return pruned, accuracy(twin, data)


def measure(net: str, seed: int, sparsities: Sequence[float], data: Digits, steps: int) -> dict[Key, Accuracies]:
    """All criteria on one network trained for `steps` steps and fine-tuned for half as many."""
    geta.seed_everything(seed)
    model = NETS[net]()
    graph = geta.analyze(model, (data.train_images[:2],))
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    fit(model, adam, data, steps)
    index, dense = GroupIndex(graph), accuracy(model, data)
    found: dict[Key, Accuracies] = {}
    for direction in DIRECTIONS:
        stats = statistics_of(model, adam, index, data, direction)
        for sparsity in sparsities:
            selector = Selector(index.sizes, int(sparsity * index.num_groups))
            for name, saliency in SALIENCIES.items():
                scores = saliency.score(stats).double().numpy()
                marked = selector.mark(scores, np.zeros(index.num_groups, dtype=bool), selector.target)
                pruned, tuned = prune_and_tune(model, index.selection(torch.from_numpy(marked)), graph, data, steps // 2)
                found[Key(net, direction, sparsity, name)] = Accuracies(dense, pruned, tuned)
    return found


def render(runs: Sequence[Mapping[Key, Accuracies]], facts: Sequence[str]) -> str:
    """The whole report; `runs` hold the same keys for different seeds or different nets."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    values = {key: [run[key] for run in runs if key in run] for key in keys}
    rows = [
        [
            *(key.net, key.direction, f"{key.sparsity:.0%}", key.saliency),
            *(spread([getattr(one, part) for one in values[key]]) for part in ("dense", "pruned", "tuned")),
        ]
        for key in keys
    ]
    header = ("net", "direction", "removed", "criterion", "dense", "right after pruning", "fine-tuned")
    return "\n".join(
        ["# The cosine criterion: 1 - cos against 1 + cos", "", *facts, "", *_paired(values), "", *table(header, rows, left=(0, 1, 3)), ""]
    )


def _paired(values: Mapping[Key, Sequence[Accuracies]]) -> list[str]:
    """Differences of the two signs, over all seeds and sparsities of a net and direction."""
    rows = []
    for net, direction in dict.fromkeys((key.net, key.direction) for key in values):
        for minus, plus in PAIRS:
            pairs = [
                pair
                for key, ours in values.items()
                if key[:2] == (net, direction) and key.saliency == minus
                for pair in zip(ours, values[key._replace(saliency=plus)], strict=True)
            ]
            cells = [net, direction, f"{minus}, less {plus}"]
            for part in ("pruned", "tuned"):
                gaps = [getattr(one, part) - getattr(other, part) for one, other in pairs]
                cells += [spread(gaps), f"{sum(gap > 0 for gap in gaps)} : {sum(gap < 0 for gap in gaps)}"]
            rows.append(cells)
    header = ("net", "direction", "difference in points", "right after pruning", "won : lost", "fine-tuned", "won : lost")
    return table(header, rows, left=(0, 1, 2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240, help="training steps; fine-tuning takes half as many")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the report")
    options = parser.parse_args(arguments)
    data = load_digits()
    runs = []
    for net in NETS:
        for seed in range(options.seeds):
            runs.append(measure(net, seed, options.sparsities, data, options.steps))
            print(f"{net}, seed {seed}: dense {next(iter(runs[-1].values())).dense:.2f} %", flush=True)
    facts = [
        f"Test accuracy in percent on scikit-learn's digits ({len(data.train_labels)} training, {len(data.test_labels)} test images), "
        f"mean ± standard deviation over {options.seeds} seeds. {options.steps} steps of Adam, pruned at once, "
        f"{options.steps // 2} steps of fine-tuning.",
        f"In the differences each pair shares net, seed, sparsity and batches; positive means that {MINUS} is better.",
        f"Measured on {machine()}; {versions('torch', 'scikit-learn', 'geta')}.",
    ]
    path = dated("saliency_cosine", folder=options.out)
    write_atomically(path, render(runs, facts).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
