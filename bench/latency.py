"""Are compact networks faster where they run? Half of the groups removed, 8-bit weights and activations: `python -m bench.latency`.

ResNet-18 and -50, MobileNetV2, a small ViT, BERT-base, a Llama of 100 million parameters and the demo's network, all with random weights,
which speed doesn't depend on. Per network and batch size, in one process and in turn: PyTorch on the dense network and on the pruned one
in floating point; ONNX Runtime on the dense network in floating point, the quantized network with nothing removed, and the pruned and
quantized one. A ratio is one of medians. Size on disk is compared with the sum of bits: every weight at its width, everything else in its
dtype.
Results: bench/results/latency_<date>.md, and a record per network in bench/results/latency/, which a later call reuses (`--fresh` doesn't).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geta
from geta.quant import quantizers
from geta.report.files import folder_bytes, prepare_folder
from geta.report.runtimes import has_dot_products, measure

from .facts import RESULTS, machine, recorded, results_folder, table, versions, written

SPARSITY, BITS, PROFILE = 0.5, 8, "cpu"
_SEED = 0
_DENSE, _PRUNED, _WHOLE, _BOTH = "dense", "pruned", "quantized", "compact"
_COLUMNS = (
    (_DENSE, "PyTorch"),
    (_PRUNED, "PyTorch"),
    (_DENSE, "ONNX Runtime, floats"),
    (_WHOLE, "ONNX Runtime, integers"),
    (_BOTH, "ONNX Runtime, integers"),
)
_HEADER = (
    "network",
    "batch",
    *(f"{side}, {runtime}, ms" for side, runtime in _COLUMNS),
    "PyTorch: pruned, times faster",
    "ONNX Runtime: compact, times faster",
    "than quantized alone",
    "bytes / sum of bits",
    "MACs kept",
    "in floats",
)


@dataclass(frozen=True)
class Net:
    """A network of the table. build: makes it. inputs: keyword arguments of a call with so many rows."""

    name: str
    words: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


def _images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))}


def _ids(length: int, vocabulary: int) -> Callable[[int], dict[str, Tensor]]:
    def ids(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))}

    return ids


class _Logits(nn.Module):
    """A model of transformers that gives its logits alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs, **self.options).logits
        return logits


def _resnet(depths: Sequence[int], *, bottleneck: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512]
    kind = "bottleneck" if bottleneck else "basic"
    config = ResNetConfig(embedding_size=64, hidden_sizes=widths, depths=list(depths), layer_type=kind)
    return _Logits(ResNetForImageClassification(config))


def _demo() -> nn.Module:
    from geta.recipes.nets.resnet import resnet20

    return resnet20()


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return _Logits(MobileNetV2ForImageClassification(MobileNetV2Config()))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    return _Logits(ViTForImageClassification(config))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _Logits(BertForSequenceClassification(BertConfig()))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        use_cache=False,
    )
    return _Logits(LlamaForCausalLM(config), use_cache=False)


NETS = (
    Net("resnet18", "ResNet-18, 224 x 224", lambda: _resnet((2, 2, 2, 2), bottleneck=False), _images),
    Net("resnet50", "ResNet-50, 224 x 224", lambda: _resnet((3, 4, 6, 3), bottleneck=True), _images),
    Net("mobilenet_v2", "MobileNetV2, 224 x 224", _mobilenet, _images),
    Net("vit_small", "ViT-small, 224 x 224", _vit, _images),
    Net("bert_base", "BERT-base, 128 tokens", _bert, _ids(128, 30522)),
    Net("demo", "ResNet-20, 8 x 8, the demo's", _demo, lambda batch: {"x": torch.rand(batch, 1, 8, 8)}),
    Net("llama_100m", "Llama of 98 M parameters, 128 tokens", _llama, _ids(128, 8192)),
)


def run(net: Net, batches: Sequence[int], threads: int, rounds: int) -> dict[str, Any]:
    """Compress one network three ways and time all of them."""
    torch.set_num_threads(threads)
    torch.manual_seed(_SEED)
    dense = net.build().eval()
    inputs = net.inputs(2)
    pruned, _, kept = _compact(dense, inputs, SPARSITY, quantized=False)
    both, sizes, _ = _compact(dense, inputs, SPARSITY, quantized=True)
    whole, _, _ = _compact(dense, inputs, 0.0, quantized=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            both,
            dense,
            folder=Path(folder),
            kwargs=inputs,
            batches=batches,
            threads=threads,
            rounds=rounds,
            runtimes=("eager", "onnx"),
            others={_PRUNED: pruned, _WHOLE: whole},
        )
        report = both.export_onnx(Path(folder) / "again.onnx")
    return {**found.to_json(), "sizes": sizes, "macs": kept, "integer": len(report.integer), "floating": report.floating}


