"""Checkpoints: one safetensors file each, with the training loop's state as JSON in its header.

One checkpoint is one file, so that renaming it is all that makes it current: none is ever half of a pair. A name
with a slash (optimizer/...) is no weight of the model. What else a run folder holds: core/run_folder.py.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.files import UserError, atomic_file
from core.run_folder import CHECKPOINTS


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes one checkpoint, atomically. state: what JSON can say."""
    try:
        with atomic_file(path) as temporary:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary,
                      metadata={"state": json.dumps(state)})
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
    except SafetensorError as error:  # its own word for a full disk
        raise UserError(f"{path} cannot be written ({error}). The checkpoint before it is kept: make room, and go on "
                        "with --resume.") from None


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint. A missing, truncated or foreign file is a UserError."""
    if not path.exists():
        best = path.with_name("best.safetensors")
        raise UserError(f"{path} is missing. " + (f"Start from the best weights: --init-from {path.parent} and another "
                                                  "--out-dir." if best.exists() else "Train the run first."))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        other = [name for name in CHECKPOINTS if name != path.name and (path.parent / name).exists()]
        remedy = f"Restore it from a copy, or go on from {other[0]}: copy the run elsewhere without {path.name} and " \
                 "name it with --init-from." if other else "Restore it from a copy, or train again with --overwrite."
        raise UserError(f"{path} is damaged or cut short ({error}). {remedy}") from None


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], where: Path | str) -> None:
    """Copies a checkpoint's weights into the model; what else the checkpoint holds is left. UserError on a mismatch."""
    wanted = model.state_dict()
    weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    for name in wanted.keys() ^ weights.keys():
        raise UserError(f"{where} has {'a' if name in weights else 'no'} weight {name}, but the settings say otherwise."
                        " Use the architecture it was trained with.")
    for name, weight in wanted.items():
        if weights[name].shape != weight.shape:
            raise UserError(f"{where}: {name} is {tuple(weights[name].shape)}, but the settings make it "
                            f"{tuple(weight.shape)}. Use the architecture it was trained with.")
    model.load_state_dict(weights)
