"""Many processes that train one model: who each of them is, and what all of them decide alike.

    torchrun --nproc-per-node 8 bitgpt/train.py        # README.md has the command for two nodes

Every rank runs the same script. They meet in `World.all_reduce_mean`, once a step, and in `World.all_reduce_sum`, once
an evaluation. DDP averages the gradients; with --fsdp FSDP2 does, which keeps a part of every weight on each rank and
gathers the whole fp32 weight before it is used: absmean is that of the matrix, and no rank sees a rounded latent. Rank
0 alone writes, prints and draws. A rank that hangs is found by core/watch.py. One process is a world of size 1 and pays
for nothing.
"""

import contextlib
import functools
import itertools
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from core.files import UserError
from core.runtime import is_sharded, whole
from core.watch import Watch

T = TypeVar("T")
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def from_torchrun(name: str, alone: int) -> int:
    """A number of the environment, `alone` where there is none. UserError where it is no such number."""
    value = os.environ.get(name, str(alone))
    if not value.isdecimal() or int(value) < alone:
        raise UserError(f"{name} is {value!r} in the environment, where torchrun has a number. Unset it.")
    return int(value)


def hang_up() -> None:
    """What is written to a terminal that is gone is no error from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
    os.close(nowhere)


class World:
    """The processes of this run. `signal`: what asked this one to stop, 0 for nothing; `stop`: what asked any."""

    def __init__(self) -> None:
        """Joins the others where torchrun started several, and waits until all are there."""
        self.rank, self.size, self.local_rank = (
            from_torchrun(name, alone) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if self.size > 1 and missing:
            raise UserError(f"WORLD_SIZE is {self.size} in the environment, and {missing[0]} is not set. Start several "
                            "processes with torchrun, which sets all of them, or unset WORLD_SIZE.")
        self.signal = self.agreed = 0
        self.watch = Watch(self.rank, self.size)
        if self.size > 1:
            nccl = torch.cuda.is_available() and dist.is_nccl_available()
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
            self.watch.meet(store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=self.rank,
                                    world_size=self.size, timeout=timedelta(days=1))  # waiting is for watch to judge
            self.watch.start()

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    @property
    def stop(self) -> int:
        """The signal to stop for, 0 for none: with several processes as of the last step, the same on all of them."""
        return self.signal if self.size == 1 else self.agreed and (self.signal or signal.SIGTERM)

    @contextlib.contextmanager
    def heed_signals(self) -> Iterator[None]:
        """Ctrl-C, a kill's SIGTERM and a closed terminal's SIGHUP (not under nohup) set a flag that is read between
        steps; a second one ends at once."""
        def handle(number: int, frame: FrameType | None) -> None:
            if number not in (signal.SIGINT, signal.SIGTERM):
                hang_up()
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number

        self.signal = self.agreed = 0
        self.watch.working -= 1  # from here on every rank is expected to move
        before = {number: signal.signal(number, handle) for number in STOPPING
                  if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.watch.working += 1

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around what this rank alone does, while the others wait for as long as it takes."""
        self.watch.working += 1
        try:
            yield
        finally:
            self.watch.working -= 1

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

    def parallel(self, model: nn.Module, device: torch.device, shard: Sequence[nn.Module] = ()) -> nn.Module:
        """`model`, its weights equal on all ranks, with gradients that are means over them.

        Without `shard` every rank holds the model, on `device`. Where the attribute require_backward_grad_sync of what
        is returned is False, gradients only add up here, as for all micro-batches of a step but the last.
        shard: the parts of it that are whole one at a time. Each rank keeps its share of each of the model's weights,
        now DTensors on `device`, and of their gradients, which are shared out after every micro-batch: no rank ever
        holds all of them.
        """
        if self.size == 1:
            return model
        model.register_forward_pre_hook(self.heartbeat)
        if not shard:
            return DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                           gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh  # two seconds of imports
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for part in (*shard, model):  # no MixedPrecisionPolicy: rounded latents would make other trits
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return model

    def heartbeat(self, *arguments: Any) -> None:
        """A forward pass begins: this rank does not hang."""
        self.watch.moves += 1

    def shard(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This rank's share of the items, and whether each counts: where they do not divide evenly, a rank without one
        repeats another's, since all must go through a sharded model equally often."""
        items = iter(items)
        while group := list(itertools.islice(items, self.size)):
            yield group[min(self.rank, len(group) - 1)], self.rank < len(group)

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on rank 0's CPU, whole, one after the other; nothing on the other ranks. All must call it."""
        found = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self.is_main:
                found[name] = tensor.cpu()
        return found

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns: rank 0 does it first, one process of every other node next, and the others find it
        done. Returns when all are."""
        if self.size == 1:
            return work()
        mine = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                result = work()
            self.barrier()
        return result

    def all_reduce_mean(self, *values: Tensor) -> list[float]:
        """Means of scalars over all ranks. What is not finite on one rank is not finite on any, so that all skip the
        same steps. Whether to stop travels along: one transfer, and the step's one synchronisation."""
        if self.size == 1:
            return torch.stack(values).tolist()
        shared = torch.stack((*values, torch.full_like(values[0], self.signal > 0))) / self.size
        dist.all_reduce(shared)
        *means, asked = shared.tolist()
        self.agreed, self.watch.stepped = int(asked > 0), True
        return means

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sums over all ranks, in double precision."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.all_reduce_sum(0)

    def shutdown(self) -> None:
        """Waits for all ranks; from then on each ends when it likes."""
        self.barrier()
        self.watch.stop()


@functools.cache
def world() -> World:
    return World()


def many() -> bool:
    """Whether this process is one of several; some builds of torch know of none."""
    return dist.is_available() and dist.is_initialized()


def sharded_as(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, which every rank has, on the device of `weight`: this rank's share where that is sharded and they have
    one shape."""
    if not is_sharded(weight) or value.shape != weight.shape:
        return value.to(weight.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def every_rank(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `main` of a script that torchrun may start: when a process dies the others say so and end, and a
    mistake that all of them see is told once."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            result = main(*args, **kwargs)
        except SystemExit:  # all stopped together: threads that the group still had would abort the interpreter's end
            if many():
                dist.destroy_process_group()
            raise
        except UserError:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(20)  # torchrun ends this process once another has told of it; if none does, it is its own
            raise
        except RuntimeError as error:
            if not many() or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise
            raise UserError(f"rank {world().rank} of {world().size} lost another process of this run "
                            f"({str(error).splitlines()[0][:120]}). The last checkpoint is kept: go on with "
                            "--resume.") from None
        finally:
            if many():
                world().watch.stop()
        if many():
            dist.destroy_process_group()
        return result

    return wrapped
