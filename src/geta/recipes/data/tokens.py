"""Text as numbers: bytes as they are, or a fast tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geta.errors import ConfigError, GetaError
from geta.recipes.data.files import read_text

BYTES = "bytes"


Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Encoded:
    """ids: int64, one per token. ends: where each token ends in the text, in bytes of UTF-8 from its start."""

    ids: Integers
    ends: Integers


class Tokens:
    """Text to ids. name: "bytes" (ids are the bytes of UTF-8), or what `load_tokenizer` takes."""

    def __init__(self, name: str) -> None:
        self.tokenizer = None if name == BYTES else load_tokenizer(name)

    @property
    def vocabulary(self) -> int:
        """How many different ids there can be."""
        return 256 if self.tokenizer is None else len(self.tokenizer)

    @property
    def padding(self) -> int:
        """The id that fills rows up: the tokenizer's own padding, else 0 (which is no byte of ordinary text)."""
        found = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return 0 if found is None else int(found)

    def encode(self, text: str) -> Encoded:
        """The tokens of a text without special ones."""
        if self.tokenizer is None:
            raw = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            return Encoded(raw, np.arange(1, len(raw) + 1))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = np.array([end for _, end in found["offset_mapping"]], np.int64)
        return Encoded(np.array(found["input_ids"], np.int64), byte_positions(text)[ends])


def byte_positions(text: str) -> Integers:
    """[len(text) + 1]: how many bytes of UTF-8 lie before each character."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before: Integers = np.concatenate([[0], np.cumsum(widths)])
    return before


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer of transformers: a folder that one was saved to, a `tokenizer.json`, BERT's `vocab.txt`, or a name on the hub.

    Raises GetaError without transformers, ConfigError when there is no fast tokenizer of that name.
    """
    try:
        import transformers
    except ImportError:
        raise GetaError(f"the tokenizer '{name}' needs transformers, which is not installed: pip install 'geta[hf]'") from None
    path = Path(name).expanduser()
    try:
        if path.is_file() and path.suffix == ".txt":
            return _word_pieces(path, transformers)
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        found = transformers.AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # the libraries below raise bare Exceptions for files that they can't read
        raise ConfigError(
            f"data.tokenizer: '{name}' can't be loaded: {error}; give 'bytes', a folder with a saved tokenizer, a tokenizer.json, "
            "a vocab.txt, or a name on the hub"
        ) from error
    if not found.is_fast:
        raise ConfigError(f"data.tokenizer: '{name}' has no fast version, and where its tokens lie in the text is needed; choose another")
    return found


def byte_rows(texts: Sequence[str]) -> list[list[int]]:
    """The bytes of every text, as rows for `padded`."""
    return [list(text.encode()) for text in texts]


def _word_pieces(path: Path, transformers: Any) -> Any:
    """BERT's tokenizer from its list of word pieces; texts are made lower case when no piece has an upper-case letter."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pieces = read_text(path).split("\n")
    places = {piece: row for row, piece in enumerate(pieces) if piece}
    marks = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    missing = [mark for mark in marks.values() if mark not in places]
    if missing:
        raise ConfigError(f"'{path}' is no list of BERT's word pieces: it lacks {', '.join(missing)}")
    lower = not any(piece != piece.lower() for piece in places if piece not in marks.values())
    built = tokenizers.Tokenizer(models.WordPiece(places, unk_token="[UNK]"))  # noqa: S106
    built.normalizer = normalizers.BertNormalizer(lowercase=lower)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", places["[SEP]"]), ("[CLS]", places["[CLS]"]))
    built.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **marks)
