"""Nets of shipped recipes: parameters as counted by hand or published, and half of their groups can be cut out exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import geta
from geta.recipes.nets.cifar_resnet import resnet56
from geta.recipes.nets.dual_encoder import DualEncoder
from geta.recipes.nets.language import small_llama
from geta.recipes.nets.simple_vit import SimpleViT, sine_cosine
from geta.recipes.nets.super_resolution import CARN, SmallSuperResolution
from geta.recipes.nets.vgg import VGG7

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[3, 5, 7, 0, 0, 0], [2, 2, 9, 1, 4, 0]])
SMALL: dict[str, tuple[Any, tuple[torch.Tensor, ...], int, Any]] = {
    "VGG7": (lambda: VGG7(image_size=16, width=8), (IMAGES,), 2 * (8 + 16 + 32) + 64, (2, 10)),
    "SimpleViT": (lambda: SimpleViT(image_size=16, width=32, depth=2, heads=4, hidden=48), (IMAGES,), 2 * (4 + 48), (2, 10)),
    "CARN x3": (lambda: CARN(scale=3, width=8), (IMAGES[..., :8, :8],), 22 * 8 + 8, (2, 3, 24, 24)),
    "small super-resolution": (lambda: SmallSuperResolution(width=8, units=2), (IMAGES,), 3 * 8, (2, 3, 32, 32)),
    "dual encoder": (
        lambda: DualEncoder(channels=3, vocabulary=16, context=6, width=8, text_width=16, depth=1),
        (IMAGES, TOKENS),
        8 + 16 + 16 + 4 + 32,
        ((2, 64), (2, 64)),
    ),
}


def shapes(output: Any) -> Any:
    return tuple(output.shape) if isinstance(output, torch.Tensor) else tuple(tuple(part.shape) for part in output)


@pytest.mark.parametrize("name", list(SMALL))
def test_half_of_the_groups_can_be_cut_out(name):
    make, inputs, groups, shape = SMALL[name]
    geta.seed_everything(0)
    model = make().eval()
    assert shapes(model(*inputs)) == shape
    graph = geta.analyze(model, inputs)
    assert graph.num_groups == groups
    selection = graph.random_selection(sparsity=0.5, seed=0)
    graph.zero_(model, selection)
    small = geta.compact(model, graph, selection)  # verified inside
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (resnet56, 855_770),
        (VGG7, 12_978_058),
        (CARN, 964_163),
        (lambda: CARN(scale=4), 1_111_875),
        (SimpleViT, 12_635_658),
        (lambda: small_llama(context=128), 4_852_992),
    ],
)
def test_sizes_are_known(make, parameters):
    with torch.device("meta"):
        model: nn.Module = make()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_what_fills_texts_up_changes_nothing():
    geta.seed_everything(0)
    model = DualEncoder(channels=3, context=6, text_width=16, depth=1).eval()
    first = model(IMAGES, TOKENS)[1]
    with torch.no_grad():
        model.embedding.weight[0] += 3.0
    torch.testing.assert_close(model(IMAGES, TOKENS)[1], first)


def test_positions_of_patches_differ():
    positions = sine_cosine(4, 16)
    assert len({tuple(row) for row in positions.tolist()}) == 16
    torch.testing.assert_close(positions.square().sum(1), torch.full((16,), 8.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VGG7(image_size=28), "must be a multiple of 8, not 28"),
        (lambda: SimpleViT(image_size=30, patch=4), r"image_size \(30\) must be a multiple of patch"),
        (lambda: CARN(scale=6), "scale must be 2, 3, 4 or 8, not 6"),
        (lambda: SimpleViT(width=36, heads=8), r"width \(36\) must be a multiple of heads"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        make()
