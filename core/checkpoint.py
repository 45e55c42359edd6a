"""Checkpoints: one safetensors file each, with the training loop's state as JSON in its header.

One checkpoint is one file, so that renaming it is all that makes it current: none is ever half of a pair. A name
with a slash (optimizer/...) is no weight of the model. A checksum finds what a disk or a copy has changed, and then
the `last` before it is taken. What else a run folder holds: core/run_folder.py.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core import run_folder
from core.config import ModelConfig
from core.files import UserError, atomic_file
from core.run_folder import BEST, CHECKPOINTS, LAST, PREVIOUS


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes one checkpoint, atomically. state: what JSON can say. previous: the name under which the
    checkpoint that is now at `path` is kept."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"state": text, "crc32": checksum(sorted(tensors.items()), text)})
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
            if previous is not None:
                with contextlib.suppress(OSError):  # none there yet; or a file system without hard links
                    previous.unlink(missing_ok=True)
                    os.link(path, previous)
    except SafetensorError as error:  # its own word for a full disk
        raise UserError(f"{path} cannot be written ({error}). The checkpoint before it is kept: make room, and go on "
                        "with --resume.") from None


def checksum(tensors: Iterable[tuple[str, Tensor]], state: str) -> str:
    """As run_folder.checksum, of tensors on the CPU, by name."""
    return run_folder.checksum(
        ((name, str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().data)
         for name, tensor in tensors), state)


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint. A missing, truncated, changed or foreign file is a UserError."""
    if not path.is_file():
        best = path.with_name(BEST)
        raise UserError(f"{path} is missing. " + (f"Start from the best weights: --init-from {path.parent} and another "
                                                  "--out-dir." if best.exists() else "Train the run first."))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if sys.platform == "win32":  # where a file that is mapped into memory cannot be replaced
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        text = metadata.get("state", "{}")
        if metadata.get("crc32", "") not in ("", checksum(sorted(tensors.items()), text)):  # convert.py writes without
            raise ValueError("its checksum does not match")
        state = json.loads(text)
        if not isinstance(state, dict):
            raise ValueError("its state is not a table")
        return {name: tensor.to(device) for name, tensor in tensors.items()}, state
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        other = [name for name in CHECKPOINTS if name != path.name and (path.parent / name).exists()]
        remedy = f"Restore it from a copy, or go on from {other[0]}: copy the run elsewhere without {path.name} and " \
                 "name it with --init-from." if other else "Restore it from a copy, or train again with --overwrite."
        raise UserError(f"{path} is damaged or cut short ({error}). {remedy}") from None


def load_newest(run: Path, device: torch.device | str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(path, tensors, state) of last.safetensors, or of the checkpoint before where that one is damaged."""
    last, previous = run / LAST, run / PREVIOUS
    try:
        return last, *load(last, device)
    except UserError as error:
        try:
            tensors, state = load(previous, device)
        except UserError:
            raise error from None
        if os.environ.get("RANK", "0") == "0":
            problem = str(error).split(". ")[0]
            print(f"note: {problem}. Going on from {previous}, step {state.get('step')}.", file=sys.stderr)
        return previous, tensors, state


def check(model: torch.nn.Module, tensors: dict[str, Tensor], where: Path | str) -> dict[str, Tensor]:
    """The weights among a checkpoint's tensors; a UserError where they are not the model's."""
    wanted = model.state_dict()
    weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    for name in wanted.keys() ^ weights.keys():
        raise UserError(f"{where} has {'a' if name in weights else 'no'} weight {name}, but the settings say otherwise."
                        " Use the architecture it was trained with.")
    for name, weight in wanted.items():
        if weights[name].shape != weight.shape:
            raise UserError(f"{where}: {name} is {tuple(weights[name].shape)}, but the settings make it "
                            f"{tuple(weight.shape)}. Use the architecture it was trained with.")
    return weights


def check_settings(make: Callable[[ModelConfig], torch.nn.Module], config: ModelConfig, tensors: dict[str, Tensor],
                   where: Path | str) -> None:
    """UserError where a stranger's settings ask for more than the checkpoint has: before memory is taken for it."""
    last = f"blocks.{config.n_layer - 1}.attn.q_proj.weight"
    if last not in tensors:
        raise UserError(f"{where} has no weight {last}, but the settings say otherwise. Use the architecture it was "
                        "trained with.")
    with torch.device("meta"):
        check(make(config), tensors, where)


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], where: Path | str) -> None:
    """Copies a checkpoint's weights into the model; what else the checkpoint holds is left. UserError on a mismatch."""
    model.load_state_dict(check(model, tensors, where))
