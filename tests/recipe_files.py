"""Tiny data sets in the formats that they really have on disk, for the sources of recipes. Every function fills a folder and returns it."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "the tower was built of red brick by a man called anna in paris long before when who".split()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, height: int, width: int, *, channels: int = 3, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3, seed=seed) if channels == 3 else noise(height, width, seed=seed)).save(path)


def image_folder(folder: Path, *, classes: int = 3, each: int = 4, size: int = 20, test: str = "val") -> Path:
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG as ImageNet has them, with pictures that are not square."""
    for part, count in (("train", each), (test, 2)):
        for label in range(classes):
            for number in range(count):
                picture(folder / part / f"n0{label}" / f"{number}.JPEG", size, size + 4 + number, seed=100 * label + number)
    return folder


def image_masks(folder: Path, *, count: int = 3, size: int = 10) -> Path:
    """Pictures and palette masks with classes 0 to 2, and 255 in the first row."""
    for part in ("train", "test"):
        for number in range(count):
            picture(folder / part / "images" / f"{number}.jpg", size, size + 2, seed=number)
            classes = noise(size, size + 2, seed=number) % 3
            classes[0] = 255
            mask = Image.fromarray(classes)
            mask.putpalette(noise(768).tolist())
            (folder / part / "masks").mkdir(exist_ok=True)
            mask.save(folder / part / "masks" / f"{number}.png")
    return folder


def idx_bytes(array: np.ndarray) -> bytes:
    assert array.dtype == np.uint8
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx(folder: Path, *, count: int = 12, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", count), ("t10k", 6)):
        images, labels = noise(rows, 8, 8, seed=rows), (np.arange(rows) % 3).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            raw = idx_bytes(array)
            (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def cifar10(folder: Path, *, each: int = 4) -> Path:
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        records = noise(each, 3073, seed=number)
        records[:, 0] = (np.arange(each) + number) % 10
        (inner / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def cifar100(folder: Path, *, each: int = 8) -> Path:
    inner = folder / "cifar-100-binary"
    inner.mkdir(parents=True)
    for name in ("train", "test"):
        records = noise(each, 3074)
        records[:, 0], records[:, 1] = np.arange(each) % 20, 99 - np.arange(each)
        (inner / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def image_pairs(folder: Path, *, low: bool = False, sizes: tuple[tuple[int, int], ...] = ((50, 64), (48, 41))) -> Path:
    """DIV2K's folders; low: also pictures of half the size, named as DIV2K does."""
    for part in ("DIV2K_train_HR", "DIV2K_valid_HR"):
        for number, (height, width) in enumerate(sizes):
            picture(folder / part / f"{number:04}.png", height, width, seed=number)
            if low:
                picture(folder / part.replace("_HR", "_LR_bicubic") / "X2" / f"{number:04}x2.png", height // 2, width // 2, seed=number)
    return folder


def tokenizer(path: Path) -> Path:
    """A tokenizer.json that knows WORDS, with BERT's special tokens."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: place for place, word in enumerate([*marks, *WORDS, ".", "?"])}
    built = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    built.add_special_tokens(marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    built.save(str(path))
    return path


def word_pieces(path: Path) -> Path:
    """BERT's vocab.txt for the same words."""
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "?"]) + "\n")
    return path


def squad(folder: Path, *, questions: int = 3, length: int = 30) -> Path:
    """train-v1.1.json and dev-v1.1.json; the texts have `length` words, and the answer stands somewhere among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        paragraphs = []
        for number in range(questions):
            words = [WORDS[(3 * place + number) % len(WORDS)] for place in range(length)]
            place = (7 * number) % (length - 2)
            start = len(" ".join([*words[:place], ""]))
            answer = {"text": " ".join(words[place : place + 2]), "answer_start": start}
            asked = {"id": f"{number}", "question": "Who built the tower?", "answers": [answer]}
            paragraphs.append({"context": " ".join(words), "qas": [asked]})
        (folder / name).write_text(json.dumps({"version": "1.1", "data": [{"title": "Tower", "paragraphs": paragraphs}]}))
    return folder


def choices(folder: Path, *, questions: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [
            {
                "question": f"the man {WORDS[number]}",
                "choices": [WORDS[1], " ".join(WORDS[2:5]), "red"][: 2 + number % 2],
                "answer": number % 2,
            }
            for number in range(questions)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def captions(folder: Path, *, count: int = 6) -> Path:
    """Pictures and Flickr8k's kind of file, two captions for each picture."""
    rows = ["image,caption"]
    for number in range(count):
        picture(folder / "images" / f"{number}.png", 12, 14, seed=number)
        rows += [f'{number}.png,"a {WORDS[number]}, red"', f"{number}.png,the {WORDS[number]}"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


def text(folder: Path, *, files: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text(f"{number}: größe " + " ".join(WORDS) * 3, encoding="utf-8")
    return folder
