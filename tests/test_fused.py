"""gpt/fused.py: the kernels of a training step against plain torch. Integers bit for bit, fp32 within what another
order of additions makes, bf16 within its rounding."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bench
import bench_train
from bitgpt.bitlinear import BitLinear, TernaryOperand, int_mm, quantize_activations, quantize_weight
from bitgpt.model import BitGPT
from core.config import ModelConfig
from engine import build
from gpt import fused
from gpt.fused import SIGNATURES, Stage, Values
from gpt.model import GPT, RMSNorm

SHAPE: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=128, n_ff=176, block_size=320, vocab_size=65)
VARIANTS = [{}, {"n_kv_head": 2, "act": "relu2"}, {"sub_norm": False, "tie_embeddings": False, "n_kv_head": 1}]


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


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_step_of_the_full_precision_twin_equals_plain_torch(changes: dict[str, Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(GPT, **changes)
    loss, grads = step(model)
    reference, reference_grads = plainly(model, monkeypatch)
    assert loss == pytest.approx(reference, rel=1e-6) and largest_error(grads, reference_grads) < 5e-6
    loss, grads = step(model, torch.bfloat16)
    assert loss == pytest.approx(reference, rel=1e-3) and largest_error(grads, reference_grads) < 0.04


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_step_of_the_ternary_twin_equals_plain_torch(changes: dict[str, Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(BitGPT, **changes)
    loss, grads = step(model)
    reference, reference_grads = plainly(model, monkeypatch)
    # an activation on the edge between two integers falls on the other side with the noise of another order of sums
    assert loss == pytest.approx(reference, rel=1e-4) and largest_error(grads, reference_grads) < 0.01
    loss, grads = step(model, torch.bfloat16)
    assert loss == pytest.approx(reference, rel=2e-3) and largest_error(grads, reference_grads) < 0.1


def other_library(name: str) -> ctypes.CDLL | None:
    """The kernels for AVX-512 without AMX, where this CPU has the one and the other."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_vnni" not in flags or "amx_int8" not in flags:
        return None
    lib = ctypes.CDLL(str(build.compile_kernels("fused", name)))
    for function, letters in SIGNATURES.items():
        getattr(lib, f"fused_{function}").argtypes = [fused.LETTERS[letter] for letter in letters]
    assert lib.fused_has_product()
    return lib


@pytest.fixture(params=["native", "avx512"])
def each_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "avx512" and (lib := other_library("avx512")) is not None:
        monkeypatch.setattr(fused, "library", lambda: lib)


@settings(max_examples=60, deadline=None)
@given(M=st.integers(1, 80), panels=st.integers(1, 5), lines=st.integers(1, 12), seed=st.integers(0, 2**31),
       extreme=st.booleans())
