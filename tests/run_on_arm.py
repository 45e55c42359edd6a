"""The kernels' NEON paths, cross-compiled and run in qemu's emulation: `make test-arm`. Sums are exact there, too.

Needs aarch64-linux-gnu-gcc and qemu-aarch64; Debian: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernels.format import KINDS, pack

HERE = Path(__file__).resolve().parent
CPUS = {"neon-i8mm": ("armv8.2-a+dotprod+i8mm", "max"), "neon": ("armv8.2-a+dotprod", "neoverse-n1"),
        "scalar": ("armv8-a", "cortex-a53")}
SHAPES = [(1, 1, 1), (16, 16, 1), (1, 6912, 1), (33, 1, 2), (17, 2561, 3), (48, 1281, 15), (3, 5000, 29), (40, 77, 4)]


@pytest.mark.parametrize("isa", CPUS)
def test_sums_are_exact(isa, tmp_path):
    architecture, cpu = CPUS[isa]
    program = tmp_path / "products"
    subprocess.run(["aarch64-linux-gnu-gcc", "-O3", "-std=gnu11", "-static", "-pthread", "-Wno-psabi",
                    f"-march={architecture}", "-o", program, HERE / "products_on_arm.c", "-lm"], check=True)
    rng, given, cases = np.random.default_rng(0), b"", []
    for kind in (kind for kind in KINDS if kind != "bf16"):
        largest = KINDS[kind].largest
        for n, k, m in SHAPES:
            for extreme in (None, -128, 127):
                w = rng.integers(-largest, largest + 1, (n, k)) if extreme is None \
                    else np.full((n, k), rng.choice([-largest, largest]))
                x = rng.integers(-128, 128, (m, k)) if extreme is None else np.full((m, k), extreme)
                w, x, scale = w.astype(np.int8), x.astype(np.int8), rng.random(n).astype(np.float32)
                packed = pack(kind, w)
                given += np.array([KINDS[kind].number, n, k, m, packed.size], "<i4").tobytes()
                given += packed.tobytes() + scale.tobytes() + x.tobytes()
                cases.append((kind, w, x, scale))
    made = subprocess.run(["qemu-aarch64", "-cpu", cpu, program], input=given, capture_output=True, check=True).stdout
    assert made[:16].rstrip(b"\0").decode() == isa
    at = 16
    for kind, w, x, scale in cases:
        size = 4 * len(x) * len(w)
        acc, y = made[at:at + size], made[at + size:at + 2 * size]
        at += 2 * size
        exact_i32 = x.astype(np.int32) @ w.T.astype(np.int32)
        assert np.array_equal(np.frombuffer(acc, "<i4").reshape(len(x), -1), exact_i32), kind
        exact = x.astype(np.float64) @ (w * scale[:, None]).T.astype(np.float64)
        bound = 128 * np.abs(w).sum(axis=1, dtype=np.float64) * scale / 127 / 2 + 1e-3  # half a step of x, everywhere
        assert (np.abs(np.frombuffer(y, "<f4").reshape(len(x), -1) - exact) <= bound + 1e-5 * np.abs(exact)).all(), kind
    assert at == len(made)
