"""Many processes that train one model: who each of them is, and what all of them decide alike.

    torchrun --nproc-per-node 8 bitgpt/train.py        # README.md has the command for two nodes

Every rank runs the same script. They meet in `World.agree`, once a step, and in `World.total`, once an evaluation; the
gradients DDP averages. Rank 0 alone writes, prints and draws. One process is a world of size 1 and pays for nothing.
"""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from core.files import UserError

T = TypeVar("T")


class World:
    """The processes of this run. `signal`: what asked this one to stop, 0 for nothing; `stop`: what asked any."""

    def __init__(self) -> None:
        """Joins the others where torchrun started several, and waits until all are there."""
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.signal = self.agreed = 0
        if self.size > 1:
            nccl = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(minutes=10))
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # a corpus can take its time

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    @property
    def stop(self) -> int:
        """The signal to stop for, 0 for none: with several processes as of the last step, the same on all of them."""
        return self.signal if self.size == 1 else self.agreed and (self.signal or signal.SIGTERM)

    @contextlib.contextmanager
    def heed_signals(self) -> Iterator[None]:
        """Ctrl-C (and a kill's SIGTERM) sets a flag that is read between steps; a second one ends at once."""
        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number

        self.signal = self.agreed = 0
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def device(self, device: torch.device) -> torch.device:
        """This process's own device, where `device` is the one that a single process would take."""
        if self.size == 1 or device.type == "cpu":
            return device
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"--device {device}: {self.size} processes cannot share it. Take --device cuda or cpu.")
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes on a machine with {torch.cuda.device_count()} CUDA device(s). Lower "
                            "--nproc-per-node, or take --device cpu.")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with gradients that are means over all ranks, and rank 0's weights everywhere. Where its attribute
        require_backward_grad_sync is False they only add up here, as for all micro-batches of a step but the last."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns: rank 0 does it first, one process of every other node next, and the others find it
        done. Returns when all are."""
        if self.size == 1:
            return work()
        mine = 0 if self.leads else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                result = work()
            dist.barrier(self.patient)
        return result

    def agree(self, *values: Tensor) -> list[float]:
        """The means over all ranks of some values (), which one rank that is not finite spoils for all, so that all
        skip the same steps; and whether to stop. One transfer, and the step's one synchronisation."""
        if self.size == 1:
            return torch.stack(values).tolist()
        shared = torch.stack((*values, torch.full_like(values[0], self.signal > 0))) / self.size
        dist.all_reduce(shared)
        *means, asked = shared.tolist()
        self.agreed = int(asked > 0)
        return means

    def total(self, *values: float) -> list[float]:
        """The sums over all ranks, in double precision."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            dist.barrier(self.patient)


@functools.cache
def world() -> World:
    return World()


def every_rank(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `main` of a script that torchrun may start: when a process dies the others say so and end, and a
    mistake that all of them see is told once."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            result = main(*args, **kwargs)
        except UserError:
            if int(os.environ.get("LOCAL_RANK", 0)):
                time.sleep(20)  # torchrun ends this process once another has told of it; if none does, it is its own
            raise
        except RuntimeError as error:
            if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise
            raise UserError(f"rank {world().rank} of {world().size} lost another process of this run "
                            f"({str(error).splitlines()[0][:120]}). The last checkpoint is kept: go on with "
                            "--resume.") from None
        if dist.is_initialized():
            dist.destroy_process_group()
        return result

    return wrapped
