"""What lies in a run folder. Read here without torch, so that the packed engine starts at once.

    config.json         {"format": 1, "twin": "bitgpt", "model": {ModelConfig}, "train": {TrainConfig}}
    tokenizer.json      what turns text into this model's tokens
    last.safetensors    latent fp32 weights and optimizer state; the loop's state as JSON in its header
    last.1.safetensors  the one before, for when a disk damages the last
    best.safetensors    the weights with the lowest validation loss
    metrics.jsonl       a record a line (core/metrics.py); loss.png is drawn from it

safetensors and JSON only: a stranger's run can execute nothing. Who trains here holds the folder's lock.
"""

import contextlib
import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from core.config import TWINS, ModelConfig, flag, from_saved
from core.files import AN_HOUR, UserError, read_json, remove_unfinished, write_json
from core.safetensors_file import open_safetensors

FORMAT = 1
LAST, BEST, PREVIOUS = "last.safetensors", "best.safetensors", "last.1.safetensors"
CHECKPOINTS = (LAST, BEST)
PACKED = {"bitgpt": "model.ternary.safetensors", "gpt": "model.bf16.safetensors"}  # engine/packed_file.py
OWN_FILES = (*CHECKPOINTS, PREVIOUS, *PACKED.values(), "config.json", "tokenizer.json", "metrics.jsonl", "loss.png")


class RunConfig(NamedTuple):
    twin: str
    model: ModelConfig
    train: dict[str, Any]


class FolderLock:
    """Keeps other processes from training into a folder, as long as this object lives. The lock is the system's: it
    ends with the process, however that ends, and leaves nothing behind. UserError where somebody has it."""

    def __init__(self, run: Path) -> None:
        windows = sys.platform == "win32"
        self.descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT) if windows else os.open(run, os.O_RDONLY)
        try:
            if sys.platform == "win32":
                import msvcrt
                msvcrt.locking(self.descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is training into {run}. Wait for it, stop it, or name another "
                            "--out-dir.") from None
        except OSError as error:  # some network file systems
            print(f"note: {run} cannot be locked ({error.strerror}): see that nothing else trains there",
                  file=sys.stderr)

    def release(self) -> None:
        descriptor, self.descriptor = getattr(self, "descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = release


def holds_run(run: Path) -> bool:
    return any((run / name).exists() for name in (*CHECKPOINTS, "config.json"))


def not_of_a_run(run: Path) -> str:
    """The name of a file that a run would overwrite, in a folder that holds none; else ""."""
    if any((run / name).exists() for name in (*CHECKPOINTS, PREVIOUS)):
        return ""
    config = run / "config.json"
    with contextlib.suppress(UserError):
        saved = read_json(config)
        if isinstance(saved, dict) and saved.get("format") == FORMAT and saved.get("twin") in TWINS:
            return ""
    return next((name for name in OWN_FILES if (run / name).exists()), "")


def check_free(run: Path, overwrite: bool) -> None:
    """UserError where a new run cannot go into the folder."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--out-dir {run} is a file, not a folder. Name another one.")
    foreign = not_of_a_run(run)
    if foreign:
        raise UserError(f"--out-dir {run} holds {foreign}, which BitGPT did not write and training would overwrite. "
                        "Name another folder.")
    if holds_run(run) and not overwrite:
        raise UserError(f"{run} holds a run already. Go on with it: --resume. Replace it: --overwrite. "
                        "Or name another --out-dir.")


def check_sources(replaced: list[Path], train: Any) -> None:
    """UserError where a run with these settings starts from, or learns from, one that is going to be replaced."""
    for name in ("init_from", "distill"):
        source = getattr(train, name)
        for run in replaced:
            if source and Path(source).resolve() == run.resolve():
                raise UserError(f"--overwrite would remove {run}, which {flag(name)} takes. Name another --out-dir.")


def erase_run(run: Path) -> None:
    """Removes what a run wrote, and nothing else that may lie in the folder."""
    for name in OWN_FILES:
        (run / name).unlink(missing_ok=True)
    remove_temporary(run)


def remove_temporary(run: Path) -> None:
    """Removes the unfinished files that a kill left behind; for whoever holds the folder's lock."""
    for name in OWN_FILES:
        remove_unfinished(run / name, older=AN_HOUR if name in PACKED.values() else 0.0)  # those are written without it


def write_config(run: Path, twin: str, model: ModelConfig, train: dict[str, Any]) -> None:
    write_json(run / "config.json", {"format": FORMAT, "twin": twin, "model": dataclasses.asdict(model),
                                     "train": train})


def read_config(run: Path, twin: str | None = None) -> RunConfig:
    """The configuration of a run folder. UserError where there is none, or a run of another twin than asked for."""
    if run.is_file():
        raise UserError(f"{run} is a file, no run folder. A GGUF file becomes one: python convert.py {run} runs/NAME")
    if not (run / "config.json").is_file():
        raise UserError(f"{run} holds no trained run. Train one: python {twin or 'bitgpt'}/train.py --out-dir {run}")
    saved = read_json(run / "config.json")
    if isinstance(saved, dict) and "architectures" in saved:
        raise UserError(f"{run} is a Hugging Face folder. It becomes a run folder: python convert.py {run} runs/NAME")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or saved.get("twin") not in TWINS:
        raise UserError(f"{run}/config.json is not a run's configuration of format {FORMAT}. Train the run again.")
    if twin not in (None, saved["twin"]):
        raise UserError(f"{run} is a run of {saved['twin']}, not of {twin}. Name another --out-dir, use the scripts "
                        f"of {saved['twin']}/, or start from its weights: {twin}/train.py --init-from {run}")
    try:
        json.dumps(saved, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{run}/config.json holds half a character, which no file can keep. Restore it.") from None
    model = from_saved(ModelConfig, saved.get("model"), f"{run}/config.json").resolved()
    if not isinstance(saved.get("train"), dict) or not model.vocab_size:
        raise UserError(f"{run}/config.json lacks its training settings or vocab_size. Restore it, or train again.")
    return RunConfig(saved["twin"], model, saved["train"])


def checksum(tensors: Iterable[tuple[str, str, tuple[int, ...], Any]], state: str) -> str:
    """CRC-32 of all that a checkpoint says, in hexadecimal. tensors: (name, torch's dtype, shape, bytes), by name."""
    crc = zlib.crc32(state.encode())
    for name, dtype, shape, content in tensors:
        crc = zlib.crc32(content, zlib.crc32(f"{name} {dtype} {shape}".encode(), crc))
    return f"{crc:08x}"


def weights_file(run: Path, checkpoint: str = "best") -> Path:
    """best.safetensors, or last where a run was stopped before it had a best."""
    path = run / f"{checkpoint}.safetensors"
    return path if path.exists() or checkpoint == "last" else run / LAST


def state_of(run: Path) -> dict[str, Any]:
    """What the best checkpoint says beside its tensors, {} where there is none or it says nothing."""
    path = weights_file(run)
    with contextlib.suppress(ValueError):
        state = json.loads(open_safetensors(path)[1].get("state", "{}")) if path.exists() else {}
        return state if isinstance(state, dict) else {}
    return {}
