"""The ternary GPT (BitNet b1.58): gpt/model.py with BitLinear for nn.Linear. Embedding, head and norms stay fp32."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from bitgpt.bitlinear import BitLinear
from core.checkpoint import check_settings, load, load_into
from core.config import ModelConfig
from core.metrics import Record
from core.run_folder import read_config, weights_file
from gpt.model import GPT


class BitGPT(GPT):
    name = "bitgpt"
    linear = BitLinear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for linear in self.bitlinears.values():
            linear.weight_quant, linear.activation_quant = config.weight_quant, config.activation_quant
            linear.per_row = config.scale == "row"

    @functools.cached_property
    def bitlinears(self) -> dict[str, BitLinear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, BitLinear)}

    def fits_kernels(self) -> bool:
        return super().fits_kernels() and all(linear.in_floats or linear.in_integers
                                              for linear in self.bitlinears.values())

    def quantize(self, share: float) -> None:
        for linear in self.bitlinears.values():
            linear.share = share

    def trits(self) -> dict[str, Tensor]:
        return {f"{name}.weight": linear.codes()[0] for name, linear in self.bitlinears.items()}


def trit_statistics(trits: dict[str, Tensor], before: dict[str, Tensor]) -> Record:
    """Shares of zeros, and of trits that differ from those `before`, in all and block by block: a dead or a frozen
    layer shows at once."""
    if not trits:
        return {}
    counts: dict[str, list[int]] = {}  # block -> [trits, zeros, flipped]
    for name, trit in trits.items():
        block = counts.setdefault(".".join(name.split(".")[:2]), [0, 0, 0])
        block[0] += trit.numel()
        block[1] += int((trit == 0).sum())
        block[2] += int((trit != before[name]).sum()) if before else 0
    total, zeros, flipped = (sum(column) for column in zip(*counts.values(), strict=True))
    record: Record = {"zeros": zeros / total, "zeros_by_block": [z / n for n, z, _ in counts.values()]}
    if before:
        record |= {"flipped": flipped / total, "flipped_by_block": [f / n for n, _, f in counts.values()]}
    return record


MODELS: dict[str, type[GPT]] = {"gpt": GPT, "bitgpt": BitGPT}


def load_model(run: Path, checkpoint: str = "best", device: torch.device | str = "cpu") -> GPT:
    """The model of a run folder with its weights. UserError where there is none, or they do not fit its settings."""
    twin, config, _ = read_config(run)
    path = weights_file(run, checkpoint)
    tensors, _ = load(path, device)
    check_settings(MODELS[twin], config, tensors, path)
    model = MODELS[twin](config).to(device)
    load_into(model, tensors, path)
    return model
