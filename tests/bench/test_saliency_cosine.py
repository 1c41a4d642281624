"""The benchmark of the cosine criterion, with next to no training."""

from __future__ import annotations

import pytest
import torch

from bench import saliency_cosine
from geta.optim import CRITERIA, GroupStatistics


def test_a_tiny_run_writes_a_report_with_every_criterion_and_direction(tmp_path):
    assert saliency_cosine.main(["--seeds", "1", "--steps", "4", "--sparsities", "0.5", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    rows = [line for line in text.splitlines() if "| 50% |" in line]
    assert len(rows) == len(saliency_cosine.NETS) * len(saliency_cosine.DIRECTIONS) * len(saliency_cosine.SALIENCIES)
    assert text.count("five with 1 - cos, less five with 1 + cos") == 4


def test_both_signs_add_up_to_two():
    one = torch.ones(3)
    inner = torch.tensor([0.5, -0.25, 0.0])
    stats = GroupStatistics(norm=one, size=one, direction=one, inner=inner, family=torch.zeros(3, dtype=torch.int64))
    assert saliency_cosine.one_plus_cosine(stats).tolist() == [1.5, 0.75, 1.0]
    assert (saliency_cosine.one_plus_cosine(stats) + CRITERIA["cosine"](stats)).tolist() == pytest.approx([2.0] * 3)


def test_differences_are_paired():
    accuracies = saliency_cosine.Accuracies
    runs = []
    for seed in range(3):
        keys = {name: saliency_cosine.Key("mlp", "full gradient", 0.5, name) for name in saliency_cosine.SALIENCIES}
        runs.append({key: accuracies(90.0, 40.0 + 10 * seed + 2.0 * (name == saliency_cosine.MINUS), 80.0) for name, key in keys.items()})
    text = saliency_cosine.render(runs, [])
    assert "| mlp | full gradient | 1 - cos, less 1 + cos | 2.00 ± 0.00 | 3 : 0 | 0.00 ± 0.00 | 0 : 0 |" in text
