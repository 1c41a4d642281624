"""Sources of data: what is read from disk is what was written there, and whatever is wrong is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import recipe_files
from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Data
from geta.recipes.data import DataSettings

SETTINGS: TypeAdapter[Any] = TypeAdapter(DataSettings)


def load(source: str, **keys: Any) -> Data:
    return SETTINGS.validate_python({"source": source, **keys}).load()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps converted files: here, in a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def everything(split: Any) -> dict[str, torch.Tensor]:
    return split.batch(range(len(split)))


def test_idx_files_plain_and_zipped_hold_the_same(tmp_path):
    plain = load("idx", path=recipe_files.idx(tmp_path / "plain"))
    zipped = load("idx", path=str(recipe_files.idx(tmp_path / "zipped", zipped=True)))
    assert (len(plain.train), len(plain.test), plain.facts) == (12, 6, {"classes": 3, "channels": 1, "image_size": 8})
    found = plain.train.batch([11, 0])
    assert torch.equal(found["images"][:, 0], torch.from_numpy(recipe_files.noise(12, 8, 8, seed=12)[[11, 0]] / np.float32(255)))
    assert found["labels"].tolist() == [2, 0]
    assert torch.equal(everything(plain.test)["images"], everything(zipped.test)["images"])


def test_cifar_planes_labels_and_normalisation(tmp_path):
    recipe_files.cifar10(tmp_path)
    data = load("cifar", path=tmp_path, mean=[0.5, 0.4, 0.3], std=[0.2, 0.5, 1.0])
    raw = recipe_files.noise(4, 3073, seed=1)
    red, blue = raw[2, 1:1025].reshape(32, 32), raw[2, 2049:].reshape(32, 32)
    found = data.train.batch([6])  # the third record of the second file
    assert (len(data.train), len(data.test), found["labels"].item()) == (20, 4, 3)
    torch.testing.assert_close(found["images"][0, 0], (torch.from_numpy(red.copy()) / 255 - 0.5) / 0.2)
    torch.testing.assert_close(found["images"][0, 2], torch.from_numpy(blue.copy()) / 255 - 0.3)


@pytest.mark.parametrize(("classes", "labels"), [(100, [99, 98]), (20, [0, 1])])
def test_cifar_100_has_fine_and_coarse_labels(tmp_path, classes, labels):
    data = load("cifar", path=recipe_files.cifar100(tmp_path), classes=classes)
    assert data.train.batch([0, 1])["labels"].tolist() == labels
    assert data.facts["classes"] == classes


def test_the_python_version_of_cifar_is_refused_because_it_is_pickle(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": 0}))
    for path in (tmp_path, folder):
        with pytest.raises(ConfigError, match=r"Python version .* pickle.*binary version"):
            load("cifar", path=path)


def test_pictures_in_folders_are_resized_cut_and_labelled(tmp_path):
    data = load("image-folder", path=recipe_files.image_folder(tmp_path), size=14)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.facts == {"classes": 3, "channels": 3, "image_size": 14, "class_names": ["n00", "n01", "n02"]}
    batch = data.train.batch([0, 11])
    assert batch["images"].shape == (2, 3, 14, 14)
    assert batch["labels"].tolist() == [0, 2]
    assert torch.equal(batch["images"], data.train.batch([11, 0])["images"].flip(0))
    assert 0.3 < float(data.test.batch([0])["images"].mean()) < 0.7
    grey = load("image-folder", path=tmp_path, size=14, resize=20, channels=1)
    assert grey.test.batch([1])["images"].shape == (1, 1, 14, 14)


def test_one_folder_is_split_within_every_class(tmp_path):
    recipe_files.image_folder(tmp_path, each=5)
    data = load("image-folder", path=tmp_path / "train", size=8, split=0.4)
    assert (len(data.train), len(data.test)) == (9, 6)
    assert not {path for path, _ in data.train.files} & {path for path, _ in data.test.files}
    assert sorted(label for _, label in data.test.files) == [0, 0, 1, 1, 2, 2]


def test_arrays_of_an_npz_file(tmp_path):
    images = recipe_files.noise(5, 6, 6, 3)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(5), x_test=images[:2], y_test=np.arange(2))
    data = load("npz", path=tmp_path / "a.npz", layout="NHWC")
    assert torch.equal(data.train.batch([3])["images"][0], torch.from_numpy(images[3].transpose(2, 0, 1) / np.float32(255)))
    assert data.facts == {"channels": 3, "image_size": 6, "classes": 5}
    np.savez(tmp_path / "b.npz", x=np.ones((4, 3)), t=np.arange(4.0))
    columns = {"features": "x", "targets": "t"}
    numbers = load("npz", path=tmp_path / "b.npz", train=columns, test=columns).test.batch([2])
    assert (numbers["features"].dtype, numbers["targets"].tolist()) == (torch.float32, [2.0])


def test_text_windows_predict_every_byte_once(tmp_path):
    data = load("text", path=recipe_files.text(tmp_path), context=16, held_out=0.2)
    windows = everything(data.train)
    assert windows["tokens"].shape[1] == 17
    joined = "".join((tmp_path / f"{number}.txt").read_text() + "\n" for number in (0, 1, 3, 4)).encode()
    told = [windows["tokens"][0, 0].item(), *windows["tokens"][:, 1:].flatten().tolist()]
    assert bytes(told) == joined[: len(told)]
    assert len(joined) - len(told) < 16
    assert windows["bytes"].tolist() == [16] * len(data.train)
    assert data.facts == {"vocabulary": 256, "context": 16}


def test_tokens_of_a_tokenizer_stand_for_all_bytes(tmp_path):
    known = recipe_files.tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("größe the tower was built " * 8)
    data = load("text", path=tmp_path / "a.txt", test_path=tmp_path / "a.txt", tokenizer=str(known), context=3)
    windows = everything(data.train)
    assert windows["tokens"].max() < data.facts["vocabulary"]
    whole = (tmp_path / "a.txt").read_text().encode()
    assert windows["bytes"].sum() == len(whole) - 1 - len("größe".encode())  # neither the last space nor the first token is predicted


def test_the_standard_library_is_text():
    data = load("stdlib", context=64, most_bytes=5_000, most_test_bytes=2_000)
    assert 4_000 < 64 * len(data.train) <= 5_100
    assert 1_500 < 64 * len(data.test) <= 2_100


def test_pictures_that_ship_with_scikit_image():
    data = load("pictures", scale=3, crop=24, per_picture=2)
    batch = data.train.batch([0, 5])
    assert (len(data.train), batch["images"].shape, batch["targets"].shape) == (24, (2, 3, 8, 8), (2, 3, 24, 24))
    small = torch.nn.functional.avg_pool2d(batch["targets"], 3)
    assert float((small - batch["images"]).abs().mean()) < 0.03
    assert torch.equal(batch["images"], data.train.batch([5, 0])["images"].flip(0))


def test_pairs_are_tiles_or_whole_pictures_with_low_resolution_made_or_read(tmp_path):
    recipe_files.image_pairs(tmp_path, low=True)
    made = load("image-pairs", path=tmp_path, crop=16, per_picture=3)
    assert (len(made.train), len(made.test)) == (6, 3 * 4 + 3 * 2)
    lows = {"train_low": "DIV2K_train_LR_bicubic/X2", "test_low": "DIV2K_valid_LR_bicubic/X2"}
    read = load("image-pairs", path=tmp_path, crop=16, per_picture=3, whole=True, **lows)
    whole = read.test.batch([1])
    assert (whole["images"].shape, whole["targets"].shape) == ((1, 3, 24, 20), (1, 3, 48, 40))
    assert torch.equal(whole["images"][0, 0], torch.from_numpy(recipe_files.noise(24, 20, 3, seed=1)[..., 0] / np.float32(255)))
    with pytest.raises(ConfigError, match=r"train\.evaluation_batch=1"):
        read.test.batch([0, 1])


def test_masks_keep_their_class_numbers(tmp_path):
    data = load("image-masks", path=recipe_files.image_masks(tmp_path), classes=3, size=10)
    batch = data.train.batch([2, 0])
    assert (batch["images"].shape, batch["labels"].shape, batch["labels"].dtype) == ((2, 3, 10, 10), (2, 10, 10), torch.int64)
    wanted = torch.from_numpy(recipe_files.noise(10, 12, seed=2) % 3).long()[:, 1:11]
    assert torch.equal(batch["labels"][0, 1:], wanted[1:])
    assert batch["labels"][:, 0].unique().tolist() == [255]
    enlarged = load("image-masks", path=tmp_path, classes=3, size=33).test.batch([1])["labels"]
    assert set(enlarged.unique().tolist()) == {0, 1, 2, 255}
    with pytest.raises(GetaError, match=r"2\.png' has the label 2, and data\.classes=2 are numbered from 0"):
        load("image-masks", path=tmp_path, classes=2, size=10).train.batch([2])
    recipe_files.picture(tmp_path / "test" / "masks" / "0.png", 10, 12)
    with pytest.raises(GetaError, match=r"0\.png' is a picture of mode RGB"):
        load("image-masks", path=tmp_path, classes=3, size=10).test.batch([0])


def test_captions_of_one_picture_stay_in_one_split(tmp_path):
    data = load("captions", path=recipe_files.captions(tmp_path), size=8, length=12, split=0.3)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert not set(data.train.files) & set(data.test.files)
    batch = data.train.batch([0])
    assert bytes(batch["tokens"][0].tolist()) == b"a the, red\0\0"
    assert batch["images"].shape == (1, 3, 8, 8)


def test_captions_of_digits_name_the_digit():
    data = load("digits-captions")
    digits = load("digits")
    captions = [bytes(row).rstrip(b"\0").decode() for row in everything(data.train)["tokens"].tolist()]
    assert len(set(captions)) == 20
    names = "zero one two three four five six seven eight nine".split()
    assert [caption.split()[2] for caption in captions] == [names[label] for label in everything(digits.train)["labels"].tolist()]
    assert 0.45 < sum("bold" in caption for caption in captions) / len(captions) < 0.55


def test_choices_mark_the_tokens_of_the_answer(tmp_path):
    data = load("choices", path=recipe_files.choices(tmp_path))
    batch = data.test.batch([0, 1])
    assert (batch["tokens"].shape[:2], batch["labels"].tolist()) == ((2, 3), [0, 1])
    assert batch["present"].tolist() == [[True, True, False], [True, True, True]]
    marked = batch["tokens"][1, 1][batch["answer_mask"][1, 1].bool()]
    assert bytes(marked.tolist()) == b" was built of"
    assert batch["answer_bytes"][1].tolist() == [5, 12, 3]
    only = load("choices", path=tmp_path, train_choices="right").train.batch([1, 2])
    assert (only["tokens"].shape[1], only["labels"].tolist()) == (1, [0, 0])


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
def test_squad_windows_hold_the_answer_where_the_labels_say(tmp_path, kind):
    recipe_files.squad(tmp_path)
    make = recipe_files.tokenizer if kind == "tokenizer.json" else recipe_files.word_pieces
    data = load("squad", path=tmp_path, tokenizer=str(make(tmp_path / kind)), length=24, stride=8)
    train = everything(data.train)
    held = train["starts"] > 0
    assert 0 < int(held.sum()) < len(held)
    test = data.test.batch([0, 2])
    assert test["tokens"].shape == (2, 3, 24)
    for row in range(2):
        text, answer = (bytes(test[name][row].flatten().tolist()).rstrip(b"\0").decode() for name in ("text", "answers"))
        assert answer in text
        seen = {text.encode()[first:last].decode() for first, last in test["spans"][row].flatten(0, 1).tolist() if first >= 0}
        assert seen == set(text.split())
    windows = [window for window in data.train.windows if window.start]
    first = windows[0]
    source = json.loads((tmp_path / "train-v1.1.json").read_text())["data"][0]["paragraphs"][0]
    assert source["context"][first.spans[first.start][0] : first.spans[first.end][1]] == source["qas"][0]["answers"][0]["text"]


def test_data_sets_of_the_hub_from_disk(tmp_path):
    import datasets
    from PIL import Image

    rows = {"image": [Image.fromarray(recipe_files.noise(10, 12, 3, seed=n)) for n in range(4)], "label": [0, 1, 2, 1]}
    splits = {name: datasets.Dataset.from_dict(rows) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    data = load("hf", path=str(tmp_path / "saved"), size=8)
    assert (data.train.batch([2, 0])["labels"].tolist(), data.test.batch([1])["images"].shape) == ([2, 0], (1, 3, 8, 8))
    assert data.facts == {"channels": 3, "image_size": 8, "classes": 3}


def test_a_file_of_texts_for_the_hub_source(tmp_path, own_cache):
    (tmp_path / "rows.jsonl").write_text('{"sentence": "red", "label": 1}\n{"sentence": "a man", "label": 0}\n')
    keys = {"path": str(tmp_path), "train": "rows.jsonl", "test": "rows.jsonl", "length": 6}
    data = load("hf", columns={"tokens": "sentence", "labels": "label"}, **keys)
    batch = data.train.batch([0, 1])
    assert bytes(batch["tokens"].flatten().tolist()) == b"red\0\0\0a man\0"
    assert batch["tokens_mask"].sum(dim=1).tolist() == [3, 5]
    with pytest.raises(ConfigError, match="has no column text; it has sentence, label"):
        load("hf", columns={"tokens": "text"}, **keys)


MY_DATA = """
import torch
from geta.recipes.batches import Data, TensorSplit

