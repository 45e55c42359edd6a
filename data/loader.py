"""Batches out of a file of token ids. train.py and compare.py stand on this.

    corpus = prepare_bins("shakespeare", "char")     # data/bins.py
    batches = Loader(corpus.train, corpus.dtype, block_size=64, batch_size=12, seed=1337)
    x, y = batches.batch(position)                   # (B, T) int64 each; position is all the state there is

No torch here: batches are numpy arrays.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.corpus import check_length


class Loader:
    """Batches from one .bin file. Nothing in it moves: what `batch` returns depends on its arguments alone."""

    def __init__(self, path: str | os.PathLike[str], dtype: str, block_size: int, batch_size: int,
                 seed: int) -> None:
        """path, dtype: of a Corpus. Raises UserError where the file does not hold a single window."""
        self.path = Path(path)
        check_length(self.path.stat().st_size // np.dtype(dtype).itemsize, block_size, self.path.stem)
        self.tokens = np.asarray(np.memmap(self.path, dtype=dtype, mode="r"))  # (N,), paged in as it is touched
        self.block_size, self.batch_size = block_size, batch_size
        self.seed = seed

    def batch(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch number `position`: x and y, (B, T) int64 each, y one token further on.

        Windows start anywhere. Their starts come from a generator that counts instead of remembering, keyed by seed
        and position: so the position is all that a checkpoint keeps, and several ranks take positions in turn. Raw
        words modulo the range, because those alone are promised to stay the same in every version of numpy.
        """
        key = np.array([self.seed % 2**64, position], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(self.batch_size)
        starts = (words % np.uint64(len(self.tokens) - self.block_size)).astype(np.int64)
        return self.windows(starts, self.block_size)

    def eval_batches(self, batch_size: int = 0, limit: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Walks the split in windows side by side, so that every token but the first is predicted exactly once.

        batch_size: windows at a time, 0 for the loader's own. limit: so many batches, spread evenly over the split
        and always the same ones; 0 for all. Yields x and y, (b, t) int64; the last ones are smaller, so weigh a mean
        by y.size.
        """
        batch_size = batch_size or self.batch_size
        n_windows, rest = divmod(len(self.tokens) - 1, self.block_size)
        batches = [(np.arange(first, min(first + batch_size, n_windows)) * self.block_size, self.block_size)
                   for first in range(0, n_windows, batch_size)]
        if rest:
            batches.append((np.array([n_windows * self.block_size]), rest))
        if 0 < limit < len(batches):
            batches = [batches[i * len(batches) // limit] for i in range(limit)]
        for starts, length in batches:
            yield self.windows(starts, length)

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """starts (B,) -> x, y (B, length)"""
        tokens = self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, length + 1)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
