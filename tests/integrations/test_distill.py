"""Distillation: formula, the frozen teacher, what it accepts and refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geta
from geta.errors import BadModelError, ConfigError


def net(outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, outputs))


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_kl_is_the_formula(weight: float, temperature: float) -> None:
    teacher = net()
    distill = geta.Distillation(teacher, weight=weight, temperature=temperature)
    student = torch.randn(7, 5, requires_grad=True)
    task = student.square().mean()
    found = distill(task, student, X)
    p = torch.softmax(teacher.eval()(X) / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    expected = (1 - weight) * task + weight * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None and bool((student.grad != 0).all())
    assert all(p.grad is None and not p.requires_grad for p in distill.teacher.parameters())


def test_rows_of_sequences_count_alike() -> None:
    teacher, student = nn.Linear(6, 5), torch.randn(2, 3, 5)
    whole = geta.Distillation(teacher, weight=1.0)(torch.zeros(()), student, torch.ones(2, 3, 6))
    flat = geta.Distillation(teacher, weight=1.0)(torch.zeros(()), student.flatten(0, 1), torch.ones(6, 6))
    torch.testing.assert_close(whole, flat)


def test_mse_and_keywords_and_logits() -> None:
    class Named(nn.Module):
        def forward(self, *, pixels: Tensor) -> Any:
            return SimpleNamespace(logits=pixels * 2)

    found = geta.Distillation(Named(), weight=0.5, measure="mse")(torch.tensor(1.0), {"logits": X}, pixels=X)
    torch.testing.assert_close(found, 0.5 + 0.5 * F.mse_loss(X, 2 * X))


def test_the_teacher_is_a_copy_and_stays_as_it_is() -> None:
    teacher = net().train()
    distill = geta.Distillation(teacher)
    before = {name: tensor.clone() for name, tensor in distill.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    for _ in range(2):
        distill(torch.zeros(()), torch.zeros(7, 5), X)
    assert teacher.training and not distill.teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in distill.teacher.state_dict().items())


def test_without_weight_the_loss_is_untouched_and_the_teacher_is_not_asked() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    loss = torch.tensor(3.0)
    assert geta.Distillation(Never(), weight=0.0)(loss, X, X) is loss


def test_the_same_student_as_the_teacher_costs_nothing() -> None:
    teacher = net().eval()
    loss = geta.Distillation(teacher, weight=1.0)(torch.tensor(9.0), teacher(X), X)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": 1.5}, "weight is 1.5"),
        ({"weight": True}, "weight is True"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"measure": "cosine"}, "measure is 'cosine'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        geta.Distillation(net(), **settings)


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadModelError, match=r"\(7, 5\) and the student's \(7, 4\)"):
        geta.Distillation(net())(torch.zeros(()), torch.zeros(7, 4), X)
    with pytest.raises(ConfigError, match="returned tuple"):
        geta.Distillation(net())(torch.zeros(()), (X, X), X)
    with pytest.raises(BadModelError, match="teacher is str"):
        geta.Distillation("dense")  # type: ignore[arg-type]
