"""From a text to batches: find it, tokenize it once, draw from it. train.py and compare.py stand on this.

    corpus = prepare_bins("shakespeare", "char")     # data/cache/shakespeare-char-1a2b3c4d/{train,val}.bin, ...
    batches = Loader(corpus.train, corpus.dtype, block_size=64, batch_size=12, seed=1337)
    x, y = batches.batch(position)                   # (B, T) int64 each; position is all the state there is

data/prepare.py makes the two corpora that have a name; any other text is a path, or a .txt in this folder.
No torch here: batches are numpy arrays.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.config import did_you_mean
from core.files import UserError, atomic_file, read_json, write_json
from data.prepare import CORPORA, prepare
from data.tokenizer import BPE_VOCAB_SIZE, Tokenizer, load_tokenizer, train_tokenizer

DATA = Path(__file__).resolve().parent
FORMAT = 1  # of a cache folder; another number makes another folder


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized text on disk: the first 90% of its characters in train.bin, the rest in val.bin."""

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
        """val_loss in nats a token, as bits a byte of UTF-8: comparable between tokenizers."""
        return val_loss / math.log(2) * self.meta["val_tokens"] / self.meta["val_bytes"]


def resolve_dataset(dataset: str, data: Path | None = None) -> tuple[str, list[Path]]:
    """What --dataset names -> (short name, the files of its text, in order).

    In this order: a corpus of data/prepare.py, made now where it is missing; a folder, whose *.txt count; a file;
    a text in the folder `data` (this one), with or without its ending. Raises UserError where it is none of them.
    """
    data = data or DATA
    if dataset in CORPORA:
        return dataset, [prepare(dataset, data)]
    if dataset and os.path.isdir(dataset):
        files = sorted(Path(dataset).glob("*.txt"))
        if not files:
            raise UserError(f"--dataset {dataset}: no .txt file in this folder. Put texts there, or name a file.")
        return Path(dataset).resolve().name, files
    for path in (dataset, data / dataset, data / f"{dataset}.txt"):
        if dataset and os.path.isfile(path):
            return Path(path).stem, [Path(path)]
    if dataset.removesuffix(".txt") in CORPORA:
        return resolve_dataset(dataset.removesuffix(".txt"), data)
    known = sorted({*CORPORA, *(path.stem for path in data.glob("*.txt"))})
    raise UserError(f"--dataset {dataset!r} is neither a file, a folder, nor a text in data/."
                    f"{did_you_mean(dataset, known)} Known: {', '.join(known)}; or give the path of a text file.")


def read_text(files: list[Path]) -> str:
    """The files as one text, a newline between two of them. Raises UserError for what is no UTF-8 text."""
    texts = []
    for path in files:
        try:
            content = path.read_bytes()
            at = content.find(b"\0")
            if at >= 0:
                raise UserError(f"{path} is binary: a NUL byte at offset {at}. Give a plain text file in UTF-8.")
            texts.append(content.decode("utf-8-sig").replace("\r\n", "\n"))  # as an editor would show it
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}. "
                            "Convert it to UTF-8, or give a text file.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}. Give the path of a text file.") from None
    text = "\n".join(texts)
    if not text.strip():
        raise UserError(f"{', '.join(map(str, files[:3]))}: the text is empty. Give one with at least a few thousand "
                        "characters.")
    return text


def prepare_bins(dataset: str, tokenizer_kind: str = "char", vocab_size: int = 0, *, block_size: int = 1,
                 tokenizer: Tokenizer | None = None, data: Path | None = None) -> Corpus:
    """Tokenizes a text once into a folder under `data`/cache; later calls find it there.

    vocab_size: how many tokens bpe trains, 0 for its default. block_size: both parts must hold a window of it, or
    nothing is written. tokenizer: takes the place of a new one, as when a run goes on or starts from another.
    The folder's name carries a hash of the text and of all settings, so nothing there is ever out of date, and
    meta.json is written last, so half a folder is never taken for a whole one. Raises UserError.
    """
    data = data or DATA
    name, files = resolve_dataset(dataset, data)
    text = read_text(files)
    cut = len(text) * 9 // 10  # by characters, as nanoGPT splits
    source = {"format": FORMAT, "sha256": sha256(text), "split": cut, "tokenizer": tokenizer_kind,
              "vocab_size": (vocab_size or BPE_VOCAB_SIZE) if tokenizer_kind == "bpe" else 0}
    if tokenizer is not None:
        source |= {"tokenizer": tokenizer.name, "vocab_size": sha256(json.dumps(tokenizer.to_json()))}
    short = re.sub(r"[^\w.-]+", "_", name)[:40]
    folder = data / "cache" / f"{short}-{source['tokenizer']}-{sha256(json.dumps(source))[:8]}"
    found = find_bins(folder, source)
    if found is not None:
        for part in ("val", "train"):
            check_length(found.meta[f"{part}_tokens"], block_size, part)
        return found

    if tokenizer is None:  # bpe learns from the training part alone; characters must hold all that the text has
        tokenizer = train_tokenizer(tokenizer_kind, text[:cut] if tokenizer_kind == "bpe" else text, vocab_size)
    parts = {"train": text[:cut], "val": text[cut:]}
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    ids = {part: tokenizer.encode_array(piece).astype(dtype) for part, piece in parts.items()}
    for part in ("val", "train"):  # the shorter one first, for its remedy is good for both
        check_length(len(ids[part]), block_size, part)
    meta = {"dataset": name, "source": source, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
            **{f"{part}_tokens": len(ids[part]) for part in parts},
            **{f"{part}_bytes": len(piece.encode("utf-8")) for part, piece in parts.items()}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for part in parts:
            with atomic_file(folder / f"{part}.bin") as temporary:
                ids[part].tofile(temporary)
        tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "meta.json", meta)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Make room or change its permissions.") from None
    print(f"{name}: {len(ids['train']):,} tokens to train on, {len(ids['val']):,} to validate, "
          f"vocabulary {tokenizer.vocab_size:,} ({tokenizer.name})", file=sys.stderr)
    return Corpus(folder, tokenizer, meta)


