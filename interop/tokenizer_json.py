"""Tokenizers, out and in: Hugging Face's tokenizer.json and GGUF's metadata, with the same ids for every text.

    char    tokenizer.json: WordLevel behind a split into characters: an unseen character is an error there too.
            GGUF: model "rwkv", the longest match over bytes. Not "gpt2", where llama.cpp takes token 11 for the end of
            the text when none is named, and a vocabulary of characters has none to name.
    bpe     tokenizer.json: byte-level BPE. GGUF: model "gpt2", and the name that llama.cpp has for our split rule
    hf      a tokenizer.json from elsewhere, kept as it is (data/hf_tokenizer.py)

Byte-level BPE spells a byte as a printable character: GPT-2's table, `SPELLING` in data/hf_tokenizer.py.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.files import UserError, write_json
from data.hf_tokenizer import HFTokenizer, spelled, unspelled
from data.tokenizer import SPLITS, BPETokenizer, CharTokenizer, Tokenizer

PRE = {"llama3": "llama-bpe", "gpt2": "gpt-2"}  # split rule -> tokenizer.ggml.pre
SAME_PRE = {"llama-v3": "llama3", "llama3": "llama3", "llama-bpe": "llama3", "gpt-2": "gpt2", "gpt2": "gpt2"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # enum llama_token_type
END = b"\xff"  # a byte that no UTF-8 text holds
Metadata = dict[str, Any]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """All pairs that make a token, in order of its rank: what tiktoken merges, as a list."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += sorted((pair for pair in splits if pair[0] in ranks and pair[1] in ranks),
                        key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


# -- tokenizer.json ----------------------------------------------------------------------------------------------------

