"""BitLinear's integers on CUDA: custom ops around the Triton kernels, so that torch.compile keeps them as they are.

    if cuda_ops.takes(x):
        x_i8, x_scale = cuda_ops.quantize(x)                            # (M, K), (M, 1), for all weights of one input
        y = cuda_ops.product(x_i8, x_scale, w_trit, w_scale, dtype)     # (M, N)

They give bit for bit what bitlinear.py computes: quantize_activations, int_mm, scaled. No gradients: those are
BitLinear's. Latent weights change with every step, so trits are taken as int8 and not packed. The kernels are imported
on first use, since triton is not everywhere. Under its interpreter (TRITON_INTERPRET=1) the ops take CPU tensors.
"""

import functools
import sys

import torch
from torch import Tensor

from kernels import gpu
from kernels.build import NoKernel


@functools.cache
def found() -> bool:
    try:
        for i in range(max(1, len(gpu.capabilities()))):
            gpu.require(f"cuda:{i}")
    except NoKernel as why:
        print(f"note: no triton kernels: {why}; training with torch's int8 product", file=sys.stderr)
        return False
    return True


@torch.compiler.assume_constant_result  # torch.compile would follow it into the driver, and break the graph there
def available() -> bool:
    """Whether the kernels can run on every GPU of this machine; says once why they cannot."""
    return found()


def takes(x: Tensor) -> bool:
    """Whether the kernels are to compute with x."""
    return x.is_cuda and available()


@torch.library.custom_op("bitgpt::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), any float -> x_i8 int8 (M, K), in rows that are padded, and x_scale fp32 (M, 1)."""
    from kernels import launch

    with torch.cuda.device_of(x):
        made = launch.quantize(x.contiguous())
    return made.x_i8[:, :x.shape[1]], made.x_scale[:, None]


@quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return x.new_empty((M, (K + 63) // 64 * 64), dtype=torch.int8)[:, :K], x.new_empty((M, 1), dtype=torch.float32)


@torch.library.custom_op("bitgpt::product", mutates_args=())
def product(x_i8: Tensor, x_scale: Tensor, w_trit: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y (M, N) of `dtype` = (x_i8 (M, K) @ w_trit (N, K).T) * x_scale (M, 1) * w_scale (), in fp32, rounded once to
    `dtype`; rows of any stride."""
    from kernels import launch

    y = x_i8.new_empty((x_i8.shape[0], w_trit.shape[0]), dtype=dtype)
    with torch.cuda.device_of(x_i8):
        launch.gemm(x_i8, w_trit, y, "scaled", x_scale=x_scale, w_scale=w_scale)
    return y


@product.register_fake
def _(x_i8: Tensor, x_scale: Tensor, w_trit: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x_i8.new_empty((x_i8.shape[0], w_trit.shape[0]), dtype=dtype)
