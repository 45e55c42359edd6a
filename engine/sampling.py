"""From logits to tokens: one sampler and one generating loop for every engine. numpy only.

    engine = load("runs/bitgpt")                                  # engine/__init__.py
    for ids in engine.generate(prompt, num_samples=2): ...        # (2,) token ids, as they come
"""

import abc
import codecs
from collections.abc import Iterator

import numpy as np

from core.config import ModelConfig
from core.files import UserError
from data.tokenizer import Tokenizer


class Sampler:
    """Draws the next token of every sequence. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off. UserError
    for what cannot be drawn from."""

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1337) -> None:
        for name, value, fits, wanted in (("temperature", temperature, temperature >= 0, "at least 0"),
                                          ("top_k", top_k, top_k >= 0, "at least 0"),
                                          ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
            if not fits:
                raise UserError(f"{name} is {value}, but must be {wanted}.")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """(B, V) logits -> (B,) ids."""
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        ids = np.arange(logits.shape[1])[None]                                 # (1, V), or the candidates (B, n)
        if 0 < self.top_k < logits.shape[1]:  # before anything else is done with a large vocabulary
            kth = np.partition(logits, -self.top_k, axis=-1)[:, [-self.top_k]]
            most = int((logits >= kth).sum(axis=-1).max())                     # more than k where some are equal
            ids = np.sort(np.argpartition(logits, -most, axis=-1)[:, -most:], axis=-1)
            logits = np.take_along_axis(logits, ids, axis=-1)
            logits = np.where(logits < kth, -np.inf, logits)
        logits = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf, as it should
            logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        order = np.argsort(-logits, axis=-1, kind="stable")
        probabilities = np.exp(np.take_along_axis(logits, order, axis=-1))
        cumulative = np.cumsum(probabilities, axis=-1)
        total = cumulative[:, -1:]
        # top_p keeps the likeliest tokens up to and with the one that reaches it: arXiv 1904.09751
        kept = np.where(cumulative - probabilities < self.top_p * total, probabilities, 0).cumsum(axis=-1)
        drawn = self.random.random((len(logits), 1)) * kept[:, -1:]
        place = (kept <= drawn).sum(axis=-1, keepdims=True)
        drawn_ids: np.ndarray = np.take_along_axis(np.broadcast_to(ids, order.shape),
                                                   np.take_along_axis(order, place, axis=-1), axis=-1)
        return drawn_ids[:, 0]


class Engine(abc.ABC):
    """A model that can be fed tokens. config: its shape; kernel: what multiplies ("torch", "cpu", ...)."""

    config: ModelConfig
    kernel: str
    length: int = 0  # tokens in the KV cache, of each sequence
    turn: object = None  # the text that is being generated

    @abc.abstractmethod
    def reset(self, batch: int) -> None:
        """Empties the KV cache, and makes it one for `batch` sequences."""

    @abc.abstractmethod
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T), behind what the cache holds -> fp32 logits (B, V) of the last; length + T <= block_size."""

    @abc.abstractmethod
    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """-log p of targets (B, T), each as the token behind its one of tokens (B, T); those follow what the cache
        holds, and are added to it."""

    def generate(self, prompt: list[int], num_samples: int = 1, max_new_tokens: int = 100, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 1337) -> Iterator[np.ndarray]:
        """Continues one prompt `num_samples` times, in one batch; yields the new ids (num_samples,) as they come.

        A context that is full is cut to its newer half, which is read again: a window that slides by halves, so that
        text longer than block_size costs one more pass every block_size / 2 tokens and not one a token. UserError for
        a prompt that is none, for settings that make no sense, and once the engine has begun another text.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        size, vocabulary = self.config.block_size, self.config.vocab_size
        wrong = [id for id in prompt if not 0 <= id < vocabulary]
        if not len(prompt) or wrong:
            raise UserError(f"the prompt {f'holds {wrong[0]}' if wrong else 'is empty'}. Give it one token or more, "
                            f"each from 0 to {vocabulary - 1}.")
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, but must be at least 1.")
        turn = self.turn = object()
        context = np.tile(np.asarray(prompt[-size:], dtype=np.int64), (num_samples, 1))  # (B, T)
        fresh = context
        self.reset(num_samples)
        for _ in range(max_new_tokens):
            if self.turn is not turn:
                raise UserError("the engine has begun another text, and it holds one at a time. Finish this one first, "
                                "ask for both at once (num_samples), or load a second engine.")
            ids = sampler(self.forward(fresh))
            yield ids
            fresh = ids[:, None]
            context = np.concatenate((context, fresh), axis=1)[:, -size:]
            if self.length == size:
                self.reset(num_samples)
                fresh = context[:, -max(1, size // 2):]


class TextStream:
    """One sample's tokens as text: characters as soon as they are whole, nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: str = "") -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # what may turn out to be the beginning of the stop string
        self.done = False

    def feed(self, id: int) -> str:
        """The text that token `id` makes certain."""
        return "" if self.done else self._release(self.decoder.decode(self.tokenizer.token_bytes(id)))

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