def find_bins(folder: Path, source: dict[str, Any]) -> Corpus | None:
    """The corpus in a cache folder, or None where it is not there, not whole or not made from `source`."""
    try:
        meta = read_json(folder / "meta.json")
        sizes = [meta[f"{part}_tokens"] * np.dtype(meta["dtype"]).itemsize for part in ("train", "val")]
        if meta["source"] != source or sizes != [(folder / f"{part}.bin").stat().st_size for part in ("train", "val")]:
            return None
        return Corpus(folder, load_tokenizer(folder / "tokenizer.json"), meta)
    except (UserError, OSError, KeyError, TypeError):  # broken in one way or another: the caller makes it anew
        return None


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_length(n_tokens: int, block_size: int, part: str) -> None:
    """A window is block_size tokens and the one after them."""
    if n_tokens <= block_size:
        remedy = f"--block-size {n_tokens - 1} or less, or a longer text" if n_tokens > 1 else "a longer text"
        name = {"train": "training", "val": "validation"}.get(part, part)
        raise UserError(f"block_size {block_size} is longer than the text: its {name} part has {n_tokens} tokens, and "
                        f"{block_size + 1} are needed. Take {remedy}.")


class Loader:
    """Batches from one .bin file. Nothing in it moves: what `batch` returns depends on its arguments alone."""

    def __init__(self, path: str | os.PathLike[str], dtype: str, block_size: int, batch_size: int, seed: int,
                 rank: int = 0, world_size: int = 1) -> None:
        """path, dtype: of a Corpus. rank of world_size: which share of every position is this process's own.
        Raises UserError where the file does not hold a single window."""
        self.path = Path(path)
        check_length(self.path.stat().st_size // np.dtype(dtype).itemsize, block_size, self.path.stem)
        self.tokens = np.asarray(np.memmap(self.path, dtype=dtype, mode="r"))  # (N,), paged in as it is touched
        self.block_size, self.batch_size = block_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def batch(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch number `position` of this rank: x and y, (B, T) int64 each, y one token further on.

        Windows start anywhere. Their starts come from a generator that counts instead of remembering, keyed by the
        seed and by position * world_size + rank: W ranks draw at one position what one process draws at W of them.
        Raw words modulo the range, because those alone are promised to stay the same in every version of numpy.
        """
        key = np.array([self.seed % 2**64, position * self.world_size + self.rank], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(self.batch_size)
        starts = (words % np.uint64(len(self.tokens) - self.block_size)).astype(np.int64)
        return self.windows(starts, self.block_size)

    def eval_batches(self, batch_size: int = 0, limit: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Walks the split in windows side by side, so that every token but the first is predicted exactly once.

        batch_size: windows at a time, 0 for the loader's own. limit: so many batches, spread evenly over the split
        and always the same ones; 0 for all. Yields x and y, (b, t) int64; the last ones are smaller, so weigh a mean
        by y.size.
        """
        batch_size = batch_size or self.batch_size
        n_windows, rest = divmod(len(self.tokens) - 1, self.block_size)
        batches = [(np.arange(first, min(first + batch_size, n_windows)) * self.block_size, self.block_size)
                   for first in range(0, n_windows, batch_size)]
        if rest:
            batches.append((np.array([n_windows * self.block_size]), rest))
        if 0 < limit < len(batches):
            batches = [batches[i * len(batches) // limit] for i in range(limit)]
        for starts, length in batches:
            yield self.windows(starts, length)

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """starts (B,) -> x, y (B, length)"""
        tokens = self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, length + 1)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
