"""What --dataset names, read as a stream: documents in pieces, so that memory stays flat however large the corpus is.

    source = find_source("path/to/folder")              # .txt, .jsonl, .parquet, or a folder of them; hf:NAME:CONFIG
    for document in source.documents(source.train): ... # each an iterator of pieces of text

Texts alone are one text, with a line's end between two files. As soon as one file holds documents (JSON lines, parquet)
all do, and a .txt is one document. data/prepare.py makes the two corpora that have a name, data/hub.py fetches what
begins with hf:, data/bins.py tokenizes.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.config import did_you_mean
from core.files import UserError
from data.prepare import CORPORA, DATA, prepare
from data.tokenizer import mended

BLOCK = 2**20  # bytes read at a time, at least 3
LONGEST_LINE = 2**28  # bytes of one JSON document; more is no document but a mistake
DOCUMENTS = (".jsonl", ".ndjson", ".parquet")
ENDINGS = (".txt", *DOCUMENTS)
SPLIT = re.compile(r"(?:^|[-_. ])(train(?:ing)?|val|valid|validation|test)(?:[-_. ]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a corpus, in order, and how they are read."""

    name: str
    train: list[Path]
    val: list[Path] = dataclasses.field(default_factory=list)  # empty: some of train is held back (scan.py)
    field: str = "text"   # which field of a JSON document or column of a parquet file holds the text
    joined: bool = False  # the files make one text; else documents, with an end after each

    @property
    def files(self) -> list[Path]:
        return self.train + self.val

    def documents(self, files: list[Path]) -> Iterator[Iterator[str]]:
        """Each document as an iterator of non-empty pieces, to be used up before the next one is asked for.
        Raises UserError for what cannot be read, is no UTF-8 text or lacks the field."""
        if self.joined:
            yield self.one_text(files)
            return
        for path in files:
            if ending(path) == ".txt":
                yield read_text(path)
            else:
                yield from (iter([text]) for text in self.fields(path) if text)

    def one_text(self, files: list[Path]) -> Iterator[str]:
        for number, path in enumerate(files):
            if ending(path) in DOCUMENTS:  # rows that are lines of one text
                yield from (text for text in self.fields(path) if text)
            else:
                if number:
                    yield "\n"
                yield from read_text(path)

    def fields(self, path: Path) -> Iterator[str]:
        return read_parquet(path, self.field) if ending(path) == ".parquet" else read_jsonl(path, self.field)


def ending(path: Path) -> str:
    return path.suffix.lower()


def find_source(dataset: str, data: Path | None = None, field: str = "text") -> Source:
    """What --dataset names.

    In this order: hf: and a name of Hugging Face's; a corpus of data/prepare.py, made now where it is missing; a
    folder, whose .txt, .jsonl and .parquet files count (if every name says train, validation or test, that is the
    split); a file; a text in the folder `data` (this one), with or without its ending. UserError if it is none of them.
    """
    data = data or DATA
    if dataset.startswith("hf:"):
        from data.hub import fetch_dataset  # the optional library, only where it is asked for

        return fetch_dataset(dataset, data, field)
    if dataset in CORPORA:
        return Source(dataset, [prepare(dataset, data)], joined=True)
    if dataset and os.path.isdir(dataset):
        files = sorted(path for path in Path(dataset).iterdir() if ending(path) in ENDINGS and path.is_file())
        if not files:
            raise UserError(f"--dataset {dataset}: no .txt, .jsonl or .parquet file in this folder. Put texts there, "
                            "or name a file.")
        others = sorted(path.name for path in Path(dataset).iterdir() if path not in files and path.name[0] != ".")
        if others:
            note(f"{dataset}: {', '.join(others[:3])}{' and others' if len(others) > 3 else ''} left out; what is read "
                 "are .txt, .jsonl and .parquet files of the folder itself")
        return source_of(Path(dataset).resolve().name, files, field)
    for path in (dataset, *(os.path.join(data, dataset + suffix) for suffix in ("", *ENDINGS))):
        if dataset and os.path.isfile(path):
            if ending(Path(path)) in (".json", ".csv", ".tsv"):
                note(f"{path} is read as plain text, with all its quotes and commas. Where each line is a JSON "
                     "document, rename it to .jsonl")
            return source_of(Path(path).stem, [Path(path)], field)
    if dataset.removesuffix(".txt") in CORPORA:
        return find_source(dataset.removesuffix(".txt"), data, field)
    known = sorted({*CORPORA, *(path.stem for suffix in ENDINGS for path in data.glob(f"*{suffix}"))})
    raise UserError(f"--dataset {dataset!r} is neither a file, a folder, nor a text in data/."
                    f"{did_you_mean(dataset, known)} Known: {', '.join(known)}; or give the path of a text file.")


