"""What is ternary: the two quantizers of BitNet b1.58 and the linear layer that computes with their integers.

    w_trit = round(W / mean|W|) in {-1, 0, 1}      one fp32 scale a matrix      (absmean)
    x_i8   = round(x * 127 / max|x|)               one fp32 scale a token       (absmax)
    y      = (x_i8 @ w_trit.T) * x_scale * w_scale

The product of integers is an integer and has one right value, so every kernel must give these same accumulators bit
for bit. Gradients pass both roundings unchanged (straight-through); weight stays the fp32 latent that is trained.
"""

import platform
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w_trit int8 (N, K) and w_scale fp32 (): absmean, arXiv 2402.17764 eq. 1-3, operations as in transformers."""
    w_scale = weight.float().abs().mean().clamp(min=1e-5)
    return (weight.float() * (1 / w_scale)).round_().clamp_(-1, 1).to(torch.int8), w_scale


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i8 int8 (..., K) and x_scale fp32 (..., 1): absmax per token, arXiv 2310.11453 eq. 4, to -128 ... 127."""
    x = x.float()
    s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-5)
    return (x * s).round_().clamp_(-128, 127).to(torch.int8), 1 / s


# Without an int8 GEMM (Arm CPUs, MPS) a plain loop would run. fp32 gives the same integers: every partial sum is one,
# and below 2^24 for rows of up to 132,000 weights.
HAS_INT8_GEMM = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def int_mm(x_i8: Tensor, w_trit: Tensor) -> Tensor:
    """acc_i32 (M, N) = x_i8 (M, K) @ w_trit (N, K).T, exactly."""
    M, K = x_i8.shape
    N = w_trit.shape[0]
    if x_i8.is_cuda:  # cuBLAS wants more than 16 rows and multiples of 8
        x_i8 = F.pad(x_i8, (0, -K % 8, 0, max(0, 17 - M)))
        w_trit = F.pad(w_trit, (0, -K % 8, 0, -N % 8))
        return torch._int_mm(x_i8, w_trit.t())[:M, :N]
    if x_i8.device.type == "cpu" and HAS_INT8_GEMM and K > 1:  # torch 2.13's product is garbage for K = 1
        return torch._int_mm(x_i8, w_trit.t())
    assert K * 127 < 2**24
    return (x_i8.float() @ w_trit.float().t()).to(torch.int32)


class TernaryProduct(torch.autograd.Function):
    """y = x @ W.T on quantized x and W. Backward remembers x as one byte a value, and W as trits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x_i8, x_scale = quantize_activations(x)                                # (M, K), (M, 1)
        w_trit, w_scale = quantize_weight(weight)                              # (N, K), ()
        ctx.save_for_backward(x_i8, x_scale, w_trit, w_scale)
        ctx.x_dtype = x.dtype
        return (int_mm(x_i8, w_trit) * x_scale * w_scale).to(dtype)            # (M, N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_i8, x_scale, w_trit, w_scale = ctx.saved_tensors
        dtype = grad_y.dtype  # trits and int8 values are exact in bf16 too
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = ((grad_y @ w_trit.to(dtype)) * w_scale).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_w = ((grad_y * x_scale).to(dtype).t() @ x_i8.to(dtype)).float()
        return grad_x, grad_w, None


class BitLinear(nn.Linear):
    """nn.Linear on ternary weights and int8 activations, in training and after. It owns nothing but `weight`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        assert not bias, "the ternary formats have no place for a bias"
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = TernaryProduct.apply(x.reshape(-1, self.in_features), self.weight, dtype)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)