def made_here(rows=2):
    split = TensorSplit({"images": torch.zeros(rows, 1)})
    return Data(split, split) if rows else None
"""


def test_data_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(MY_DATA)
    monkeypatch.chdir(tmp_path)
    assert len(load("python", factory="mydata:made_here", options={"rows": 3}).train) == 3
    with pytest.raises(GetaError, match=r"returned NoneType; it must return geta\.recipes\.batches\.Data"):
        load("python", factory="mydata:made_here", options={"rows": 0})
    with pytest.raises(GetaError, match="failed with TypeError"):
        load("python", factory="mydata:made_here", options={"lines": 0})
    with pytest.raises(ConfigError, match="has no function 'other'"):
        load("python", factory="mydata:other")
    with pytest.raises(ConfigError, match="'nowhere' can't be imported"):
        load("python", factory="nowhere:f")


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-5])
    return path


def case(source: str, *_done: object, **keys: Any) -> tuple[str, dict[str, Any]]:
    """A source and its keys; what had to be done on disk first was done while the arguments were made."""
    return source, keys


def squad_keys(folder: Path, dev: str) -> dict[str, Any]:
    (recipe_files.squad(folder) / "dev-v1.1.json").write_text(dev)
    return {"path": folder, "tokenizer": str(recipe_files.tokenizer(folder / "t.json"))}


def captions_with(folder: Path, text: str) -> Path:
    (recipe_files.captions(folder) / "captions.csv").write_text(text)
    return folder


SQUAD_2 = '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "who?", "answers": [], "is_impossible": true}]}]}]}'
BROKEN = {
    "idx folder": (lambda f: case("idx", path=f / "none"), "nothing at .*none.*folder with the IDX files"),
    "idx file": (lambda f: case("idx", path=f), "no 'train-images-idx3-ubyte' and no"),
    "idx short": (lambda f: case("idx", truncated(recipe_files.idx(f) / "train-images-idx3-ubyte"), path=f), "bytes, and its header"),
    "idx gz": (lambda f: case("idx", truncated(recipe_files.idx(f, zipped=True) / "t10k-labels-idx1-ubyte.gz"), path=f), "can't be read"),
    "idx other": (
        lambda f: case("idx", (recipe_files.idx(f) / "t10k-labels-idx1-ubyte").write_bytes(b"GIF89a.."), path=f),
        "is no IDX file",
    ),
    "cifar none": (lambda f: case("cifar", path=f), "data_batch_1.bin, .* is missing"),
    "cifar short": (
        lambda f: case("cifar", truncated(recipe_files.cifar10(f) / "cifar-10-batches-bin" / "data_batch_3.bin"), path=f),
        "no multiple of 3073",
    ),
    "cifar label": (
        lambda f: case("cifar", (recipe_files.cifar10(f) / "cifar-10-batches-bin/test_batch.bin").write_bytes(b"\x63" * 3073), path=f),
        "label 99 .* is this the other CIFAR",
    ),
    "folder none": (lambda f: case("image-folder", path=f / "x"), "a folder with train/ and test/"),
    "folder flat": (lambda f: case("image-folder", recipe_files.image_folder(f), path=f / "train"), r"data\.split=0\.2"),
    "folder empty": (
        lambda f: case("image-folder", (f / "train" / "a").mkdir(parents=True), (f / "val").mkdir(), path=f),
        "no picture in a",
    ),
    "mean": (lambda f: case("idx", path=recipe_files.idx(f), mean=[0.5] * 3, std=[1.0] * 3), "3 numbers, .* 1 channels"),
    "npz none": (lambda f: case("npz", path=f), "a folder at .* where an .npz file was expected"),
    "npz name": (lambda f: case("npz", np.savez(f / "a.npz", x=np.ones(3)), path=f / "a.npz"), "no array x_train, y_train; it has x"),
    "npz pickle": (
        lambda f: case("npz", np.savez(f / "a.npz", x_train=np.array([{}]), y_train=np.ones(1)), path=f / "a.npz"),
        "can't be read without pickle",
    ),
    "npz zip": (lambda f: case("npz", (f / "a.npz").write_bytes(b"PK\x03\x04xx"), path=f / "a.npz"), "can't be read without pickle"),
    "npz length": (
        lambda f: case("npz", np.savez(f / "a.npz", x=np.ones(3), y=np.ones(2)), path=f / "a.npz", train={"features": "x", "targets": "y"}),
        "differ in length or are empty: {'features': 3, 'targets': 2}",
    ),
    "text none": (lambda f: case("text", path=f), r"no file '\*\.txt' in the folder"),
    "text short": (lambda f: case("text", (f / "a.txt").write_text("hello"), path=f / "a.txt"), r"one row of data\.context=256 needs 257"),
    "text latin": (lambda f: case("text", (f / "a.txt").write_bytes(b"gr\xf6"), path=f / "a.txt"), "is no UTF-8 text"),
    "text tokens": (lambda f: case("text", path=recipe_files.text(f), tokenizer=str(f / "0.txt")), r"data\.tokenizer: .*lacks \[UNK\]"),
    "pairs none": (lambda f: case("image-pairs", path=f), "a folder of pictures in high resolution"),
    "pairs small": (lambda f: case("image-pairs", path=recipe_files.image_pairs(f)), r"smaller than data\.crop=96"),
    "pairs low": (
        lambda f: case(
            "image-pairs", recipe_files.picture(f / "low" / "7.png", 8, 8), path=recipe_files.image_pairs(f), crop=16, train_low="low"
        ),
        "lacks 0000.png, 0001.png",
    ),
    "masks none": (
        lambda f: case("image-masks", (recipe_files.image_masks(f) / "train" / "masks" / "1.png").unlink(), path=f, classes=3),
        "has no mask for 1.jpg",
    ),
    "captions none": (lambda f: case("captions", path=captions_with(f, "a.png,hello\n")), "has no captions"),
    "captions keys": (lambda f: case("captions", path=captions_with(f, "file,text\na.png,b\n")), "line 2 .* has no 'image' and 'caption'"),
    "captions picture": (
        lambda f: case("captions", (recipe_files.captions(f) / "images" / "3.png").unlink(), path=f),
        "2 of the pictures with captions aren't in .*: 3.png",
    ),
    "choices json": (lambda f: case("choices", (recipe_files.choices(f) / "train.jsonl").write_text("{"), path=f), "line 1 .* is no JSON"),
    "choices keys": (
        lambda f: case("choices", (recipe_files.choices(f) / "test.jsonl").write_text('{"question": "a", "choices": ["b"]}'), path=f),
        "line 1 .* must have 'question'",
    ),
    "choices long": (lambda f: case("choices", path=recipe_files.choices(f), length=4), r"data\.length=4 is too short"),
    "squad shape": (lambda f: case("squad", **squad_keys(f, '{"data": [{}]}')), "isn't built like SQuAD 1.1 .*KeyError 'paragraphs'"),
    "squad 2": (lambda f: case("squad", **squad_keys(f, SQUAD_2)), "'who.' has no answer, as in SQuAD 2.0"),
    "captions split": (
        lambda f: case("captions", path=recipe_files.captions(f), test_file="captions.csv", split=0.5),
        r"data\.split has no effect beside data\.test_file",
    ),
    "text pattern": (
        lambda f: case("text", (f / "a.txt").write_text("hello"), path=f / "a.txt", pattern="*.md"),
        r"data\.pattern has no effect: .* is a file",
    ),
    "text held out": (
        lambda f: case("text", path=recipe_files.text(f), test_path=f, held_out=0.5, context=8),
        r"data\.held_out has no effect beside data\.test_path",
    ),
    "npz layout": (
        lambda f: case("npz", np.savez(f / "a.npz", x=np.ones(3)), path=f / "a.npz", train={"t": "x"}, test={"t": "x"}, layout="NHWC"),
        r"data\.layout has no effect",
    ),
    "hub size": (
        lambda f: case(
            "hf", (f / "a.jsonl").write_text('{"x": 1.5}'), path=str(f), train="a.jsonl", test="a.jsonl", columns={"x": "x"}, size=8
        ),
        r"data\.size has no effect: none of data\.columns holds pictures",
    ),
    "hub": (lambda f: case("hf", path=str(f), train="a.txt"), "the split 'a.txt' of .* can't be opened"),
}


FETCHED = {
    "idx": lambda f: case("idx", path=recipe_files.idx(f)),
    "image-folder": lambda f: case("image-folder", path=recipe_files.image_folder(f), size=8),
    "image-masks": lambda f: case("image-masks", path=recipe_files.image_masks(f), classes=3, size=8),
    "image-pairs": lambda f: case("image-pairs", path=recipe_files.image_pairs(f), crop=16),
    "captions": lambda f: case("captions", path=recipe_files.captions(f), size=8, tokenizer=str(recipe_files.tokenizer(f / "t.json"))),
    "choices": lambda f: case("choices", path=recipe_files.choices(f)),
    "squad": lambda f: case("squad", path=recipe_files.squad(f), tokenizer=str(recipe_files.tokenizer(f / "t.json")), length=24, stride=8),
    "text": lambda f: case("text", path=recipe_files.text(f), context=8),
}


@pytest.mark.parametrize("what", list(FETCHED))
def test_another_process_fetches_the_same_batches(tmp_path, what):
    source, keys = FETCHED[what](tmp_path)
    data = load(source, **keys)
    for split in (data.train, data.test):
        here = split.batch([1, 0])
        there = pickle.loads(pickle.dumps(split)).batch([1, 0])  # noqa: S301 - what processes that fetch batches are sent
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
        assert len({len(column) for column in here.values()}) == 1


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_is_missing_or_damaged_is_named(tmp_path, own_cache, what):
    make, message = BROKEN[what]
    source, keys = make(tmp_path)
    with pytest.raises(GetaError, match=message):
        load(source, **keys)


def test_a_damaged_picture_is_named_when_it_is_fetched(tmp_path):
    recipe_files.image_folder(tmp_path)
    bad = truncated(tmp_path / "train" / "n01" / "0.JPEG")
    bad.write_bytes(bad.read_bytes()[:100])
    data = load("image-folder", path=tmp_path, size=8)
    with pytest.raises(GetaError, match=f"'{bad}' can't be decoded"):
        data.train.batch([4])
    assert len(data.train.batch([3])["images"]) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "idx", "path": "x", "mean": [0.5]}, "mean and std go together"),
        ({"source": "cifar", "path": "x", "std": [0.0], "mean": [0.0]}, "above 0"),
        ({"source": "image-folder", "path": "x", "size": 32, "resize": 16}, r"resize \(16\) must be at least size"),
        ({"source": "pictures", "scale": 3, "crop": 32}, r"crop \(32\) must be a multiple of scale"),
        ({"source": "squad", "path": "x", "tokenizer": "x", "length": 32, "stride": 16}, "less than half of length"),
        ({"source": "cifr", "path": "x"}, "does not match any of the expected tags"),
        ({"source": "cifar", "path": "x", "clases": 10}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_settings_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        SETTINGS.validate_python(keys)


def test_a_recipe_as_run_with_every_default_filled_in_loads_again(tmp_path):
    settings = SETTINGS.validate_python({"source": "text", "path": recipe_files.text(tmp_path), "test_path": tmp_path, "context": 8})
    filled_in = SETTINGS.validate_python(json.loads(settings.model_dump_json()))
    assert len(filled_in.load().train) == len(settings.load().train)


def test_settings_survive_being_written_down(tmp_path):
    settings = SETTINGS.validate_python({"source": "cifar", "path": "~/x", "mean": [0.5] * 3, "std": [1.0] * 3})
    assert SETTINGS.validate_python(json.loads(settings.model_dump_json())) == settings
    assert settings.path == Path.home() / "x"
