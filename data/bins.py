"""From a corpus to files of token ids, once: in a stream, on all CPUs, with flat memory, going on after a kill.

    corpus = prepare_bins("shakespeare", "char")     # data/cache/shakespeare-char-1a2b3c4d/{train,val}.bin, ...

The corpus is read twice: once for its hash (and length, and characters), which names the folder (scan.py); then to
encode it, in pieces cut where a cut changes no id (pieces.py). What is encoded is appended to train.part and val.part,
and every few seconds progress.json says how much of them is safe; a later call cuts them there and goes on. At the end
they become train.bin and val.bin, and meta.json comes last: half a folder is never taken for a whole one (corpus.py).
Neighbours: source.py reads, tokenizer.py encodes, loader.py draws batches, one_process.py keeps others waiting.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from core.files import UserError, read_json, write_json
from data.corpus import PARTS, Corpus, check_lengths, checksums, find_bins, sha256
from data.one_process import only_one
from data.pieces import jobs_of
from data.scan import Scan, Tally, bar, scanned
from data.source import DATA, Source, find_source
from data.tokenizer import BPE_VOCAB_SIZE, Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 1  # of a cache folder; another number makes another folder
BPE_TEXT = 2**28             # characters at most that bpe learns from, spread over the training part
JOURNAL_SECONDS = 5.0        # from one progress.json to the next


def prepare_bins(dataset: str, tokenizer_kind: str = "char", vocab_size: int = 0, *, block_size: int = 1,
                 tokenizer: Tokenizer | None = None, data: Path | None = None, text_field: str = "text",
                 text_sha256: str = "", quiet: bool = False) -> Corpus:
    """Tokenizes a corpus once into a folder under `data`/cache; later calls find it there.

    vocab_size: how many tokens bpe trains, 0 for its default. block_size: both parts must hold a window of it, or
    nothing is kept. tokenizer: taken instead of a new one, as when a run resumes or starts from another; where these
    settings have made the same one before, its folder is used.
    text_field: of JSON lines and parquet. text_sha256: which text it has to be. The folder's name carries a hash of the
    text and of all settings, so nothing there is ever out of date. Raises UserError.
    """
    data = data or DATA
    source = find_source(dataset, data, text_field)
    scan = scanned(source, data / "cache", tokenizer is None and tokenizer_kind == "char")
    if text_sha256 not in ("", scan.sha256):
        raise UserError(f"--dataset {dataset} is not the text that the run was trained on (its sha256 is "
                        f"{scan.sha256[:16]}..., not {text_sha256[:16]}...). Restore that one, or train on this one "
                        "from the run's weights: --init-from RUN and another --out-dir.")
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
                                                                         block_size, quiet)
        except OSError as error:
            kept = " What is tokenized is kept: the same command goes on." * (folder / "progress.json").exists()
            raise UserError(f"{folder} cannot be written: {error.strerror}. Make room or change its permissions.{kept}"
                            ) from None
    check_lengths(found.meta, block_size)
    return found


def text_sha256(dataset: str, text_field: str) -> str:
    """The hash of the corpus that --dataset names, which is what meta.json and checkpoints know it by."""
    return scanned(find_source(dataset, DATA, text_field), DATA / "cache", want_characters=False).sha256


def folder_of(source: Source, origin: dict[str, Any], data: Path) -> Path:
    short = re.sub(r"[^\w.-]+", "_", source.name)[:40]
    return data / "cache" / f"{short}-{origin['tokenizer']}-{sha256(json.dumps(origin))[:8]}"


@dataclasses.dataclass
class Preparation:
    """One corpus on its way to its folder, which nobody else writes to meanwhile."""

    source: Source
    scan: Scan
    folder: Path
    origin: dict[str, Any]

    def run(self, tokenizer: Tokenizer | None, kind: str, vocab_size: int, block_size: int, quiet: bool) -> Corpus:
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
            meta["crc32"] = checksums(self.folder)
            write_json(self.folder / "meta.json", meta)
            (self.folder / "progress.json").unlink(missing_ok=True)
        except BaseException as error:
            self.clean(keep=not isinstance(error, UserError) and (self.folder / "progress.json").exists())
            raise
        if not quiet:
            print(f"{self.source.name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to "
                  f"validate, vocabulary {tokenizer.vocab_size:,} ({tokenizer.name})", file=sys.stderr)
        return Corpus(self.folder, tokenizer, meta)

    def begin(self) -> tuple[dict[str, int], Tokenizer | None]:
        """Where an earlier attempt got to, with its tokenizer; or nothing done and None."""
        nothing = {"jobs": 0} | {f"{part}_{what}": 0 for part in PARTS for what in ("tokens", "bytes", "size")}
        # Anything missing or broken: from the start.
        with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError, OverflowError):
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
