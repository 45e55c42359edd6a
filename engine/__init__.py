"""Inference: load a run, feed it tokens, through the kernel that fits the machine.

    import engine
    model = engine.load("runs/bitgpt")                                # kernel="auto": Triton on a GPU, C, or torch
    for ids in model.generate(prompt_ids, max_new_tokens=100): ...    # (num_samples,) token ids, as they come

sampling.py has the loop and the sampler, reference.py the torch engine, cpu.py and cuda.py the packed ones. Importing
this, and the packed path on a CPU, leaves torch alone: it would take longer to import than a small model to answer.
"""

import dataclasses
import sys
from pathlib import Path

from core.config import MOST_THREADS, flag, setting
from core.files import UserError
from core.run_folder import read_config
from engine.cpu import KV_CACHES, CPUEngine
from engine.packed_file import HEADS, WEIGHTS
from engine.packing import unpackable
from engine.sampling import Engine
from kernels import gpu
from kernels.build import NoKernel

KERNELS = ("auto", "torch", "cpu", "triton")
TRITS = tuple(weights for weights in WEIGHTS if weights.startswith("trit"))

__all__ = ["HEADS", "KERNELS", "KV_CACHES", "TRITS", "Engine", "EngineConfig", "load"]


@dataclasses.dataclass
class EngineConfig:
    """Which weights, and what runs them: `load` by flags."""

    out_dir: str = setting("", "the run folder (default: runs/ and the model's name)", path=True)
    checkpoint: str = setting("best", "which weights", choices=("best", "last"))
    kernel: str = setting("auto", "what computes: Triton (GPU) or C, packed, or torch", choices=KERNELS)
    weights: str = setting("trit2", "how trits are packed: 2 bits each or 1.6", choices=TRITS)
    head: str = setting("q8", "how embedding and head are packed", choices=HEADS)
    kv_cache: str = setting("fp32", "how the cpu kernel keeps keys and values; bf16 is faster far into a text",
                            choices=KV_CACHES)
    threads: int = setting(0, "CPU threads (0: the physical cores)", low=0, high=MOST_THREADS)
    device: str = setting("auto", "device of the torch and triton kernels: auto, cpu, cuda, cuda:N, mps")

    def load(self, run: Path) -> Engine:
        return load(run, self.kernel, self.checkpoint, self.device, self.threads, self.weights, self.head,
                    self.kv_cache)


def tell_unused(model: Engine, **settings: str) -> Engine:
    """The engine, after a note if any of these settings, of which it has no use, was asked for."""
    asked = [f"{flag(name)} {value}" for name, value in settings.items() if value != getattr(EngineConfig, name)]
    if asked:
        print(f"note: the {model.kernel} kernel has no use for {', '.join(asked)}", file=sys.stderr)
    return model


def load(run: str | Path, kernel: str = "auto", checkpoint: str = "best", device: str = "auto", threads: int = 0,
         weights: str = "trit2", head: str = "q8", kv_cache: str = "fp32") -> Engine:
    """The engine of a run folder.

    kernel: of KERNELS; auto takes triton for a ternary run where there is an NVIDIA GPU, cpu unless `device` names
    another one, and torch where neither can run. checkpoint: best or last. device: of the torch and triton kernels.
    threads: 0 takes the physical cores. weights, head: how the packed kernels pack the ternary matrices (of TRITS) and
    embedding and head (of HEADS). kv_cache: what the C kernel keeps keys and values as (of KV_CACHES). Raises
    UserError.
    """
    run = Path(run)
    twin, config, _ = read_config(run)  # says first what is wrong with the folder
    for name, value, known in (("kernel", kernel, KERNELS), ("checkpoint", checkpoint, ("best", "last")),
                               ("weights", weights, TRITS), ("head", head, HEADS), ("kv_cache", kv_cache, KV_CACHES)):
        if value not in known:
            raise UserError(f"{name} {value!r} is not known. Choose from: {', '.join(known)}.")
    if not 0 <= threads <= MOST_THREADS:
        raise UserError(f"threads is {threads}, but must be at least 0 (which takes the physical cores) and at most "
                        f"{MOST_THREADS}.")
    unfit = unpackable(twin, config)
    if kernel == "auto" and unfit:
        print(f"note: {run} was trained with {unfit}, which the packed kernels do not know; taking torch",
              file=sys.stderr)
        kernel = "torch"
    on_gpu = kernel == "auto" and twin == "bitgpt" and device.partition(":")[0] in ("auto", "cuda")
    if kernel == "triton" or (on_gpu and gpu.capabilities()):
        try:
            gpu.require(device)  # before torch is imported
            from engine.cuda import CUDAEngine

            return tell_unused(CUDAEngine.from_run(run, checkpoint, device, weights, head), kv_cache=kv_cache)
        except NoKernel as why:
            if kernel == "triton":
                raise UserError(f"--kernel triton: {why}. Take --kernel auto, cpu or torch.") from None
            print(f"note: no triton kernel: {why}; going on without it", file=sys.stderr)
    if kernel == "cpu" or (kernel == "auto" and device in ("auto", "cpu")):
        try:
            return tell_unused(CPUEngine.from_run(run, checkpoint, threads, weights, head, kv_cache=kv_cache),
                               device="auto" if device == "cpu" else device,
                               **{"weights": weights} if twin == "gpt" else {})
        except NoKernel as why:
            if kernel == "cpu":
                raise UserError(f"--kernel cpu: {why}. Install a C compiler, or take --kernel torch.") from None
            print(f"note: {why}; going on with the torch kernel", file=sys.stderr)
    from engine.reference import TorchEngine

    return tell_unused(TorchEngine.from_run(run, checkpoint, device, threads), weights=weights, head=head,
                       kv_cache=kv_cache)
