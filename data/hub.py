"""Datasets of Hugging Face by name, fetched once in a stream into files of JSON lines that data/source.py reads.

    --dataset hf:wikitext:wikitext-103-raw-v1      hf:NAME or hf:NAME:CONFIG; with a slash in NAME where it has one
    --dataset hf:roneneldan/TinyStories            a folder of .jsonl, .parquet or .txt files is a NAME too

The `datasets` library is asked for only here, and no code of a dataset is run. Every 64 MB a file is whole and stays; a
later call goes on after the last one. When all rows are here no network is needed any more. Rows are documents, except
in the data sets named in ROWS_ARE_LINES, where they are the lines of one text.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.files import UserError, atomic_file, read_json, write_json
from core.progress import progress
from data.corpus import sha256
from data.one_process import only_one
from data.source import Source, text_in

FORMAT = 1
SHARD = 2**26  # bytes of JSON lines in a file
ROWS_ARE_LINES = ("wikitext", "ptb_text_only", "enwik8")  # the name's last part
PARTS = {"train": ("train",), "val": ("validation", "valid", "val", "dev")}  # the names of splits


def fetch_dataset(dataset: str, data: Path, field: str) -> Source:
    """dataset: hf:NAME or hf:NAME:CONFIG. Its rows' texts, fetched where they are not here yet. Raises UserError."""
    _, _, rest = dataset.partition(":")
    name, _, config = rest.partition(":")
    if not name:
        raise UserError(f"--dataset {dataset!r} names no dataset. Write hf:NAME or hf:NAME:CONFIG, as in "
                        "hf:wikitext:wikitext-103-raw-v1.")
    origin = {"format": FORMAT, "name": name, "config": config, "field": field}
    short = re.sub(r"[^\w.-]+", "_", rest)[-40:]
    folder = data / "cache" / f"hf-{short}-{sha256(json.dumps(origin))[:8]}"
    if not whole(folder, origin):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder):
                if not whole(folder, origin):
                    fetch(name, config, field, folder, origin)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}. Make room or change its permissions; what "
                            "is fetched is kept, and the same command goes on.") from None
    files = {part: sorted(folder.glob(f"{part}-*.jsonl")) for part in PARTS}
    joined = name.rstrip("/").rpartition("/")[2] in ROWS_ARE_LINES
    return Source(short, files["train"], files["val"], joined=joined)  # the files' own field is always "text"


def whole(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether all rows of just this dataset are here."""
    try:
        meta = read_json(folder / "dataset.json")
    except UserError:
        return False
    found = {path.name: path.stat().st_size for path in folder.glob("*.jsonl")}
    return bool(found) and meta == {"origin": origin, "files": found}


def fetch(name: str, config: str, field: str, folder: Path, origin: dict[str, Any]) -> None:
    """Writes the rows of both parts and, when all are there, dataset.json."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{name}: datasets of Hugging Face need a library that is not installed. Get it with "
                        "`pip install datasets`.") from None
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # whatever its network code and the dataset's own files raise
        raise UserError(f"hf:{name} cannot be loaded: {type(error).__name__}: {str(error)[:300]}\n"
                        "Check the name and the network; a dataset with several configurations needs one, "
                        "hf:NAME:CONFIG.") from None
    named = {part: next((split for split in names if split in splits), "") for part, names in PARTS.items()}
    if not named["train"]:
        raise UserError(f"hf:{name} has no split called train. It has: {', '.join(splits)}.")
    for part, split in named.items():
        if split:
            fetch_split(splits[split], f"hf:{name}, split {split}", folder, part, field)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.jsonl"))}
    write_json(folder / "dataset.json", {"origin": origin, "files": files})


def fetch_split(rows: Any, where: str, folder: Path, part: str, field: str) -> None:
    """The rows that are not here yet, in files named by the number of their first row."""
    done = sorted(folder.glob(f"{part}-*.jsonl"))
    first = 0
    if done:
        with open(done[-1], "rb") as file:
            first = int(done[-1].stem.rpartition("-")[2]) + sum(1 for _ in file)
        print(f"{where}: {first:,} rows are here already", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(None, f"fetching {where}", initial=first, unit=" rows", delay=1.5))
        iterator = texts(rows.skip(first) if first else rows, where, field)
        row = next(iterator, None)
        while row is not None:
            with atomic_file(folder / f"{part}-{first:012}.jsonl") as path, open(path, "wb") as file:
                while row is not None and file.tell() < SHARD:
                    file.write(json.dumps({"text": row}, ensure_ascii=False).encode("utf-8") + b"\n")
                    first += 1
                    bar.update(1)
                    row = next(iterator, None)


def texts(rows: Any, where: str, field: str) -> Iterator[str]:
    try:
        for row in rows:
            yield text_in(row, field, where)
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library lets through whatever its network code raises
        raise UserError(f"{where} broke off: {type(error).__name__}: {str(error)[:300]}\nWhat is fetched is kept; the "
                        "same command goes on.") from None
