"""generate.py and engine/: the sampler, the sliding context, the streams, and what reaches stdout."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Call, shell
from hypothesis import given, settings
from hypothesis import strategies as st

from core.files import UserError
from data.tokenizer import BYTES as EVERY_BYTE
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from engine import load
from engine.sampling import Sampler, TextStream

BYTES = BPETokenizer(EVERY_BYTE)  # a token a byte: characters beyond ASCII come in pieces


# -- the sampler -------------------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], dtype=np.float32))


def shares(sampler: Sampler, draws: int = 4000) -> np.ndarray:
    """(B, V): how often each token was drawn."""
    ids = np.stack([sampler(LOGITS) for _ in range(draws)])                    # (draws, B)
    return np.stack([np.bincount(column, minlength=4) / draws for column in ids.T])


def test_draws_follow_the_probabilities() -> None:
    np.testing.assert_allclose(shares(Sampler()), np.exp(LOGITS), atol=0.03)


def test_temperatures_beyond_fp32() -> None:
    logits = np.array([[1, 3, 2]], dtype=np.float32)
    assert all(Sampler(temperature=1e-300, seed=seed)(logits).tolist() == [1] for seed in range(20))
    assert {int(Sampler(temperature=1e300, seed=seed)(logits)[0]) for seed in range(30)} == {0, 1, 2}


def test_temperature() -> None:
    assert (Sampler(temperature=0)(LOGITS) == [0, 3]).all()
    expected = np.exp(LOGITS * 2) / np.exp(LOGITS * 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares(Sampler(temperature=0.5)), expected, atol=0.03)


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions() -> None:
    for sampler in (Sampler(top_k=2), Sampler(top_p=0.7)):
        np.testing.assert_allclose(shares(sampler), [[0.625, 0.375, 0, 0], [0, 0, 0.375, 0.625]], atol=0.03)
    np.testing.assert_allclose(shares(Sampler(top_p=0.4)), [[1, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(shares(Sampler(top_k=99)), np.exp(LOGITS), atol=0.03)


def test_top_k_keeps_all_that_are_equal_and_those_alone() -> None:
    logits = np.array([[1, 5, 3, 3, 3, 0], [9, 8, 7, 0, 0, 0]], dtype=np.float32)
    sampler = Sampler(temperature=50, top_k=2)
    ids = np.stack([sampler(logits) for _ in range(300)])
    assert set(ids[:, 0]) == {1, 2, 3, 4} and set(ids[:, 1]) == {0, 1}


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(top_k=2), Sampler(top_p=0.5), Sampler(temperature=0)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_of_a_diverged_model_are_refused(sampler: Sampler, bad: float) -> None:
    with pytest.raises(UserError, match="diverged"):
        sampler(np.array([[1, 2, 3, 4], [1, bad, 3, 4]], dtype=np.float32))


def test_one_seed_one_text() -> None:
    a, b, c = ([Sampler(seed=seed)(LOGITS).tolist() for _ in range(1)] + [shares(Sampler(seed=seed), 50).tolist()]
               for seed in (1, 1, 2))
    assert a == b != c


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 30), st.floats(0, 5), st.integers(0, 40), st.floats(0.01, 1),
       st.integers(0, 99))
def test_what_is_drawn_is_a_token(B: int, V: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(B, V)).astype(np.float32) * 50
    ids = Sampler(temperature, top_k, top_p, seed)(logits)
    assert ids.shape == (B,) and ((ids >= 0) & (ids < V)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(2, 900), st.sampled_from([0.3, 1, 2.5]), st.integers(0, 60),
       st.sampled_from([0.2, 0.9, 1]), st.sampled_from([1, 3, 1000]), st.integers(0, 99))
def test_what_is_drawn_does_not_depend_on_how_candidates_are_found(
        B: int, V: int, temperature: float, top_k: int, top_p: float, levels: int, seed: int) -> None:
    logits = np.round(np.random.default_rng(seed).normal(size=(B, V)) * levels).astype(np.float32) / np.float32(levels)
    expected, draws = [], np.random.default_rng(seed).random(B)
    for row, draw in zip(logits, draws, strict=True):
        likelihood = np.exp((row - row.max()) / np.float32(temperature))
        if 0 < top_k < V:
            likelihood[row < np.sort(row)[-top_k]] = 0
        if top_p < 1:
            falling = np.sort(likelihood)[::-1].astype(np.float64)
            reached = int(np.argmax(falling.cumsum() >= top_p * falling.sum()))
            likelihood[likelihood < falling[reached]] = 0
        shares = likelihood.astype(np.float64).cumsum()
        expected.append(int(np.argmax(shares > draw * shares[-1])))
    assert Sampler(temperature, top_k, top_p, seed)(logits).tolist() == expected


# -- text as it comes --------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_stream_is_the_text_whatever_the_pieces(text: str) -> None:
    stream = TextStream(BYTES)
    parts = [stream.feed(byte) for byte in text.encode()]
    assert "".join(parts) + stream.finish() == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text  # no half character is ever shown


@settings(deadline=None)
@given(st.text("abc", max_size=30), st.text("abc", min_size=1, max_size=4))
def test_a_stream_ends_before_the_stop_string(text: str, stop: str) -> None:
    stream, out = TextStream(BYTES, stop), ""
    for byte in text.encode():
        out += stream.feed(byte)
    assert out + stream.finish() == text.split(stop)[0]
    assert stream.done


# -- generating --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("twin", ["gpt", "bitgpt"])
def test_greedy_text_equals_the_models_own(twin: str, trained: dict[str, Path]) -> None:
    from bitgpt.model import MODELS
    from engine.reference import TorchEngine
    engine = load(trained[twin], kernel="torch")
    assert isinstance(engine, TorchEngine)
    prompt = load_tokenizer(trained[twin] / "tokenizer.json").encode("The k")
    ids = [int(new[0]) for new in engine.generate(prompt, max_new_tokens=10, temperature=0)]
    from core import checkpoint
    model = MODELS[twin](engine.config).eval()
    checkpoint.load_into(model, checkpoint.load(trained[twin] / "best.safetensors")[0], "best")
    tokens = list(prompt)
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens]))[0].argmax()))
    assert ids == tokens[len(prompt):]


def test_text_goes_on_past_block_size_with_the_newer_half_of_the_context(trained: dict[str, Path]) -> None:
    engine = load(trained["bitgpt"], kernel="torch")
    prompts: list[np.ndarray] = []
    forward = engine.forward
    engine.forward = lambda tokens: (prompts.append(tokens), forward(tokens))[1]  # type: ignore[method-assign]
    ids = np.concatenate(list(engine.generate(list(range(5)), max_new_tokens=40)))
    assert len(ids) == 40
    rereads = [tokens[0].tolist() for tokens in prompts[1:] if tokens.shape[1] > 1]
    text = [*range(5), *ids.tolist()]
    assert rereads[0] == text[17 - 8:17] and len(rereads) == 4  # full at 16, then again every 8 tokens
    assert len(list(engine.generate(list(range(5)) * 9, max_new_tokens=3))) == 3  # a prompt longer than the context


@pytest.mark.parametrize(("wrong", "problem"), [
    ({"prompt": []}, "the prompt is empty"), ({"prompt": [0, 10**6]}, "holds 1000000"), ({"prompt": [-1]}, "holds -1"),
    ({"num_samples": 0}, "num_samples is 0"), ({"temperature": -1}, "temperature is -1"),
    ({"top_k": -1}, "top_k is -1"), ({"top_p": 0}, "top_p is 0"), ({"top_p": 1.5}, "top_p is 1.5")])
def test_what_cannot_be_generated_is_told(wrong: dict[str, Any], problem: str, trained: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=problem):
        list(load(trained["bitgpt"]).generate(**{"prompt": [1], **wrong}))


@pytest.mark.parametrize("wrong", [{"weights": "trit3"}, {"head": "q4"}, {"checkpoint": "latest"}, {"kernel": "cpp"},
                                   {"threads": -1}])
def test_what_cannot_be_loaded_is_told(wrong: dict[str, Any], trained: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} .*(Choose from|at least 0)"):
        load(trained["bitgpt"], **wrong)


def test_settings_that_the_kernel_does_not_know_are_told(trained: dict[str, Path], call: Call) -> None:
    flags = ["--out-dir", trained["bitgpt"], "--max-new-tokens", "2", "--kernel"]
    told = call("bitgpt/generate", *flags, "torch", "--kv-cache", "bf16", "--weights", "trit1.6")
    assert told.code == 0 and "the torch kernel has no use for --weights trit1.6, --kv-cache bf16" in told.err
    assert "no use" in call("bitgpt/generate", *flags, "cpu", "--device", "cuda").err
    assert "note" not in call("bitgpt/generate", *flags, "cpu", "--kv-cache", "bf16", "--device", "cpu").err


def test_two_texts_of_one_engine_do_not_mix(trained: dict[str, Path]) -> None:
    engine = load(trained["bitgpt"])
    alone = [int(ids[0]) for ids in engine.generate([1, 2], max_new_tokens=4, temperature=0)]
    first = engine.generate([3, 4], max_new_tokens=4, temperature=0)
    next(first)
    assert [int(ids[0]) for ids in engine.generate([1, 2], max_new_tokens=4, temperature=0)] == alone
    with pytest.raises(UserError, match="read another text"):
        next(first)
    size = engine.config.block_size
    old = engine.generate([1] * size, max_new_tokens=4, temperature=0)  # at its end the window slides
    next(old)
    new = engine.generate([1, 2], max_new_tokens=4, temperature=0)
    begun = [int(next(new)[0]), int(next(new)[0])]
    with pytest.raises(UserError, match="read another text"):
        next(old)
    assert [*begun, *(int(ids[0]) for ids in new)] == alone


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_a_text_does_not_go_on_behind_what_was_measured(kernel: str, trained: dict[str, Path]) -> None:
    engine = load(trained["bitgpt"], kernel)
    one = np.ones((1, 3), np.int64)
    for use in (lambda: engine.reset(1), lambda: engine.nats(one, one), lambda: engine.forward(one)):
        text = engine.generate([1, 2, 3], max_new_tokens=6)
        next(text)
        use()
        with pytest.raises(UserError, match="read another text"):
            next(text)


def test_a_number_of_tokens_that_is_none_is_refused(trained: dict[str, Path]) -> None:
    for wrong in (-3, 2.5, "7"):
        with pytest.raises(UserError, match="max_new_tokens"):
            next(load(trained["bitgpt"]).generate([1], max_new_tokens=wrong))  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_is_told(trained: dict[str, Path], call: Call) -> None:
    for length, told in ((16, False), (17, True)):
        result = call("generate", "--out-dir", trained["gpt"], "--prompt", "o" * length, "--max-new-tokens", "1")
        assert result.code == 0 and ("the model sees the last 16" in result.err) == told


@pytest.mark.parametrize("twin", ["gpt", "bitgpt"])
def test_samples_of_a_batch_differ_and_the_first_is_shown_as_it_comes(twin: str, trained: dict[str, Path],
                                                                     call: Call) -> None:
    flags = ["--out-dir", trained[twin], "--prompt", "The", "--max-new-tokens", "30", "--num-samples", "3"]
    result = call(f"{twin}/generate", *flags)
    samples = result.out.rstrip("\n").split("\n" + "-" * 15 + "\n")
    assert result.code == 0 and len(samples) == 3 and len(set(samples)) == 3
    assert all(sample.startswith("The") and len(sample) == 33 for sample in samples)
    assert "tok/s" in result.err and "tok/s" not in result.out
    assert call("generate", *flags).out == result.out  # the same seed; the twin is seen from the folder
    assert call("generate", *flags, "--seed", "2").out != result.out


def test_prompt_from_a_file_and_from_standard_input(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    (tmp_path / "prompt.txt").write_text("The crown")
    flags = ["--out-dir", trained["gpt"], "--max-new-tokens", "5", "--num-samples", "1"]
    from_flag = call("gpt/generate", *flags, "--prompt", "The crown")
    assert call("gpt/generate", *flags, "--prompt-file", tmp_path / "prompt.txt").out == from_flag.out
    piped = subprocess.run([sys.executable, ROOT / "gpt/generate.py", *map(str, flags), "--prompt-file", "-"],
                           input="The crown", capture_output=True, text=True, cwd=tmp_path)
    assert piped.stdout == from_flag.out and from_flag.out.startswith("The crown")


def test_stop_and_empty_prompt(trained: dict[str, Path], call: Call) -> None:
    flags = ["--out-dir", trained["gpt"], "--num-samples", "2", "--max-new-tokens", "60", "--prompt", ""]
    whole = call("gpt/generate", *flags)
    stopped = call("gpt/generate", *flags, "--stop", "e")
    assert whole.code == stopped.code == 0 and whole.out.startswith("\n") and "e" in whole.out
    assert stopped.out.split("\n" + "-" * 15 + "\n") == [
        text.split("e")[0] + end for text, end in zip(whole.out.split("\n" + "-" * 15 + "\n"), ("", "\n"), strict=True)]


def test_a_closed_pipe_ends_quietly(trained: dict[str, Path]) -> None:
    command = f"{sys.executable} {ROOT / 'gpt/generate.py'} --out-dir {trained['gpt']} --max-new-tokens 400 | head -c 5"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(result.stdout) == 5 and "Traceback" not in result.stderr and "Error" not in result.stderr


def test_the_packed_path_needs_no_torch_to_start() -> None:
    """Reading flags, run folders and tokenizers, and sampling, leave torch alone."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate, engine, engine.cpu; " \
           "print('torch' in sys.modules)"
    assert shell("-c", code).stdout.strip() == "False"