def source_of(name: str, files: list[Path], field: str) -> Source:
    """Files sorted into training and validation by their names, where those tell for every one; a test split is left
    out."""
    joined = not any(ending(path) in DOCUMENTS for path in files)
    said = [match[1].lower()[:2] if (match := SPLIT.search(path.stem)) else "" for path in files]
    train, val, test = ([path for path, part in zip(files, said, strict=True) if part == kind]
                        for kind in ("tr", "va", "te"))
    if train and all(said):
        if test:
            note(f"{name}: {', '.join(path.name for path in test)} left out, as a test split")
        return Source(name, train, val, field, joined)
    if len(files) > 1 and (val or test):
        note(f"{name}: {(val + test)[0].name} is read like the others, as "
             + ("not every file is named train, validation or test" if train else "no file is named train"))
    return Source(name, files, field=field, joined=joined)


@functools.cache  # once, however often the text is looked up
def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def read_text(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces, as an editor would show it: no byte order mark, lines that end with \\n."""
    offset, held, carriage = 0, b"", ""  # bytes before `held`; a character cut in two; a \r whose \n may yet come
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(BLOCK)
                at = block.find(b"\0")
                if at >= 0:
                    raise UserError(f"{path} is binary: a NUL byte at offset {offset + len(held) + at}. Give a plain "
                                    "text file in UTF-8.")
                if offset == 0 and not held and block.startswith(b"\xef\xbb\xbf"):
                    block, offset = block[3:], 3
                content = held + block
                try:
                    text, used = content.decode("utf-8"), len(content)
                except UnicodeDecodeError as error:
                    if not block or error.reason != "unexpected end of data":
                        raise UserError(
                            f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset "
                            f"{offset + error.start}. Convert it to UTF-8, or give a text file.") from None
                    text, used = content[:error.start].decode("utf-8"), error.start
                held, offset, text = content[used:], offset + used, carriage + text
                carriage = "\r" if block and text.endswith("\r") else ""
                text = text[:len(text) - len(carriage)].replace("\r\n", "\n")
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give the path of a text file.") from None


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """The field of every line's object."""
    try:
        with open(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB: one JSON object a "
                                    "line is expected.")
                if not line.strip():
                    continue
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number} is not JSON: {error}. Mend it, or leave it out.") from None
                yield text_in(content, field, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give the path of a .jsonl file.") from None


def text_in(content: Any, field: str, where: str) -> str:
    """The text of a document; null counts as empty, half a surrogate pair as U+FFFD."""
    if not isinstance(content, dict) or field not in content:
        has = sorted(map(str, content))[:8] if isinstance(content, dict) else []
        raise UserError(f"{where} has no field {field!r}.{did_you_mean(field, has)} "
                        + (f"It has: {', '.join(has)}. Name the one with the text: --text-field NAME." if has else
                           "An object with a text is expected, like {\"text\": \"...\"}."))
    text = content[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is no text but {type(text).__name__}. Name another: "
                        "--text-field NAME.")
    return mended(text).replace("\r\n", "\n")


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """The column, a few hundred rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need a library that is not installed. Get it with "
                        "`pip install pyarrow`.") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise UserError(f"{path} has no column {field!r}.{did_you_mean(field, names)} It has: "
                                f"{', '.join(names[:8])}. Name the one with the text: --text-field NAME.")
            for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                for value in batch.column(0):
                    yield text_in({field: value.as_py()}, field, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error)[:200]}. Restore it from its source.") from None
