"""Folders that are whole or not there, and safetensors files written one tensor at a time.

    with atomic_folder(path, overwrite, kind) as temporary: ...         # renamed to path when all went well
    write_safetensors(path, specs, make)                                # make(name) -> the tensor of each spec
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.files import UserError, atomic_file, remove_unfinished
from core.safetensors_file import header

DTYPES = {"F32": torch.float32, "U8": torch.uint8}


def read_foreign_json(path: Path) -> Any:
    """JSON of a folder that somebody else made; a UserError where it is none, or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Copy it again from where it came.") from None


class Spec(NamedTuple):
    """A tensor to be written. dtype: F32 or U8."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(path: Path, specs: list[Spec], make: Callable[[str], Tensor], metadata: dict[str, str],
                      written: Callable[[int], Any] = lambda size_bytes: None) -> None:
    """Writes the tensors in the order of `specs`, holding one at a time. written: told of each one's bytes."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(header(specs, metadata))
        for spec in specs:
            tensor = make(spec.name).contiguous()
            assert tensor.shape == spec.shape and tensor.dtype == DTYPES[spec.dtype], spec.name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            written(spec.size_bytes)


class Kind(NamedTuple):
    """What convert.py writes. wrote: whether it has written what lies at a path; names: whether a file of that name
    belongs into the folder, None for what is a single file."""

    wrote: Callable[[Path], bool]
    names: Callable[[str], bool] | None = None


def check_free(path: Path, overwrite: bool, kind: Kind) -> None:
    """UserError where something lies at `path` that must stay: all but what was converted before."""
    ours = kind.names
    if not path.exists() and not path.is_symlink():
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.parent} does not exist, or is no folder. Create it, or name another place.")
        return
    if ours is None:
        if path.is_dir():
            raise UserError(f"{path} is a folder. Name a file.")
    elif not path.is_dir() or path.is_symlink():
        raise UserError(f"{path} is a file. Name a folder that is not there yet.")
    elif not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{path} is there already. --overwrite replaces it; or name another.")
    foreign = sorted(entry.name for entry in path.iterdir() if not ours(entry.name)) if ours else []
    if foreign:
        raise UserError(f"{path} holds {foreign[0]!r}, which convert.py did not write, so it is not overwritten. Move "
                        "that away, or name another folder.")
    if not kind.wrote(path):
        raise UserError(f"{path} was not written by convert.py (or by an older version of it), so it is not "
                        "overwritten. Move it away, or name another place.")


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool, kind: Kind) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes path's place, on failure it is removed."""
    check_free(path, overwrite, kind)
    whole = path.absolute()
    temporary, old = (whole.with_name(f".{whole.name}.{os.getpid()}{end}.tmp") for end in ("", ".old"))
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        remove_unfinished(whole)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Name another place.") from None
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
