"""What the tests of conversions share: small runs, and the comparison of two models' logits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from bitgpt.model import BitGPT
from core import checkpoint
from core.config import ModelConfig
from core.files import write_json
from core.run_folder import write_config
from data.hf_tokenizer import HFTokenizer, spelled
from data.tokenizer import CharTokenizer, Tokenizer, train_bpe
from engine.reference import TorchEngine
from gpt.model import GPT
from interop.tokenizer_json import bpe_document, merges_of
from training.settings import TrainConfig

# Characters of one to four bytes, and all that a tokenizer could stumble over.
CHARACTERS = ("\n\t\r !\"#'\\,.:;<>[]|0123456789AEIOUabcdefghijklmnopqrstuvwxyz"
              "\u00e9\u0301\u00df\u4e2d\u20ac\u2028\U0001f600")
TEXT = "a king's crown, \t\tand\r\n 12345 <|endoftext|> \\n caf\u00e9 \u4e2d\u4e2d\u20ac\U0001f600 [x]\n\n\n  he'll go"


def char_tokenizer() -> CharTokenizer:
    return CharTokenizer(CHARACTERS)


def bpe_tokenizer(vocab_size: int = 400) -> Tokenizer:
    words = "the king of night shall speak and no more a crown is light, he'll say\n"
    return train_bpe((words + "caf\u00e9 \u4e2d\u6587 12345 \U0001f600\n") * 30, vocab_size)


def foreign_tokenizer(split: str) -> HFTokenizer:
    """A byte-level BPE as published ones are: with tokens for the ends of a text, and fewer than the model has rows."""
    tokens = bpe_tokenizer().tokens
    vocab = {spelled(token): id for id, token in enumerate(tokens)}
    merges = [[spelled(a), spelled(b)] for a, b in merges_of(tokens)]
    special = [(len(tokens), "<|begin_of_text|>"), (len(tokens) + 1, "<|end_of_text|>")]
    return HFTokenizer(bpe_document(vocab, merges, split, special), len(tokens) + 10)


def make_run(folder: Path, twin: str = "bitgpt", tokenizer: Tokenizer | None = None, seed: int = 0,
             **settings: object) -> Path:
    """A run folder of random weights: spread like trained ones, with norms that are not all one."""
    tokenizer = tokenizer or char_tokenizer()
    config = ModelConfig(**{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 96, "block_size": 64,
                            "vocab_size": tokenizer.vocab_size, **settings}).resolved()  # type: ignore[arg-type]
    torch.manual_seed(seed)
    model = {"gpt": GPT, "bitgpt": BitGPT}[twin](config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1, 0.2)
            elif "proj" in name:
                weight.mul_(5)
            else:
                weight.mul_(20)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    write_config(folder, twin, config, dataclasses.asdict(TrainConfig(max_iters=7, lr=0.003)))
    checkpoint.save(folder / "best.safetensors", model.state_dict(), {"step": 7, "best_val_loss": 1.25})
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "val_loss": 1.25, "val_bpb": 2.5}) + "\n")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "best.safetensors")[0]


def our_logits(run: Path, ids: list[int]) -> torch.Tensor:
    """(T, V), one token after another."""
    engine = TorchEngine.from_run(run, device="cpu")
    engine.reset(1)
    return torch.tensor(np.stack([engine.forward(np.array([[id]]))[0] for id in ids]))


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a || b) in nats over the positions of two (T, V) logits."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def same_choices(a: torch.Tensor, b: torch.Tensor, margin: float = 0.05) -> bool:
    """Whether both take the same token wherever the first's lead is more than `margin`."""
    top = a.topk(2).values
    clear = top[:, 0] - top[:, 1] > margin
    return bool(clear.float().mean() > 0.5 and (a.argmax(-1) == b.argmax(-1))[clear].all())


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
