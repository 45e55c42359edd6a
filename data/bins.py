"""From a corpus to files of token ids, once: in a stream, on all CPUs, with flat memory, going on after a kill.

    corpus = prepare_bins("shakespeare", "char")     # data/cache/shakespeare-char-1a2b3c4d/{train,val}.bin, ...

The corpus is read twice: once for its hash (and length, and characters), which names the folder; then to encode it, in
pieces cut where a cut changes no id. What is encoded is appended to train.part and val.part, and every few seconds
progress.json says how much of them is safe; a later call cuts them there and goes on. At the end they become
train.bin and val.bin, and meta.json comes last: half a folder is never taken for a whole one.
Neighbours: source.py reads, tokenizer.py encodes, loader.py draws batches, one_process.py keeps others waiting.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from core.files import UserError, read_json, write_json
from data.one_process import only_one
from data.source import DATA, Source, find_source
from data.tokenizer import BPE_VOCAB_SIZE, Tokenizer, code_points, load_tokenizer, train_tokenizer

FORMAT = 1  # of a cache folder; another number makes another folder
PARTS = ("train", "val")
PIECE = 2**20                # characters that are encoded at once
LONGEST_PIECE = 16 * PIECE   # a stretch of text without a place to cut is cut here all the same
BPE_TEXT = 2**28             # characters at most that bpe learns from, spread over the training part
JOURNAL_SECONDS = 5.0        # from one progress.json to the next
REMEMBERED = 2**26           # bytes: the hash of files larger than this is kept with their sizes and times


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized corpus on disk: train.bin, and in val.bin the validation split or the last tenth."""

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


def prepare_bins(dataset: str, tokenizer_kind: str = "char", vocab_size: int = 0, *, block_size: int = 1,
                 tokenizer: Tokenizer | None = None, data: Path | None = None, text_field: str = "text") -> Corpus:
    """Tokenizes a corpus once into a folder under `data`/cache; later calls find it there.

    vocab_size: how many tokens bpe trains, 0 for its default. block_size: both parts must hold a window of it, or
    nothing is kept. tokenizer: takes the place of a new one, as when a run goes on or starts from another; where it is
    what these settings made before, that is used.
    text_field: of JSON lines and parquet. The folder's name carries a hash of the text and of all settings, so nothing
    there is ever out of date. Raises UserError.
    """
    data = data or DATA
    source = find_source(dataset, data, text_field)
    scan = scanned(source, data / "cache", tokenizer is None and tokenizer_kind == "char")
    origin = {"format": FORMAT, "sha256": scan.sha256, "split": scan.split, "tokenizer": tokenizer_kind,
              "vocab_size": (vocab_size or BPE_VOCAB_SIZE) if tokenizer_kind == "bpe" else 0}
    folder = folder_of(source, origin, data)
    found = find_bins(folder, origin)
    if tokenizer is not None and (found is None or found.tokenizer.to_json() != tokenizer.to_json()):
        origin |= {"tokenizer": tokenizer.name, "vocab_size": sha256(json.dumps(tokenizer.to_json()))}
        folder = folder_of(source, origin, data)
        found = find_bins(folder, origin)
    if found is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder):
                found = find_bins(folder, origin)  # by the process that was waited for
                if found is None:
                    return Preparation(source, scan, folder, origin).run(tokenizer, tokenizer_kind, vocab_size,
                                                                         block_size)
        except OSError as error:
            kept = " What is tokenized is kept: the same command goes on." * (folder / "progress.json").exists()
            raise UserError(f"{folder} cannot be written: {error.strerror}. Make room or change its permissions.{kept}"
                            ) from None
    check_lengths(found.meta, block_size)
    return found


def folder_of(source: Source, origin: dict[str, Any], data: Path) -> Path:
    short = re.sub(r"[^\w.-]+", "_", source.name)[:40]
    return data / "cache" / f"{short}-{origin['tokenizer']}-{sha256(json.dumps(origin))[:8]}"


def find_bins(folder: Path, origin: dict[str, Any]) -> Corpus | None:
    """The corpus in a cache folder, or None where it is not there, not whole or not made from `origin`."""
    try:
        meta = read_json(folder / "meta.json")
        sizes = [meta[f"{part}_tokens"] * np.dtype(meta["dtype"]).itemsize for part in PARTS]
        if meta["source"] != origin or sizes != [(folder / f"{part}.bin").stat().st_size for part in PARTS]:
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


def check_lengths(meta: dict[str, Any], block_size: int) -> None:
    for part in ("val", "train"):  # the shorter one first, for its remedy is good for both
        check_length(meta[f"{part}_tokens"], block_size, part)


