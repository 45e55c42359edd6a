"""What takes a step: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest."""

import torch
from torch.optim import AdamW, Muon, Optimizer

from core.settings import TrainConfig

MOMENTS = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}  # what each remembers of a weight


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
