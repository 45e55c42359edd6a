"""bitgpt/quantizers.py and what BitLinear makes of it: every form by hand, and its gradients against plain formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitgpt.bitlinear import BitLinear
from bitgpt.quantizers import ACTIVATIONS, WEIGHTS, quantize_weight

ROW = [[4.0, -1.0, 0.5, 0.0, -0.5, 0.0]]  # mean 0.5, mean |w| 1; the lower median of |w| is 0.5


@pytest.mark.parametrize(("how", "codes", "scale"), [
    ("absmean", [[1, -1, 0, 0, 0, 0]], 1.0), ("absmedian", [[1, -1, 1, 0, -1, 0]], 0.5),
    ("sign", [[1, -1, -1, -1, -1, -1]], 1.0), ("int2", [[3, -1, 1, 1, -1, 1]], 0.625)])
def test_weights_by_hand(how: str, codes: list[list[int]], scale: float) -> None:
    found, found_scale = quantize_weight(torch.tensor(ROW), how)
    assert found.tolist() == codes and found_scale == scale and found_scale.dim() == 0
    both = torch.tensor(ROW + [[2 * w for w in ROW[0]]])
    found, found_scale = quantize_weight(both, how, per_row=True)
    assert found.tolist() == codes * 2 and found_scale.tolist() == [[scale], [2 * scale]]


def test_activations_by_hand() -> None:
    x = torch.tensor([[127.0, 0.4, -1.6], [0.0, 0.0, 0.0]])
    assert ACTIVATIONS["int8"](x).tolist() == [[127, 0, -2], [0, 0, 0]]
    for how in ("clamp8", "none"):
        torch.testing.assert_close(ACTIVATIONS[how](x), x)
    step = 43.0 / 7**0.5  # mean |x| is 43: the largest level is 7, 127 / step rounds to 8
    torch.testing.assert_close(ACTIVATIONS["int4"](x)[0], torch.tensor([7 * step, 0.0, 0.0]))
    assert ACTIVATIONS["int4"](x)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", WEIGHTS)
def test_int2_loses_least_of_normal_weights_and_one_bit_most(how: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(400, 400)
    codes, scale = quantize_weight(weight, how)
    error = float((codes * scale - weight).square().mean())
    # levels 0 and +-L, threshold L / 2: 1 + 2 L^2 (1 - Phi(L / 2)) - 4 L phi(L / 2); sign: 1 - 2 / pi; int2: Max 1960
    assert error == pytest.approx({"absmean": 0.263, "absmedian": 0.318, "sign": 0.363, "int2": 0.119}[how], abs=5e-3)


def plain(x: Tensor, weight: Tensor, layer: BitLinear, share: float) -> Tensor:
    """Straight-through in fp64, written out: what is rounded counts in forward, what it was made from in backward."""
    codes, scale = WEIGHTS[layer.weight_quant](weight.detach(), layer.per_row)
    w = weight.double() + share * (codes.double() * scale.double() - weight.detach().double())
    x_q = ACTIVATIONS[layer.activation_quant](x.detach()) if share == 1 else x.detach()  # blending is of weights alone
    return (x.double() + (x_q - x.detach()).double()) @ w.t()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(1, 9), st.sampled_from(list(WEIGHTS)),
       st.sampled_from(list(ACTIVATIONS)), st.booleans(), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 2**31))
def test_every_form_and_its_gradients_equal_plain_straight_through(
        M: int, K: int, N: int, how: str, activation: str, per_row: bool, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, grad = torch.randn(2, M, K, requires_grad=True), torch.randn(2, M, N)
    layer = BitLinear(K, N)
    layer.weight_quant, layer.activation_quant, layer.per_row, layer.share = how, activation, per_row, share
    x_gold, w_gold = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y, y_gold = layer(x), plain(x_gold, w_gold, layer, share)
    y.backward(grad)
    y_gold.backward(grad.double())
    for ours, gold in ((y, y_gold), (x.grad, x_gold.grad), (layer.weight.grad, w_gold.grad)):
        largest = float(gold.detach().abs().max())
        torch.testing.assert_close(ours.detach().double(), gold.detach().double(), rtol=1e-5, atol=1e-5 * largest)


def test_evaluation_quantizes_whatever_share_training_does() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(20, 5), torch.randn(3, 20)
    expected = layer.eval()(x)
    layer.share = 0.0
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer.train()(x), x @ layer.weight.t())
