"""Quantizers: what BitLinear makes of its weight and its input, under the names of `--weight-quant` and
`--activation-quant`.

    codes, scale = quantize_weight(weight)               # absmean: weight is about codes * scale
    codes, scale = WEIGHTS["int2"](weight, per_row=True)  # any of them: fp32 (N, K) -> fp32 whole numbers (N, K), scale
    x_q = ACTIVATIONS["int4"](x)                         # fp32 (..., K) -> the value that is computed with

scale is fp32 () for a matrix, or (N, 1) per row. bitlinear.py says which of them run on integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-5  # a matrix or a token of zeros stays zeros


def mean(values: Tensor, per_row: bool) -> Tensor:
    return values.mean(dim=1, keepdim=True) if per_row else values.mean()


def absmean(weight: Tensor, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """-1, 0, 1: BitNet b1.58, arXiv 2402.17764 eq. 1-3, operations as in transformers."""
    scale = mean(weight.abs(), per_row).clamp(min=EPS)
    return (weight * (1 / scale)).round_().clamp_(-1, 1), scale


def absmedian(weight: Tensor, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """-1, 0, 1: the median in the place of the mean, so that about a quarter are zeros. arXiv 2407.09527"""
    magnitude = weight.abs()
    scale = (magnitude.median(dim=1, keepdim=True).values if per_row else magnitude.median()).clamp(min=EPS)
    return (weight * (1 / scale)).round_().clamp_(-1, 1), scale


def sign(weight: Tensor, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """-1, 1, as the weight is below or above the mean: the 1-bit BitNet, arXiv 2310.11453 eq. 1-3."""
    return (weight > mean(weight, per_row)).to(weight.dtype) * 2 - 1, mean(weight.abs(), per_row).clamp(min=EPS)


def int2(weight: Tensor, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """-3, -1, 1, 3: four even levels around 0, as arXiv 2502.02631 finds best for 2 bits. Normal weights lose least
    with 1.25 mean|W| from level to level (Max 1960: 0.996 sigma)."""
    scale = (0.625 * mean(weight.abs(), per_row)).clamp(min=EPS)
    return (weight * (0.5 / scale)).floor_().clamp_(-2, 1) * 2 + 1, scale


def int8(x: Tensor) -> Tensor:
    x_i8, scale = quantize_activations(x)
    return x_i8 * scale


def int4(x: Tensor) -> Tensor:
    """Whole steps from -8 to 7, by the mean of |x| per token: BitNet a4.8, arXiv 2411.04965 eq. 3-4."""
    scale = x.abs().mean(dim=-1, keepdim=True).clamp(min=EPS) / 7**0.5
    return (x / scale).round_().clamp_(-8, 7) * scale


def clamp8(x: Tensor) -> Tensor:
    """int8 without its rounding: scaled by max|x|, clamped, scaled back. Nothing exceeds its own maximum, so this is
    `none` but for float noise; others train with it, so it can be measured."""
    s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    return (x * s).clamp_(-128, 127) / s


def none(x: Tensor) -> Tensor:
    return x


WEIGHTS: dict[str, Callable[[Tensor, bool], tuple[Tensor, Tensor]]] = {
    quantizer.__name__: quantizer for quantizer in (absmean, absmedian, sign, int2)}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    quantizer.__name__: quantizer for quantizer in (int8, int4, clamp8, none)}


def quantize_weight(weight: Tensor, how: str = "absmean", per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Codes int8 (N, K) and their scale fp32, () or (N, 1)."""
    codes, scale = WEIGHTS[how](weight.float(), per_row)
    return codes.to(torch.int8), scale


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i8 int8 (..., K) and x_scale fp32 (..., 1): absmax per token, arXiv 2310.11453 eq. 4."""
    x = x.float()
    s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=EPS)
    return (x * s).round_().to(torch.int8), 1 / s  # |x * s| rounds to 127 at most: nothing is left to clamp
