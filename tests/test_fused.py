"""gpt/fused.py: the kernels of a training step against plain torch. Integers bit for bit, fp32 within what another
order of additions makes, bf16 within its rounding."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Call, sanitized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitgpt.bitlinear import int_mm, quantize_activations
from bitgpt.model import BitGPT
from bitgpt.quantizers import quantize_weight
from core.config import ModelConfig
from gpt import fused
from gpt.model import GPT, rotary_tables, rotate
from kernels import build

SHAPE: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=128, n_ff=176, block_size=320, vocab_size=65)
VARIANTS = [{}, {"n_kv_head": 2, "act": "relu2"}, {"sub_norm": False, "tie_embeddings": False, "n_kv_head": 1},
            {"n_head": 2, "block_size": 48}]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """All tests here share the work, as training does."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of(model_class: type[GPT], **changes: Any) -> GPT:
    """A model whose weights are far from what they start with."""
    torch.manual_seed(0)
    model = model_class(ModelConfig(**SHAPE | changes).resolved())
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1, 0.2) if weight.dim() == 1 else weight.mul_(4)
    return model


def step(model: GPT, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    tokens = torch.randint(65, (2, 3, model.config.block_size), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, loss = model(tokens[0], tokens[1])
    assert logits is None and loss is not None
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def plainly(model: GPT, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[float, dict[str, Tensor]]:
    with monkeypatch.context() as patch:
        patch.setattr(fused, "fits", lambda *_: False)
        return step(model, **how)


def largest_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return max(float((ours[name] - grad).norm() / grad.norm()) for name, grad in reference.items())


def test_the_kernels_are_compiled_here() -> None:
    assert fused.library() is not None  # where there is a compiler, falling back would be a failure


def other_library(isa: str) -> ctypes.CDLL:
    """The kernels for less than this CPU has. "avx512": without AMX."""
    needs = {"avx512": ("avx512_vnni", "amx_int8"), "cascadelake": ("avx512_vnni",), "avxvnni": ("avx_vnni",),
             "avx2": ("avx2",)}.get(isa, ())
    if not all(need in build.cpu_flags() for need in needs):
        pytest.skip(f"this CPU has no {' or '.join(needs)} to run or to leave out")
    return fused.prepared(ctypes.CDLL(str(build.compile_kernels(fused.SOURCE, isa, openmp=True))))


@pytest.fixture(params=["native", "avx512", "cascadelake", "avxvnni", "avx2", "scalar"])
def each_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "native":
        lib = other_library(request.param)
        monkeypatch.setattr(fused, "library", lambda: lib)


def check_step(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    ternary = isinstance(model, BitGPT)
    reference, reference_grads = plainly(model, monkeypatch)
    loss, grads = step(model)
    # an activation on the edge between two integers falls on the other side with the noise of another order of sums
    assert loss == pytest.approx(reference, rel=1e-4 if ternary else 1e-6)
    assert largest_error(grads, reference_grads) < (0.01 if ternary else 5e-6)
    loss, grads = step(model, torch.bfloat16)
    assert loss == pytest.approx(reference, rel=2e-3 if ternary else 1e-3)
    assert largest_error(grads, reference_grads) < (0.1 if ternary else 0.04)


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
@pytest.mark.parametrize("changes", VARIANTS)
def test_a_step_equals_plain_torch(model_class: type[GPT], changes: dict[str, Any],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(model_of(model_class, **changes), monkeypatch)


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_threads_change_no_more_than_the_order_of_a_sum(model_class: type[GPT]) -> None:
    model = model_of(model_class, n_kv_head=2)
    loss, grads = step(model)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        other, first = step(model)
        again, second = step(model)
        assert loss == other == again and all(torch.equal(first[name], second[name]) for name in grads)
        assert largest_error(first, grads) < 1e-6


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_a_step_on_other_cpus(model_class: type[GPT], each_isa: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(model_of(model_class, n_kv_head=2, block_size=80), monkeypatch)


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_what_was_never_written_counts_for_nothing(model_class: type[GPT], each_isa: None,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory full of NaN, and logits of a few tokens at a time, no multiple of what is summed at once."""
    for tokens in (16, 48, 80):
        monkeypatch.setattr(fused, "LOGITS", tokens * SHAPE["vocab_size"])
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
        try:
            check_step(model_of(model_class, block_size=48), monkeypatch)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("share", "changes"), [
    (0.5, {}), (0.5, {"weight_quant": "int2", "scale": "row"}),
    (1.0, {"weight_quant": "sign", "activation_quant": "none"})])
def test_weights_that_meet_floats_are_numbers_like_others(share: float, changes: dict[str, Any],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(BitGPT, **changes)
    model.quantize(share)
    assert model.fits_kernels()
    (loss, grads), (reference, reference_grads) = step(model), plainly(model, monkeypatch)
    assert loss == pytest.approx(reference, rel=1e-6) and largest_error(grads, reference_grads) < 5e-6
    model.quantize(0.0)
    assert loss != pytest.approx(step(model)[0], rel=1e-5)


@pytest.mark.parametrize(("model_class", "error"), [(GPT, 1e-6), (BitGPT, 0.02)])
@torch.no_grad()
def test_logits_equal_plain_torch(model_class: type[GPT], error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(model_class), torch.randint(65, (3, 320), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, all_logits=True)[0]
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    reference = model(tokens, all_logits=True)[0]
    assert not torch.equal(logits, reference) and (logits - reference).norm() < error * reference.norm()


def rows_of_int8(M: int, K: int) -> Tensor:
    """Memory for rows that go into a product (values.h), and some more that it may read."""
    return torch.zeros(M + 32, (-(-K // 64) | 1) * 64, dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(M=st.integers(1, 80), panels=st.integers(1, 5), lines=st.integers(1, 12), seed=st.integers(0, 2**31),
       extreme=st.booleans())
@example(M=33, panels=3, lines=21, seed=0, extreme=True)
@example(M=1, panels=1, lines=432, seed=1, extreme=True)  # K = 6912
def check_product(M: int, panels: int, lines: int, seed: int, extreme: bool) -> None:
    N, K, random = 16 * panels, 16 * lines, torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=random) * (seed % 7 > 0)  # some all zero
    x_i8 = rows_of_int8(M, K)
    x_i8[:M, :K] = torch.randint(-128, 128, (M, K), generator=random)
    if extreme:
        x_i8[:M, :K] = torch.where(x_i8[:M, :K] < 0, -128, 127)
        weight = torch.ones(N, K)
    parts = (weight[:16], weight[16:]) if panels > 1 else (weight,)
    packed = fused.PackedWeights((parts,), torch.float32, ternary=True)
    means = [part.double().abs().mean().clamp(min=1e-5).item() for part in parts]
    assert packed.scales == pytest.approx(means, rel=3e-7)
    w_trit = torch.cat([(part * (1 / scale)).round().clamp(-1, 1).to(torch.int8)
                        for part, scale in zip(parts, torch.tensor(packed.scales), strict=True)])
    w_scale = torch.cat([torch.full((len(part),), scale) for part, scale in zip(parts, packed.scales, strict=True)])
    found, sums = torch.empty(M, N), x_i8[:M, :K].sum(1, dtype=torch.int32)
    fused.call("multiply", M, N, K, *map(fused.address, (x_i8, sums, packed.memory, found)))
    # sums below 2^24: exact in fp32
    assert torch.equal(found, int_mm(x_i8[:M, :K].contiguous(), w_trit).float() * w_scale)


def test_the_ternary_product_is_exact(each_isa: None) -> None:
    check_product()


def test_activations_are_quantized_as_everywhere(each_isa: None) -> None:
    torch.manual_seed(3)
    x = torch.randn(50, 112) * torch.logspace(-8, 4, 50).unsqueeze(1)
    out, scale, sums = rows_of_int8(50, 112), torch.empty(50), torch.empty(50, dtype=torch.int32)
    fused.call("quantize", 50, 112, *map(fused.address, (x, out, scale, sums)))
    x_i8, x_scale = quantize_activations(x)
    assert torch.equal(out[:50, :112], x_i8) and torch.equal(scale, x_scale[:, 0])
    assert not out[:50, 112:128].any()


sides = st.integers(1, 14).map(lambda n: 16 * n)


@settings(max_examples=15, deadline=None)
@given(shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3), seed=st.integers(0, 2**31))
@example(shapes=[(240, 496), (496, 240), (480, 480)], seed=0)  # more rows than go through a product at a time
def check_muon(shapes: list[tuple[int, int]], seed: int) -> None:
    """Against the same in fp64: five steps make 480 times of a small singular value, and of its rounding."""
    random, momentum, rate, decay = torch.Generator().manual_seed(seed), 0.9, 0.02, 0.1
    start, grads, momenta = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(3))
    grads[0] *= seed % 5 > 0
    momenta[0] *= seed % 5 > 0
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        moved, kept = [w.clone() for w in start], [m.clone() for m in momenta]
        fused.muon(moved, grads, kept, dtype, momentum, rate, decay)
        again, kept_again = [w.clone() for w in start], [m.clone() for m in momenta]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        fused.muon(again, grads, kept_again, dtype, momentum, rate, decay)
        torch.set_num_threads(threads)
        for w, g, m, w_moved, m_kept, twice in zip(start, grads, momenta, moved, kept, again, strict=True):
            m_now = m.double() + (1 - momentum) * (g - m).double()
            x = g.double() + momentum * (m_now - g)
            x = (x if len(x) <= x.shape[1] else x.t()) / x.norm().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.t()
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            N, K = w.shape
            step = rate * max(1, N / K) ** 0.5 * (x if N <= K else x.t())
            assert torch.allclose(m_kept.double(), m_now, atol=1e-6)
            assert (w_moved - (1 - rate * decay) * w.double() + step).norm() <= error * step.norm() + 1e-6 * w.norm()
            assert torch.equal(w_moved, twice)


def test_muon_orthogonalizes(each_isa: None) -> None:
    check_muon()


SANITIZED = """
import ctypes, sys
sys.path.insert(0, {root!r})
import torch
from bitgpt.model import BitGPT
from core.config import ModelConfig
from kernels import build
from gpt import fused
from gpt.model import GPT
torch.set_num_threads(2)
lib = fused.prepared(ctypes.CDLL(str(build.compile_kernels(fused.SOURCE, sanitize=True, openmp=True))))
assert lib.fused_ready()
fused.library = lambda: lib
shapes = (dict(n_head=4, n_kv_head=2, n_ff=176), dict(n_head=2, n_ff=80, tie_embeddings=False, act="relu2"),
          dict(n_head=2, n_ff=64, sub_norm=False, dropout=0.2))
for model_class in (GPT, BitGPT):
    for dtype in (torch.float32, torch.bfloat16):
        for i, shape in enumerate(shapes):
            fused.LOGITS = (2**27, 40 * 37)[i % 2]  # all at once, or a few tokens at a time
            config = ModelConfig(n_layer=1, n_embd=128, block_size=48, vocab_size=37, **shape).resolved()
            model = model_class(config)
            for batch, length in ((1, 16), (5, 48)):
                x = torch.randint(37, (2, batch, length))
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = model(x[0], x[1])[1]
                    loss.backward()
                    with torch.no_grad():
                        model(x[0], x[1])
                assert torch.isfinite(loss)
            matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
            fused.muon([weight.data for weight in matrices], [weight.grad for weight in matrices],
                       [torch.zeros_like(weight) for weight in matrices], dtype, 0.9, 0.01, 0.1)
print("clean")
"""


def test_clean_under_sanitizers() -> None:
    """What torch allocates is watched as well: every piece that the kernels are given ends where they may not go on."""
    assert sanitized(SANITIZED.format(root=str(ROOT))) == ["clean"]


def test_gradients_are_the_straight_through_estimator_s() -> None:
    """Of a ternary block in fp32, against the same in fp64. Only without an activation on the edge between two integers
    is that the same function: the seed has none."""
    torch.manual_seed(2)
    B, T, C, H, G = 2, 16, 64, 2, 1
    model = BitGPT(ModelConfig(n_layer=1, n_head=H, n_kv_head=G, n_embd=C, n_ff=48, block_size=T,
                               vocab_size=65).resolved())
    block, (cos, sin) = model.blocks[0], rotary_tables(0, T, C // H, 1e4, torch.device("cpu"))
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(1, 0.3) if weight.dim() == 1 else weight.normal_()
    x, g = torch.randn(B, T, C, requires_grad=True), torch.randn(B, T, C)
    leaves = {"x": x, **dict(block.named_parameters())}
    ours = torch.autograd.grad((block(x, cos, sin, None, True) * g).sum(), list(leaves.values()))

    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}

    def layer(rows: Tensor, norm: str, *names: str) -> list[Tensor]:
        n = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + model.config.norm_eps) * double[norm + ".weight"]
        scale = n.detach().abs().amax(-1, keepdim=True) / 127
        n = n + ((n / scale).round() * scale - n).detach()
        weights = [double[name + ".weight"] for name in names]
        codes = [quantize_weight(weight.float()) for weight in weights]
        quantized = [w_trit.double() * w_scale.double() for w_trit, w_scale in codes]
        return [n @ (w + (q - w).detach()).t() for w, q in zip(weights, quantized, strict=True)]

    def heads(y: Tensor, n: int) -> Tensor:
        return y.view(B, T, n, C // H).transpose(1, 2)

    q, k, v = layer(double["x"], "attn_norm", *(f"attn.{one}_proj" for one in "qkv"))
    q, k = (rotate(heads(y, n), cos.double(), sin.double()) for y, n in ((q, H), (k, G)))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, heads(v, G), is_causal=True, enable_gqa=True)
    middle = double["x"] + layer(y.transpose(1, 2).reshape(B, T, C), "attn.sub_norm", "attn.o_proj")[0]
    gate, up = layer(middle, "mlp_norm", "mlp.gate_proj", "mlp.up_proj")
    out = middle + layer(torch.nn.functional.silu(gate) * up, "mlp.sub_norm", "mlp.down_proj")[0]
    reference = torch.autograd.grad((out * g).sum(), list(double.values()))
    assert largest_error(dict(zip(leaves, ours, strict=True)), dict(zip(leaves, reference, strict=True))) < 1e-5


def test_an_evaluation_does_no_work_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = model_of(GPT), list[Any]()
    call = fused.call
    monkeypatch.setattr(fused, "call", lambda name, *what: (steps.append(what[0]) if "forward" in name else None,
                                                            call(name, *what)))
    tokens = torch.randint(65, (2, 3, 320), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model(tokens[0], tokens[1])[1]
    *blocks, head = steps
    assert len(blocks) == 2 and not head.weight and not head.grad_head
    evaluated = [(block.needed, sum(block.saved_bytes)) for block in blocks]
    assert model(tokens[0], tokens[1])[1].item() == loss.item() and steps[-1].grad_head
    assert all(block.needed and not needed and sum(block.saved_bytes) > 1.3 * less
               for block, (needed, less) in zip(steps[3:5], evaluated, strict=True))


def test_backward_remembers_less_of_the_ternary_twin() -> None:
    def remembered(model_class: type[GPT]) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        model = model_of(model_class)
        tokens = torch.zeros(4, 320, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            _, loss = model(tokens, tokens)
        return sum(kept.values()) if loss is not None else 0

    assert remembered(BitGPT) < 0.95 * remembered(GPT)


def test_weights_are_quantized_once_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of(BitGPT), []

    class Counting(fused.PackedWeights):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            made.append(1)
            super().__init__(*arguments, **how)

    monkeypatch.setattr("bitgpt.bitlinear.PackedWeights", Counting)
    with fused.cached_weights():
        first, again = step(model)[0], step(model)[0]
        assert first == again and len(made) == SHAPE["n_layer"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1)
    assert step(model)[0] != first


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_checkpointing_changes_nothing_but_memory(model_class: type[GPT]) -> None:
    model = model_of(model_class)
    loss, grads = step(model)
    model.checkpointing = True
    again, grads_again = step(model)
    assert loss == again and all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_dropout(model_class: type[GPT]) -> None:
    model = model_of(model_class, dropout=0.3)
    torch.manual_seed(5)
    loss, grads = step(model)
    torch.manual_seed(5)
    again, grads_again = step(model)
    assert loss == again != step(model)[0] and all(torch.equal(grads[name], grads_again[name]) for name in grads)
    model.checkpointing = True
    torch.manual_seed(5)
    assert step(model)[0] == loss
    model.eval()
    assert step(model)[0] == pytest.approx(step(model_of(model_class))[0], rel=1e-6)


@torch.no_grad()
def test_what_is_dropped() -> None:
    model = model_of(GPT, dropout=0.25, n_layer=1, n_head=1, n_embd=64, n_ff=64)
    (block,), (cos, sin) = model.blocks, rotary_tables(0, 320, 64, 1e4, torch.device("cpu"))
    x = torch.randn(2, 320, 64)

    def update(training: bool) -> Tensor:
        """What the block adds."""
        return block.train(training)(x, cos, sin, None, True) - x

    block.attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.copy_(torch.eye(64))
    dropped, kept = update(True), update(True) != 0
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)  # 4 deviations: 0.009
    assert (kept == (dropped != 0)).float().mean() == pytest.approx(0.625, abs=0.02)  # another seed, another choice
    at = dropped != 0
    assert torch.allclose(dropped[at], update(False)[at] / 0.75, atol=1e-5)
    # Probabilities and what comes of them are dropped, and on average nothing is.
    block.mlp.down_proj.weight.zero_()
    block.attn.o_proj.weight.copy_(torch.eye(64))
    block.attn.sub_norm = None
    plain, mean = update(False), sum(update(True) for _ in range(100)) / 100
    assert 0.05 < (mean - plain).norm() / plain.norm() < 0.15


def test_gradients_with_dropout_are_those_of_what_was_computed() -> None:
    """By small differences, with one and the same seed."""
    model = model_of(GPT, dropout=0.3, n_layer=1, block_size=32).train()
    torch.manual_seed(5)
    grads, random = step(model)[1], torch.Generator().manual_seed(6)
    direction = {name: torch.randn(grad.shape, generator=random) * grad.norm() for name, grad in grads.items()}
    for name in ("blocks.0.attn.q_proj.weight", "blocks.0.attn.v_proj.weight", "blocks.0.mlp.up_proj.weight",
                 "wte.weight"):
        losses, weight = [], model.get_parameter(name)
        for sign in (1, -1):
            weight.data.add_(direction[name], alpha=sign * 1e-3)
            torch.manual_seed(5)
            losses.append(step(model)[0])
            weight.data.sub_(direction[name], alpha=sign * 1e-3)
        along = float((grads[name] * direction[name]).sum())
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(along, rel=0.05)


def test_what_the_kernels_cannot_do_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 32, dtype=torch.long)
    fine = ModelConfig(**SHAPE).resolved()
    assert fused.fits(fine, tokens)
    for changes in ({"n_ff": 100}, {"n_embd": 72, "n_head": 3}):
        assert not fused.fits(ModelConfig(**SHAPE | changes).resolved(), tokens)
    assert model_of(BitGPT).fits_kernels()
    for changes in ({"qk_norm": True}, {"norm": "inner"}, {"weight_quant": "sign"}, {"scale": "row"}):
        assert not model_of(BitGPT, **changes).fits_kernels()
    assert not fused.fits(fine, tokens[:, :30])
    monkeypatch.setattr(fused, "compile_kernels", lambda *_, **__: (_ for _ in ()).throw(build.NoKernel("no compiler")))
    fused.library.cache_clear()
    try:
        assert not fused.fits(fine, tokens) and torch.isfinite(torch.tensor(step(model_of(BitGPT))[0]))
    finally:
        fused.library.cache_clear()


def test_slower_training_is_told(corpus: Path, tmp_path: Path, call: Call) -> None:
    flags = [*TINY, "--dataset", corpus, "--max-iters", "1", "--verbose", "1"]
    for twin, changes, told in (("gpt", ["--n-head", "1"], False), ("gpt", ["--n-head", "2"], True),
                                ("bitgpt", ["--n-head", "1", "--activation-quant", "int4"], True)):
        result = call(f"{twin}/train", *flags, *changes, "--out-dir", tmp_path / f"{twin}{told}")
        assert result.code == 0 and ("training in plain PyTorch" in result.err) == told


def test_the_kernels_use_torch_s_threads() -> None:
    """Linked against no libgomp of their own: two sets of spinning threads would fight for the cores."""
    library = build.compile_kernels(fused.SOURCE, openmp=True)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert "NEEDED" in needed and "gomp" not in needed


@torch.no_grad()
def test_heads_and_layers_drop_each_for_itself() -> None:
    model = model_of(GPT, dropout=0.25, n_layer=1, n_head=2, n_kv_head=1, n_embd=64, n_ff=64)
    (block,), (cos, sin) = model.blocks, rotary_tables(0, 320, 32, 1e4, torch.device("cpu"))
    block.attn.q_proj.weight[32:] = block.attn.q_proj.weight[:32]  # both heads ask for the same
    block.attn.sub_norm = None
    x = torch.randn(2, 320, 64)

    def update(attention: float, mlp: float) -> Tensor:
        block.attn.o_proj.weight.copy_(attention * torch.eye(64))
        block.mlp.down_proj.weight.copy_(mlp * torch.eye(64))
        torch.manual_seed(5)
        return block.train()(x, cos, sin, None, True) - x

    attention, mlp = update(1, 0), update(0, 1)
    assert ((attention == 0) == (mlp == 0)).float().mean() == pytest.approx(0.625, abs=0.02)
    one, other = attention.split(32, dim=-1)
    kept = (one != 0) & (other != 0)
    assert torch.isclose(one[kept], other[kept], rtol=1e-3).float().mean() < 0.1


def test_no_loss_without_a_target_or_with_a_logit_that_is_none() -> None:
    model, tokens = model_of(GPT), torch.zeros(1, 320, dtype=torch.long)
    for target in (-1, 65):
        targets = tokens.clone()
        targets[0, 7] = target
        assert model(tokens, targets)[1].isnan()
    model.wte.weight.data[64] = torch.nan  # a token that is in no text
    assert model(tokens, tokens)[1].isnan()


def test_weights_that_are_held_are_held_by_dtype() -> None:
    model = model_of(GPT)
    apart = [step(model, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    with fused.cached_weights():
        assert [step(model, dtype)[0] for dtype in (torch.float32, torch.bfloat16)] == apart
