"""gpt/model.py and bitgpt/: the twins' three properties, the arithmetic of BitLinear, attention and its cache."""

import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitgpt.bitlinear import BitLinear, int_mm, quantize_activations, quantize_weight
from bitgpt.model import BitGPT
from core.config import ModelConfig
from engine.reference import freeze
from gpt.model import GPT, KVCache, RMSNormFunction

SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=23)
VARIANTS = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "qk_norm": True}, {"tie_embeddings": False, "act": "relu2"},
            {"sub_norm": False, "n_ff": 40}]


def build(model_class: type[GPT], seed: int = 0, **changes: object) -> GPT:
    torch.manual_seed(seed)
    return model_class(dataclasses.replace(SMALL, **changes).resolved()).eval()  # type: ignore[arg-type]


# -- the twins ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", VARIANTS)
def test_twins_have_equal_keys_and_initial_weights_and_load_into_each_other(changes: dict) -> None:
    gpt, bitgpt = build(GPT, **changes).state_dict(), build(BitGPT, **changes)
    assert list(gpt) == list(bitgpt.state_dict())
    assert all(torch.equal(gpt[name], weight) for name, weight in bitgpt.state_dict().items())
    other = build(GPT, seed=1, **changes).state_dict()
    bitgpt.load_state_dict(other)
    assert all(torch.equal(other[name], weight) for name, weight in bitgpt.state_dict().items())
    assert not torch.equal(other["wte.weight"], gpt["wte.weight"])


def test_only_the_seven_linears_of_a_block_are_ternary() -> None:
    model = build(BitGPT, tie_embeddings=False)
    names = {name.split(".", 2)[2] for name in model.trits()}
    assert names == {f"attn.{n}_proj.weight" for n in "qkvo"} | {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert not isinstance(model.lm_head, BitLinear)
    assert all(set(trit.unique().tolist()) <= {-1, 0, 1} for trit in model.trits().values())


@pytest.mark.parametrize(("changes", "low", "high"), [
    ({"n_layer": 2, "n_embd": 48, "n_head": 2}, 45e3, 80e3),
    ({"n_layer": 24, "n_embd": 2048, "n_head": 16, "n_kv_head": 4, "block_size": 2048}, 1e9, 1.3e9)])
def test_from_fifty_thousand_to_a_billion_parameters(changes: dict, low: float, high: float) -> None:
    with torch.device("meta"):
        assert low < build(BitGPT, **changes).num_params() < high


# -- the arithmetic ----------------------------------------------------------------------------------------------------

def test_weights_are_rounded_half_to_even_and_scaled_by_their_mean() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.75, -0.25, 3.0, 0.0]])  # mean |w| = 1
    trit, scale = quantize_weight(weight)
    assert scale == 1 and trit.tolist() == [[0, 0, 1, -1], [1, 0, 1, 0]]


def test_activations_span_int8_and_round_half_to_even() -> None:
    x_i8, scale = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0, 0, 0, 0]]))
    assert x_i8.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert scale[0] == 1 and torch.isfinite(scale).all()


def test_zero_weights_and_zero_inputs_give_zeros_and_no_nan() -> None:
    layer = BitLinear(8, 4)
    torch.nn.init.zeros_(layer.weight)
    y = layer(torch.zeros(3, 8))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, 4)) and torch.isfinite(layer.weight.grad).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31))
def test_int_mm_is_exact(M: int, K: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    x_i8 = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    w_trit = torch.randint(-1, 2, (N, K), dtype=torch.int8)
    acc_i32 = int_mm(x_i8, w_trit)
    assert acc_i32.dtype == torch.int32
    assert torch.equal(acc_i32.long(), x_i8.long() @ w_trit.long().t())


def test_int_mm_without_an_int8_gemm_gives_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    x_i8 = torch.full((3, 6912), -128, dtype=torch.int8)
    w_trit = torch.ones(5, 6912, dtype=torch.int8)
    expected = int_mm(x_i8, w_trit)
    monkeypatch.setattr("bitgpt.bitlinear.HAS_INT8_GEMM", False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int_mm(x_i8, w_trit), expected) and expected[0, 0] == -128 * 6912


def straight_through(x: Tensor, weight: Tensor) -> Tensor:
    """BitLinear as papers write it, in fp64 around the fp32 integers: the oracle."""
    x_i8, x_scale = quantize_activations(x.detach())
    w_trit, w_scale = quantize_weight(weight.detach())
    x_q = x.double() + (x_i8.double() * x_scale.double() - x.double()).detach()
    w_q = weight.double() + (w_trit.double() * w_scale.double() - weight.double()).detach()
    return x_q @ w_q.t()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 100), st.integers(1, 30), st.integers(0, 2**31))