def test_bpe_runs_sample_any_prompt(tmp_path: Path, corpus: Path, call: Call) -> None:
    from conftest import TINY
    run = tmp_path / "bpe"
    assert call("bitgpt/train", *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--dataset", corpus,
                "--out-dir", run).code == 0
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 300
    result = call("bitgpt/generate", "--out-dir", run, "--prompt", "König 王 🙂", "--max-new-tokens", "20")
    assert result.code == 0 and result.out.startswith("König 王 🙂")


def test_a_character_unknown_to_a_char_run_is_named(trained: dict[str, Path], call: Call) -> None:
    result = call("gpt/generate", "--out-dir", trained["gpt"], "--prompt", "caf\u00e9")
    assert result.code == 2 and "\u00e9" in result.err and result.out == ""
    assert isinstance(load_tokenizer(trained["gpt"] / "tokenizer.json"), CharTokenizer)


def test_a_prompt_file_of_other_editors(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfThe\r\nking")
    result = call("gpt/generate", "--out-dir", trained["gpt"], "--max-new-tokens", "5", "--num-samples", "1",
                  "--prompt-file", tmp_path / "prompt.txt")
    assert result.code == 0 and result.out.startswith("The\nking"), result.err


def test_nothing_is_generated_once_all_samples_have_stopped(trained: dict[str, Path], call: Call) -> None:
    said = call("gpt/generate", "--out-dir", trained["gpt"], "--num-samples", "2", "--max-new-tokens", "3000",
                "--prompt", "", "--stop", "e").err
    assert int(said.split("2 x ")[1].split(" tokens")[0]) < 1500


def test_texts_of_two_threads_are_right_or_refused(trained: dict[str, Path]) -> None:
    engine = load(trained["bitgpt"], kernel="cpu", threads=2)
    found: list[list[int]] = []

    def text() -> list[int]:
        return [int(ids[0]) for ids in engine.generate([1, 2, 3], max_new_tokens=20, seed=5)]

    def many() -> None:
        for _ in range(30):
            with contextlib.suppress(UserError):
                found.append(text())

    expected, threads = text(), [threading.Thread(target=many) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found and all(one == expected for one in found) and text() == expected  # who begins last is let finish


def test_a_fork_is_told_that_it_has_no_threads(trained: dict[str, Path]) -> None:
    program = "import os, sys, threading, engine\n" \
              "model = engine.load(sys.argv[1], kernel='cpu', threads=int(sys.argv[2]))\n" \
              "ids = [list(new) for new in model.generate([1], max_new_tokens=5)]\n" \
              "def forever():\n    for _ in model.generate([2], max_new_tokens=10**9): pass\n" \
              "threading.Thread(target=forever, daemon=True).start()\n" \
              "while model.length < 9: pass\n" \
              "if os.fork():\n    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\n" \
              "try:\n    sys.exit(0 if [list(new) for new in model.generate([1], max_new_tokens=5)] == ids else 1)\n" \
              "except engine.UserError as error:\n    sys.exit(7 if 'fork' in str(error) else 1)\n"
    for threads, code in ((1, 0), (2, 7)) * 3:  # at whatever moment of the other thread's text
        done = subprocess.run([sys.executable, "-c", program, trained["bitgpt"], str(threads)], cwd=ROOT,
                              capture_output=True, text=True, timeout=100)
        assert done.returncode == code, done.stderr
