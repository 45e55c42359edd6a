"""The full-precision GPT. Its ternary twin (bitgpt/model.py) changes one attribute: the class of its linears.

The block is the one that transformers' BitNet, llama.cpp and ik_llama.cpp run: RMSNorm, rotary embeddings, grouped
heads, a gated MLP, no biases, and an RMSNorm before each output projection (sub-norm), which the twins share.
Shapes: B batch, T tokens, C n_embd, H heads, G key/value heads, D head width, F n_ff, V vocabulary, S cached tokens.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core.config import ModelConfig
from gpt import fused


class Linear(nn.Linear):
    """nn.Linear: the class that the ternary twin exchanges."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.norm: RMSNorm | None = None  # of its own input, with --norm inner

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.norm is None else self.norm(x))

    def packed(self, layers: tuple[tuple[Tensor, ...], ...], dtype: torch.dtype) -> fused.PackedWeights:
        """The weights of layers of this kind, as gpt/fused.py multiplies with them."""
        return fused.PackedWeights(layers, dtype)

    def together(self, x: Tensor, *others: nn.Module) -> tuple[Tensor, ...]:
        """The products of one input with this layer and others, for the sake of what they can share."""
        return tuple(linear(x) for linear in (self, *others))


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm with its backward written out. On a CPU autograd's takes twice as long, a third of a small step; CUDA
    has a fused kernel of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rms_inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)        # (..., 1)
        normed = x * rms_inverse
        ctx.save_for_backward(normed, weight, rms_inverse)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, rms_inverse = ctx.saved_tensors
        product = grad_y * normed
        mean = (product @ weight).div_(-weight.numel()).unsqueeze(-1)                 # (..., 1)
        grad_x = (grad_y * weight).addcmul_(normed, mean).mul_(rms_inverse)
        return grad_x, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 whatever the input's dtype. arXiv 1910.07467"""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return RMSNormFunction.apply(x.float(), self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens seen so far, for generating one token at a time.

    k, v: (n_layer, B, G, block_size, D). length: tokens held, the same in every layer once a forward is over.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, config.block_size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, G, T, D) behind what is there; returns all of the layer's (B, G, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rotary_tables(start: int, length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D / 2) for positions start ... start + length - 1. arXiv 2104.09864"""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, D), first half of D paired with the second (NeoX order)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped heads: H query heads share G key/value heads. arXiv 2305.13245"""

    def __init__(self, config: ModelConfig, linear: type[Linear], layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = linear(config.n_embd, config.n_embd)
        self.k_proj = linear(config.n_embd, kv_width)
        self.v_proj = linear(config.n_embd, kv_width)
        self.o_proj = linear(config.n_embd, config.n_embd)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.sub_norm = RMSNorm(config.n_embd, config.norm_eps) if config.has_sub_norms else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = self.q_proj.together(x, self.k_proj, self.v_proj)
        y = self.attend(q, k, v, cos, sin, cache)
        return self.o_proj(y if self.sub_norm is None else self.sub_norm(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) of q (B, T, C) and k, v (B, T, G D)."""
        B, T, C = q.shape
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)                  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)               # (B, G, T, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)               # (B, G, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                     # (B, G, S, D)
            if 1 < T < k.shape[2]:  # a chunk behind a prefix: is_causal would align it to the first key
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=self.n_kv_head != self.n_head,
            dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    """down(sub_norm(act(gate(x)) * up(x))). arXiv 2002.05202"""

    def __init__(self, config: ModelConfig, linear: type[Linear]) -> None:
        super().__init__()
        self.gate_proj = linear(config.n_embd, config.n_ff)
        self.up_proj = linear(config.n_embd, config.n_ff)
        self.down_proj = linear(config.n_ff, config.n_embd)
        self.sub_norm = RMSNorm(config.n_ff, config.norm_eps) if config.has_sub_norms else None
        self.act_name = config.act
        self.act = F.silu if config.act == "silu" else lambda x: F.relu(x).square()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj.together(x, self.up_proj)
        y = self.act(gate) * up                                                       # (B, T, F)
        return self.down_proj(y if self.sub_norm is None else self.sub_norm(y))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, linear: type[Linear], layer: int) -> None:
        super().__init__()
        inner = config.norm == "inner"
        self.attn_norm = nn.Identity() if inner else RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, linear, layer)
        self.mlp_norm = nn.Identity() if inner else RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config, linear)
        self.dropout = nn.Dropout(config.dropout)
        self.eps = config.norm_eps

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                in_kernels: bool = False) -> Tensor:
        """The residual stream x (B, T, C) behind this block; in_kernels: in those of fused.py."""
        attn, mlp = self.attn, self.mlp
        if in_kernels:
            dropout = self.dropout.p if self.training else 0.0
            seed = int(torch.randint(2**32, ())) if dropout else 0
            shape = fused.Shape(attn.n_head, attn.n_kv_head, mlp.act_name, self.eps, dropout, seed)
            norms = self.attn_norm, attn.sub_norm, self.mlp_norm, mlp.sub_norm
            up, down = (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
            return fused.block(x, cos, sin, shape, norms,
                               ((attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,), up, down))
        x = x + self.dropout(attn(self.attn_norm(x), cos, sin, cache))
        return x + self.dropout(mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only transformer. `config` must be resolved (ModelConfig.resolved) and name a vocab_size."""

    name = "gpt"
    linear: type[Linear] = Linear  # the only thing the ternary twin changes

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, self.linear, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.checkpointing = False  # keep the blocks' inputs alone, and compute the rest again in backward
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.norm == "inner":
            for module in list(self.modules()):
                if isinstance(module, Linear):
                    module.norm = RMSNorm(module.in_features, config.norm_eps)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # GPT-2's initialisation: what adds to the residual stream starts smaller
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                all_logits: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or mean loss in nats per token.

        tokens: (B, T) ids. With targets (B, T): None and the loss. Without: logits of the last position (B, 1, V), or
        with all_logits of each (B, T, V), and None. With a cache the tokens follow what it holds, and are added to it.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache.length
        assert start + T <= self.config.block_size, f"{start + T} tokens in a context of {self.config.block_size}"
        cos, sin = rotary_tables(start, T, self.config.head_dim, self.config.rope_theta, tokens.device)
        head = self.wte.weight if self.lm_head is None else self.lm_head.weight
        x = self.dropout(self.wte(tokens))                                            # (B, T, C)
        in_kernels = cache is None and self.fits_kernels() and fused.fits(self.config, tokens)
        for block in self.blocks:
            x = self.run(block, x, cos, sin, cache, in_kernels)
        if targets is not None and in_kernels:
            return None, fused.loss(x, self.norm, head, targets.reshape(-1))
        if cache is not None:
            cache.length += T
        if targets is None:
            return F.linear(self.norm(x if all_logits else x[:, -1:]), head), None
        logits = F.linear(self.norm(x), head).view(B * T, -1)                         # (B T, V)
        return None, F.cross_entropy(logits.float(), targets.reshape(-1))

    def run(self, block: Any, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def num_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def fits_kernels(self) -> bool:
        """Whether its layers are what gpt/fused.py computes."""
        return self.config.norm == "sub" and not self.config.qk_norm

    def quantize(self, share: float) -> None:
        """How far training quantizes the ternary twin from now on: 0 not at all, 1 altogether. Evaluation always
        does."""

    def trits(self) -> dict[str, Tensor]:
        """The codes of the ternary weights by name, int8 (N, K): none here."""
        return {}
