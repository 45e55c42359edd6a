"""What takes a step: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from core.distributed import sharded_as
from core.runtime import DTYPES, is_sharded, pick_dtype
from gpt import fused
from training.settings import TrainConfig

AT_ONCE = 2**22  # weights in one batch of matrices: larger ones fill the machine by themselves


class Muon(torch.optim.Muon):
    """torch's Muon, to which a small model is hundreds of products too short to pay for their calls: here all matrices
    are one call of gpt/fused.c, or, where that cannot be, matrices of one shape are one batch."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if any(is_sharded(weight) for group in self.param_groups for weight in group["params"]):
            super().step()  # torch's own knows how
            return
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            moved = weights, *self.grads_and_momenta(weights)
            if fused.fit_matrices(*moved):
                fused.muon(*moved, dtype_of_products(weights[0].device), group["momentum"], group["lr"],
                           group["weight_decay"])
                continue
            batches = defaultdict[tuple[int, ...], list[Tensor]](list)
            for weight in weights:
                batches[tuple(sorted(weight.shape))].append(weight)
            for (rows, columns), batch in batches.items():
                size = max(1, AT_ONCE // (rows * columns))
                for first in range(0, len(batch), size):
                    self.update(batch[first:first + size], group)

    def grads_and_momenta(self, weights: list[Tensor]) -> tuple[list[Any], list[Any]]:
        return [weight.grad for weight in weights], [self.state[weight]["momentum_buffer"] for weight in weights]

    def update(self, weights: list[Tensor], group: dict[str, float]) -> None:
        """A step of matrices (N, K) and (K, N)."""
        grads, momenta = self.grads_and_momenta(weights)
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        wide = torch.stack([matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t() for matrix in ahead])
        for weight, matrix in zip(weights, orthogonal(wide), strict=True):
            N, K = weight.shape
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(matrix if N <= K else matrix.t(), alpha=-group["lr"] * max(1, N / K) ** 0.5)


def dtype_of_products(device: torch.device) -> torch.dtype:
    """bf16, or fp32 where that is faster."""
    return DTYPES[pick_dtype("auto", device)]


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards U V^T of each matrix U S V^T (B, N, K), N <= K; singular values end between 0.7
    and 1.2. https://kellerjordan.github.io/posts/muon/"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype_of_products(matrices.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


MOMENTS = {AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}  # what each remembers of a weight


def moments(model: torch.nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, under a checkpoint's names: optimizer/exp_avg/blocks.0.attn.q_proj.weight ... In
    the same order on every rank: the ranks gather them one by one."""
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    return {f"optimizer/{key}/{names[weight]}": optimizer.state[weight][key] for optimizer in optimizers
            for group in optimizer.param_groups for weight in group["params"] if weight in optimizer.state
            for key in MOMENTS[type(optimizer)]}


def restore_moments(model: torch.nn.Module, optimizers: list[Optimizer], saved: dict[str, Tensor], taken: bool) -> None:
    """Takes back what `moments` gave, `taken`: after a step or more. ValueError where it is anything else."""
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    left = dict(saved)
    for optimizer in optimizers:
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]) if taken else ():
            for key in MOMENTS[type(optimizer)]:
                value = left.pop(f"optimizer/{key}/{names[weight]}")
                if value.shape != (() if key == "step" else weight.shape) or value.dtype != torch.float32:
                    raise ValueError(f"optimizer/{key}/{names[weight]}")
                optimizer.state[weight][key] = sharded_as(weight, value)
    if left:
        raise ValueError(next(iter(left)))


def make_optimizers(model: torch.nn.Module, config: TrainConfig) -> list[Optimizer]:
    """Their groups say beside `params`: `ratio`, their learning rate in units of config.lr, and `weight_decay` with
    `decays`, which is that while it is on."""
    muon = config.optimizer == "muon"
    hidden, decayed, others = (list[torch.nn.Parameter]() for _ in range(3))
    for name, weight in model.named_parameters():
        (others if weight.dim() < 2 else hidden if muon and name.startswith("blocks.") else decayed).append(weight)
    optimizers: list[Optimizer] = [AdamW(
        [{"params": decayed, "ratio": 1.0, "decays": config.weight_decay},
         {"params": others, "ratio": 1.0, "decays": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True)]
    if muon:  # arXiv 2502.16982; the post it cites: a momentum of 0.95, no more than matrices
        optimizers.append(Muon(
            [{"params": hidden, "ratio": config.muon_lr / config.lr, "decays": config.muon_weight_decay}],
            lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=0.0))
    return optimizers
