"""Augmentations follow the generator alone, and move what belongs together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from geta.errors import ConfigError
from geta.recipes.augment import AugmentSettings

SETTINGS: TypeAdapter[Any] = TypeAdapter(AugmentSettings)
ALL = ["crop", "cutout", "flip", "mixup", "random-resized-crop", "shift", "turn"]


def augmented(name: str, batch: dict[str, torch.Tensor], seed: int = 0, **keys: Any) -> dict[str, torch.Tensor]:
    return SETTINGS.validate_python({"name": name, **keys}).apply(batch, torch.Generator().manual_seed(seed))


def pictures(rows: int = 32, size: int = 8, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    images = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"images": images, **more}


@pytest.mark.parametrize("name", ALL)
def test_equal_generators_give_equal_batches_and_nothing_is_changed_in_place(name):
    batch = pictures(labels=torch.arange(32))
    before = {key: column.clone() for key, column in batch.items()}
    torch.manual_seed(1)
    first = augmented(name, batch)
    torch.manual_seed(2)
    again, other = augmented(name, batch), augmented(name, batch, seed=1)
    assert all(torch.equal(batch[key], before[key]) for key in before)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["images"], other["images"])
    assert (first["images"].shape, first["images"].dtype) == (batch["images"].shape, torch.float32)
    assert torch.equal(first["labels"], batch["labels"])


@pytest.mark.parametrize("name", ["flip", "turn"])
def test_what_lies_on_the_pixels_moves_along(name):
    plain = pictures()
    large = plain["images"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = (100 * plain["images"][:, 0]).long()
    found = augmented(name, {**plain, "targets": large, "labels": labels})
    assert torch.equal(found["targets"][:, :, ::2, ::2], found["images"])
    assert torch.equal((100 * found["images"][:, 0]).long(), found["labels"])
    changed = (found["images"] != plain["images"]).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.95


def test_flips_are_mirror_images():
    batch = pictures()
    assert torch.equal(augmented("flip", batch, probability=1.0)["images"], batch["images"].flip(3))
    assert torch.equal(augmented("flip", batch, probability=1.0, upright=True)["images"], batch["images"].flip(2))


def test_turns_are_the_four_quarter_turns():
    batch = pictures()
    found = augmented("turn", batch)["images"]
    times = [[torch.equal(row, old.rot90(k, (1, 2))) for k in range(4)] for row, old in zip(found, batch["images"], strict=True)]
    assert all(sum(one) == 1 for one in times)
    assert {one.index(True) for one in times} == {0, 1, 2, 3}


def test_a_crop_is_a_window_of_the_padded_picture():
    batch = pictures(rows=8)
    found = augmented("crop", batch, padding=2)["images"]
    around = torch.nn.functional.pad(batch["images"], (2, 2, 2, 2))
    windows = around.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    assert (windows == found[:, None]).flatten(2).all(2).any(1).all()


def test_a_resized_crop_of_the_whole_picture_is_the_picture():
    batch = pictures()
    same = augmented("random-resized-crop", batch, scale=[1.0, 1.0], ratio=[1.0, 1.0])["images"]
    torch.testing.assert_close(same, batch["images"], atol=1e-5, rtol=0.0)
    ramp = torch.arange(8.0).expand(16, 1, 8, 8)
    found = augmented("random-resized-crop", {"images": ramp}, scale=[0.25, 0.25], ratio=[1.0, 1.0])["images"]
    spread = found.amax((1, 2, 3)) - found.amin((1, 2, 3))
    assert float(spread.max()) <= 3.6  # half of the width
    assert float(found.amax() - found.amin()) > 5.0


def test_cutout_covers_one_square():
    found = augmented("cutout", {"images": torch.ones(64, 3, 8, 8)}, size=4)["images"]
    holes = (found == 0).sum((2, 3))
    assert torch.equal(holes[:, 0], holes[:, 2])
    assert (int(holes.max()), int(holes.min()) >= 4) == (16, True)


def test_mixup_adds_the_other_label_and_its_share():
    batch = pictures(labels=torch.arange(32))
    found = augmented("mixup", batch, alpha=1.0)
    share = found["mix"].view(-1, 1, 1, 1)
    mixed = share * batch["images"] + (1 - share) * batch["images"][found["other_labels"]]
    torch.testing.assert_close(found["images"], mixed)
    assert sorted(found["other_labels"].tolist()) == list(range(32))
    with pytest.raises(ConfigError, match="may be there once"):
        augmented("mixup", found)


@pytest.mark.parametrize(
    ("name", "batch", "message"),
    [
        ("flip", {"tokens": torch.zeros(2, 3)}, "'flip' changes pictures, and the batch has tokens"),
        (
            "crop",
            {"images": torch.zeros(2, 3, 4, 4), "targets": torch.zeros(2, 3, 8, 8)},
            "'crop' would move the pictures away from targets",
        ),
        ("turn", {"images": torch.zeros(2, 3, 4, 5)}, "'turn' needs square pictures"),
        ("mixup", {"images": torch.zeros(2, 3, 4, 4)}, "'mixup' needs one class per picture"),
    ],
)
def test_what_does_not_fit_is_refused(name, batch, message):
    with pytest.raises(ConfigError, match=message):
        augmented(name, batch)


@pytest.mark.parametrize(("keys", "message"), [({"scale": [0.5, 0.2]}, "two shares in order"), ({"ratio": [0.0, 1.0]}, "positive numbers")])
def test_impossible_ranges_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        augmented("random-resized-crop", pictures(), **keys)