# ---- the first reading ----

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
        """Only what has a validation split of its own says that it begins."""
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
    return tqdm(None, f"{what} {source.name}", total, unit="B", unit_scale=True, delay=1.5, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10)


# ---- the second reading ----

Job = tuple[str, list[tuple[str, bool]]]  # part, and texts, each with whether a document ends after it


def jobs_of(source: Source, scan: Scan, cut: re.Pattern[str] | None, tally: Tally) -> Iterator[Job]:
    """The corpus in jobs of about PIECE characters: always the same ones for the same corpus and `cut`."""
    def parts() -> Iterator[tuple[str, Iterator[Iterator[str]]]]:
        tally.begin_part("train")
        documents = (tally.count(document, source.joined) for document in source.documents(source.train))
        if source.val:
            yield "train", documents
            tally.begin_part("val")
            yield "val", (tally.count(document, source.joined) for document in source.documents(source.val))
        elif source.joined:
            head, tail = divided(next(documents), int(scan.split))
            yield "train", iter([head])
            yield "val", iter([tail])
        else:
            yield "train", itertools.islice(documents, scan.train_documents)
            yield "val", documents

    for part, documents in parts():
        job: list[tuple[str, bool]] = []
        size = 0
        for document in documents:
            for text, last in with_last(pieces_of(document, cut)):
                job.append((text, last and not source.joined))
                size += len(text)
                if size >= PIECE:
                    yield part, job
                    job, size = [], 0
        if job:
            yield part, job


def divided(pieces: Iterator[str], at: int) -> tuple[Iterator[str], Iterator[str]]:
    """The first `at` characters, and the rest, to be read after those."""
    rest: list[str] = []

    def head() -> Iterator[str]:
        left = at
        for piece in pieces:
            if len(piece) > left:
                rest.append(piece[left:])
                yield piece[:left]
                return
            left -= len(piece)
            yield piece

    def tail() -> Iterator[str]:
        yield from rest
        yield from pieces

    return head(), tail()


def pieces_of(texts: Iterator[str], cut: re.Pattern[str] | None) -> Iterator[str]:
    """One text in pieces of at least PIECE characters but for the last, cut at the first place after so many where
    that changes no id. cut None: in one."""
    if cut is None:
        yield "".join(texts)
        return
    text = ""
    for more in texts:
        text += more
        while len(text) > PIECE:
            match = cut.search(text, PIECE)
            if match is None and len(text) < LONGEST_PIECE:
                break
            at = match.start() if match else LONGEST_PIECE
            yield text[:at]
            text = text[at:]
    if text:
        yield text


