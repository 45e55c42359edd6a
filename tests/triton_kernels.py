"""The Triton kernels: run by test_triton.py under Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors, and on the
GPU where there is one. By itself: python -m pytest tests/triton_kernels.py

A program takes the interpreter a tenth of a second, so shapes are tiny; the launch rules still choose the kernels.
"""

import contextlib
import os

if "TRITON_INTERPRET" not in os.environ:  # conftest.py hides it from all other tests
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["GPUS"]

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

from benchmarks import gpu as bench_gpu
from benchmarks import speed
from bitgpt import cuda_ops
from bitgpt.bitlinear import int_mm, quantize_activations, quantize_weight, scaled
from bitgpt.model import BitGPT
from core.config import ModelConfig
from core.files import UserError
from engine import cuda, evaluation, packed_file
from engine.packing import pack_tensor
from engine.reference import TorchEngine
from gpt.model import RMSNormFunction, rotary_tables, rotate
from kernels import launch
from kernels.gpu_format import BYTES, TRITS, Matrix, in_turns, pack_bytes, pack_trits, row_bytes, stacked, unpack_trits
from kernels.launch import Quantized

if launch.INTERPRETED:  # as on a GPU, the larger of a number and NaN is the number
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    numpys = ReduceOps.min_max
    ReduceOps.min_max = lambda self, x, val_reduce_op, idx_reduce_op=None: numpys(
        self, x, np.fmax.reduce if val_reduce_op is np.max else val_reduce_op, idx_reduce_op)

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda:0")
torch.set_num_threads(1)
torch.set_default_device(DEVICE)


