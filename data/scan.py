"""The first reading of a corpus: its hash, which names its folder, its length, and the characters that it has.

Neighbours: source.py reads, bins.py encodes in a second reading.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.files import UserError, read_json, write_json
from core.progress import progress
from data.corpus import PARTS, sha256
from data.source import Source
from data.tokenizer import code_points

FORMAT = 1           # of what is remembered
REMEMBERED = 2**26   # bytes: the hash of files larger than this is kept with their sizes and times


@dataclasses.dataclass
class Scan:
    """What one reading of a corpus tells."""

    sha256: str           # of the text, or of the documents with a mark before each
    split: int | str      # where validation begins: a character of the one text, or what to call the split
    train_documents: int  # how many documents train on
    chars: int
    characters: str       # that the text has, in order; "" where nobody asked


def scanned(source: Source, cache: Path, want_characters: bool) -> Scan:
    """Reads the corpus, or remembers what it was where its large files have kept their sizes and times."""
    try:
        files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}. Give the path of a text file.") from None
    key = [FORMAT, files, len(source.train), source.field, source.joined]
    memory = cache / f"{sha256(json.dumps(key))[:16]}.scan.json"
    n_bytes = sum(path.stat().st_size for path in source.files)
    if n_bytes >= REMEMBERED:
        with contextlib.suppress(UserError, TypeError, KeyError):  # not there, or broken: read again
            before = read_json(memory)
            if before["key"] == key and (before["scan"]["characters"] or not want_characters):
                return Scan(**before["scan"])
    scan = read_once(source, want_characters)
    if n_bytes >= REMEMBERED:
        with contextlib.suppress(OSError):  # only time is lost
            cache.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"key": key, "scan": dataclasses.asdict(scan)})
    return scan


def read_once(source: Source, want_characters: bool) -> Scan:
    tally = Tally(np.zeros(sys.maxunicode + 1, dtype=bool) if want_characters else None)
    documents = {"train": 0, "val": 0}
    with bar(source, "reading") as progress:
        for part, files in zip(PARTS, (source.train, source.val), strict=True):
            tally.begin_part(part)
            for document in source.documents(files) if files else ():
                for piece in tally.count(document, source.joined):
                    progress.update(len(piece))
                documents[part] += 1
    if tally.blank:
        raise UserError(f"{', '.join(map(str, source.files[:3]))}: the text is empty. Give one with at least a few "
                        "thousand characters.")
    if want_characters and not source.joined:
        tally.see("\n")  # what stands between documents
    held_back = min(max(1, documents["train"] // 10), 10_000)  # documents
    split: int | str = tally.chars * 9 // 10  # by characters, as nanoGPT splits
    if source.val:
        split = "given, one text" if source.joined else "given"
    elif not source.joined:
        split = f"last {held_back} documents"
        documents["train"] -= held_back
    characters = "" if tally.seen is None else "".join(map(chr, np.flatnonzero(tally.seen)))
    return Scan(tally.hash.hexdigest(), split, documents["train"], tally.chars, characters)


class Tally:
    """Counts and hashes what is read. The hash of one text is that of its UTF-8; bytes that no UTF-8 holds stand before
    each of several documents, and before a validation split."""

    def __init__(self, seen: np.ndarray | None = None) -> None:
        self.hash, self.chars, self.blank = hashlib.sha256(), 0, True
        self.seen = seen  # (code points,) bool

    def begin_part(self, part: str) -> None:
        """part: train or val. The hash of a corpus without a validation split of its own knows of no parts."""
        self.pending = b"\xfe" if part == "val" else b""

    def count(self, document: Iterator[str], joined: bool) -> Iterator[str]:
        """The same pieces."""
        self.hash.update(self.pending + (b"" if joined else b"\xff"))
        self.pending = b""
        for piece in document:
            self.hash.update(piece.encode("utf-8"))
            self.chars += len(piece)
            self.blank = self.blank and not piece.strip()
            self.see(piece)
            yield piece

    def see(self, piece: str) -> None:
        if self.seen is not None:
            self.seen[code_points(piece)] = True


def bar(source: Source, what: str) -> "tqdm[Any]":
    """A progress bar over characters, about as many as bytes; what is quick shows none."""
    total = sum(path.stat().st_size for path in source.files)
    return progress(None, f"{what} {source.name}", total=total, unit="B", unit_scale=True, delay=1.5)
