"""Inference: load a run, feed it tokens, through the kernel that fits the machine.

    from engine import load
    engine = load("runs/bitgpt")
    for ids in engine.generate(prompt_ids, max_new_tokens=100): ...

sampling.py has the loop and the sampler, reference.py the torch engine.
"""

from pathlib import Path

from core.files import UserError
from engine.sampling import Engine

KERNELS = ("auto", "torch")


def load(run: str | Path, kernel: str = "auto", checkpoint: str = "best", device: str = "auto") -> Engine:
    """The engine of a run folder. kernel: of KERNELS; checkpoint: best or last; device: of the torch kernel."""
    if kernel not in KERNELS:
        raise UserError(f"--kernel {kernel!r} is not known. Choose from: {', '.join(KERNELS)}.")
    from engine.reference import TorchEngine  # torch takes a second to import: only who needs it pays

    return TorchEngine.from_run(Path(run), checkpoint, device)
