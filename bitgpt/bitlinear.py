"""What is ternary: the linear layer that computes with the integers of BitNet b1.58's two quantizers (quantizers.py).

    w_trit = round(W / mean|W|) in {-1, 0, 1}      one fp32 scale a matrix      (absmean)
    x_i8   = round(x * 127 / max|x|)               one fp32 scale a token       (absmax)
    y      = (x_i8 @ w_trit.T) * x_scale * w_scale

The product of integers is an integer and has one right value, so every kernel must give these same accumulators bit
for bit. Gradients pass both roundings unchanged (straight-through); weight stays the fp32 latent that is trained.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitgpt import cuda_ops
from bitgpt.quantizers import ACTIVATIONS, WEIGHTS, quantize_activations, quantize_weight
from core.runtime import whole
from gpt.fused import PackedWeights
from gpt.model import Linear


def scaled(acc_i32: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """y fp32 (M, N). Converted first: a product of int32 and fp32 takes torch ten times as long."""
    return acc_i32.float().mul_(x_scale).mul_(w_scale)


# Without an int8 GEMM (Arm CPUs, MPS) a plain loop would run. fp32 gives the same integers: every partial sum is one,
# and below 2^24 for rows of up to 132,000 weights.
HAS_INT8_GEMM = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def int_mm(x_i8: Tensor, w_trit: Tensor) -> Tensor:
    """acc_i32 (M, N) = x_i8 (M, K) @ w_trit (N, K).T, exactly."""
    M, K = x_i8.shape
    N = w_trit.shape[0]
    if x_i8.is_cuda:  # torch wants more than 16 rows and multiples of 8, and cuBLAS may not have every one of those
        x_i8 = F.pad(x_i8, (0, -K % 32, 0, max(0, 17 - M)))
        w_trit = F.pad(w_trit, (0, -K % 32, 0, -N % 32))
        return torch._int_mm(x_i8, w_trit.t())[:M, :N]
    if x_i8.device.type == "cpu" and HAS_INT8_GEMM and K > 1:  # torch 2.13's product is garbage for K = 1
        return torch._int_mm(x_i8, w_trit.t())
    assert K * 127 < 2**24
    with torch.autocast(x_i8.device.type, enabled=False):  # which would round the sums to bf16
        return (x_i8.float() @ w_trit.float().t()).to(torch.int32)


def product(x_i8: Tensor, x_scale: Tensor, w_trit: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y (M, N) of `dtype`."""
    return scaled(int_mm(x_i8, w_trit), x_scale, w_scale).to(dtype)


class TernaryProducts(torch.autograd.Function):
    """x, dtype, weights -> x @ W.T for every W of `weights`, on quantized x and W. x is quantized once for all of them,
    and remembered for backward once, as one byte a value; W as trits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, dtype, *weights = inputs  # named here: without gradients dynamo takes as many names as inputs for no ctx
        on_gpu = cuda_ops.takes(x)
        x_i8, x_scale = (cuda_ops.quantize if on_gpu else quantize_activations)(x)      # (M, K), (M, 1)
        trits, scales = zip(*map(quantize_weight, weights), strict=True)       # (N, K), ()
        ctx.save_for_backward(x_i8, x_scale, *trits, *scales)
        ctx.x_dtype = x.dtype
        multiply = cuda_ops.product if on_gpu else product
        return tuple(multiply(x_i8, x_scale, w_trit, w_scale, dtype)                    # (M, N)
                     for w_trit, w_scale in zip(trits, scales, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_i8, x_scale, *rest = ctx.saved_tensors
        trits, scales = rest[:len(grads)], rest[len(grads):]
        dtype = grads[0].dtype
        x = x_i8.to(dtype)  # int8 values and trits are exact in bf16 too
        grad_x = None
        if ctx.needs_input_grad[0]:
            parts = [(grad @ w_trit.to(dtype)).mul_(w_scale)                   # (M, K)
                     for grad, w_trit, w_scale in zip(grads, trits, scales, strict=True)]
            grad_x = functools.reduce(Tensor.add_, parts).to(ctx.x_dtype)
        grad_weights = [(grad * x_scale).to(dtype).t().mm(x).float() if needed else None
                        for grad, needed in zip(grads, ctx.needs_input_grad[2:], strict=True)]
        return grad_x, None, *grad_weights


def pass_through(value: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in forward and `value` in backward, which is the straight-through estimator."""
    return value + (quantized - value).detach()


class BitLinear(Linear):
    """nn.Linear on quantized weights and activations, in training and after. It owns nothing but `weight`.

    weight_quant, activation_quant: of quantizers.py; per_row: scales for every row. Trits and int8 are computed as
    integers, the other forms in floating point. share: how much quantization training has, see BitGPT.quantize; below 1
    weights are blended with what they are quantized to, and activations stay as they are.
    """

    weight_quant, activation_quant, per_row = "absmean", "int8", False
    share = 1.0

    def packed(self, layers: tuple[tuple[Tensor, ...], ...], dtype: torch.dtype) -> PackedWeights:
        if self.in_floats:
            return super().packed(tuple(tuple(self.blended(weight.detach()) for weight in layer) for layer in layers),
                                   dtype)
        return PackedWeights(layers, dtype, ternary=True)

    @property
    def in_floats(self) -> bool:
        """Whether activations stay unquantized, so that it is an ordinary matrix product of floats."""
        return self.activation_quant == "none" or (self.training and self.share < 1)

    @property
    def in_integers(self) -> bool:
        form = self.weight_quant, self.activation_quant, self.per_row
        return form == ("absmean", "int8", False) and not self.in_floats

    def codes(self) -> tuple[Tensor, Tensor]:
        """What the weight is now: whole numbers int8 (N, K) and their scale fp32, () or (N, 1)."""
        return quantize_weight(whole(self.weight.detach()), self.weight_quant, self.per_row)

    def products(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """The products of one input with several layers of this kind: it is quantized once for all."""
        weights: list[Any] = [linear.weight for linear in linears]
        if not self.in_integers:
            return self.straight_through(x, weights)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        products = TernaryProducts.apply(x.reshape(-1, self.in_features), dtype, *weights)
        return tuple(y.view(*x.shape[:-1], -1) for y in products)

    def straight_through(self, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """The same in floating point, as papers write it: for what has no integer kernel."""
        if not self.in_floats:
            x = pass_through(x.float(), ACTIVATIONS[self.activation_quant](x.float()))
        return tuple(F.linear(x, self.blended(weight)) for weight in weights)

    def blended(self, weight: Tensor) -> Tensor:
        """A weight between itself and what it is quantized to, as far as training has come."""
        share = self.share if self.training else 1.0
        if not share:
            return weight
        codes, scale = WEIGHTS[self.weight_quant](weight, self.per_row)
        return pass_through(weight, weight.lerp(codes * scale, share))

    def together(self, x: Tensor, *others: nn.Module) -> tuple[Tensor, ...]:
        return self.products(x, self, *others) if self.norm is None else super().together(x, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x if self.norm is None else self.norm(x), self)[0]
