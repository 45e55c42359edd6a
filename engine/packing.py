"""Makes a run's packed file (packed_file.py) from its checkpoint. numpy only, but for the quantizers, which want torch.

    path, config = pack_run(Path("runs/bitgpt"), weights="trit1.6", head="q6")   # unless that is done already
"""

import errno
import sys
from pathlib import Path

import numpy as np

from core.config import OF_TRITS, ModelConfig
from core.files import UserError
from core.run_folder import PACKED, checksum, read_config, weights_file
from core.safetensors_file import open_safetensors
from engine import packed_file
from engine.packed_file import Entry
from kernels.format import Array, pack, quantize_rows


def unpackable(twin: str, config: ModelConfig) -> str:
    """The setting of a run that keeps it from being packed, "" where none does."""
    return config.unfit(twin, norm=("sub",), weight_quant=OF_TRITS, activation_quant=("int8",))


def pack_run(run: Path, checkpoint: str = "best", weights: str = "trit2", head: str = "q8") -> tuple[Path, ModelConfig]:
    """Makes the run's packed file, tensor by tensor, unless it is there and of the same checkpoint. Returns its path
    and the model's shape. weights is for the ternary twin; the matrices of the other one are packed as bf16."""
    twin, config, _ = read_config(run)
    unfit = unpackable(twin, config)
    if unfit:
        raise UserError(f"{run} was trained with {unfit}, which the packed kernels do not know. Take --kernel torch.")
    weights = weights if twin == "bitgpt" else "bf16"
    path, source = run / PACKED[twin], weights_file(run, checkpoint)
    identity = ""
    if source.exists():
        stat = source.stat()
        identity = f"{source.name} {stat.st_size} {stat.st_mtime_ns} {config.weight_quant} {config.scale}"
    if path.exists():
        _, metadata = open_safetensors(path)
        same = metadata.get("format") == packed_file.FORMAT and (metadata.get("weights"), metadata.get("head")) == (
            weights, head)
        if same and metadata.get("source") == identity:
            return path, config
        if not identity:
            of = metadata.get("source", "").partition(" ")[0]
            if checkpoint != "best" and of != source.name:
                raise UserError(f"{source} is missing, and {path} was packed from {of or 'another'}. Leave out "
                                f"--checkpoint {checkpoint}, or restore the file.")
            if not same:
                print(f"note: {path} has {metadata.get('weights')}, head {metadata.get('head')}, and there is no "
                      "checkpoint to pack another from", file=sys.stderr)
            return path, config
    latent, metadata = open_safetensors(source)
    print(f"packing {source} ({weights}, head {head}) ...", file=sys.stderr, flush=True)

    if metadata.get("crc32"):  # convert.py writes without
        found = checksum(((name, f"torch.{w.dtype}", w.shape, np.ascontiguousarray(w).data)
                          for name, w in sorted(latent.items())), metadata.get("state", "{}"))
        if found != metadata["crc32"]:
            raise UserError(f"{source} is damaged (its checksum does not match). Restore it from a copy, or train the "
                            "run again.")

    def make(entry: Entry) -> tuple[Array, Array | None]:
        w = latent.get(entry.name)
        if w is None or w.shape != entry.shape or w.dtype != np.float32:
            raise UserError(f"{source}: {entry.name} is {'missing' if w is None else w.shape}, but the settings make "
                            f"it {entry.shape} in fp32. Use the architecture it was trained with.")
        return pack_tensor(entry, w, config.weight_quant, config.scale == "row")

    try:
        packed_file.write(path, config, weights, head, {"twin": twin, "source": identity}, make)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}. Make {run} writable, copy it, or take --kernel "
                        "torch, which packs nothing.") from None
    return path, config


def pack_tensor(entry: Entry, w: Array, weight_quant: str = "absmean",
                per_row: bool = False) -> tuple[Array, Array | None]:
    """(packed, scale) of one latent fp32 tensor; a norm as it is."""
    if not entry.kind:
        return w, None
    if entry.kind == "bf16":
        return pack("bf16", w), None
    if entry.kind in ("q8", "q6"):
        codes, scale = quantize_rows(w, entry.kind)
        return pack(entry.kind, codes), scale
    import torch

    from bitgpt.quantizers import quantize_weight
    w_trit, w_scale = quantize_weight(torch.from_numpy(np.array(w)), weight_quant, per_row)
    return pack(entry.kind, w_trit.numpy()), w_scale.numpy().reshape(w_scale.shape[:1])