def seeded(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def trits(n, k, seed=0):
    return torch.randint(-1, 2, (n, k), generator=seeded(seed), dtype=torch.int8)


def matrix(w_trit, scale=0.3):
    return Matrix(pack_trits(w_trit), torch.full((len(w_trit),), scale), w_trit.shape[1], TRITS)


def as_quantized(x_i8):
    """What quantize_kernel would leave of int8 activations."""
    width = row_bytes(x_i8.shape[1], TRITS)
    padded = torch.nn.functional.pad(x_i8, (0, TRITS * width - x_i8.shape[1]))
    return Quantized(padded, torch.ones(len(x_i8)), padded[:, :3 * width].sum(1, dtype=torch.int32))


def exact(x_i8, w):
    return (x_i8.double() @ w.double().T).int()


# ---------------------------------------------------------------------------------------------------- exact integers
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(m=st.integers(1, 3), n=st.integers(1, 20), k=st.integers(1, 140), x=st.sampled_from(["random", -128, 127]),
       w=st.sampled_from(["random", -1, 0, 1]), seed=st.integers(0, 2**31 - 1))
@example(m=1, n=1, k=1, x=-128, w=1, seed=0)
@example(m=2, n=17, k=65, x=127, w=-1, seed=0)
@example(m=1, n=3, k=129, x=-128, w=0, seed=0)
@example(m=1, n=2, k=1100, x="random", w="random", seed=0)  # a row in two parts
def test_sums_are_exact(m, n, k, x, w, seed):
    generator = seeded(seed)
    x_i8 = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    w_trit = trits(n, k, seed)
    x_i8, w_trit = (x_i8 if x == "random" else x_i8.fill_(x)), (w_trit if w == "random" else w_trit.fill_(w))
    q, packed, expected = as_quantized(x_i8), pack_trits(w_trit), exact(x_i8, w_trit)
    acc_i32 = torch.empty((2, m, n), dtype=torch.int32)
    launch.gemv(q, matrix(w_trit), acc_i32[0], "acc", launch.row_for(packed.shape[1] // 4, m, TRITS))
    launch.gemm(q.x_i8, packed, acc_i32[1], "acc", TRITS, x_sum=q.x_sum)
    assert torch.equal(acc_i32[0], expected) and torch.equal(acc_i32[1], expected)


def test_plain_int8_of_any_stride():
    generator = seeded(0)
    for m, n, k in ((1, 1, 1), (5, 3, 33), (2, 70, 17)):
        x_i8 = torch.randint(-128, 128, (m, k + 3), generator=generator, dtype=torch.int8)[:, :k]
        w = torch.randint(-128, 128, (n, k + 5), generator=generator, dtype=torch.int8)[:, :k]
        acc_i32 = torch.empty((m, n), dtype=torch.int32)
        launch.gemm(x_i8, w, acc_i32, "acc")
        assert torch.equal(acc_i32, exact(x_i8, w))


def test_quantizing_is_torchs():
    generator = seeded(0)
    for k in (1, 67, 1100):                                 # the last in two parts
        x = torch.randn(4, k, generator=generator) * 3
        x[0] = 0                                            # a token of zeros has a scale too
        x[1] = torch.arange(k) - k / 2                      # halves to even
        x[2, 0] = 1e15
        x_i8, x_scale = quantize_activations(x)
        made = launch.quantize(x)
        assert torch.equal(made.x_i8[:, :k], x_i8) and not made.x_i8[:, k:].any()
        assert torch.equal(made.x_scale, x_scale[:, 0])
        assert torch.equal(made.x_sum, x_i8[:, :3 * row_bytes(k, TRITS)].sum(1, dtype=torch.int32))
        w_trit = trits(3, k)                                # and one token that is quantized where it is used
        expected = scaled(exact(x_i8[3:], w_trit), x_scale[3:], torch.tensor(0.3))
        assert torch.equal(launch.linear(x[3:], matrix(w_trit)), expected)


def test_norm_and_quantizing():
    generator = seeded(0)
    x, weight = torch.randn(3, 200, generator=generator), torch.rand(200, generator=generator) + 0.5
    x_i8, x_scale = quantize_activations(RMSNormFunction.apply(x, weight, 1e-5))
    made = launch.quantize(x, weight, 1e-5)
    # the sum of squares has an order of its own: a value in thousands may lie on the other side of a half
    assert (made.x_i8[:, :200].int() - x_i8).abs().max() <= 1 and (made.x_i8[:, :200] != x_i8).float().mean() < 0.01
    torch.testing.assert_close(made.x_scale, x_scale[:, 0], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("m", [1, 2, 9])  # fused GEMV, GEMV, GEMM
def test_epilogues(m):
    generator = seeded(m)
    n, k = 12, 70
    x, weight = torch.randn(m, k, generator=generator), torch.rand(k, generator=generator) + 0.5
    gate, up = (matrix(trits(n, k, seed), scale) for seed, scale in ((1, 0.3), (2, 0.7)))
    pairs, both = in_turns(gate, up), stacked(gate, up)
    made = launch.quantize(x, weight, 1e-5)
    x_i8 = made.x_i8[:, :k].contiguous()
    y = torch.cat([scaled(int_mm(x_i8, unpack_trits(part.w, k)), made.x_scale[:, None], part.scale)
                   for part in (gate, up)], dim=1)
    assert torch.equal(launch.linear(x, both, "scaled", weight, 1e-5), y)
    residual = torch.randn(m, 2 * n, generator=generator)
    into = residual.clone()
    launch.linear(x, both, "residual", weight, 1e-5, into)
    assert torch.equal(into, residual + y)
    g, u = y.chunk(2, dim=1)
    assert torch.equal(launch.linear(x, pairs, "relu2", weight, 1e-5), torch.relu(g).square() * u)
    torch.testing.assert_close(launch.linear(x, pairs, "silu", weight, 1e-5), torch.nn.functional.silu(g) * u)


def test_head_sees_activations_of_fifteen_bits():
    generator = seeded(0)
    n, k = 11, 50
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    table = Matrix(pack_bytes(codes), torch.rand(n, generator=generator) * 0.01, k, BYTES)
    x, weight = torch.randn(9, k, generator=generator), torch.rand(k, generator=generator) + 0.5
    normed = RMSNormFunction.apply(x, weight, 1e-5)
    expected = normed.double() @ (codes * table.scale[:, None]).double().T
    found = [launch.head(x[:m], table, weight, 1e-5) for m in (1, 2, 9)]  # fused GEMV, GEMV, GEMM
    assert torch.equal(found[0], found[2][:1]) and torch.equal(found[1], found[2][:2])
    assert (found[2] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(launch.embed(torch.tensor([3, 10]), table), codes[[3, 10]] * table.scale[[3, 10], None])
    bf16 = Matrix(codes.bfloat16(), torch.ones(n), k, BYTES)
    assert torch.equal(launch.embed(torch.tensor([3]), bf16), codes[[3]].float())
    expected = normed @ codes.float().T
    assert (launch.head(x[:2], bf16, weight, 1e-5) - expected[:2]).abs().max() < 1e-2 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------- training
def test_custom_ops_are_bitlinears_arithmetic():
    torch.manual_seed(0)
    x, (w_trit, w_scale) = torch.randn(2, 33), quantize_weight(torch.randn(5, 33))
    x_i8, x_scale = quantize_activations(x)

    def forward(x, dtype=torch.float32):
        return cuda_ops.product(*cuda_ops.quantize(x), w_trit, w_scale, dtype)

    expected = scaled(int_mm(x_i8, w_trit), x_scale, w_scale)
    assert torch.equal(forward(x, torch.float16), expected.half())
    assert torch.equal(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), expected)
    torch.library.opcheck(cuda_ops.quantize, (x,), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(cuda_ops.product, (x_i8, x_scale, w_trit, w_scale, torch.float16),
                          test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_step_keeps_the_custom_ops(monkeypatch):
    monkeypatch.setattr(cuda_ops, "takes", lambda x: True)
    torch.manual_seed(0)
    model = BitGPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_ff=24, block_size=4, vocab_size=7).resolved())
    x, y = torch.randint(7, (2, 1, 4))
    traced, found = [], []

    def backend(graph, inputs):
        traced.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x, y)  # as training begins: the step has a graph of its own afterwards
    for call in (model, compiled):
        loss = call(x, y)[1]
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[0], found[1])
    for graph in traced:
        assert [graph.count(f"torch.ops.bitgpt.{op}.default(") for op in ("quantize", "product")] == [4, 7]
    assert len(traced) == 2


# ---------------------------------------------------------------------------------------------------- a whole model
CONFIGS = {
    "grouped heads, tied, silu": ({"n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_ff": 48}, "trit2", "q8"),
    "norms of heads, untied, relu2": ({"n_head": 2, "n_embd": 20, "n_ff": 24, "qk_norm": True, "sub_norm": False,
                                       "tie_embeddings": False, "act": "relu2"}, "trit1.6", "q8"),
}


def twins(folder, shape, weights, kind):
    """A model in this engine, and in torch."""
    config = ModelConfig(n_layer=1, block_size=12, vocab_size=9, **shape).resolved()
    torch.manual_seed(2)  # no two likeliest tokens lie within rounding
    model = BitGPT(config)
    for parameter in model.parameters():  # logits that differ
        parameter.data = torch.rand_like(parameter) + 0.5 if parameter.dim() == 1 else parameter.data * 4
    latent = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    path = folder / "model.ternary.safetensors"
    packed_file.write(path, config, weights, kind, {}, lambda entry: pack_tensor(entry, latent[entry.name]))
    return cuda.CUDAEngine.from_file(path, config, DEVICE), TorchEngine(model, DEVICE)


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_is_the_torch_model(name, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SPLIT", 4)  # so that eight positions are more than one split
    ours, theirs = twins(tmp_path, *CONFIGS[name])

    # every layer by itself: its integers from the activations it was given
    real, seen = launch.linear, []

    def checked(x, m, epilogue="scaled", norm=None, eps=0.0, into=None):
        before = None if into is None else into.clone()
        y = real(x, m, epilogue, norm, eps, into)
        q = launch.quantize(x, norm, eps)
        plain = scaled(int_mm(q.x_i8[:, :m.k].contiguous(), unpack_trits(m.w, m.k)), q.x_scale[:, None], m.scale)
        if epilogue in ("scaled", "residual"):
            assert torch.equal(y, plain if before is None else before + plain)
        seen.append(epilogue)
        return y

    monkeypatch.setattr(cuda, "linear", checked)
    tokens = np.array([[1, 7, 2, 3, 0, 5, 8, 8, 4, 6, 2, 0]])
    for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:8]):
        log_p, log_q = (torch.from_numpy(engine.forward(chunk)).log_softmax(-1) for engine in (theirs, ours))
        assert (log_p.exp() * (log_p - log_q)).sum() < 1e-3
    assert len(seen) == 3 * 4
    monkeypatch.undo()
    # a prompt that is long enough for GEMM, and over the edge of the context, which is read again
    greedy, other = ([ids.tolist() for ids in engine.generate(tokens[0, :11].tolist(), 1, 3, temperature=0)]
                     for engine in (ours, theirs))
    assert greedy == other
    # the loss, read in one pass and in two
    x, y = np.array([[1, 7, 2, 3, 0, 5], [2, 2, 8, 1, 6, 4]]), np.array([[7, 2, 3, 0, 5, 8], [2, 8, 1, 6, 4, 4]])
    expected, _ = evaluation.loss_of(theirs, [(x, y)])
    assert evaluation.loss_of(ours, [(x, y)])[0] == pytest.approx(expected, abs=5e-3)
    monkeypatch.setattr(evaluation, "AT_ONCE", 8)
    assert evaluation.loss_of(ours, [(x, y)])[0] == pytest.approx(expected, abs=5e-3)


# ---------------------------------------------------------------------------------------------------- CUDA graphs
HOST_WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh")


class Recorded(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph: what is launched while it records, with the addresses and numbers of then.
    A replay runs these launches again, and no line of what launched them."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        assert name not in HOST_WAITS, name
        self.launches.append((name, lambda: function(*args, **(kwargs or {})), result))
        return result

    def replay(self):
        for name, again, made in self.launches:
            if name.startswith("empty"):
                made.fill_(99)  # whatever memory held
            elif isinstance(made, torch.Tensor):
                made.copy_(again())
            else:  # a kernel, or values and their places
                for to, result in zip(made, again() or (), strict=True):
                    to.copy_(result)


def simulate_graphs(ours, monkeypatch):
    """Has this engine record and replay its launches."""
    records = []

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        before = ours.ids.clone()
        records.append(graph)
        with graph:
            yield
        records.remove(graph)
        ours.ids.copy_(before)  # a real capture computes nothing

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                def again():
                    with _disable_current_modes():
                        self.kernel[grid](*args, **options)

                again()
                for graph in records:
                    graph.launches.append(("kernel", again, ()))

            return run

    for module in (launch, launch.triton_attention):
        for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launcher(getattr(module, kernel)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)


def test_attention_over_many_splits(monkeypatch):
    monkeypatch.setattr(launch, "SPLIT", 4)
    B, H, G, D, S = 2, 4, 2, 32, 96
    heads, tables = launch.Heads(H, G, D, 1e-5), rotary_tables(0, S, D, 1e4, DEVICE)
    for length in (0, 3, 63, 64, 79):
        qkv = torch.randn(B, (H + 2 * G) * D, device=DEVICE)
        k, v = (torch.randn(B, G, S, D, device=DEVICE).half() for _ in range(2))
        y = launch.attend(qkv, heads, None, tables, torch.tensor([length], dtype=torch.int32, device=DEVICE), k, v)
        q, new_k, new_v = qkv.view(B, H + 2 * G, 1, D).split((H, G, G), dim=1)
        q, new_k = (rotate(one, *(table[length] for table in tables)) for one in (q, new_k))
        assert torch.allclose(k[:, :, length], new_k[:, :, 0].half(), atol=2e-3)
        keys, values = (torch.cat((cached[:, :, :length].float(), new.float()), dim=2)
                        for cached, new in ((k, new_k), (v, new_v)))
        expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        assert torch.allclose(y, expected.reshape(B, H * D), atol=5e-3)


@pytest.mark.parametrize(("wrong", "problem"), [
    ({"prompt": []}, "is empty"), ({"prompt": [99]}, "holds 99"), ({"num_samples": 0}, "num_samples is 0"),
    ({"temperature": -1}, "temperature is -1")])
def test_what_cannot_be_generated_is_told(wrong, problem, tmp_path):
    ours, _ = twins(tmp_path, *CONFIGS["grouped heads, tied, silu"])
    with pytest.raises(UserError, match=problem):
        list(ours.generate(**{"prompt": [1], **wrong}))
    first = ours.generate([3, 4], max_new_tokens=4)
    next(first), next(ours.generate([1]))
    with pytest.raises(UserError, match="read another text"):
        list(first)
    ours.norm = ours.norm * float("nan")
    for temperature in (0, 1):
        with pytest.raises(UserError, match="diverged"):
            list(ours.generate([3, 4], max_new_tokens=2, temperature=temperature))


def test_a_captured_step_serves_every_position(tmp_path, monkeypatch):
    ours, _ = twins(tmp_path, *CONFIGS["grouped heads, tied, silu"])
    prompt, settings = [1, 7, 2, 3, 0, 5, 8, 8, 4], {"max_new_tokens": 6, "temperature": 0.8, "top_k": 4, "seed": 3}
    ours.graphs.captures = False
    plain = [ids.tolist() for ids in ours.generate(prompt, **settings)]     # over the edge of the context
    ours.graphs.captures = True
    if launch.INTERPRETED:
        simulate_graphs(ours, monkeypatch)
    assert [ids.tolist() for ids in ours.generate(prompt, **settings)] == plain
    graph = ours.graphs.seen[0.8, 4, 1.0]
    assert graph.result is ours.ids
    if launch.INTERPRETED:
        assert [name for name, *_ in graph.graph.launches].count("kernel") == 7


def test_bench_compares_sums_first(monkeypatch):
    def clock(launches):
        launches[0]()
        return lambda: 7.0

    monkeypatch.setattr(bench_gpu, "microseconds", clock)
    row = bench_gpu.gemv_row(6, 80, DEVICE, 100, "", 2, {})
    assert row["exact"] and row["us"] == {"ternary": 7.0, "bf16": 7.0} and row["copies"] == 3
    monkeypatch.setattr(bench_gpu, "int_mm", lambda x, w: int_mm(x, w) + 1)
    assert not bench_gpu.gemv_row(6, 80, DEVICE, 100, "", 1, {})["exact"]


def test_benchs_worker_measures_it(tmp_path):
    ours, _ = twins(tmp_path, *CONFIGS["grouped heads, tied, silu"])
    assert speed.measure(ours, np.array([[1, 2, 3]]), 0, [2, 1]) > 0 and ours.length == 3
