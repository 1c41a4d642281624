"""Small tensors put together: what comes back, how much it saves, folders from before, and bundles that don't fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geta
from geta.errors import CheckpointError
from geta.export import files, storage
from geta.export.bundles import bundled, unbundled

TENSORS = {
    "weight": torch.randn(40, 40),
    "scale": torch.tensor(0.5),
    "count": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "half": torch.randn(3, 2).to(torch.bfloat16),
    "bias": torch.randn(40),
    "flags": torch.tensor([True, False]),
    "codes": torch.arange(7, dtype=torch.uint8),
}


def layouts(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_what_goes_in_comes_out() -> None:
    stored = bundled(TENSORS)
    assert list(stored) == ["weight", "*float32", "*int64", "*bfloat16", "*bool", "*uint8"]
    found = unbundled(stored, layouts(TENSORS))
    assert sorted(found) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    found["scale"].zero_()
    assert stored["*float32"][0] == 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.pop("*int64"),
        lambda stored: stored.update({"*float32": stored["*float32"][:-1]}),
        lambda stored: stored.update({"*float32": torch.cat([stored["*float32"], torch.ones(1)])}),
        lambda stored: stored.update({"*float32": stored["*float32"].double()}),
        lambda stored: stored.update({"*int8": torch.zeros(2, dtype=torch.int8)}),
        lambda stored: stored.update({"more": torch.zeros(2)}),
        lambda stored: stored.pop("weight"),
    ],
)
def test_other_tensors_than_described_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    stored = bundled(TENSORS)
    change(stored)
    with pytest.raises(CheckpointError, match="damaged"):
        unbundled(stored, layouts(TENSORS))


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unbundled({"*float32": torch.empty(0)}, {"x": (torch.float32, (0, 10**30))})


def quantized() -> tuple[geta.CompactModel, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval(), torch.randn(4, 64)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=8, activations=8, calibration=[x], exclude=(), initial_bits=8)
    return geta.compact(model, graph, graph.random_selection(0.5)).eval(), x


def test_folders_of_version_1_are_read(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    small, x = quantized()
    small.save(tmp_path / "new")
    monkeypatch.setattr(storage, "bundled", dict)
    monkeypatch.setattr(files, "VERSION", 1)
    small.save(tmp_path / "old")
    assert b"0.weight_codes" in (tmp_path / "old" / "model.safetensors").read_bytes()
    assert b'"version": 1' in (tmp_path / "old" / "manifest.json").read_bytes()
    monkeypatch.undo()
    for folder in ("old", "new"):
        assert torch.equal(geta.load(tmp_path / folder)(x), small(x))
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("old", "new")]
    assert sizes[1] < 0.85 * sizes[0]
