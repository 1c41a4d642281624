"""The quantizer's compiled kernels against PyTorch's operators, forward and backward, and kept values against computed ones.

All candidates of a size take turns in one process and see the same tensors, so only the ratios mean something.
Run it with `python -m bench.quantizer_kernels`; it writes bench/results/quantizer_kernels_<date>.md. `--sizes`, `--threads` and
`--rounds` change what is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.facts import RESULTS, dated, machine, results_folder, table, versions
from geta.quant import Bits, Quantizer, native, native_status, ops
from geta.report.files import write_atomically
from geta.report.latency import interleaved

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
THREADS = (1, 2)
FOURIER = (0.21,)
HEADER = ("elements", "threads", "what", "operators, us", "kernel, us", "ratio")


def present(result: object) -> None:
    """A measurement of a kernel that doesn't cover its case would be one of nothing."""
    if result is None:
        raise RuntimeError(f"no compiled kernel: {native_status()}")


def candidates(size: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """{what: (by PyTorch's operators, by the kernel)} for one tensor of `size` elements, 8 bits, a third of them clamped."""
    generator = torch.Generator().manual_seed(size)
    x, grad = (torch.randn(size, generator=generator) for _ in range(2))
    q_m, t = torch.tensor(1.0), torch.tensor(1.0)
    d = q_m / 127.0

    def backward(amplitudes: Sequence[float]) -> tuple[Callable[[], object], Callable[[], object]]:
        def by_operators() -> object:
            return ops.aten_gradients(grad, x, d, q_m, t, True, True, amplitudes)

        def by_kernel() -> None:
            present(native.gradients(grad, x, d, q_m, t, amplitudes=amplitudes, strength=None, signed=True))

        return by_operators, by_kernel

    return {
        "forward": (
            lambda: ops.aten_values(x, ops.prepared(x, d, q_m, t, True), True, True),
            lambda: present(native.quantize(x, d, q_m, t, signed=True)),
        ),
        "backward, straight-through": backward(()),
        "backward, one harmonic": backward(FOURIER),
    }


def kept_values(size: int, *, linear: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(a weight quantizer that computes each time, one that keeps its values where that pays)."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.nn.Parameter(torch.randn(size, generator=generator))

    def forward(keep: bool) -> Callable[[], Tensor]:
        quantizer = Quantizer("weight", "weight", Bits(4, 8), torch.tensor(1.0), linear=linear, initial_bits=8)
        quantizer.keep_values = keep
        return lambda: quantizer(weight)

    return forward(keep=False), forward(keep=True)


def compare(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[str, str, str]:
    """Medians in microseconds and their ratio, as text."""
    times = interleaved({"first": first, "second": second}, rounds)
    slow, fast = times["first"].median * 1e3, times["second"].median * 1e3
    return f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.1f}"


def compilation() -> str:
    """How the kernels were compiled, without the compiler's folder."""
    compiler, *flags = native_status().command.split()
    return " ".join([Path(compiler).name, *flags])


def report(sizes: Sequence[int], threads: Sequence[int], rounds: int) -> str:
    """The Markdown report."""
    rows, kept_rows = [], []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for size in sizes:
                for what, pair in candidates(size).items():
                    rows.append((f"{size:,}", str(count), what, *compare(*pair, rounds)))
                for linear in (True, False):
                    pair = kept_values(size, linear=linear)
                    kept_rows.append((f"{size:,}", str(count), "linear" if linear else "nonlinear", *compare(*pair, rounds)))
    finally:
        torch.set_num_threads(before)
    lines = [
        "# The quantizer's kernels",
        "",
        f"{versions('torch')}, {machine()}; `{compilation()}`.",
        f"Medians of {rounds} rounds, float32, one quantizer per tensor, 8 bits, the candidates of a row in turns.",
        "",
        *table(HEADER, rows, left=(2,)),
        "",
        "A weight quantizer's whole forward pass with autograd, unchanged weights: computed each time, and with kept values. Values of",
        "linear quantizers are kept from 32 MiB on, those of nonlinear ones from 4096 elements on; below, both columns do the same.",
        "",
        *table((*HEADER[:3], "computed, us", "kept, us", "ratio"), kept_rows, left=(2,)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the report")
    options = parser.parse_args()
    text = report(options.sizes, options.threads, options.rounds)
    target = dated("quantizer_kernels", folder=options.out)
    write_atomically(target, text.encode())
    print(text)


if __name__ == "__main__":
    main()
