"""Makes the corpora that have a name: `python data/prepare.py shakespeare` or `astro`."""

from pathlib import Path

CORPORA = ("shakespeare", "astro")


def prepare(name: str, data: Path) -> Path:
    return data / f"{name}.txt"
