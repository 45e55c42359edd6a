"""Every variant as a person uses it: both twins trained and compared, sampled, and converted or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Call

import convert
import engine
from core.config import ModelConfig
from core.safetensors_file import open_safetensors
from engine.packing import pack_run

QUICK = [*TINY, "--n-embd", "64", "--max-iters", "4", "--optimizer", "muon", "--threads", "1"]


def outcome(source: Path, destination: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """"" where convert.py did it, else its message."""
    capsys.readouterr()
    try:
        convert.main([str(source), str(destination), "--quiet", *flags])
    except SystemExit:
        return capsys.readouterr().err
    return ""


@pytest.mark.parametrize(("flags", "kernel", "refused"), [
    (["--weight-quant", "absmedian"], "cpu", {"hf"}), (["--weight-quant", "sign"], "cpu", {"hf"}),
    (["--scale", "row"], "cpu", {"hf", "packed", "gguf"}),
    (["--weight-quant", "int2", "--scale", "row"], "torch", {"hf", "packed", "gguf"}),
    (["--activation-quant", "int4"], "torch", {"hf", "packed", "gguf"}),
    (["--activation-quant", "clamp8"], "torch", {"hf", "packed", "gguf"}),
    (["--activation-quant", "none"], "torch", {"hf", "packed", "gguf"}),
    (["--norm", "inner"], "torch", {"hf", "packed", "gguf"})])
def test_it_trains_compares_samples_and_goes_where_it_can(
        flags: list[str], kernel: str, refused: set[str], tmp_path: Path, corpus: Path, call: Call,
        capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "bitgpt"
    if {"sign", "int2", "inner"} & {*flags}:  # what the report or the twin takes notice of
        result = call("compare", *QUICK, *flags, "--dataset", corpus, "--out-dir", tmp_path)
        assert ("ternary at 1 bits" in result.out) == ("sign" in flags)
        assert ("ternary at 1.6 bits" in result.out) == ("int2" not in flags)
    else:
        result = call("bitgpt/train", *QUICK, *flags, "--dataset", corpus, "--out-dir", run)
    assert result.code == 0, result.err
    assert engine.load(run, threads=1).kernel == kernel
    sampled = call("generate", "--out-dir", run, "--max-new-tokens", "5", "--threads", "1", "--temperature", "0")
    assert sampled.code == 0 and ("taking torch" in sampled.err) == (kernel == "torch")
    told = {"hf": outcome(run, tmp_path / "hf", capsys), "packed": outcome(run, tmp_path / "hf2", capsys, "--packed"),
            "gguf": outcome(run, tmp_path / "x.gguf", capsys, "--type", "f16")}
    assert {place for place, message in told.items() if message} == refused
    setting = flags[-2:] if "int2" not in flags else flags[:2]
    assert all(" ".join(setting) in told[place] for place in refused)
    if kernel == "torch":
        packed = call("generate", "--out-dir", run, "--kernel", "cpu")
        assert packed.code == 2 and " ".join(setting) in packed.err and "--kernel torch" in packed.err


@pytest.mark.parametrize("flags", [["--weight-quant", "absmedian", "--scale", "row"], ["--weight-quant", "sign"]])
def test_packed_forms_compute_what_was_trained(flags: list[str], tmp_path: Path, corpus: Path, call: Call) -> None:
    run = tmp_path / "run"
    assert call("bitgpt/train", *QUICK, *flags, "--dataset", corpus, "--out-dir", run).code == 0
    path, config = pack_run(run)
    packed, _ = open_safetensors(path)
    assert packed["blocks.1.mlp.down_proj.scale"].shape == ((64,) if config.scale == "row" else ())
    prompt = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    ours, gold = (torch.from_numpy(engine.load(run, kernel, threads=1, head="bf16").forward(prompt)).log_softmax(-1)
                  for kernel in ("cpu", "torch"))
    assert float((gold.exp() * (gold - ours)).sum()) < 1e-3


def test_norms_inside_replace_all_others_in_both_twins(tmp_path: Path) -> None:
    from bitgpt.model import BitGPT
    from gpt.model import GPT
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_ff=48, vocab_size=9, norm="inner").resolved()
    twins = [model_class(config) for model_class in (GPT, BitGPT)]
    assert list(twins[0].state_dict()) == list(twins[1].state_dict())
    norms = {name: tuple(w.shape) for name, w in twins[0].state_dict().items() if w.dim() == 1}
    assert norms == {f"blocks.0.{name}_proj.norm.weight": (48 if "down" in name else 32,) for name in (
        "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")} | {"norm.weight": (32,)}
    tokens = torch.randint(9, (2, 7))
    for twin in twins:  # the norm is inside: the size of what comes in is of no matter
        layer, x = twin.blocks[0].attn.q_proj, torch.randn(3, 32)
        torch.testing.assert_close(layer(5 * x), layer(x), rtol=2e-2, atol=2e-2)
        twin(tokens, tokens)[1].backward()
        assert all(weight.grad is not None for weight in twin.parameters())


def test_an_inner_norm_cannot_be_left_out(tmp_path: Path, corpus: Path, call: Call) -> None:
    result = call("bitgpt/train", *QUICK, "--norm", "inner", "--no-sub-norm", "--dataset", corpus,
                  "--out-dir", tmp_path / "run")
    assert result.code == 2 and "Take one of them" in result.err
