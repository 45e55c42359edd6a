"""Text <-> token ids: single characters, byte-pair encoding trained on the corpus, or GPT-2's. One interface for all.

    tokenizer = train_tokenizer("char", text)         # or "bpe", with a vocabulary size, or "gpt2"
    tokenizer.save("runs/gpt/tokenizer.json")         # every run folder holds its tokenizer
    tokenizer = load_tokenizer("runs/gpt/tokenizer.json")

data/bins.py writes the ids to disk, data/gpt2.py fetches GPT-2's vocabulary. JSON on purpose: a stranger's tokenizer
can run no code.
"""

import abc
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from core.config import did_you_mean
from core.files import UserError, read_json, write_json

FORMAT = 1
BPE_VOCAB_SIZE = 4096  # when none is asked for
BYTES = [bytes([value]) for value in range(256)]
# How text is cut into words before bytes are merged inside each. Llama 3's rule: llama.cpp (pre-tokenizer "llama-bpe")
# and Hugging Face run it, so an exported run meets the same tokens there, and on plays it needs a tenth fewer of them
# than GPT-2's. Only rules named here are loaded: a regex out of a stranger's file could hang the program.
SPLITS = {"llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
          "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
# Where a text may be cut in two without changing one id, under both rules: before a space that follows something else
# than a blank (no rule joins those), or after a line's end where neither neighbour is a blank.
CUT = re.compile(r"(?<=\S) |(?<=\S\n)(?=\S)")
GPT2_SHA256 = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"  # of its tokens, a newline between two
BLANKS = re.compile(r"\s{65536}")  # both packages' regex engine runs out of stack on half a million blanks in a row


class Tokenizer(abc.ABC):
    """What all tokenizers share. `tokens` is the vocabulary: the bytes of token i are tokens[i], so ids decode by
    joining, and a stream of tokens decodes with an incremental UTF-8 decoder."""

    name: str
    tokens: list[bytes]
    cut: re.Pattern[str] | None = CUT  # where a long text may be encoded in two; None: nowhere

    @property
    def end(self) -> list[int]:
        """What follows a document in a corpus of documents: GPT-2's mark, or a line's end where there is none."""
        return self.encode("\n")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @abc.abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """text -> (T,) uint32 ids; for texts of any length."""

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no valid UTF-8, as where a BPE token cuts a character in two, become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")

    def start(self) -> list[int]:
        """What an empty prompt stands for: a new line, or the first token where the text had none."""
        return [self.tokens.index(b"\n")] if b"\n" in self.tokens else [0]

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `from_json` of the same class takes back, as plain JSON values."""

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())


class CharTokenizer(Tokenizer):
    """One token a character; ids follow the order of `characters`. Raises ValueError where those are no vocabulary."""

    name = "char"

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("the characters must be distinct, and at least one")
        self.characters = characters
        self.tokens = [character.encode("utf-8") for character in characters]  # a lone surrogate is a ValueError
        codes = code_points(characters)
        self.ids = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # code point -> id; the last entry is never set
        self.ids[codes] = np.arange(len(codes))

    def encode_array(self, text: str) -> np.ndarray:
        """Raises UserError that names the characters which the corpus did not have."""
        codes = code_points(text)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if ids.size and ids.min() < 0:
            unseen = [chr(code) for code in np.unique(codes[ids < 0])]
            named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in unseen[:5])
            raise UserError(f"the character tokenizer has never seen {named}{', ...' if len(unseen) > 5 else ''}: not "
                            f"among the {self.vocab_size} characters it was made from. Leave it out, or train with "
                            "--tokenizer bpe, which encodes any text.")
        return ids.astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.name, "characters": self.characters}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "CharTokenizer":
        if not isinstance(content.get("characters"), str):
            raise ValueError("'characters' must be text")
        return cls(content["characters"])


class BPETokenizer(Tokenizer):
    """Byte-level BPE: the 256 bytes, then what is merged from them, in order of rank. Encodes any text.

    tokens: rank -> bytes. split: a name in SPLITS. Raises ValueError where those are no vocabulary.
    special: after those, tokens that no text is encoded to.
    """

    name = "bpe"
    special: tuple[str, ...] = ()

    def __init__(self, tokens: list[bytes], split: str = "llama3") -> None:
        import tiktoken  # here, so that character runs need neither of the two BPE packages

        if split not in SPLITS:
            raise ValueError(f"unknown split rule {split!r}")
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens) or b"" in ranks or not ranks.keys() >= set(BYTES):
            raise ValueError("the tokens must be distinct, not empty, and hold every single byte")
        special = {text: len(tokens) + i for i, text in enumerate(self.special)}
        self.tokens, self.merged, self.split = tokens + [text.encode() for text in self.special], tokens, split
        self.encoding = tiktoken.Encoding("bitgpt", pat_str=SPLITS[split], mergeable_ranks=ranks,
                                          special_tokens=special)

    def encode_array(self, text: str) -> np.ndarray:
        """Half of a surrogate pair, which no UTF-8 can hold, counts as U+FFFD."""
        try:
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=())
                                   for piece in pieces(text)])
        except UnicodeEncodeError:
            return self.encode_array(mended(text))

    def to_json(self) -> dict[str, Any]:
        """Tokens as Latin-1 text, one character a byte: readable where they are ASCII, exact everywhere."""
        return {"format": FORMAT, "kind": self.name, "split": self.split,
                "tokens": [token.decode("latin-1") for token in self.merged]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BPETokenizer":
        return cls(latin_tokens(content), str(content.get("split")))


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's 50,256 tokens and the one between documents. A run holds all of them, so it needs no download again."""

    name = "gpt2"
    special = ("<|endoftext|>",)

    def __init__(self, tokens: list[bytes]) -> None:
        if hashlib.sha256(b"\n".join(tokens)).hexdigest() != GPT2_SHA256:
            raise ValueError("those are not GPT-2's tokens")
        super().__init__(tokens, "gpt2")

    @property
    def end(self) -> list[int]:
        return [len(self.merged)]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "GPT2Tokenizer":
        return cls(latin_tokens(content))


def latin_tokens(content: dict[str, Any]) -> list[bytes]:
    """The tokens that `to_json` of a BPE tokenizer wrote."""
    tokens = content.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("'tokens' must be a list of texts")
    return [token.encode("latin-1") for token in tokens]


def mended(text: str) -> str:
    """Text that UTF-8 can hold: half of a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def code_points(text: str) -> np.ndarray:
    """(T,) uint32, one a character."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def pieces(text: str) -> list[str]:
    """The text whole, but for a cut in every run of blanks that would overflow the regex engine."""
    cuts = [0, *(match.end() for match in BLANKS.finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def train_char(texts: Iterable[str], vocab_size: int) -> CharTokenizer:
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for text in texts:
        seen[code_points(text)] = True
    return CharTokenizer("".join(map(chr, np.flatnonzero(seen))))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """At most `vocab_size` tokens (0: 4096); fewer where the text runs out of pairs to merge."""
    import rustbpe

    vocab_size = vocab_size or BPE_VOCAB_SIZE
    if not 256 <= vocab_size <= 2**20:
        raise UserError(f"vocab_size {vocab_size}: a bpe vocabulary holds the 256 bytes and what is merged from them. "
                        f"Take --vocab-size between 256 and {2**20}.")
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size=vocab_size,
                                buffer_size=16, pattern=SPLITS["llama3"])  # 16 texts in memory at a time
    return BPETokenizer([bytes(token) for token, _ in sorted(trained.get_mergeable_ranks(), key=lambda pair: pair[1])])


def take_gpt2(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Learns nothing: GPT-2's own."""
    from data.gpt2 import gpt2_tokens  # only who asks for it may have to fetch it

    if vocab_size not in (0, 50257):
        raise UserError(f"vocab_size {vocab_size}: --tokenizer gpt2 has 50257 tokens. Leave --vocab-size out, or take "
                        "--tokenizer bpe, which trains as many as are asked for.")
    return GPT2Tokenizer(gpt2_tokens())


TRAINERS: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "char": train_char, "bpe": train_bpe, "gpt2": take_gpt2}
KINDS: dict[str, type[CharTokenizer] | type[BPETokenizer]] = {
    "char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}


def train_tokenizer(kind: str, texts: str | Iterable[str], vocab_size: int = 0) -> Tokenizer:
    """kind: char, bpe or gpt2. texts: one, or many that are read once. vocab_size: of bpe, 0 for the default;
    characters are what the texts have."""
    if kind not in TRAINERS:
        raise UserError(f"tokenizer {kind!r} is not known.{did_you_mean(kind, TRAINERS)} "
                        f"Choose from: {', '.join(TRAINERS)}.")
    return TRAINERS[kind]([texts] if isinstance(texts, str) else texts, vocab_size)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads what `save` wrote. A missing, broken or hostile file is a UserError."""
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.get("kind") not in [*KINDS, "hf"]:
            raise ValueError(f"'kind' must be one of {', '.join(KINDS)}, hf")
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r} instead of {FORMAT}; written by a newer version?")
        if content["kind"] == "hf":  # of an imported model; that module imports this one
            from data.hf_tokenizer import HFTokenizer

            return HFTokenizer.from_json(content)
        return KINDS[content["kind"]].from_json(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer: {error}. Restore it or train the run again.") from None