def splitter(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pre_tokenizer(split: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split == "gpt2"}
    return level if split == "gpt2" else {"type": "Sequence", "pretokenizers": [splitter(SPLITS[split]), level]}


def document(model: dict[str, Any], before: dict[str, Any], decoder: dict[str, Any],
             special: Iterable[tuple[int, str]] = ()) -> dict[str, Any]:
    added = [{"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for id, text in special]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": before, "post_processor": None, "decoder": decoder, "model": model}


def char_document(tokenizer: CharTokenizer) -> dict[str, Any]:
    vocab = {character: id for id, character in enumerate(tokenizer.characters)}
    return document({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}, splitter(r"[\s\S]"), {"type": "Fuse"})


def bpe_document(vocab: dict[str, int], merges: list[list[str]], split: str,
                 special: Iterable[tuple[int, str]] = ()) -> dict[str, Any]:
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": vocab, "merges": merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return document(model, pre_tokenizer(split), decoder, special)


def own_bpe_document(tokenizer: BPETokenizer) -> dict[str, Any]:
    vocab = {spelled(token): id for id, token in enumerate(tokenizer.merged)}
    return bpe_document(vocab, [[spelled(a), spelled(b)] for a, b in merges_of(tokenizer.merged)], tokenizer.split,
                        specials(tokenizer).items())


def specials(tokenizer: BPETokenizer) -> dict[int, str]:
    return dict(enumerate(tokenizer.special, len(tokenizer.merged)))


def to_huggingface(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Writes tokenizer.json and what AutoTokenizer needs to find it."""
    if isinstance(tokenizer, CharTokenizer):
        content = char_document(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        content = own_bpe_document(tokenizer)
    elif isinstance(tokenizer, HFTokenizer):
        content = tokenizer.content
    else:
        raise UserError(f"a tokenizer of kind {tokenizer.name} has no form that transformers reads.")
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "clean_up_tokenization_spaces": False})


def from_huggingface(content: Any, vocab_size: int, path: Path | str) -> Tokenizer:
    """The tokenizer of a tokenizer.json: ours again where it came from here, else kept as it is."""
    try:
        return own_tokenizer(content, vocab_size) or HFTokenizer(content, vocab_size)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no tokenizer that can be read: {error}.") from None


def own_tokenizer(content: Any, vocab_size: int) -> Tokenizer | None:
    """The char or bpe tokenizer that would be written as just this."""
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict) or set(vocab.values()) != set(range(vocab_size)):
        return None
    tokens = sorted(vocab, key=vocab.__getitem__)

    def same(other: dict[str, Any]) -> bool:
        return all(content.get(key) == other[key] for key in other if key != "model") and model == other["model"]

    try:
        if model.get("type") == "WordLevel" and all(len(token) == 1 for token in tokens):
            char = CharTokenizer("".join(tokens))
            return char if same(char_document(char)) else None
        if model.get("type") == "BPE" and tokens:
            for split in SPLITS:
                bpe = BPETokenizer([unspelled(token) for token in tokens], split)
                if same(own_bpe_document(bpe)):
                    return bpe
    except ValueError:
        return None
    return None


# -- GGUF --------------------------------------------------------------------------------------------------------------

def escape(character: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "\0": "\\x00"}.get(character, character)


def unescape(text: str) -> str:
    plain = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(r"\\(x[0-9a-fA-F]{2}|[\s\S])", lambda match: chr(int(match[1][1:], 16)) if len(match[1]) == 3
                  else plain.get(match[1], match[1]), text)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> Metadata:
    """tokenizer.ggml.*: what llama.cpp needs to tokenize as we do."""
    prefix = "tokenizer.ggml."
    if isinstance(tokenizer, CharTokenizer):
        tokens = [escape(character) for character in tokenizer.characters]
        return {prefix + "model": "rwkv", prefix + "tokens": tokens, prefix + "token_type": [NORMAL] * len(tokens),
                prefix + "add_bos_token": False, prefix + "add_eos_token": False}
    if isinstance(tokenizer, BPETokenizer):
        split, vocab = tokenizer.split, {spelled(token): id for id, token in enumerate(tokenizer.merged)}
        merges = [[spelled(a), spelled(b)] for a, b in merges_of(tokenizer.merged)]
        special = specials(tokenizer)
        first = last = next(iter(special), tokenizer.tokens.index(END))
    elif isinstance(tokenizer, HFTokenizer):
        split, vocab, merges, special = foreign_bpe(tokenizer)
        ids = {text: id for id, text in special.items()}
        first = next((ids[t] for t in ("<|begin_of_text|>", "<|endoftext|>", "<s>") if t in ids), -1)
        last = next((ids[t] for t in ("<|end_of_text|>", "<|endoftext|>", "</s>") if t in ids), -1)
        if -1 in (first, last):
            raise UserError("the tokenizer names no token that ends a text, and llama.cpp would take token 11 for it.")
    else:
        raise UserError(f"a tokenizer of kind {tokenizer.name} has no form that llama.cpp reads.")
    texts, types = [f"[PAD{id}]" for id in range(vocab_size)], [UNUSED] * vocab_size
    for text, id in vocab.items():
        texts[id], types[id] = text, NORMAL
    for id, text in special.items():
        texts[id], types[id] = text, CONTROL
    return {prefix + "model": "gpt2", prefix + "pre": PRE[split], prefix + "tokens": texts,
            prefix + "token_type": types, prefix + "merges": [f"{a} {b}" for a, b in merges],
            prefix + "bos_token_id": first, prefix + "eos_token_id": last,
            prefix + "add_bos_token": False, prefix + "add_eos_token": False}


def foreign_bpe(tokenizer: HFTokenizer) -> tuple[str, dict[str, int], list[list[str]], dict[int, str]]:
    """(split rule, vocabulary, merges, special tokens) of a byte-level BPE with a split rule that llama.cpp knows."""
    model, before = tokenizer.content["model"], tokenizer.content.get("pre_tokenizer")
    for split in PRE:
        if (model.get("type") == "BPE" and rule(before) == rule(pre_tokenizer(split))
                and not tokenizer.content.get("normalizer")):
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            special = {token["id"]: token["content"] for token in tokenizer.content.get("added_tokens") or []}
            return split, model["vocab"], merges, special
    raise UserError("the tokenizer is no byte-level BPE with a split rule that llama.cpp has a name for "
                    f"({', '.join(PRE)}), so its GGUF would read text wrongly.")


def rule(before: Any) -> Any:
    """What of a pre-tokenizer decides on ids."""
    if isinstance(before, dict):
        return {key: rule(value) for key, value in before.items() if key != "trim_offsets"}
    return [rule(value) for value in before] if isinstance(before, list) else before


def from_gguf(metadata: Metadata, vocab_size: int, path: Path) -> Tokenizer:
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    types = types if isinstance(types, list) else [NORMAL] * vocab_size
    if not isinstance(tokens, list) or len(tokens) != vocab_size or len(types) != vocab_size:
        raise UserError(f"{path} has no token for each of its {vocab_size} ids. Restore it from a copy.")
    try:
        if kind == "rwkv" and all(len(unescape(token)) == 1 for token in tokens):
            return CharTokenizer("".join(map(unescape, tokens)))
        split = SAME_PRE.get(str(metadata.get("tokenizer.ggml.pre")))
        if kind != "gpt2" or split is None:
            raise UserError(f"{path} has a tokenizer of kind {kind!r} ({metadata.get('tokenizer.ggml.pre')!r}), which "
                            "cannot be read out of a GGUF. Convert the Hugging Face folder that it was made from.")
        merges = [str(pair).split(" ") for pair in metadata.get("tokenizer.ggml.merges") or []]
        normal = {text: id for id, text in enumerate(tokens) if types[id] == NORMAL}
        special = [(id, text) for id, text in enumerate(tokens) if types[id] not in (NORMAL, UNUSED)]
        return from_huggingface(bpe_document(normal, merges, split, special), vocab_size, path)
    except ValueError as error:
        raise UserError(f"{path} has a broken tokenizer: {error}.") from None


