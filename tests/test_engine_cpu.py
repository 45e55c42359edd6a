"""The C kernels: exact integers on every instruction set, one result for every way through, and the torch model's."""

import ctypes
import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, sanitized
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgpt.bitlinear import BitLinear
from bitgpt.model import BitGPT
from bitgpt.quantizers import quantize_activations
from core import checkpoint
from core.config import ModelConfig
from core.files import UserError
from core.run_folder import write_config
from core.safetensors_file import open_safetensors
from engine import packed_file
from engine.cpu import SOURCE, CPUEngine, library
from engine.packed_file import Entry
from engine.packing import pack_run, pack_tensor
from engine.reference import TorchEngine
from gpt.model import GPT
from kernels import build
from kernels.format import KINDS, from_bf16, pack, to_bf16, unpack
from training.settings import TrainConfig


def cpu_flags():
    """The CPU's features, as Linux names them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.split() for line in lines if line.startswith(("flags", "Features"))), []))


def isas():
    """The instruction sets that this CPU has kernels for, the best one first."""
    flags = cpu_flags()
    wanted = {"amx": {"amx_int8"}, "avx512": {"avx512f", "avx512bw", "avx512_vnni"}, "avxvnni": {"avx2", "avx_vnni"},
              "avx2": {"avx2"}, "neon-i8mm": {"asimddp", "i8mm"}, "neon": {"asimddp"}}
    return [isa for isa, needs in wanted.items() if needs <= flags] + ["scalar"]


def best_isa():
    """What the compiler must make of this very CPU."""
    return isas()[0]


RUNS = {"auto": best_isa(), **{isa: isa for isa in isas()[1:] if isa in build.ISAS}}
if "avx512" in isas():
    RUNS["cascadelake"] = "avx512"
INTEGERS = [kind for kind in KINDS if kind != "bf16"]


@pytest.fixture(scope="module", params=RUNS)
def isa(request):
    """An instruction set, which is also the one that ran: with a compiler there is no falling back."""
    assert library(request.param).bitgpt_isa().decode() == RUNS[request.param]
    return request.param


def address(array):
    return None if array is None else array.ctypes.data


def integers(isa, kind, w, x):
    """acc_i32 (M, N) of the kernels; exactly sized copies, so that a sanitizer sees a read beyond them."""
    n, k = w.shape
    packed, x = pack(kind, w).copy(), np.ascontiguousarray(x)
    acc = np.zeros((len(x), n), np.int32)
    assert not library(isa).bitgpt_product(KINDS[kind].number, n, k, address(packed), None, len(x), address(x),
                                                 address(acc), None, None)
    return acc


def floats(isa, kind, packed, scale, n, k, x):
    """A whole linear layer on fp32 activations (M, K), as the model computes it."""
    y = np.zeros((len(x), n), np.float32)
    assert not library(isa).bitgpt_product(KINDS[kind].number, n, k, address(packed), address(scale), len(x),
                                                 None, None, address(x), address(y))
    return y


def reference(w, x):
    return (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.int32)


# ---------------------------------------------------------------------------------------------------- exact integers
@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(INTEGERS), n=st.integers(1, 70), k=st.integers(1, 300), m=st.integers(1, 33),
       seed=st.integers(0, 2**32 - 1))
def test_sums_are_exact(isa, kind, n, k, m, seed):
    compare_sums(isa, kind, n, k, m, seed)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(("n", "k", "m"), [(40, 2700, 50), (17, 6912, 17), (33, 1301, 100)])
def test_sums_of_long_rows_and_many_tokens_are_exact(isa, kind, n, k, m):
    compare_sums(isa, kind, n, k, m, 0)


def compare_sums(isa, kind, n, k, m, seed):
    rng = np.random.default_rng(seed)
    w = rng.integers(-KINDS[kind].largest, KINDS[kind].largest + 1, (n, k)).astype(np.int8)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    assert np.array_equal(integers(isa, kind, w, x), reference(w, x))


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (16, 16, 1), (1, 6912, 1), (33, 1, 2), (17, 2561, 3),
                                           (48, 1281, 15), (3, 5000, 29)])
@pytest.mark.parametrize("extreme", [-128, 127])
def test_sums_at_the_extremes(isa, kind, n, k, m, extreme):
    x = np.full((m, k), extreme, np.int8)
    for weight in (-KINDS[kind].largest, 0, KINDS[kind].largest):
        w = np.full((n, k), weight, np.int8)
        assert np.array_equal(integers(isa, kind, w, x), reference(w, x))


@pytest.mark.parametrize("kind", ["trit2", "trit1.6"])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_long_rows_do_not_overflow(isa, kind, m):
    k = 200_003  # several times the columns that one sum of shifted codes could hold
    for weight, extreme in ((1, -128), (1, 127), (-1, -128)):
        w, x = np.full((2, k), weight, np.int8), np.full((m, k), extreme, np.int8)
        assert np.array_equal(integers(isa, kind, w, x), reference(w, x))


def test_invalid_codes_are_counted(isa):
    count = library(isa).bitgpt_count_invalid
    for kind, bad in (("trit2", sum(any(b >> s & 3 == 3 for s in (0, 2, 4, 6)) for b in range(256))), ("trit1.6", 13)):
        packed = np.tile(np.arange(256, dtype=np.uint8), 3)
        assert count(KINDS[kind].number, address(packed), packed.size) == 3 * bad


# ---------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("kind", ["trit2", "trit1.6"])
def test_ternary_layer_is_torchs(isa, kind):
    torch.manual_seed(0)
    for n, k, m in ((48, 100, 1), (40, 384, 5), (16, 77, 20)):
        weight, x = torch.randn(n, k) * 0.1, torch.randn(m, k) * 3
        x[0] = 0  # a token of zeros has a scale too
        packed, scale = pack_tensor(Entry("w.weight", kind, (n, k)), weight.numpy())
        layer = BitLinear(k, n)
        layer.weight.data = weight
        expected = layer(x).detach().numpy()
        found = floats(isa, kind, packed, np.full(n, scale, np.float32), n, k, x.numpy())
        assert np.array_equal(found, expected)  # integers and three fp32 operations: nothing is left to differ


@pytest.mark.parametrize("kind", ["q8", "q6"])
def test_head_sees_activations_of_fifteen_bits(isa, kind):
    rng = np.random.default_rng(0)
    n, k = 50, 200
    w = rng.integers(-KINDS[kind].largest, KINDS[kind].largest + 1, (n, k)).astype(np.int8)
    scale = rng.random(n).astype(np.float32) * 0.01
    x = rng.standard_normal((9, k)).astype(np.float32)
    expected = x.astype(np.float64) @ (w * scale[:, None]).T.astype(np.float64)
    for m in (1, 2, 9):
        found = floats(isa, kind, pack(kind, w), scale, n, k, x[:m])
        assert np.abs(found - expected[:m]).max() < 1e-4 * np.abs(expected).max()


def test_bf16_layer(isa):
    rng = np.random.default_rng(0)
    n, k = 50, 201
    w = from_bf16(to_bf16(rng.standard_normal((n, k)).astype(np.float32)))
    x = rng.standard_normal((9, k)).astype(np.float32)
    for m in (1, 2, 9):
        found = floats(isa, "bf16", pack("bf16", w), None, n, k, x[:m])
        assert np.abs(found - x[:m].astype(np.float64) @ w.T.astype(np.float64)).max() < 1e-5 * np.sqrt(k)


# ---------------------------------------------------------------------------------------------------- whole models
SHAPES = {
    "plain": {},
    "grouped": {"n_kv_head": 2, "act": "relu2", "tie_embeddings": False},
    "odd": {"n_embd": 120, "n_head": 6, "n_ff": 200, "sub_norm": False, "vocab_size": 77},
    "one-head": {"n_kv_head": 1, "qk_norm": True, "n_layer": 2},
    "wide-heads": {"n_embd": 512, "n_kv_head": 1, "n_layer": 1},
    "wider-heads": {"n_embd": 768, "n_head": 3, "n_layer": 1, "block_size": 150},
}


def make_run(folder, twin=BitGPT, seed=0, **shape):
    """A run folder with random weights whose embeddings bf16 can hold, so that a bf16 head loses nothing."""
    config = ModelConfig(**{"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 100, "vocab_size": 101,
                            **shape}).resolved()
    torch.manual_seed(seed)
    model = twin(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = torch.rand_like(weight) + 0.5
        else:
            weight.data = weight.data * 3
            if twin is GPT or "wte" in name or "lm_head" in name:
                weight.data = weight.data.bfloat16().float()
    folder.mkdir(exist_ok=True)
    write_config(folder, twin.name, config, dataclasses.asdict(TrainConfig()))
    checkpoint.save(folder / "best.safetensors", model.state_dict(), {})
    return config


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_run(folder, **SHAPES[request.param])
    return folder


def tokens_for(engine, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, engine.config.vocab_size, (batch, length))


def feed(engine, tokens, lengths):
    """Logits after feeding tokens (B, T) in chunks of these lengths."""
    engine.reset(len(tokens))
    at = 0
    for length in lengths:
        logits = engine.forward(tokens[:, at:at + length])
        at += length
    assert at == tokens.shape[1] == engine.length
    return logits


@pytest.mark.parametrize("head", ["bf16", "q8", "q6"])
def test_every_way_through_gives_the_same_bits(isa, run, head):
    weights = "trit1.6" if head == "q6" else "trit2"
    engine = CPUEngine.from_run(run, weights=weights, head=head, threads=2, isa=isa)
    assert (engine.isa, engine.threads) == (RUNS[isa], 2)
    tokens = tokens_for(engine, 3, 70)
    whole = feed(engine, tokens, [70])
    assert whole.shape == (3, engine.config.vocab_size) and np.isfinite(whole).all()
    assert np.array_equal(feed(engine, tokens, [1] * 70), whole)
    assert np.array_equal(feed(engine, tokens, [13, 1, 1, 30, 25]), whole)
    assert np.array_equal(feed(engine, tokens[1:2], [69, 1])[0], whole[1])  # one sequence alone: other tiles and loops
    assert np.array_equal(feed(engine, tokens[2:], [1] * 70)[0], whole[2])
    first = feed(engine, tokens[:, :13], [13])
    engine.reset(3)
    every = engine.logits(tokens, all_logits=True)
    assert np.array_equal(every[:, 12], first) and np.array_equal(every[:, 69], whole)
    for threads in (1, 3):
        other = CPUEngine.from_run(run, weights=weights, head=head, threads=threads, isa=isa)
        assert np.array_equal(feed(other, tokens, [60, 10]), whole)
        assert np.array_equal(feed(other, tokens[:1], [1] * 70)[0], whole[0])


def kl(p, q):
    """Largest Kullback-Leibler divergence of a row, nats."""
    p, q = torch.log_softmax(torch.from_numpy(p), -1), torch.log_softmax(torch.from_numpy(q), -1)
    return (p.exp() * (p - q)).sum(-1).max().item()


def test_same_distribution_as_torch(isa, run):
    engine, torchs = CPUEngine.from_run(run, head="bf16", isa=isa), TorchEngine.from_run(run, device="cpu")
    tokens = tokens_for(engine, 4, 60)
    for reach in (1, 7, 60):
        found, expected = feed(engine, tokens[:, :reach], [reach]), feed(torchs, tokens[:, :reach], [reach])
        assert kl(expected, found) < 1e-3  # int8 rounding amplifies float noise
        top = np.sort(expected, axis=1)[:, -2:]
        clear = top[:, 1] - top[:, 0] > 0.1 * expected.std()
        assert (found.argmax(1) == expected.argmax(1))[clear].all() and clear.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_full_precision_twin_is_torchs(isa, shape, tmp_path):
    make_run(tmp_path, GPT, **SHAPES[shape])
    engine = CPUEngine.from_run(tmp_path, head="bf16", isa=isa)
    torchs = TorchEngine.from_run(tmp_path, device="cpu")
    tokens = tokens_for(engine, 2, 60)
    found, expected = feed(engine, tokens, [60]), feed(torchs, tokens, [60])
    assert np.abs(found - expected).max() < 2e-5 * max(1, np.abs(expected).max())
    assert np.array_equal(feed(engine, tokens, [1] * 60), found)


def test_a_cache_of_bf16_gives_the_same_bits_every_way(isa, run):
    engine = CPUEngine.from_run(run, head="bf16", threads=2, isa=isa, kv_cache="bf16")
    tokens = tokens_for(engine, 3, 70)
    whole = feed(engine, tokens, [70])
    assert np.array_equal(feed(engine, tokens, [1] * 70), whole)
    assert np.array_equal(feed(engine, tokens[1:2], [13, 1, 1, 30, 25])[0], whole[1])
    other = CPUEngine.from_run(run, head="bf16", threads=3, isa=isa, kv_cache="bf16")
    assert np.array_equal(feed(other, tokens, [60, 10]), whole)
    exact = feed(CPUEngine.from_run(run, head="bf16", isa=isa), tokens, [70])
    assert not np.array_equal(exact, whole) and kl(exact, whole) < 5e-3


@pytest.mark.parametrize("shape", ["grouped", "odd", "one-head"])
@pytest.mark.parametrize("kv_cache", ["fp32", "bf16"])
def test_spans_of_positions_are_merged_the_same_way_by_anybody(isa, shape, kv_cache, tmp_path):
    make_run(tmp_path, GPT, **SHAPES[shape], block_size=1100)  # no rounding to int8, which hides much
    engine = CPUEngine.from_run(tmp_path, threads=2, isa=isa, kv_cache=kv_cache)
    tokens = tokens_for(engine, 2, 1060)
    whole = feed(engine, tokens, [1060])  # three spans of attention.h
    for threads in (1, 2, 7):
        engine = CPUEngine.from_run(tmp_path, threads=threads, isa=isa, kv_cache=kv_cache)
        lengths = [500, *[1] * 30, 490, *[1] * 40]  # by one and by many over the ends of two spans
        assert np.array_equal(feed(engine, tokens, lengths), whole)
        assert np.array_equal(feed(engine, tokens[:1], [1040, *[1] * 20])[0], whole[0])


def test_attention_over_spans_is_torchs(isa, tmp_path):
    make_run(tmp_path, GPT, **SHAPES["grouped"], block_size=1100)
    engine = CPUEngine.from_run(tmp_path, head="bf16", threads=2, isa=isa)
    torchs = TorchEngine.from_run(tmp_path, device="cpu")
    tokens = tokens_for(engine, 2, 1060)
    expected = feed(torchs, tokens, [1060])
    assert np.abs(feed(engine, tokens, [1060]) - expected).max() < 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_of_bf16_rounds_keys_and_values_and_nothing_else(isa, shape, tmp_path, monkeypatch):
    make_run(tmp_path, GPT, **SHAPES[shape])
    torchs = TorchEngine.from_run(tmp_path, device="cpu")
    tokens = tokens_for(torchs, 2, 60)
    found = feed(CPUEngine.from_run(tmp_path, head="bf16", isa=isa, kv_cache="bf16"), tokens, [60])
    exact, attention = feed(torchs, tokens, [60]), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **how: attention(
        q, k.bfloat16().float(), v.bfloat16().float(), **how))
    rounded = feed(torchs, tokens, [60])  # where the last bit differs, a number here and there is rounded the other way
    assert np.abs(found - rounded).max() < 0.05 * np.abs(found - exact).max()


@pytest.mark.parametrize(("head", "limit"), [("q8", 5e-3), ("q6", 2e-2)])
def test_smaller_heads_change_little(run, head, limit):
    tokens = tokens_for(CPUEngine.from_run(run), 4, 40)
    logits = feed(TorchEngine.from_run(run, device="cpu"), tokens, [40])
    assert kl(logits, feed(CPUEngine.from_run(run, head=head), tokens, [40])) < limit * logits.var()


def test_long_prompt_and_full_context(tmp_path):
    make_run(tmp_path, n_layer=1, block_size=1100, n_embd=32, n_head=2)
    engine = CPUEngine.from_run(tmp_path, threads=2)
    tokens = tokens_for(engine, 1, 1100)
    whole = feed(engine, tokens, [1100])  # longer than one chunk of cpu.c
    assert np.array_equal(feed(engine, tokens, [600, 499, 1]), whole)
    wide = np.repeat(tokens[:, :20], 600, axis=0)  # more sequences than a chunk has tokens
    assert np.array_equal(feed(engine, wide, [20])[599], feed(engine, tokens[:, :20], [20])[0])


def test_one_engine_for_more_sequences_than_before(isa, run):
    engine = CPUEngine.from_run(run, threads=2, isa=isa)  # its head has two rows of activations a sequence
    tokens = tokens_for(engine, 60, 2)
    first, many = feed(engine, np.resize(tokens, (1, 64)), [64]), feed(engine, tokens, [1, 1])
    assert np.array_equal(feed(CPUEngine.from_run(run, threads=2, isa=isa), tokens, [1, 1]), many)
    assert np.array_equal(feed(engine, np.resize(tokens, (1, 64)), [64]), first)


def test_generates_through_the_shared_sampler(run):
    engine = CPUEngine.from_run(run)
    greedy = [ids.copy() for ids in engine.generate([1, 2, 3], num_samples=3, max_new_tokens=130, temperature=0)]
    assert len(greedy) == 130 and all((ids == ids[0]).all() for ids in greedy)  # over the context's end, too


def test_threads_that_have_gone_to_sleep_wake_up(isa, run):
    engine = CPUEngine.from_run(run, threads=2, isa=isa)
    tokens = tokens_for(engine, 1, 5)
    engine.reset(1)
    found = []
    for t in range(tokens.shape[1]):
        time.sleep(0.02)
        found.append(engine.forward(tokens[:, t:t + 1]))
    assert np.array_equal(found[-1], feed(engine, tokens, [1] * 5))


def test_a_token_outside_the_vocabulary_is_refused(run):
    engine = CPUEngine.from_run(run)
    for token in (-1, engine.config.vocab_size, 2**32 + 1):
        with pytest.raises(ValueError, match="vocabulary"):
            engine.forward(np.array([[0, token]]))
    assert engine.length == 0
    one = np.array([[0, 1]])
    for targets in (np.array([[1, -1]]), np.array([[1, engine.config.vocab_size]]), np.array([[1]])):
        engine.reset(1)
        with pytest.raises(ValueError, match="targets"):
            engine.nats(one, targets)


# ---------------------------------------------------------------------------------------------------- packing
def test_packs_the_trits_the_model_was_trained_with(tmp_path):
    config = make_run(tmp_path)
    model = BitGPT(config)
    tensors, _ = checkpoint.load(tmp_path / "best.safetensors")
    checkpoint.load_into(model, tensors, "test")
    for weights in ("trit2", "trit1.6"):
        path, _ = pack_run(tmp_path, weights=weights)
        packed, metadata = open_safetensors(path)
        assert metadata["weights"] == weights
        for name, trits in model.trits().items():
            assert np.array_equal(unpack(weights, packed[name], *trits.shape), trits.numpy())
            scale = packed[packed_file.scale_of(name)]
            assert scale.shape == () and scale == model.get_parameter(name).abs().mean().item()


def test_packs_again_when_the_checkpoint_has_changed(tmp_path, capsys):
    make_run(tmp_path)
    path, _ = pack_run(tmp_path)
    assert "packing" in capsys.readouterr().err
    first = path.read_bytes()
    pack_run(tmp_path)
    assert capsys.readouterr().err == ""
    make_run(tmp_path, seed=1)
    pack_run(tmp_path)
    assert "packing" in capsys.readouterr().err and path.read_bytes() != first
    (tmp_path / "best.safetensors").unlink()  # the packed file is all that is needed
    pack_run(tmp_path)
    assert capsys.readouterr().err == ""


def test_checkpoints_of_another_shape_are_refused(tmp_path):
    make_run(tmp_path)
    config = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=100, vocab_size=101).resolved()
    write_config(tmp_path, "bitgpt", config, dataclasses.asdict(TrainConfig()))
    with pytest.raises(UserError, match="wte.weight is"):
        CPUEngine.from_run(tmp_path)
    assert not list(tmp_path.glob("model.*")) and not list(tmp_path.glob(".*.tmp"))


def test_a_packed_run_needs_no_torch(tmp_path):
    make_run(tmp_path)
    pack_run(tmp_path)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"import numpy as np\nfrom engine.cpu import CPUEngine\n"
            f"e = CPUEngine.from_run({str(tmp_path)!r})\nprint(e.isa, e.forward(np.array([[1, 2, 3]])).shape)\n"
            f"assert 'torch' not in sys.modules and 'safetensors' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [best_isa(), "(1,", "101)"], done.stderr


# ---------------------------------------------------------------------------------------------------- building
def test_without_a_compiler_there_is_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.NoKernel, match="no C compiler"):
        build.compile_kernels(SOURCE)


def test_a_compiler_that_is_no_command_is_named(monkeypatch):
    for command, problem in (("gcc '-O2", "No closing quotation"), ("icc -O2", "no such command")):
        monkeypatch.setenv("CC", command)
        with pytest.raises(build.NoKernel, match=problem):
            build.compile_kernels(SOURCE)


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path, capsys):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cpu.c: error: unknown CPU' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.NoKernel, match="unknown CPU"):
        build.compile_kernels(SOURCE)
    assert not list((tmp_path / "cache" / "bitgpt").iterdir())


def test_two_may_compile_at_once(monkeypatch, tmp_path):
    slow = tmp_path / "cc"  # the compiler is copied, not run: what is tested is who writes which file when
    real = build.compile_kernels(SOURCE)
    slow.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\nsleep 0.2\n"
                    f"while [ \"$1\" != -o ]; do shift; done\ncp {real} \"$2\"\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from engine.cpu import SOURCE, compile_kernels; "
            "print(compile_kernels(SOURCE))")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = [process.communicate()[0].strip() for process in processes]
    assert paths[0] == paths[1] and [Path(paths[0])] == list((tmp_path / "cache" / "bitgpt").iterdir())
    ctypes.CDLL(paths[0])


def test_engines_in_two_threads(run):
    engines = [CPUEngine.from_run(run, threads=2) for _ in range(2)]
    tokens = tokens_for(engines[0], 1, 50)
    expected, found = feed(engines[0], tokens, [50]), [None, None]

    def work(i):
        for _ in range(3):
            found[i] = feed(engines[i], tokens, [20] + [1] * 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[0], expected) and np.array_equal(found[1], expected)


# ---------------------------------------------------------------------------------------------------- sanitizers
SANITIZED = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from core.config import ModelConfig
from engine.cpu import CPUEngine, library
from kernels.format import KINDS, pack
from engine.packed_file import Packed, entries, scale_of, stored
rng = np.random.default_rng(0)
lib = library({isa!r}, True)
print(lib.bitgpt_isa().decode())
for kind in KINDS:
    for n, k, m in ((1, 1, 1), (17, 33, 2), (33, 1301, 1), (20, 100, 31)):
        w = rng.integers(-KINDS[kind].largest, KINDS[kind].largest + 1, (n, k)).astype(np.int8)
        packed = pack(kind, w if kind != "bf16" else w.astype(np.float32)).copy()
        x, acc = rng.integers(-128, 128, (m, k)).astype(np.int8), np.empty((m, n), np.int32)
        xf, y = x.astype(np.float32), np.empty((m, n), np.float32)
        if kind != "bf16":
            assert not lib.bitgpt_product(KINDS[kind].number, n, k, packed.ctypes.data, None, m, x.ctypes.data,
                                          acc.ctypes.data, None, None)
            assert np.array_equal(acc, x.astype(np.int32) @ w.T.astype(np.int32))
        assert not lib.bitgpt_product(KINDS[kind].number, n, k, packed.ctypes.data, None, m, None, None,
                                      xf.ctypes.data, y.ctypes.data)
for i, (weights, head) in enumerate((("trit2", "q8"), ("trit1.6", "q6"), ("bf16", "bf16"))):
    shape = (dict(n_head=2, n_embd=20, n_ff=30), dict(n_head=4, n_kv_head=2, n_embd=64, tie_embeddings=False),
             dict(n_head=2, n_embd=32, qk_norm=True, sub_norm=False, act="relu2"))[i]
    config = ModelConfig(n_layer=2, block_size=530, vocab_size=37, **shape).resolved()
    tensors = {{}}
    for entry in entries(config, weights, head):
        for name, (dtype, size) in stored(entry).items():
            if dtype == "U8":
                w = rng.integers(-1, 2, entry.shape).astype(np.int8)
                tensors[name] = pack(entry.kind, w if entry.kind != "bf16" else w.astype(np.float32)).copy()
            else:
                tensors[name] = np.full(size, 0.1, np.float32)
    for threads in (1, 3):
        kv_cache = "fp32" if threads == 1 else "bf16"
        engine = CPUEngine(Packed(config, weights, head, tensors, {{}}), threads, {isa!r}, True, kv_cache)
        tokens = rng.integers(0, 37, (100, 530))
        for batch, prompt, end in ((1, 19, 70), (100, 1, 3), (3, 500, 530)):  # 100: more rows, not more tokens
            engine.reset(batch)
            engine.forward(tokens[:batch, :prompt])
            for t in range(prompt, end):
                logits = engine.forward(tokens[:batch, t:t + 1])
            engine.reset(batch)
            some = tokens[:batch, :end]
            assert np.isfinite(logits).all() and np.isfinite(engine.nats(some, some)).all()
        del engine
print("clean")
"""