def with_last(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each with whether it is the last one."""
    iterator = iter(items)
    for before in iterator:
        for item in iterator:
            yield before, False
            before = item
        yield before, True


@dataclasses.dataclass
class Preparation:
    """One corpus on its way to its folder, which nobody else writes to meanwhile."""

    source: Source
    scan: Scan
    folder: Path
    origin: dict[str, Any]

    def run(self, tokenizer: Tokenizer | None, kind: str, vocab_size: int, block_size: int) -> Corpus:
        """Raises UserError and leaves nothing behind; an OSError or Ctrl-C leaves what progress.json vouches for."""
        try:
            (self.folder / "meta.json").unlink(missing_ok=True)
            counts, resumed = self.begin()
            if tokenizer is None:
                tokenizer = resumed or train_tokenizer(kind, self.lesson(kind), vocab_size)
            dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
            tally = Tally()
            self.encode(tokenizer, dtype, counts, tally)
            if tally.hash.hexdigest() != self.scan.sha256:
                raise UserError(f"{', '.join(map(str, self.source.files[:3]))}: the text changed while it was read. "
                                "Let whatever writes it finish, and try again.")
            meta = {"dataset": self.source.name, "source": self.origin, "vocab_size": tokenizer.vocab_size,
                    "dtype": dtype, **{f"{part}_tokens": counts[f"{part}_tokens"] for part in PARTS},
                    **{f"{part}_bytes": counts[f"{part}_bytes"] for part in PARTS}}
            check_lengths(meta, block_size)
            for part in PARTS:
                os.replace(self.folder / f"{part}.part", self.folder / f"{part}.bin")
            tokenizer.save(self.folder / "tokenizer.json")
            write_json(self.folder / "meta.json", meta)
            (self.folder / "progress.json").unlink(missing_ok=True)
        except BaseException as error:
            self.clean(keep=not isinstance(error, UserError) and (self.folder / "progress.json").exists())
            raise
        print(f"{self.source.name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
              f"vocabulary {tokenizer.vocab_size:,} ({tokenizer.name})", file=sys.stderr)
        return Corpus(self.folder, tokenizer, meta)

    def begin(self) -> tuple[dict[str, int], Tokenizer | None]:
        """Where an earlier attempt got to, with its tokenizer; or nothing done and None."""
        nothing = {"jobs": 0} | {f"{part}_{what}": 0 for part in PARTS for what in ("tokens", "bytes", "size")}
        with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # anything missing or broken: from the start
            before = read_json(self.folder / "progress.json")
            tokenizer = load_tokenizer(self.folder / "tokenizer.json")
            counts = {key: int(before["counts"][key]) for key in nothing}
            for part in PARTS:
                path, size = self.folder / f"{part}.part", counts[f"{part}_size"]
                if not path.exists():  # it had its final name, and the end was near
                    os.replace(self.folder / f"{part}.bin", path)
                if path.stat().st_size < size:
                    raise UserError(f"{path} is shorter than it was")
            if before["source"] == self.origin:
                for part in PARTS:
                    os.truncate(self.folder / f"{part}.part", counts[f"{part}_size"])
                return counts, tokenizer
        (self.folder / "progress.json").unlink(missing_ok=True)
        for part in PARTS:
            (self.folder / f"{part}.part").write_bytes(b"")
        return nothing, None

    def clean(self, keep: bool) -> None:
        with contextlib.suppress(OSError):
            for name in () if keep else ("train.part", "val.part", "progress.json"):
                (self.folder / name).unlink(missing_ok=True)

    def lesson(self, kind: str) -> Iterator[str]:
        """What a new tokenizer learns from: characters from all that the text has, bpe from the training part alone."""
        if kind != "bpe":
            yield self.scan.characters
            return
        step = -(-self.scan.chars // BPE_TEXT)  # every so many jobs
        for number, (part, texts) in enumerate(jobs_of(self.source, self.scan, Tokenizer.cut, Tally())):
            if part == "val":
                return
            if number % step == 0:
                yield "\n".join(text for text, _ in texts)

    def encode(self, tokenizer: Tokenizer, dtype: str, counts: dict[str, int], tally: Tally) -> None:
        """Appends to the two .part files what is not there yet. counts: brought up to date on the way."""
        def work(texts: list[tuple[str, bool]]) -> tuple[np.ndarray, int]:
            arrays = []
            for text, ends in texts:
                arrays.append(tokenizer.encode_array(text))
                if ends:
                    arrays.append(end)
            return np.concatenate(arrays).astype(dtype), sum(len(text.encode("utf-8")) for text, _ in texts)

        end = np.array([] if self.source.joined else tokenizer.end, dtype=np.uint32)
        workers = cpus()
        waiting: collections.deque[tuple[str, Future[tuple[np.ndarray, int]]]] = collections.deque()
        saved = time.monotonic()
        with contextlib.ExitStack() as stack:
            files = {part: stack.enter_context(open(self.folder / f"{part}.part", "ab")) for part in PARTS}
            progress = stack.enter_context(bar(self.source, "tokenizing"))
            # Threads: tiktoken and numpy let go of Python's lock, and nothing has to be copied to another process.
            pool = stack.enter_context(ThreadPoolExecutor(workers))

            def write_first() -> None:
                part, future = waiting.popleft()
                ids, n_bytes = future.result()
                files[part].write(ids.data)
                counts["jobs"] += 1
                for what, more in (("tokens", len(ids)), ("bytes", n_bytes), ("size", ids.nbytes)):
                    counts[f"{part}_{what}"] += more

            for number, (part, texts) in enumerate(jobs_of(self.source, self.scan, tokenizer.cut, tally)):
                progress.update(sum(len(text) for text, _ in texts))
                if number < counts["jobs"] + len(waiting):
                    continue  # done before a kill
                waiting.append((part, pool.submit(work, texts)))
                if len(waiting) > 2 * workers:
                    write_first()
                if time.monotonic() - saved > JOURNAL_SECONDS:
                    self.journal(tokenizer, files, counts)
                    saved = time.monotonic()
            while waiting:
                write_first()
            for file in files.values():
                sync(file)

    def journal(self, tokenizer: Tokenizer, files: Mapping[str, IO[bytes]], counts: dict[str, int]) -> None:
        for file in files.values():
            sync(file)
        if not (self.folder / "progress.json").exists():
            tokenizer.save(self.folder / "tokenizer.json")
        write_json(self.folder / "progress.json", {"source": self.origin, "counts": counts})


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def cpus() -> int:
    """That this process may run on."""
    available: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)  # not on macOS, not on Windows
    return min(32, len(available(0)) if available else os.cpu_count() or 1)
