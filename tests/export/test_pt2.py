"""`.pt2` files: PyTorch alone runs them and makes the same numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import geta
from export_nets import CASES, compacted, inputs
from geta.export.plain import pack

_ALONE = """
import sys, torch
for folder in sys.argv[1:]:
    module = torch.export.load(folder + "/model.pt2").module()
    for batch, x in enumerate(torch.load(folder + "/x.pt")):
        torch.save(module(x), f"{folder}/y{batch}.pt")
assert "geta" not in sys.modules
"""


_PROCESSES = 4


@pytest.mark.parametrize("part", range(_PROCESSES))
def test_a_process_without_this_library_makes_the_same_numbers(part, tmp_path):
    models = {name: compacted(name) for name in list(CASES)[part::_PROCESSES]}
    folders = {name: tmp_path / str(number) for number, name in enumerate(models)}
    given = {name: [inputs(CASES[name], batch) for batch in (CASES[name].shape[0], 3)] for name in models}
    for name, model in models.items():
        folders[name].mkdir()
        assert model.export_pt2(folders[name] / "model.pt2") == (folders[name] / "model.pt2").stat().st_size
        torch.save(given[name], folders[name] / "x.pt")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", _ALONE, *map(str, folders.values())], check=True)
    for name, model in models.items():
        # batch norms are folded, so a rounding step may flip somewhere; without norms nothing differs
        most = 0.02 if "bn" in str(model.tensors().keys()) or "1.weight" in model.tensors() else 1e-5
        for batch, x in enumerate(given[name]):
            with torch.no_grad():
                expected = torch.utils._pytree.tree_leaves(model(x))
            for mine, theirs in zip(expected, torch.load(folders[name] / f"y{batch}.pt"), strict=True):
                assert (mine - theirs).abs().max() <= most * mine.abs().max(), name


def test_weights_of_few_bits_are_packed(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), torch.randn(2, 512)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=geta.Bits(4, 4), activations=None)
    for quantizer in geta.quant.quantizers(model).values():
        quantizer.round_bits_()
    small = geta.compact(model, graph)
    assert small.export_pt2(tmp_path / "model.pt2") < 1.1 * small.cost.weight_bytes


@pytest.mark.parametrize(("width", "offset", "count"), [(2, 2, 9), (4, 8, 8), (4, 8, 7), (4, 0, 1)])
def test_packing(width, offset, count):
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-offset, (1 << width) - offset, (count,), generator=generator)
    packed = pack(codes, width, offset)
    each = 8 // width
    assert len(packed) == -(-count // each)
    shifts = torch.arange(each) * width
    again = ((packed[:, None] >> shifts) & ((1 << width) - 1)).reshape(-1)[:count] - offset
    assert torch.equal(again, codes)


def test_errors_leave_the_old_file(tmp_path, monkeypatch):
    model, path = compacted("perceptron"), tmp_path / "model.pt2"
    path.write_bytes(b"old")
    with pytest.raises(geta.ConfigError, match="there is no folder"):
        model.export_pt2(tmp_path / "none" / "model.pt2")
    with pytest.raises(geta.ConfigError, match="dynamic is 'time'"):
        model.export_pt2(path, dynamic="time")

    def fail(*_args, **_kwargs):
        raise RuntimeError("can't\nbecause")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(geta.BadModelError, match=r"RuntimeError: can't$"):
        model.export_pt2(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


class Scaled(nn.Module):
    """Makes a constant on the way, as DeBERTa's attention does; capturing that leaves an in-place detach in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden / torch.sqrt(torch.tensor(hidden.size(-1), dtype=torch.float)))


def test_constants_that_the_model_makes(tmp_path):
    model, x = Scaled().eval(), torch.randn(3, 4)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=8, activations=None, exclude=(), initial_bits=8)
    small = geta.compact(model, graph, graph.random_selection(0.5)).eval()
    small.export_pt2(tmp_path / "model.pt2")
    (found,) = torch.export.load(tmp_path / "model.pt2").module()(x)
    torch.testing.assert_close(found, small(x))