@example(M=33, panels=3, lines=21, seed=0, extreme=True)
@example(M=1, panels=1, lines=432, seed=1, extreme=True)  # K = 6912
def check_product(M: int, panels: int, lines: int, seed: int, extreme: bool) -> None:
    N, K, random = 16 * panels, 16 * lines, torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=random) * (seed % 7 > 0)  # some all zero
    x_i8 = torch.zeros(M + 31, -(-K // 64) * 64, dtype=torch.int8)
    x_i8[:M, :K] = torch.randint(-128, 128, (M, K), generator=random)
    if extreme:
        x_i8[:M, :K] = torch.where(x_i8[:M, :K] < 0, -128, 127)
        weight = torch.ones(N, K)
    operand = TernaryOperand((weight[:16], weight[16:]) if panels > 1 else (weight,), torch.float32)
    w_trit = torch.cat([quantize_weight(part)[0] for part in (weight[:16], weight[16:]) if len(part)])
    assert torch.equal(operand.matrix(), w_trit.float())
    operand.columns.fill_(1)
    expected = int_mm(x_i8[:M, :K].contiguous(), w_trit)
    assert torch.equal(operand.product(x_i8), expected.float())  # sums below 2^24: exact in fp32


def test_the_ternary_product_is_exact(each_product: None) -> None:
    check_product()


def test_without_a_product_of_its_own_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitgpt.bitlinear.has_ternary_product", lambda: False)
    check_product()


@pytest.mark.parametrize("kind", ["sum", "plain", "gated"])
def test_gradients_are_the_straight_through_estimator_s(kind: str) -> None:
    """Of one layer with its norm, in fp32, against fp64 on the very same integers."""
    torch.manual_seed(2)
    norm, layers = RMSNorm(96, 1e-5), [BitLinear(96, 48), BitLinear(96, 32)]
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    x, update, g = torch.randn(21, 96), torch.randn(21, 192 if kind == "gated" else 96), torch.randn(21, 80)
    x.requires_grad_(), update.requires_grad_()
    inputs = (x, Values(update)) if kind == "sum" else Values(update)
    _, values = fused.products(inputs, norm, tuple(layers), "silu" if kind == "gated" else "")
    weights = [layer.weight for layer in layers]
    leaves = [update, norm.weight, *weights]
    ours = torch.autograd.grad((values.plain() * g).sum(), leaves)

    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    row = double[0] + x.detach() if kind == "sum" else double[0]
    if kind == "gated":
        row = torch.nn.functional.silu(row[:, :96]) * row[:, 96:]
    n = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + 1e-5) * double[1]
    integers = fused_integers(x, update, norm, kind)
    x_scale = 127 / n.detach().abs().amax(-1, keepdim=True)
    y = []
    for weight in double[2:]:
        w_trit, w_scale = quantize_weight(weight.float())
        ternary = weight + (w_trit * w_scale.double() - weight).detach()
        rounded = n + (integers / x_scale - n).detach()
        y.append(rounded @ ternary.t())
    reference = torch.autograd.grad((torch.cat(y, 1) * g).sum(), double)
    assert largest_error(dict(enumerate(ours)), dict(enumerate(reference))) < 2e-6  # type: ignore[arg-type]


def fused_integers(x: Tensor, update: Tensor, norm: RMSNorm, kind: str) -> Tensor:
    """x_i8 as the stage makes it."""
    stage = Stage({"sum": fused.SUM, "plain": fused.PLAIN, "gated": fused.GATED}[kind], "silu", norm.eps)
    staged = stage.forward(x.detach() if kind == "sum" else None, update.detach(), None, norm.weight.detach(),
                           torch.float32, True, False)
    return staged.n[:21, :96].double()


def test_activations_are_quantized_as_everywhere() -> None:
    torch.manual_seed(3)
    x = torch.randn(50, 112) * torch.logspace(-8, 4, 50).unsqueeze(1)
    staged = Stage(fused.PLAIN, "silu", 0.0).forward(None, x, None, None, torch.float32, True, False)
    x_i8, x_scale = quantize_activations(x)
    assert torch.equal(staged.n[:50, :112], x_i8) and torch.equal(staged.scale, x_scale[:, 0])
    assert not staged.n[:50, 112:].any()


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


@pytest.mark.parametrize(("model_class", "error"), [(GPT, 1e-6), (BitGPT, 0.02)])
@torch.no_grad()
def test_logits_equal_plain_torch(model_class: type[GPT], error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(model_class), torch.randint(65, (3, 320), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, every=True)[0]
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    reference = model(tokens, every=True)[0]
    assert not torch.equal(logits, reference) and (logits - reference).norm() < error * reference.norm()


def test_weights_are_quantized_once_while_they_are_held() -> None:
    model, made = model_of(BitGPT), []

    class Counting(TernaryOperand):
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            super().__init__(*arguments)

    for module in model.modules():
        if isinstance(module, BitLinear):
            module.operand = Counting
    with fused.weights_held():
        first, again = step(model)[0], step(model)[0]
        assert first == again and len(made) == 4 * SHAPE["n_layer"]
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
def test_dropout(model_class: type[GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(model_class, dropout=0.3)
    torch.manual_seed(5)
    loss, grads = step(model)
    torch.manual_seed(5)
    assert step(model)[0] == loss != step(model)[0]
    torch.manual_seed(5)
    reference, reference_grads = plainly(model, monkeypatch)  # which draws in the same order
    assert loss == pytest.approx(reference, rel=1e-4) and largest_error(grads, reference_grads) < 0.01
    model.eval()
    assert step(model)[0] == pytest.approx(step(model_of(model_class))[0], rel=1e-6)


def test_what_the_kernels_cannot_do_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 32, dtype=torch.long)
    fine = ModelConfig(**SHAPE).resolved()
    assert fused.fits(fine, tokens)
    for changes in ({"n_ff": 100}, {"n_embd": 72, "n_head": 3}):
        assert not fused.fits(ModelConfig(**SHAPE | changes).resolved(), tokens)
    assert model_of(BitGPT).fits_kernels
    for changes in ({"qk_norm": True}, {"norm": "inner"}, {"weight_quant": "sign"}, {"scale": "row"}):
        assert not model_of(BitGPT, **changes).fits_kernels
    assert not fused.fits(fine, tokens[:, :30])
    monkeypatch.setattr(fused, "compile_kernels", lambda *_: (_ for _ in ()).throw(build.NoKernel("no compiler")))
    fused.library.cache_clear()
    try:
        assert not fused.fits(fine, tokens) and torch.isfinite(torch.tensor(step(model_of(BitGPT))[0]))
    finally:
        fused.library.cache_clear()


def test_bench_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_train.SHAPES, "toy", (2, {**SHAPE, "block_size": 32, "n_layer": 1}))
    bench.main(["train", "--shapes", "toy", "--repeats", "1", "--seconds", "0.01", "--save", str(tmp_path / "speed")])
    shown = capsys.readouterr().out
    report = bench_train.json.loads((tmp_path / "speed.json").read_text())
    assert [one["model"] for one in report["results"]] == ["gpt", "bitgpt"] and "toy bitgpt" in shown
    for one in report["results"]:
        assert one["tok_per_sec"] == pytest.approx(64 / one["step_s"]) and one["peak_memory_bytes"] > 1e7
        assert sum(one["parts"].values()) == pytest.approx(1) and one["parts"]["products"] > 0
    with pytest.raises(SystemExit) as stop:
        bench.main(["train", "--shapes", "babby"])
    assert stop.value.code == 2 and "Did you mean baby?" in capsys.readouterr().err


def test_the_kernels_use_torch_s_threads() -> None:
    """Linked against no libgomp of their own: two sets of spinning threads would fight for the cores."""
    needed = subprocess.run(["readelf", "-d", build.compile_kernels("fused")], capture_output=True, text=True).stdout
    assert "NEEDED" in needed and "gomp" not in needed
