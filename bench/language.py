"""A Llama of 4.9 million parameters on Python's own text, pruned and quantized while it trains: `python -m bench.language`.

Byte by byte, grouped-query attention, on the modules and documentation of the standard library; every tenth file is held out. Half and
30 % of all groups go, weights get 4 or 8 bits (QASSO); at 2 and 3 bits nothing is removed and gradients of the rounding are compared
(LSQ with the straight-through estimator and with StableQAT's surrogate). All runs have the same steps, batches and learning rate.

Reported: perplexity per byte on held-out text, whether the compact model writes the tokens that the zeroed one writes, bytes on disk, and
tokens per second of a forward pass in PyTorch, dense and compact in turn. Activations stay floats, as they mostly do in language models.
Results: bench/results/language_<date>.md, and a record per run in bench/results/language/, which a later call reuses.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geta
from geta.integrations.evaluate import perplexity
from geta.quant.surrogate import Surrogate
from geta.report.files import folder_bytes, prepare_folder

from .facts import RESULTS, machine, recorded, results_folder, spread, table, versions, written

_HELD_OUT = 32_768
_PROMPTS, _WRITTEN, _ROUNDS = 4, 48, 15
_SURROGATES: dict[str, Surrogate] = {"STE": geta.STE(), "StableQAT": geta.Fourier((0.21,))}


@dataclass(frozen=True)
class Case:
    """sparsity: share of the groups that goes; bits: of the weights, None = floats; surrogate: of fixed bits, "" = QASSO learns them."""

    sparsity: float = 0.0
    bits: int | None = None
    surrogate: str = ""

    @property
    def name(self) -> str:
        if self.bits is None:
            return "dense"
        return f"{self.bits} bits, {self.surrogate}" if self.surrogate else f"{self.sparsity:.0%} removed, {self.bits} bits"


CASES = (
    Case(),
    *(Case(sparsity, bits) for sparsity in (0.3, 0.5) for bits in (8, 4)),
    *(Case(0.0, bits, surrogate) for bits in (3, 2) for surrogate in _SURROGATES),
)


@dataclass(frozen=True)
class Size:
    """Of the network and its training; the tests use smaller ones."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    inner: int = 768
    context: int = 128
    batch: int = 8
    steps: int = 600
    rate: float = 1e-3
    held_out: int = _HELD_OUT

    def build(self) -> Any:
        """A new network; kv-groups of two query heads."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=2 * self.context,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules and its documentation, in order of their paths: to train on, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for place, path in enumerate(paths):
        parts[place % 10 == 9].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(parts[held])), dtype=torch.uint8).long() for held in (False, True))
    return train, held_out


def run(case: Case, seed: int, size: Size) -> dict[str, Any]:
    """Train one network and look at what comes out."""
    torch.set_num_threads(1)
    text, held_out = corpus()
    geta.seed_everything(seed)
    model = size.build()
    example = {"input_ids": text[: 2 * size.context].view(2, -1)}
    graph = geta.analyze(model, kwargs=example)
    if case.bits is not None:
        weights: Any = geta.FixedBits(case.bits) if case.surrogate else geta.Bits(case.bits, case.bits)
        surrogate = _SURROGATES[case.surrogate or "STE"]
        geta.quantize(model, weights=weights, activations=None, granularity="channel", surrogate=surrogate, exclude=())
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=size.rate)
    if case.bits is not None and not case.surrogate:
        optimizer = geta.QASSO(optimizer, graph, sparsity=case.sparsity, schedule=size.steps)
    train(model, optimizer, text, seed, size)
    model.eval()
    small = geta.compact(model, graph)
    return {
        "perplexity": perplexity(small, held_out[: size.held_out], window=size.context, stride=size.context // 2, batch_size=16),
        "same tokens": bool(torch.equal(writes(model, text), writes(_eager(model, graph), text))),
        **disk(small),
        **speed(small, size),
        "notes": list(getattr(optimizer, "notes", ())),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, seed: int, size: Size) -> None:
    """Random windows, gradients clipped to 1, a tenth of warm-up and then a cosine."""
    model.train()
    warm = max(1, size.steps // 10)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, size.steps - warm))
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [warm])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(size.steps):
        starts = torch.randint(len(text) - size.context, (size.batch,), generator=generator)
        rows = text[starts[:, None] + torch.arange(size.context)]
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def _eager(model: Any, graph: geta.DependencyGraph) -> Any:
    """The cut model of the network's own class, which can write with a cache."""
    return geta.compact_eager(model, graph).model


def writes(model: Any, text: Tensor) -> Tensor:
    """What the network goes on with after some prompts, always the likeliest byte."""
    prompts = text[: _PROMPTS * 16].view(_PROMPTS, 16)
    with torch.no_grad():
        found: Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=_WRITTEN)
    return found


def disk(small: geta.CompactModel) -> dict[str, int]:
    """Bytes of the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "model")
        return {"bytes": folder_bytes(Path(folder) / "model")}


@torch.no_grad()
def speed(small: geta.CompactModel, size: Size) -> dict[str, float]:
    """Tokens per second of a forward pass of one window, dense and compact in turn; medians."""
    dense, ids = size.build().eval(), torch.zeros(1, size.context, dtype=torch.long)
    calls: dict[str, Callable[[], Any]] = {
        "dense tokens/s": lambda: dense(input_ids=ids, use_cache=False),
        "tokens/s": lambda: small(input_ids=ids),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: size.context / statistics.median(found[2:]) for name, found in times.items()}


def render(records: Mapping[Case, Sequence[dict[str, Any]]]) -> list[str]:
    """A row per case: means and deviations over the seeds."""
    rows = []
    for case, found in records.items():
        ratio = [one["tokens/s"] / one["dense tokens/s"] for one in found]
        same = sum(one["same tokens"] for one in found)
        size = [one["bytes"] / 1e6 for one in found]
        columns = [spread([one["perplexity"] for one in found]), spread(size), spread(ratio), f"{same} of {len(found)}"]
        rows.append([case.name, *columns])
    header = ("network", "perplexity per byte", "MB on disk", "tokens/s, times dense", "writes what the zeroed network writes")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    folder = options.out / "language"
    prepare_folder(folder)
    size = Size(steps=options.steps)
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = {case: [pool.submit(record, case, seed, size, folder) for seed in range(options.seeds)] for case in CASES}
        records = {case: [future.result() for future in futures] for case, futures in waiting.items()}
    parameters = sum(p.numel() for p in size.build().parameters())
    facts = f"{versions('torch', 'transformers', 'geta')}; {machine()}, a thread per run."
    what = f"{parameters:,} parameters; {size.steps} steps of {size.batch} x {size.context} bytes, {options.seeds} seeds, mean ± deviation."
    written("language", ["# A language model on Python's own text", "", facts, what, "", *render(records)], options.out)


def record(case: Case, seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """The record of a run, from its file if it is there."""
    name = case.name.replace("%", "").replace(", ", "-").replace(" ", "-")
    return recorded(folder / f"{name}-{size.steps}-{seed}.json", lambda: run(case, seed, size))


if __name__ == "__main__":
    main()
