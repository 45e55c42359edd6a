"""llama.cpp itself runs what convert.py exports: the same text, and nearly the same probabilities. make test-interop

Not part of `make test`, as it needs llama-cpp-python, which takes a quarter of an hour to build. Prints its figures.
"""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from interop_models import (
    TEXT,
    bpe_tokenizer,
    char_tokenizer,
    divergence,
    foreign_tokenizer,
    make_run,
    our_logits,
)
from llama_cpp import Llama

import train
from bitgpt.model import BitGPT
from core.files import UserError
from core.run_folder import read_config
from data.tokenizer import load_tokenizer
from gpt.model import GPT
from interop.gguf import write_gguf
from interop.source import RunSource

SHAPE = ["--n-layer", "2", "--n-head", "4", "--n-kv-head", "2", "--n-embd", "256", "--n-ff", "768", "--block-size",
         "128", "--batch-size", "8", "--max-iters", "120", "--eval-interval", "120", "--eval-iters", "10", "--lr",
         "2e-3", "--verbose", "0"]


@pytest.fixture(scope="module", params=["char", "bpe"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """Both twins, trained on some English, with one of the tokenizers."""
    folder = tmp_path_factory.mktemp(request.param)
    for model in (GPT, BitGPT):
        train.main(model, [*SHAPE, "--dataset", str(corpus), "--tokenizer", request.param, "--vocab-size",
                           "512" if request.param == "bpe" else "0", "--out-dir", str(folder / model.name)])
    return {model.name: folder / model.name for model in (GPT, BitGPT)}


def open_gguf(path: Path) -> Llama:
    return Llama(str(path), n_ctx=256, logits_all=True, verbose=False)


def their_logits(model: Llama, ids: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(ids)
    return torch.tensor(np.array(model.scores[:len(ids)]))


@pytest.mark.parametrize("twin, type", [("bitgpt", "tq1_0"), ("bitgpt", "tq2_0"), ("bitgpt", "q2_0"), ("bitgpt", "f16"),
                                        ("gpt", "f16")])
def test_the_same_text_and_probabilities(runs, tmp_path, corpus, twin, type):
    run = runs[twin]
    write_gguf(RunSource(run), tmp_path / "x.gguf", type, quiet=True)
    model, tokenizer = open_gguf(tmp_path / "x.gguf"), load_tokenizer(run / "tokenizer.json")
    ids = tokenizer.encode(corpus.read_text()[-2000:])[:128]
    wanted, logits = our_logits(run, ids), their_logits(model, ids)
    kl = divergence(wanted, logits)
    print(f"\n{tokenizer.name} {twin} {type}: KL {kl:.1e} nats, same choice at "
          f"{100 * float((wanted.argmax(-1) == logits.argmax(-1)).float().mean()):.1f}% of {len(ids)} positions, "
          f"{(tmp_path / 'x.gguf').stat().st_size / 1e3:,.0f} kB")
    assert kl < 1e-3
    prompt = tokenizer.encode("The king ")
    text = list(prompt)
    model.reset()
    for id in model.generate(prompt, temp=0, repeat_penalty=1.0):  # greedy
        text.append(id)
        if len(text) == 100:
            break
    wanted = our_logits(run, text)
    top = wanted.topk(2).values
    alike = 0
    for at in range(len(prompt) - 1, len(text) - 1):
        if text[at + 1] != wanted[at].argmax():
            assert top[at, 0] - top[at, 1] < 0.2, f"{tokenizer.decode(text)!r} at {at}"  # both were as likely
            break
        alike += 1
    print(f"greedy: {tokenizer.decode(text[:len(prompt) + alike])!r}")
    assert alike >= 10


@pytest.mark.parametrize("tokenizer", [char_tokenizer(), bpe_tokenizer(), foreign_tokenizer("llama3"),
                                       foreign_tokenizer("gpt2")], ids=["char", "bpe", "llama3", "gpt2"])
def test_the_same_tokens(tmp_path, tokenizer):
    run = make_run(tmp_path / "run", tokenizer=tokenizer, n_layer=1, n_embd=256, n_ff=256)
    write_gguf(RunSource(run), tmp_path / "x.gguf", quiet=True)
    model = open_gguf(tmp_path / "x.gguf")
    assert model.n_vocab() == read_config(run).model.vocab_size
    draw = np.random.default_rng(0)
    texts = [TEXT, "\n", " ", "  \n  \n", "\r\n\r\n", "a\tb", "\u2028", "|<>|", "i's o'll", "\\n"]
    alphabet = sorted(set(TEXT))
    texts += ["".join(draw.choice(alphabet, 40)) for _ in range(200)]
    compared = 0
    for text in texts:
        try:
            ids = tokenizer.encode(text)
        except UserError as error:
            assert "never seen" in str(error)
            continue
        compared += 1
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        assert b"".join(model.detokenize([id]) for id in ids).decode() == text
    assert compared >= 200
