"""evaluate.py and engine/evaluation.py: one loss of a run, whatever computes it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, english
from torch.nn import functional as F

import engine
from engine import evaluation


def shown(result):
    assert result.code == 0, result.err
    loss, bits = map(float, re.fullmatch(r"([\d.]+) nats per token, ([\d.]+) bits per byte\n", result.out).groups())
    return loss, bits


@pytest.mark.parametrize("twin", ["gpt", "bitgpt"])
def test_packed_weights_have_the_loss_of_training(twin, call, trained):
    best = min((json.loads(line) for line in (trained[twin] / "metrics.jsonl").read_text().splitlines()),
               key=lambda record: record.get("val_loss", np.inf))
    torchs = shown(call("evaluate", "--out-dir", trained[twin], "--kernel", "torch"))
    packed = shown(call("evaluate", "--out-dir", trained[twin], "--kernel", "cpu"))
    assert torchs == pytest.approx((best["val_loss"], best["val_bpb"]), abs=2e-3)  # maybe measured in bf16
    assert packed == pytest.approx(torchs, abs=2e-3)


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_passes_of_any_length_give_one_loss(kernel, trained, monkeypatch):
    model = engine.load(trained["bitgpt"], kernel, threads=1)
    x, y = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 3, 16))
    whole = evaluation.loss_of(model, [(x, y), (x[:1, :3], y[:1, :3])])
    assert whole[1] == 3 * 16 + 3
    monkeypatch.setattr(evaluation, "AT_ONCE", 15)  # five positions of three windows
    assert evaluation.loss_of(model, [(x, y), (x[:1, :3], y[:1, :3])]) == pytest.approx(whole, rel=1e-4)
    monkeypatch.setattr(engine.cpu, "CHUNK", 6)
    assert evaluation.loss_of(model, [(x, y), (x[:1, :3], y[:1, :3])]) == pytest.approx(whole, rel=1e-4)


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((3, 4, 9)).astype(np.float32) * 30, rng.integers(0, 9, (3, 4))
    expected = F.cross_entropy(torch.from_numpy(logits).transpose(1, 2), torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(evaluation.cross_entropy(logits, targets), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_another_text_and_a_part_of_it(call, trained, tmp_path, monkeypatch):
    other = tmp_path / "night.txt"
    other.write_text("the night shall speak and the king shall carry water\n" * 200)
    ours, theirs = (call("evaluate", "--out-dir", trained["bitgpt"], *flags) for flags in ((), ("--dataset", other)))
    assert shown(ours) != shown(theirs) and f"of {other}" in theirs.err
    monkeypatch.setattr(evaluation, "AT_ONCE", 32)  # two windows
    part = call("evaluate", "--out-dir", trained["bitgpt"], "--eval-iters", "1", "--dataset", other)
    assert part.code == 0 and f"\r32 tokens of {other}" in part.err and f"\r32 tokens of {other}" not in theirs.err


def test_a_text_that_was_edited_is_no_longer_the_one_of_training(call, trained, corpus, tmp_path):
    run, config = tmp_path / "run", json.loads((trained["gpt"] / "config.json").read_text())
    shutil.copytree(trained["gpt"], run)
    edited = tmp_path / corpus.name
    edited.write_text(corpus.read_text()[::-1])
    config["train"]["dataset"] = str(edited)
    (run / "config.json").write_text(json.dumps(config))
    result = call("evaluate", "--out-dir", run)
    assert result.code == 2 and "no longer the text" in result.err and not result.out
    assert call("evaluate", "--out-dir", run, "--dataset", edited).code == 0  # asked for by name


@pytest.mark.parametrize(("flags", "problem"), [
    (("--out-dir", "nowhere"), "holds no trained run"), (("--kernel", "cuda"), "Did you mean"),
    (("--eval-iter", "3"), "--eval-iters"), (("--dataset", "no/such.txt"), "no/such.txt"),
    (("--model", "gpt"), "a run of bitgpt"), (("--kernel", "triton", "--device", "mps"), "not on --device mps")])
def test_mistakes_are_told(flags, problem, call, trained):
    result = call("evaluate", "--out-dir", trained["bitgpt"], *flags)
    assert result.code == 2 and problem in result.err and "Traceback" not in result.err and not result.out


def test_the_field_of_training_is_read(call, tmp_path):
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": "water", "body": english(60, i)}) + "\n"
                                                for i in range(300)))
    assert call("gpt/train", *TINY, "--dataset", tmp_path / "two.jsonl", "--text-field", "body", "--out-dir",
                tmp_path / "run").code == 0
    assert call("evaluate", "--out-dir", tmp_path / "run").code == 0
