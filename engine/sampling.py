"""From logits to tokens: one sampler and one generating loop for every engine. numpy only.

    engine = load("runs/bitgpt")                                  # engine/__init__.py
    for ids in engine.generate(prompt, num_samples=2): ...        # (2,) token ids, as they come
"""

import abc
import codecs
import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from core.config import ModelConfig
from core.files import UserError
from data.tokenizer import Tokenizer


def is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_whole(name: str, value: Any, least: int) -> None:
    if not is_whole(value) or value < least:
        raise UserError(f"{name} is {value}, but must be a whole number of at least {least}.")


def check_finite(largest: np.ndarray) -> None:
    """UserError unless all are finite. largest: of each sequence a number that is finite if all its logits are."""
    if not np.isfinite(largest).all():
        raise UserError("the model's logits are not finite: its training has diverged. Take another run.")


class Sampler:
    """Draws the next token of every sequence. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off. UserError
    for what cannot be drawn from."""

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1337) -> None:
        check_whole("top_k", top_k, 0)
        check_whole("seed", seed, 0)
        for name, value, fits, wanted in (("temperature", temperature, temperature >= 0, "at least 0"),
                                          ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
            if not fits:
                raise UserError(f"{name} is {value}, but must be {wanted}.")
        self.temperature = min(max(temperature, 1e-20), 1e20) if temperature else 0  # fp32; beyond, nothing changes
        self.top_k, self.top_p = top_k, top_p
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """fp32 logits (B, V) -> ids (B,)."""
        if self.temperature == 0:
            chosen = logits.argmax(axis=-1)                                    # of NaN, where there is one
            check_finite(np.take_along_axis(logits, chosen[:, None], axis=-1))
            return chosen
        ids = None                                                             # all, or the candidates (n,)
        if 0 < self.top_k < logits.shape[1]:
            groups = logits.shape[1] // 16
            if groups >= self.top_k:  # few logits beyond the top_k reach the top_k-th of the groups' maxima
                maxima = logits[:, :16 * groups].reshape(-1, 16, groups).max(axis=1)
                ids = np.flatnonzero(~(logits < self.kth(maxima)).all(axis=0))  # of any sequence
                logits = logits[:, ids]
            logits = np.where(logits < self.kth(logits), -np.inf, logits)
        largest = logits.max(axis=-1, keepdims=True)                           # (B, 1)
        check_finite(largest)
        likelihood = logits - largest                                          # (B, n); in place: new memory costs more
        likelihood /= self.temperature
        np.exp(likelihood, out=likelihood)
        if self.top_p < 1:  # the likeliest tokens up to the one that reaches it and all that equal it: arXiv 1904.09751
            falling = np.sort(likelihood, axis=-1)[:, ::-1]
            cumulative = falling.astype(np.float64).cumsum(axis=-1)
            inside = cumulative - falling < self.top_p * cumulative[:, -1:]
            least = np.take_along_axis(falling, inside.sum(axis=-1, keepdims=True) - 1, axis=-1)
            likelihood[likelihood < least] = 0
        cumulative = likelihood.astype(np.float64)
        cumulative.cumsum(axis=-1, out=cumulative)
        drawn = self.random.random(len(logits)) * cumulative[:, -1]
        places = np.array([row.searchsorted(one, "right") for row, one in zip(cumulative, drawn, strict=True)])
        return places if ids is None else ids[places]

    def kth(self, values: np.ndarray) -> np.ndarray:
        """(B, n) -> (B, 1): the top_k-th largest of each row."""
        return np.partition(values, -self.top_k, axis=-1)[:, [-self.top_k]]


Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(method: Method) -> Method:
    """A method of an engine that one thread at a time may be in, and after which no other text can go on."""
    @functools.wraps(method)
    def wrapped(self: "Engine", *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            self.uses += 1
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class Engine(abc.ABC):
    """A model that can be fed tokens. config: its shape; kernel: what multiplies ("torch", "cpu", ...)."""

    config: ModelConfig
    kernel: str
    length: int = 0  # tokens in the KV cache, of each sequence
    uses: int = 0    # of the cache, so far: a text that is being generated knows by it whether it is still there

    def __init__(self) -> None:
        self.lock = threading.RLock()  # for all that touches the cache
        self.forked = False            # this process was forked off the one that loaded the engine
        ENGINES.add(self)

    @abc.abstractmethod
    def reset(self, batch: int) -> None:
        """Empties the KV cache, and makes it one for `batch` sequences."""

    @abc.abstractmethod
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T), behind what the cache holds -> fp32 logits (B, V) of the last; length + T <= block_size."""

    @abc.abstractmethod
    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """-log p of each of targets (B, T) as the token after its one of tokens (B, T). The tokens follow what the
        cache holds, and are added to it."""

    def begin(self, prompt: list[int], num_samples: int) -> np.ndarray:
        """A new text, with an empty cache: its context (num_samples, T), T <= block_size. UserError for what is no
        prompt."""
        vocabulary = self.config.vocab_size
        wrong = [id for id in prompt if not is_whole(id) or not 0 <= id < vocabulary]
        if not len(prompt) or wrong:
            raise UserError(f"the prompt {f'holds {wrong[0]!r}' if wrong else 'is empty'}. Give it one token or more, "
                            f"each from 0 to {vocabulary - 1}.")
        check_whole("num_samples", num_samples, 1)
        self.reset(num_samples)
        return np.tile(np.asarray(prompt[-self.config.block_size:], dtype=np.int64), (num_samples, 1))

    def go_on(self, uses: int) -> None:
        """UserError where the engine was used for anything else since it counted so many uses."""
        if self.uses != uses:
            raise UserError("the engine has read another text since, and it holds one at a time. Finish one first, ask "
                            "for both at once (num_samples), or load a second engine.")

    def generate(self, prompt: list[int], num_samples: int = 1, max_new_tokens: int = 100, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 1337) -> Iterator[np.ndarray]:
        """Continues one prompt `num_samples` times, in one batch; yields the new ids (num_samples,) as they come.

        A context that is full is cut to its newer half, which is read again: a window that slides by halves, so that
        text longer than block_size costs one more pass every block_size / 2 tokens and not one a token. UserError for
        a prompt that is none, for settings that make no sense, and once the engine has read anything else.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        check_whole("max_new_tokens", max_new_tokens, 0)
        size = self.config.block_size
        with self.lock:
            fresh = context = self.begin(prompt, num_samples)
            uses = self.uses
        for _ in range(max_new_tokens):
            with self.lock:
                self.go_on(uses)
                if self.length == size:
                    self.reset(num_samples)
                    fresh = context[:, -max(1, size // 2):]
                logits = self.forward(fresh)
                uses = self.uses
            ids = sampler(logits)
            yield ids
            fresh = ids[:, None]
            context = np.concatenate((context, fresh), axis=1)[:, -size:]


ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def after_fork() -> None:
    """In the child: no other thread is left to release a lock or to finish a text."""
    for engine in ENGINES:
        engine.lock, engine.uses, engine.forked = threading.RLock(), engine.uses + 1, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


class TextStream:
    """One sample's tokens as text: characters as soon as they are whole, nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: str = "") -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # what may turn out to be the beginning of the stop string
        self.done = False

    def feed(self, id: int) -> str:
        """The text that token `id` makes certain."""
        return "" if self.done else self._release(self.decoder.decode(self.tokenizer.tokens[id]))

    def finish(self) -> str:
        """What was held back, once no token follows."""
        text = "" if self.done else self._release(self.decoder.decode(b"", final=True)) + self.held
        self.done, self.held = True, ""
        return text

    def _release(self, text: str) -> str:
        text = self.held + text
        if self.stop and self.stop in text:
            self.done, self.held = True, ""
            return text[:text.index(self.stop)]
        keep = next((n for n in range(min(len(self.stop) - 1, len(text)), 0, -1) if text.endswith(self.stop[:n])), 0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]
