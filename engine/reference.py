"""The torch engine: the models of gpt/ and bitgpt/ themselves, on any device. The reference for every other kernel.

A ternary run is packed once as it loads: the trits and the scale take the place of the latent weights.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bitgpt.bitlinear import BitLinear, int_mm, scaled
from bitgpt.model import load_model
from bitgpt.quantizers import quantize_activations
from core.config import ModelConfig
from core.runtime import pick_device
from engine.sampling import Engine, exclusive
from gpt.model import GPT, KVCache


class TernaryLinear(nn.Module):
    """A BitLinear that is done with training: w_trit int8 (N, K) and w_scale, quantized once."""

    w_trit: Tensor
    w_scale: Tensor

    def __init__(self, trained: BitLinear) -> None:
        super().__init__()
        w_trit, w_scale = trained.codes()
        self.register_buffer("w_trit", w_trit)
        self.register_buffer("w_scale", w_scale)

    def together(self, x: Tensor, *others: "TernaryLinear") -> tuple[Tensor, ...]:
        x_i8, x_scale = quantize_activations(x.reshape(-1, x.shape[-1]))       # (M, K), (M, 1)
        return tuple(scaled(int_mm(x_i8, linear.w_trit), x_scale, linear.w_scale).view(*x.shape[:-1], -1)
                     for linear in (self, *others))

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x)[0]


def freeze(model: nn.Module) -> nn.Module:
    """Replaces every BitLinear that computes with integers by its TernaryLinear, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BitLinear) and child.in_integers and child.norm is None:
                setattr(module, name, TernaryLinear(child))
    vars(model).pop("bitlinears", None)  # BitGPT's list of them would keep every latent weight in memory
    return model.eval()


class TorchEngine(Engine):
    """Runs a model of the twins (frozen here) with a KV cache, in fp32 around the quantized layers."""

    kernel = "torch"

    def __init__(self, model: GPT, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config: ModelConfig = model.config
        self.device = torch.device(device)
        self.model = freeze(model).to(self.device)
        self.reset(1)

    @classmethod
    def from_run(cls, run: Path, checkpoint: str = "best", device: str = "auto", threads: int = 0) -> "TorchEngine":
        if threads:
            torch.set_num_threads(threads)
        return cls(load_model(run, checkpoint), pick_device(device))

    @exclusive
    def reset(self, batch: int) -> None:
        self.cache = KVCache(self.config, batch, self.device, torch.float32)
        self.length = 0

    @exclusive
    @torch.inference_mode()
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        logits, _ = self.model(torch.from_numpy(tokens).long().to(self.device), cache=self.cache)
        self.length = self.cache.length
        return logits[:, -1].float().cpu().numpy()

    @exclusive
    @torch.inference_mode()
    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        x, y = (torch.from_numpy(array).long().to(self.device) for array in (tokens, targets))
        logits, _ = self.model(x, cache=self.cache, all_logits=True)
        self.length = self.cache.length
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape).cpu().numpy()
