"""Do latency tables tell what a whole network takes? `python -m bench.predictions`, on a machine that does nothing else.

A table is measured per network (`geta.measure_layers`, ONNX Runtime, one image or text, one thread; three of its numbers are fitted to
the uncut network and to one with half of every family). Then networks with other shares of their groups removed at random are exported
and timed beside the table's largest layers: measured over predicted, at the pace that the machine has then. Random weights; the networks
are those of `bench.latency`.

Results: bench/results/predictions_<date>.md, and a record per network and precision in bench/results/predictions/, which a later call
reuses (`--fresh` doesn't).
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch

import geta
from geta.report.files import prepare_folder
from geta.report.latency_table import Prediction, check_prediction
from geta.report.runtimes import has_dot_products

from .facts import RESULTS, machine, recorded, results_folder, table, versions, written
from .latency import NETS, PROFILE, analysed

SHARES = (0.2, 0.35, 0.65)
PRECISIONS = ("floats", "integers")
_HEADER = ("network", "arithmetic", "groups removed", "predicted, ms", "measured, ms", "machine's pace", "measured / predicted")


def run(name: str, precision: str, seconds: float) -> dict[str, Any]:
    """Measure the table of one network, and the networks that it is asked about."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = next(net for net in NETS if net.name == name)
    model, inputs = net.build().eval(), net.inputs(2)
    graph = analysed(model, inputs, quantized=precision == "integers")
    known = geta.measure_layers(graph, precision=precision, batch=1, seconds=seconds)
    found = []
    for share in SHARES:
        selection = graph.random_selection(share, seed=round(100 * share), multiple_of=PROFILE)
        found.append(check_prediction(geta.compact(model, graph, selection), graph, known))
    return {"shares": SHARES, "predictions": [asdict(one) for one in found], "fitted": known.networks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob of networks")
    parser.add_argument("--seconds", type=float, default=15.0, help="for timing one table")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    folder = options.out / "predictions"
    prepare_folder(folder)
    rows = []
    for net in (net for net in NETS if fnmatchcase(net.name, options.only)):
        for precision in PRECISIONS:
            with ProcessPoolExecutor(1) as pool:  # a process each, as in bench.latency
                done = recorded(
                    folder / f"{net.name}-{precision}.json",
                    lambda net=net, precision=precision, pool=pool: pool.submit(run, net.name, precision, options.seconds).result(),  # type: ignore[misc]
                    fresh=options.fresh,
                )
            for share, record in zip(done["shares"], done["predictions"], strict=True):
                one = Prediction(**record)
                numbers = (f"{one.predicted:.3f}", f"{one.measured:.3f}", f"{one.pace:.2f}", f"{one.ratio:.2f}")
                rows.append([net.words, precision, f"{share:.0%}", *numbers])
            print(f"{net.name}, {precision}: done", flush=True)
    dots = "with" if has_dot_products() else "without"
    facts = f"{versions('torch', 'onnxruntime', 'transformers', 'geta')}; {machine()}, {dots} integer dot products; batch 1, 1 thread."
    written("predictions", ["# Predicted and measured latency", "", facts, "", *table(_HEADER, rows, left=(0, 1))], options.out)


if __name__ == "__main__":
    main()
