"""Weights as the GPU reads them, packed from a run's file (format.py) on the device as it is loaded. torch only.

triton_kernels.py draws the bits: rows of whole words, each in four quarters. A row is a multiple of 16 bytes, so every
thread reads 16 at once. int8 matrices (embedding, head) are rows of bytes, 15-bit activations meet them twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.format import KINDS, ROWS, q6_planes, trits_of_bytes

TRITS, BYTES = 4, 1  # planes


class Matrix(NamedTuple):
    """w (N, 4 * KW) uint8 for trits, int8 or bf16 for tables; scale (N,) fp32, ones for bf16; k: columns."""

    w: Tensor
    scale: Tensor
    k: int
    planes: int

    @property
    def n(self) -> int:
        return self.w.shape[0]

    @property
    def words(self) -> int:
        """Words of four bytes in a plane of a row: KW."""
        return self.w.shape[1] // 4


def row_bytes(k: int, planes: int) -> int:
    """Bytes of a row of k columns: a plane of it is a multiple of 16 columns."""
    return 16 * -(-k // (16 * planes))


def pack_trits(w_trit: Tensor) -> Tensor:
    """w_trit int8 (N, K) -> (N, row_bytes) uint8."""
    n, k = w_trit.shape
    width = row_bytes(k, TRITS)
    quarters = F.pad(w_trit, (0, TRITS * width - k)).view(n, TRITS, width)
    codes = torch.where(torch.arange(TRITS, device=w_trit.device).view(1, TRITS, 1) < 3, quarters + 1, quarters & 3)
    codes = codes.to(torch.uint8)
    return (codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6).contiguous()


def unpack_trits(w: Tensor, k: int) -> Tensor:
    """The inverse of `pack_trits`: int8 (N, k)."""
    planes = [(w >> 2 * p & 3).to(torch.int8) for p in range(TRITS)]
    trits = [planes[0] - 1, planes[1] - 1, planes[2] - 1, planes[3] - (planes[3] >> 1 << 2)]
    return torch.cat(trits, dim=1)[:, :k]


def pack_bytes(w: Tensor) -> Tensor:
    """w int8 (N, K) -> (N, row_bytes) int8, zeros behind."""
    return F.pad(w, (0, row_bytes(w.shape[1], BYTES) - w.shape[1])).contiguous()


def unpack(kind: str, packed: Tensor, n: int, k: int) -> Tensor:
    """What format.unpack gives, on the device of `packed` (panels, groups, bytes): int8 (n, k), for bf16 bf16."""
    panels, groups, size = packed.shape
    lines = packed.view(panels, groups, size // 64, ROWS, 4)
    a = lines[:, :, 0]                                                              # (panel, group, row, j)
    if kind == "bf16":
        return a.view(torch.bfloat16).transpose(1, 2).reshape(panels * ROWS, -1)[:n, :k]
    if kind == "q8":
        w = (a ^ 128).view(torch.int8)[:, :, :, None]                               # (panel, group, row, plane, j)
    elif kind == "q6":
        w = torch.stack(q6_planes(a, lines[:, :, 1], lines[:, :, 2]), dim=3).view(torch.int8) - 32
    else:
        table = torch.from_numpy(trits_of_bytes(kind)).to(packed.device)
        w = table[a.int()].transpose(3, 4)
    return w.transpose(1, 2).reshape(panels * ROWS, groups * KINDS[kind].columns)[:n, :k]


def matrix(kind: str, packed: Tensor, scale: Tensor | None, n: int, k: int) -> Matrix:
    """A matrix of the packed file, on the device of `packed`. scale: (1,) or (n,), None for bf16."""
    w = unpack(kind, packed, n, k)
    scale = torch.ones(1, device=packed.device) if scale is None else scale
    scale = scale.reshape(-1).expand(n).contiguous()
    if kind == "bf16":
        return Matrix(w.contiguous(), scale, k, BYTES)
    return Matrix(pack_trits(w), scale, k, TRITS) if kind.startswith("trit") else Matrix(pack_bytes(w), scale, k, BYTES)


def stacked(*parts: Matrix) -> Matrix:
    """Matrices of one input as one, one below the other."""
    return Matrix(torch.cat([part.w for part in parts]), torch.cat([part.scale for part in parts]), parts[0].k,
                  parts[0].planes)


def in_turns(gate: Matrix, up: Matrix) -> Matrix:
    """Rows of two matrices in turns, so that a program has both factors of act(gate) * up."""
    return Matrix(torch.stack((gate.w, up.w), dim=1).flatten(0, 1),
                  torch.stack((gate.scale, up.scale), dim=1).flatten(), gate.k, gate.planes)