def test_forward_and_gradients_equal_plain_straight_through(M: int, K: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, grad = torch.randn(2, M, K, requires_grad=True), torch.randn(2, M, N)
    layer = BitLinear(K, N)
    y = layer(x)
    y.backward(grad)
    x_gold, w_gold = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y_gold = straight_through(x_gold, w_gold)
    y_gold.backward(grad.double())
    for ours, gold in ((y, y_gold), (x.grad, x_gold.grad), (layer.weight.grad, w_gold.grad)):
        scale = float(gold.detach().abs().max())
        torch.testing.assert_close(ours.detach().double(), gold.detach().double(), rtol=1e-5, atol=1e-5 * scale)


def test_products_together_are_the_products_one_by_one() -> None:
    torch.manual_seed(0)
    layers, x, grads = [BitLinear(20, n) for n in (7, 3)], torch.randn(5, 20, requires_grad=True), []
    for products in (layers[0].together(x, layers[1]), [layer(x) for layer in layers]):
        sum(y.square().sum() for y in products).backward()
        grads.append([*(y.detach() for y in products), x.grad, *(layer.weight.grad for layer in layers)])
        x.grad = None
        for layer in layers:
            layer.weight.grad = None
    for ours, gold in zip(*grads, strict=True):
        torch.testing.assert_close(ours, gold, rtol=1e-6, atol=1e-5)
    assert torch.equal(grads[0][0], grads[1][0])


def test_rms_norm_and_its_gradients() -> None:
    x, weight = torch.randn(2, 3, 10, dtype=torch.double, requires_grad=True), torch.rand(10, dtype=torch.double)
    weight.requires_grad_()
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5), torch.rms_norm(x, (10,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-5), (x, weight))


def test_autocast_changes_the_dtype_and_not_the_integers() -> None:
    layer, x = BitLinear(64, 32), torch.randn(4, 64)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, plain.bfloat16())


def test_a_bf16_matmul_of_the_quantized_values_would_not_be_the_same() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(512, 64), torch.randn(64, 512)
    x_i8, _ = quantize_activations(x)
    w_trit, _ = quantize_weight(layer.weight)
    rounded = (x_i8.bfloat16() @ w_trit.bfloat16().t()).float()
    assert (rounded != int_mm(x_i8, w_trit)).float().mean() > 0.1


def test_frozen_layers_compute_what_the_trained_ones_did() -> None:
    model = build(BitGPT)
    tokens = torch.randint(23, (2, 16))
    with torch.no_grad():
        expected = model(tokens)[0]
    latents = [weakref.ref(weight) for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
    assert torch.equal(freeze(model)(tokens)[0], expected)
    assert not any(isinstance(module, BitLinear) for module in model.modules())
    gc.collect()
    assert latents and not any(weight() is not None for weight in latents)  # trits take their place in memory


def test_what_adds_to_the_residual_stream_starts_smaller() -> None:
    for name, weight in build(GPT, n_layer=8, n_embd=128, vocab_size=500).named_parameters():
        std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert torch.all(weight == 1) if weight.dim() == 1 else weight.std().item() == pytest.approx(std, rel=0.05)


# -- attention and its cache -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 7, 3]])
def test_cached_chunks_give_the_logits_of_one_pass(changes: dict, chunks: list[int]) -> None:
    model = build(GPT, **changes)  # full precision: int8 rounding would amplify the noise of another summation order
    tokens = torch.randint(23, (3, 16))
    whole = model(tokens, all_logits=True)[0]                                         # (3, 16, V)
    cache, start = KVCache(model.config, 3, torch.device("cpu"), torch.float32), 0
    for length in chunks:
        logits, _ = model(tokens[:, start:start + length], cache=cache)
        start += length
        torch.testing.assert_close(logits[:, 0], whole[:, start - 1], rtol=1e-4, atol=1e-5)
    assert cache.length == 16


@pytest.mark.parametrize("model_class", [GPT, BitGPT])
def test_no_token_sees_the_future(model_class: type[GPT]) -> None:
    model = build(model_class)
    tokens = torch.randint(23, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 23
    a, b = (model(t, all_logits=True)[0] for t in (tokens, changed))
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


def test_positions_matter_and_rotary_attention_is_relative() -> None:
    from gpt.model import rotary_tables, rotate
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(m: int, n: int) -> float:
        a = rotate(q, *rotary_tables(m, 1, 8, 10000.0, q.device))
        b = rotate(k, *rotary_tables(n, 1, 8, 10000.0, k.device))
        return float((a * b).sum())

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5) and abs(score(3, 1) - score(4, 1)) > 1e-4


def test_dropout_only_while_training() -> None:
    model = build(GPT, dropout=0.5)
    tokens = torch.randint(23, (2, 16))
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


def test_n_ff_follows_the_packed_formats_blocks() -> None:
    assert [ModelConfig(n_embd=width, n_head=2).resolved().n_ff for width in (128, 256, 384, 768, 2560)] == \
        [320, 768, 1024, 2048, 6912]