def analysed(model: nn.Module, inputs: Mapping[str, Tensor], *, quantized: bool) -> geta.DependencyGraph:
    """The graph of a model, which gets quantizers of the bench's bits where they are wanted."""
    graph = geta.analyze(model, kwargs=inputs)
    if quantized:
        bits = geta.Bits(BITS, BITS)
        geta.quantize(model, weights=bits, activations=bits, calibration=[dict(inputs)], exclude=(), results_of=graph)
        for quantizer in quantizers(model).values():
            quantizer.round_bits_()
    return graph


def _compact(
    dense: nn.Module, inputs: Mapping[str, Tensor], sparsity: float, *, quantized: bool
) -> tuple[geta.CompactModel, dict[str, int], float]:
    """The compact model, (bytes on disk, sum of bits in bytes), the share of the MACs that is left."""
    model = copy.deepcopy(dense)
    graph = analysed(model, inputs, quantized=quantized)
    selection = graph.random_selection(sparsity, seed=_SEED, multiple_of=PROFILE)
    graph.zero_(model, selection)
    small = geta.compact(model, graph, selection).eval()
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "model")
        disk = folder_bytes(Path(folder) / "model")
    tensors = small.tensors()
    widths = {f"{name}_codes": width for name, width in small.bits.items()}
    bits_sum = sum(tensor.numel() * widths.get(name, 8 * tensor.element_size()) for name, tensor in tensors.items())
    share = small.cost.relative_to(geta.cost(dense, kwargs=inputs))["macs"]
    return small, {"disk": disk, "bits": bits_sum // 8}, share


def render(net: Net, record: Mapping[str, Any]) -> list[list[str]]:
    """A row per batch size."""
    rows = []
    for batch, times in record["latency_ms"].items():
        ms = [times[f"{side}, {runtime}"]["median"] for side, runtime in _COLUMNS]
        eager, pruned, floats, whole, both = ms
        size = record["sizes"]["disk"] / record["sizes"]["bits"]
        ratios = (f"{eager / pruned:.2f}", f"{floats / both:.2f}", f"{whole / both:.2f}")
        reasons = f"{len(record['floating'])} of {len(record['floating']) + record['integer']} layers"
        shown = (f"{one:.1f}" if one >= 1 else f"{one:.3f}" for one in ms)
        rows.append([net.words, batch, *shown, *ratios, f"{size:.3f}", f"{record['macs']:.0%}", reasons])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob of networks")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    folder = options.out / "latency"
    prepare_folder(folder)
    rows: list[list[str]] = []
    for net in (net for net in NETS if fnmatchcase(net.name, options.only)):
        path = folder / f"{net.name}-{options.threads}.json"
        # a process each: what one network leaves behind in memory isn't the next one's affair
        with ProcessPoolExecutor(1) as pool:
            record = recorded(
                path,
                lambda net=net, pool=pool: pool.submit(_named, net.name, options.batches, options.threads, options.rounds).result(),  # type: ignore[misc]
                fresh=options.fresh,
            )
        rows += render(net, record)
        print(f"{net.name}: done", flush=True)
    dots = "with" if has_dot_products() else "without"
    software = versions("torch", "onnxruntime", "transformers", "geta")
    facts = f"{software}; {machine()}, {dots} integer dot products; {options.threads} thread(s)."
    multiple = geta.device_profile(PROFILE).multiple_of
    what = f"{SPARSITY:.0%} of the groups removed at random, multiples of {multiple} channels kept, weights and activations of {BITS} bits."
    written("latency", ["# Latency of compact networks", "", facts, what, "", *table(_HEADER, rows)], options.out)


def _named(name: str, batches: Sequence[int], threads: int, rounds: int) -> dict[str, Any]:
    return run(next(net for net in NETS if net.name == name), batches, threads, rounds)


if __name__ == "__main__":
    main()
