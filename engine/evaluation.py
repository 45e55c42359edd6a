"""The loss of a text, through any engine. numpy only.

    loss, tokens = loss_of(engine, loader.eval_batches(windows_at_once(engine)))      # nats per token

evaluate.py is the command. train.py measures in the precision of training, so the two may differ by a few thousandths.
"""

from collections.abc import Iterable

import numpy as np

from engine.sampling import Engine

AT_ONCE = 4096   # tokens in one pass, at most,
LOGITS = 2**26   # and logits


def windows_at_once(engine: Engine) -> int:
    return max(1, AT_ONCE // engine.config.block_size)


def loss_of(engine: Engine, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int]:
    """(mean nats per token, tokens) of batches x, y (B, T), each read from an empty cache."""
    total, tokens = 0.0, 0
    for x, y in batches:
        engine.reset(len(x))
        most = max(1, min(AT_ONCE, LOGITS // engine.config.vocab_size) // len(x))
        for at in range(0, x.shape[1], most):
            total += float(engine.nats(x[:, at:at + most], y[:, at:at + most]).sum(dtype=np.float64))
        tokens += y.size
    return total / tokens, tokens


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits (..., V)) of targets (...): nats. ValueError for what is no target."""
    if targets.shape != logits.shape[:-1] or targets.min() < 0 or targets.max() >= logits.shape[-1]:
        raise ValueError(f"targets {targets.shape} of {targets.min()} to {targets.max()} for logits {logits.shape}")
    most = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - most).sum(axis=-1, dtype=np.float64)
    return np.log(total) - (np.take_along_axis(logits, targets[..., None], axis=-1) - most)[..., 0]
