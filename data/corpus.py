"""A tokenized corpus on disk: a folder with train.bin, val.bin, tokenizer.json and, written last, meta.json.

Neighbours: bins.py makes it, loader.py draws batches from it.
"""

import dataclasses
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from core.files import UserError, read_json
from data.tokenizer import Tokenizer, load_tokenizer

PARTS = ("train", "val")
CHECKED = 2**26  # bytes of a part


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized corpus on disk: train.bin, and in val.bin the validation split, or what was held back as one."""

    folder: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]  # as in meta.json: dataset, sha256 and sizes of the text, dtype of the ids

    @property
    def train(self) -> Path:
        return self.folder / "train.bin"

    @property
    def val(self) -> Path:
        return self.folder / "val.bin"

    @property
    def dtype(self) -> str:
        return self.meta["dtype"]

    def bits_per_byte(self, val_loss: float) -> float:
        """val_loss in nats per token, as bits per byte of UTF-8: comparable between tokenizers."""
        return val_loss / math.log(2) * self.meta["val_tokens"] / self.meta["val_bytes"]


def find_bins(folder: Path, origin: dict[str, Any]) -> Corpus | None:
    """The corpus in a cache folder, or None where it is not there, not whole or not made from `origin`."""
    try:
        meta = read_json(folder / "meta.json")
        sizes = [meta[f"{part}_tokens"] * np.dtype(meta["dtype"]).itemsize for part in PARTS]
        if meta["source"] != origin or sizes != [(folder / f"{part}.bin").stat().st_size for part in PARTS]:
            return None
        if "crc32" in meta and meta["crc32"] != checksums(folder):
            return None
        return Corpus(folder, load_tokenizer(folder / "tokenizer.json"), meta)
    except (UserError, OSError, KeyError, TypeError):  # broken in one way or another: the caller makes it anew
        return None


def checksums(folder: Path) -> list[int]:
    """CRC-32 of the beginnings of the parts: large ones are not read through at every start."""
    found = []
    for part in PARTS:
        crc = 0
        with open(folder / f"{part}.bin", "rb") as file:
            while file.tell() < CHECKED and (block := file.read(2**20)):
                crc = zlib.crc32(block, crc)
        found.append(crc)
    return found


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_length(n_tokens: int, block_size: int, part: str) -> None:
    """A window is block_size tokens and the one after them."""
    name = {"train": "training", "val": "validation"}.get(part, part)
    if not n_tokens:
        raise UserError(f"the {name} part of the text is empty. Take more documents, or longer ones.")
    if n_tokens <= block_size:
        remedy = f"--block-size {n_tokens - 1} or less, or a longer text" if n_tokens > 1 else "a longer text"
        raise UserError(f"block_size {block_size} is longer than the text: its {name} part has {n_tokens} tokens, and "
                        f"{block_size + 1} are needed. Take {remedy}.")


def check_lengths(meta: dict[str, Any], block_size: int) -> None:
    for part in ("val", "train"):  # the shorter one first, for its remedy is good for both
        check_length(meta[f"{part}_tokens"], block_size, part)
