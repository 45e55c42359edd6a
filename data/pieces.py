"""A corpus cut into pieces, at places where a cut changes no token id, and the pieces gathered into jobs.

Neighbours: source.py reads, scan.py counts, bins.py encodes the jobs.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from data.scan import Scan, Tally
from data.source import Source

PIECE = 2**20                # characters that are encoded at once
LONGEST_PIECE = 16 * PIECE   # a stretch of text without a place to cut is cut here all the same

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
