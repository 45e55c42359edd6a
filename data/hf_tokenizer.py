"""A tokenizer.json from elsewhere, as it came with an imported model (convert.py), run by the `tokenizers` library.

Neighbour: tokenizer.py, whose load_tokenizer comes here for runs of kind "hf". No text gets special tokens added; those
that are written out in it, as <|begin_of_text|>, are taken as such.
"""

import json
import re
from typing import Any

import numpy as np

from core.files import UserError
from data.tokenizer import FORMAT, Tokenizer, mended

# GPT-2's way to write bytes as text: those that print stand for themselves, the others follow from U+0100 on.
PRINTING = [*range(33, 127), *range(161, 173), *range(174, 256)]
SPELLING = [chr(byte) if byte in PRINTING else chr(256 + byte - sum(b < byte for b in PRINTING)) for byte in range(256)]
BYTE_OF = {character: byte for byte, character in enumerate(SPELLING)}


def spelled(token: bytes) -> str:
    return "".join(SPELLING[byte] for byte in token)


def unspelled(text: str) -> bytes:
    """The inverse of `spelled`; a ValueError for other text."""
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ValueError(f"{text!r} spells no bytes ({error})") from None


class HFTokenizer(Tokenizer):
    """content: a tokenizer.json. vocab_size: the model's, which may be more than the tokenizer's tokens.

    Raises ValueError where that is no tokenizer, or has more tokens than the model.
    """

    name = "hf"
    cut = None  # its rules are its own

    @property
    def end(self) -> list[int]:
        """The mark that ends a text, by any of its names."""
        ids = [self.library.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]
        return [id for id in ids if id is not None][:1] or super().end

    def __init__(self, content: Any, vocab_size: int) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise UserError("the tokenizer of this imported model needs a library that is not installed. Get it with "
                            "`pip install tokenizers`.") from None
        try:
            self.library = Library.from_str(json.dumps(content))
        except Exception as error:  # the library has no narrower class
            raise ValueError(f"the tokenizers library does not take it ({error})") from None
        self.library.no_truncation()
        self.library.no_padding()
        self.content = content
        vocab = self.library.get_vocab(with_added_tokens=True)
        if not vocab or max(vocab.values()) >= vocab_size:
            raise ValueError(f"its ids end at {max(vocab.values(), default=-1)}, but the model has {vocab_size} tokens")
        self.tokens = [b""] * vocab_size
        added = {token.content for token in self.library.get_added_tokens_decoder().values()}
        byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
        for text, id in vocab.items():
            self.tokens[id] = text.encode() if text in added else bytes_of(text, byte_level)

    def encode_array(self, text: str) -> np.ndarray:
        """Half of a surrogate pair, which no UTF-8 can hold, counts as U+FFFD."""
        return np.array(self.library.encode(mended(text), add_special_tokens=False).ids, dtype=np.uint32)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.name, "vocab_size": self.vocab_size, "tokenizer": self.content}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "HFTokenizer":
        vocab_size = content.get("vocab_size")
        if not isinstance(vocab_size, int) or not 0 < vocab_size <= 2**24:
            raise ValueError("'vocab_size' must be a whole number")
        return cls(content.get("tokenizer"), vocab_size)


def bytes_of(text: str, byte_level: bool) -> bytes:
    """The bytes of a token: byte-level spelling, or SentencePiece's (a bar for a space, <0x0A> for a byte)."""
    if byte_level:
        try:
            return unspelled(text)
        except ValueError:
            return text.encode()
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()
