"""Finds the rank that hangs: one that no longer runs, or that runs and gets nowhere.

A process that dies breaks its connections, and the others know at once. One that hangs leaves them waiting in an
operation of all ranks, where Python can raise nothing. So a thread of every rank posts signs of life into the store
where the ranks met, reads those of the others, and ends its own process when one of them hangs. It counts its own
heartbeats instead of asking a clock: a machine that sleeps or starves, or a clock that jumps, makes no rank hang.
core/distributed.py starts it.
"""

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

BEAT = 5.0      # seconds from one sign of life to the next
PATIENCE = 12   # heartbeats without a sign, or in which no rank moves
AT_FIRST = 120  # the same, until the first step is over: caches fill, libraries compile


class Judge:
    """Hears the signs of all ranks once a heartbeat, and says which of them hang.

    A sign is (heartbeat, moves, working): moves counts the forward passes that have begun, working says that the rank
    does what may take any time, such as writing a checkpoint, while the others wait for it.
    """

    def __init__(self, size: int) -> None:
        self.signs: Sequence[Sequence[int]] = [[0, 0, 0]] * size
        self.silent = [0] * size        # heartbeats without a new sign
        self.still = self.longest = 0   # heartbeats in which no rank moved; and the most of them before one did

    def hear(self, signs: Sequence[Sequence[int]], at_first: bool) -> list[int]:
        """The ranks that hang. Those that do move in long steps are given four times as long."""
        before, self.signs = self.signs, signs
        self.silent = [beats + 1 if old == new else 0
                       for beats, old, new in zip(self.silent, before, signs, strict=True)]
        moves = [sign[1] for sign in signs]
        if any(sign[2] for sign in signs) or moves != [sign[1] for sign in before]:
            self.longest, self.still = max(self.longest, self.still), 0
        else:
            self.still += 1
        silent = [rank for rank, beats in enumerate(self.silent) if beats >= PATIENCE]
        if silent or self.still < (AT_FIRST if at_first else max(PATIENCE, 4 * self.longest)):
            return silent
        return [rank for rank, moved in enumerate(moves) if moved == min(moves)]


class Watch(threading.Thread):
    """A daemon thread, of a run of several ranks. `moves` and `working` are this rank's own, as `Judge` knows them;
    `stepped`: it took a step; `over`: nobody is watched any more."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.size = rank, size
        self.moves, self.working, self.stepped = 0, 1, False
        self.over = threading.Event()

    def meet(self, store: Any) -> None:
        """Waits until all ranks have come to the store."""
        self.store = store.clone()  # a connection of its own: other threads wait for answers on theirs
        self.post(0)
        self.store.wait([f"sign/{rank}" for rank in range(self.size)])

    def post(self, beat: int) -> None:
        self.store.set(f"sign/{self.rank}", f"{beat} {self.moves} {self.working}")

    def run(self) -> None:
        judge, beat = Judge(self.size), 0
        while not self.over.wait(BEAT):
            beat += 1
            try:
                self.post(beat)
                signs = self.store.multi_get([f"sign/{rank}" for rank in range(self.size)])
            except RuntimeError:  # the store is gone with the process that kept it: the run is over
                if not self.over.wait(4 * BEAT):  # but this rank hangs, or it would have ended
                    self.exit(f"rank {self.rank} of {self.size} lost the others")
                return
            hanging = judge.hear([[int(number) for number in sign.split()] for sign in signs], not self.stepped)
            if hanging and not self.over.is_set():
                self.end(hanging)

    def stop(self) -> None:
        """Nobody is watched any more. Waits for the thread: were it in the store's C++ code when the interpreter exits,
        it would abort the process ("terminate called without an active exception")."""
        self.over.set()
        if self.is_alive():
            self.join(PATIENCE * BEAT)

    def end(self, hanging: list[int]) -> None:
        """Says which ranks hang and ends this process; torchrun then ends the others."""
        others = [rank for rank in range(self.size) if rank not in hanging] or [0]
        if self.rank != others[0]:
            threading.Event().wait(2 * BEAT)  # told once, by the first that can
        who = f"rank {', '.join(map(str, hanging))} of {self.size} hangs" if len(hanging) < self.size else \
            "all ranks wait for each other"
        self.exit(f"{who}: no sign of life for {BEAT * PATIENCE:.0f} s or more")

    def exit(self, problem: str) -> None:
        """From a thread, whatever the main thread is stuck in."""
        print(f"\nerror: {problem}. The last checkpoint is kept: go on with --resume.", file=sys.stderr, flush=True)
        os._exit(2)