@pytest.mark.parametrize("isa", RUNS)
def test_clean_under_sanitizers(isa):
    assert sanitized(SANITIZED.format(root=str(ROOT), isa=isa)) == [RUNS[isa], "clean"]


def test_kernels_of_another_cpu_or_compiler_are_others(monkeypatch, tmp_path):
    version, header, cc = tmp_path / "version", tmp_path / "kernels" / "some.h", tmp_path / "cc"
    header.parent.mkdir()
    version.write_text("1"), header.write_text("1")
    cc.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && exec cat {version}\n"
                  "while [ \"$1\" != -o ]; do shift; done\n: > \"$2\"\n")
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "KERNELS", header.parent)
    paths = [build.compile_kernels(SOURCE)]
    version.write_text("2")
    paths.append(build.compile_kernels(SOURCE))
    monkeypatch.setattr(build, "cpu_flags", lambda: "another CPU")
    paths.append(build.compile_kernels(SOURCE))
    header.write_text("2")
    paths.append(build.compile_kernels(SOURCE))
    assert len(set(paths)) == 4 and build.compile_kernels(SOURCE) == paths[-1]


def test_each_byte_that_is_no_code_is_seen_alone(isa):
    for kind, bad in (("trit2", [b for b in range(256) if any(b >> s & 3 == 3 for s in (0, 2, 4, 6))]),
                      ("trit1.6", range(243, 256))):
        for value in bad:
            packed = np.zeros(8192, np.uint8)
            packed[5000] = value
            assert library(isa).bitgpt_count_invalid(KINDS[kind].number, address(packed), packed.size) == 1


def test_tokens_of_next_to_nothing(isa):
    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (20, 64)).astype(np.int8)
    x = (rng.standard_normal((3, 64)) * [[0], [1e-6], [1e-4]]).astype(np.float32)
    y = floats(isa, "trit2", pack("trit2", w).copy(), np.full(20, 0.5, np.float32), 20, 64, x)
    x_i8, x_scale = quantize_activations(torch.from_numpy(x))
    assert np.array_equal(y, reference(w, x_i8.numpy()).astype(np.float32) * x_scale.numpy() * np.float32(0.5))
