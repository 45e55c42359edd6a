"""Triton on CUDA, as far as it needs no GPU: kernels compiled ahead of time and interpreted, rules, messages."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import bench
import engine
from benchmarks import gpu as bench_gpu
from bitgpt import cuda_ops
from core.config import ModelConfig
from core.files import UserError
from engine import cuda
from engine.sampling import Sampler
from kernels import format, gpu, gpu_format, launch
from kernels.build import NoKernel
from kernels.gpu_format import BYTES, TRITS, Matrix, row_bytes
from kernels.launch import Heads, Quantized, Target

ROOT = Path(__file__).resolve().parents[1]
WIDTH, FFN, HEADS = 2560, 6912, Heads(20, 5, 128, 1e-5)  # of BitNet-b1.58-2B-4T


def has_gpu():
    return not subprocess.run([sys.executable, "-c", "from engine import gpu; gpu.require()"], cwd=ROOT,
                              capture_output=True,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPUS"]}).returncode


@pytest.mark.parametrize("where", ["interpreter", *["gpu"] * has_gpu()])
def test_kernels(where):
    flags = {"interpreter": {"TRITON_INTERPRET": "1"}, "gpu": {}}[where]
    halves = [subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", half,
                                str(ROOT / "tests" / "triton_kernels.py")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, **flags, "TORCHDYNAMO_DISABLE": "0"})
              for half in ("engine_is", "not engine_is")]  # at once: each takes half a minute
    told = [process.communicate()[0] for process in halves]
    assert [process.returncode for process in halves] == [0, 0], [text[-5000:] for text in told]


# ---------------------------------------------------------------------------------------------------- compiled ahead
def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(n, k, planes=TRITS):
    return Matrix(meta(n, row_bytes(k, planes), dtype=torch.uint8 if planes == TRITS else torch.int8),
                  meta(n), k, planes)


def rows(m, k, planes=TRITS, limbs=1):
    return Quantized(meta(m * limbs, planes * row_bytes(k, planes), dtype=torch.int8), meta(m),
                     meta(m, dtype=torch.int32))


def row(k, rows, planes=TRITS):
    return launch.row_for(row_bytes(k, planes) // 4, rows, planes)


def cache(batch=1, length=4096):
    return meta(batch, 5, length, 128, dtype=torch.float16)


TABLES = (meta(4096, 64), meta(4096, 64))
LAUNCHES = {  # what the engine launches for 2B-4T
    "gemv qkv": lambda: launch.linear(meta(1, WIDTH), weights(3840, WIDTH), "scaled", meta(WIDTH), 1e-5),
    "gemv down": lambda: launch.linear(meta(1, FFN), weights(WIDTH, FFN), "residual", meta(FFN), 1e-5, meta(1, WIDTH)),
    "gemv batch 8": lambda: launch.gemv(rows(8, WIDTH), weights(2 * FFN, WIDTH), meta(8, FFN), "relu2", row(WIDTH, 8)),
    "gemv batch 8, down": lambda: launch.gemv(rows(8, FFN), weights(WIDTH, FFN), meta(8, WIDTH), "residual",
                                              row(FFN, 8)),
    "gemv head": lambda: launch.head(meta(1, WIDTH), weights(128256, WIDTH, BYTES), meta(WIDTH), 1e-5),
    "gemv head, batch 8": lambda: launch.gemv(rows(8, WIDTH, BYTES, 2), weights(128256, WIDTH, BYTES),
                                              meta(8, 128256), "scaled", row(WIDTH, 16, BYTES), limbs=2),
    "gemm": lambda: launch.gemm(rows(2048, WIDTH).x_i8, weights(2 * FFN, WIDTH).w, meta(2048, FFN), "relu2", TRITS,
                                meta(2048), meta(2 * FFN), meta(2048, dtype=torch.int32)),
    "gemm batch 16": lambda: launch.gemm(rows(16, FFN).x_i8, weights(WIDTH, FFN).w, meta(16, WIDTH), "residual", TRITS,
                                         meta(16), meta(WIDTH), meta(16, dtype=torch.int32)),
    "gemm training": lambda: launch.gemm(rows(8192, WIDTH).x_i8, meta(WIDTH, WIDTH, dtype=torch.int8),
                                         meta(8192, WIDTH, dtype=torch.bfloat16), "scaled", x_scale=meta(8192, 1),
                                         w_scale=meta()),
    "gemv, widest of the bench": lambda: launch.gemv(rows(1, 27648), weights(5120, 27648), meta(1, 5120), "scaled",
                                                         row(27648, 1)),
    "gemv of 3200": lambda: launch.gemv(rows(1, 3200), weights(4800, 3200), meta(1, 4800), "scaled", row(3200, 1)),
    "quantize": lambda: launch.quantize(meta(2048, FFN), meta(FFN), 1e-5),
    "embed": lambda: launch.embed(meta(1, dtype=torch.int64), weights(128256, WIDTH, BYTES)),
    "rotate": lambda: launch.rotate(meta(512, 3840), HEADS, None, TABLES, 0, cache(), cache()),
    "attend": lambda: launch.attend(meta(1, 3840), HEADS, None, TABLES, meta(1, dtype=torch.int32), cache(), cache()),
    "attend, long": lambda: launch.attend(meta(1, 3840), HEADS, None, TABLES, meta(1, dtype=torch.int32),
                                          cache(length=131072), cache(length=131072)),
}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8",
         torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


def compiled(name, capability, tmp_path, monkeypatch):
    """[(kernel, PTX, registers, bytes of stack, of shared memory)] of what a launch launches, for that GPU."""
    made = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert all(0 < n < 2**31 for n in grid)
            return self.compile

        def compile(self, *args, **options):
            given = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
            signature, constants, attributes = {}, {}, {}
            for i, parameter in enumerate(self.kernel.params):
                value = given.pop(parameter.name)
                aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
                if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # as Triton specializes
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                    continue
                signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else \
                    "i32" if isinstance(value, int) else "fp32"
                attributes[(i,)] = [["tt.divisibility", 16]] if aligned else []
            binary = triton.compile(ASTSource(self.kernel, signature, constants, attributes),
                                    target=GPUTarget("cuda", capability, 32), options=given)
            path = tmp_path / "kernel.cubin"
            path.write_bytes(binary.asm["cubin"])
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True,
                                   text=True, check=True).stdout
            registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
            made.append((self.kernel.__name__, binary.asm["ptx"], registers, stack, binary.metadata.shared))

    monkeypatch.setattr(launch, "target", lambda device: Target(132 if capability >= 90 else 108, capability >= 90))
    for module in (launch, launch.triton_attention):
        for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel)))
    LAUNCHES[name]()
    return made


@pytest.mark.parametrize(("name", "capability"), [(name, 90) for name in LAUNCHES] + [
    ("gemv down", 80), ("gemv batch 8", 80), ("gemm", 80), ("attend", 80), ("gemm", 86), ("gemm training", 86),
    ("gemm", 120), ("attend", 120)])
def test_kernels_compile_for_gpus(name, capability, tmp_path, monkeypatch):
    for kernel, ptx, registers, stack, shared in compiled(name, capability, tmp_path, monkeypatch):
        assert registers <= 255 and stack == 0  # nothing is spilled
        assert shared <= {80: 163, 90: 227}.get(capability, 99) * 1024
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
        before, _, _ = ptx.partition("griddepcontrol.wait") if capability >= 90 else ("", "", "")
        assert "st.global" not in before  # nor is anything read that the kernel before may be writing
        assert kernel in ("gemv_kernel", "quantize_kernel") or not re.search(r"ld\.global|cp\.async", before)
        if kernel in ("gemv_kernel", "gemm_kernel", "quantize_kernel"):
            # exact division, subnormal numbers, and no product that is rounded once with a sum where torch rounds twice
            assert not re.search(r"div\.(full|approx)|\.ftz|fma\.", ptx)
        if kernel == "gemv_kernel":
            assert ptx.count("dp4a.s32.s32") >= 32
            first = re.search(r"ld\.global[.\w:]*v4\.b32", ptx)
            assert first  # 16 bytes a load, and before the kernel that makes the activations has ended
            assert capability < 90 or first.start() < ptx.index("griddepcontrol.wait")
        if kernel == "gemm_kernel":
            tensor_cores = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*m16n8k32\S*s8\.s8"
            assert re.search(tensor_cores, ptx) and "cp.async" in ptx
        if name == "gemm training":
            assert "cvt.rn.bf16x2.f32" in ptx  # where the interpreter truncates


# ---------------------------------------------------------------------------------------------------- bits and rules
@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(list(format.KINDS)), n=st.integers(1, 40), k=st.integers(1, 150),
       seed=st.integers(0, 2**31 - 1))
def test_a_files_weights_reach_the_gpus_layout(kind, n, k, seed):
    rng = np.random.default_rng(seed)
    most = format.KINDS[kind].largest
    w = rng.standard_normal((n, k)) if kind == "bf16" else rng.integers(-most, most + 1, (n, k)).astype(np.int8)
    packed = torch.from_numpy(format.pack(kind, w))
    expected = torch.from_numpy(format.unpack(kind, packed.numpy(), n, k))
    assert torch.equal(gpu_format.unpack(kind, packed, n, k).to(expected.dtype), expected)
    made = gpu_format.matrix(kind, packed, None if kind == "bf16" else torch.tensor(0.5), n, k)
    if kind.startswith("trit"):
        assert torch.equal(gpu_format.unpack_trits(made.w, k), expected) and made.w.shape[1] % 16 == 0
    elif kind != "bf16":
        assert torch.equal(made.w[:, :k], expected) and not made.w[:, k:].any() and made.w.shape[1] % 16 == 0
    assert cuda.valid_codes(kind, packed.numpy(), torch.device("cpu")) if kind.startswith("trit") else True


@settings(max_examples=200, deadline=None)
@given(m=st.integers(1, 5000), n=st.integers(1, 130_000), k=st.integers(1, 65536), pair=st.booleans(),
       processors=st.integers(1, 150))
def test_launch_rules_cover_every_output(m, n, k, pair, processors):
    words = row_bytes(k, TRITS) // 4
    row = launch.row_for(words, 1, TRITS) or launch.row_shape(words, 1)
    assert words <= row.width <= max(2 * words, words + 31)
    shape = launch.gemv_shape(n, row, pair, m, processors)
    assert shape.bn in (1, 2, 4, 8, 16, 32) and shape.bn >= 1 + pair and 1 <= shape.programs <= -(-n // shape.bn)
    tile = launch.gemm_shape(m, n, processors)
    assert tile.bm in (16, 32, 64, 128) and tile.bn in (64, 128) and tile.bm <= max(16, 2 * m)
    assert tile.stages * tile.bk * (tile.bm + tile.bn) <= 99 * 1024  # shared memory of the smallest GPU, sm_86


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0, 0, 1), (1, 0, 1), (0.7, 5, 1), (1.3, 0, 0.6),
                                                             (1e-300, 3, 0.5), (2, 40, 0.9)])
def test_sampling_on_the_device_is_the_samplers(temperature, top_k, top_p):
    logits = np.random.default_rng(1).standard_normal((64, 30)).astype(np.float32) * 3
    draw = torch.from_numpy(np.random.default_rng(7).random(64))
    found, finite = cuda.sample(torch.from_numpy(logits), draw, temperature, top_k, top_p)
    assert found.tolist() == Sampler(temperature, top_k, top_p, seed=7)(logits).tolist() and finite.isfinite().all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, 0, 1), (1, 3, 1), (1, 0, 0.5), (1, 3, 0.5), (0, 0, 1)])
def test_sampling_on_the_device_stays_inside_whatever_the_logits(temperature, top_k, top_p):
    """Outside, a GPU would lose its context."""
    logits = torch.tensor([[1, math.nan, 2, 0, 1], [math.inf, 1, 2, 3, 4], [-math.inf] * 5, [0, 1, 2, 3, -math.inf]])
    ids, finite = cuda.sample(logits, torch.full((4,), 0.999, dtype=torch.float64), temperature, top_k, top_p)
    assert ((ids >= 0) & (ids < 5)).all() and ids[3] in (2, 3)
    assert finite.isfinite().tolist() == [False, False, False, True]


class Driver:
    """libcuda of a machine with two GPUs."""

    def __init__(self, version):
        self.version = version

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 2
        return 0

    def cuDeviceGetAttribute(self, value, which, device):
        value._obj.value = {75: 9 - device, 76: 6 * device}[which]
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0


def test_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(gpu, "library", lambda: Driver(12020))
    assert gpu.capabilities.__wrapped__() == ((9, 0), (8, 6)) and not gpu.has_dependent_launch(9)
    monkeypatch.setattr(gpu, "library", lambda: Driver(12040))
    assert gpu.has_dependent_launch(9) and not gpu.has_dependent_launch(8)
    monkeypatch.setattr(gpu, "library", lambda: None)
    assert gpu.capabilities.__wrapped__() == () and not gpu.has_dependent_launch(9)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs whose captures and replays do nothing but count."""
    made = cuda.Graphs(torch.device("cpu"))
    made.captures, made.captured, made.replayed = True, 0, 0

    class CUDAGraph:
        def replay(self):
            made.replayed += 1

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        made.captured += 1
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    for name in ("synchronize", "default_stream", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    return made


def test_the_graphs_used_last_are_kept(graphs):
    def run(key):
        return graphs.run(key, lambda x: x, torch.full((1,), key)).item()

    assert [run(1) for _ in range(3)] == [1, 1, 1] and (graphs.captured, graphs.replayed) == (1, 2)
    for key in range(2, 20):
        run(key)
        run(1)
    assert (graphs.captured, graphs.replayed) == (1, 20) and list(graphs.seen)[-2:] == [19, 1]
    assert len(graphs.seen) == cuda.KEPT_GRAPHS


def test_where_graphs_cannot_be_captured(graphs, capsys):
    def compute(x):
        if graphs.captured and not graphs.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return x + 1

    assert [graphs.run("step", compute, torch.tensor(at)).item() for at in range(4)] == [1, 2, 3, 4]
    assert [graphs.run("other", compute, torch.tensor(at)).item() for at in range(3)] == [1, 2, 3]
    assert graphs.captured == 1 and not graphs.replayed
    assert "note: no CUDA graphs: operation not permitted" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- elsewhere
@pytest.mark.parametrize(("found", "device", "reason"), [
    ((), "auto", "no NVIDIA GPU"), (((7, 5),), "auto", "compute capability 7.5"), (((9, 0),), "cuda:1", "has 1 NVIDIA"),
    (((9, 0),), "mps", "not on --device mps"), (((9, 0),), "cuda", "torch")])
def test_why_it_cannot_run(found, device, reason, monkeypatch, call, trained):
    monkeypatch.setattr(gpu, "capabilities", lambda: found)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    with pytest.raises(NoKernel, match=reason):
        gpu.require(device)
    result = call("bitgpt/generate", "--out-dir", trained["bitgpt"], "--kernel", "triton", "--device", device)
    assert result.code == 2 and reason in result.err and "--kernel triton" in result.err and not result.out


def test_no_triton(monkeypatch):
    monkeypatch.setattr(gpu, "capabilities", lambda: ((8, 0),))
    monkeypatch.setattr(triton, "__version__", "3.4.0+git")
    with pytest.raises(NoKernel, match="triton 3.4.0.git is too old: 3.5"):
        gpu.require()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoKernel, match="package triton is not installed"):
        gpu.require()


def test_auto_falls_back_with_one_line(monkeypatch, call, trained):
    flags = ("bitgpt/generate", "--out-dir", trained["bitgpt"], "--num-samples", "1", "--max-new-tokens", "3",
             "--temperature", "0")
    plain = call(*flags)
    monkeypatch.setattr(gpu, "capabilities", lambda: ((7, 5),))
    result = call(*flags)
    assert result.out == plain.out and "note:" not in plain.err
    assert len([line for line in result.err.splitlines() if "note: no triton kernel: the GPU has" in line]) == 1


def test_training_says_why_it_does_without(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "capabilities", lambda: ((9, 0), (7, 5)))
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "2.13.0")
    cuda_ops.found.cache_clear()
    try:
        compiled = torch.compile(lambda x: x + cuda_ops.available(), backend="eager", fullgraph=True)  # a constant
        assert compiled(torch.zeros(1)) == 0 and not cuda_ops.available()
        assert capsys.readouterr().err.count("note: no triton kernels: the GPU has compute capability 7.5") == 1
    finally:
        cuda_ops.found.cache_clear()


def test_a_full_precision_run_has_no_triton_kernel(monkeypatch, trained):
    monkeypatch.setattr(gpu, "require", lambda device="auto": 0)
    with pytest.raises(UserError, match="full-precision"):
        engine.load(trained["gpt"], kernel="triton")


def test_long_caches_are_read_in_longer_pieces():
    assert [launch.split_of(positions) for positions in (1, 64, 4096, 32768, 65536, 131072, 2**20)] == [
        64, 64, 64, 64, 128, 256, 256]


# ---------------------------------------------------------------------------------------------------- benchmarks/gpu.py
def test_bench_says_where_it_cannot_run(capsys):
    for flags, problem in ((["--device", "cuda", "--batch", "1,x"], "whole numbers"),
                           (["--device=mps"], "not on --device mps"), (["--device", "cuda", "--repeat"], "--repeats")):
        with pytest.raises(SystemExit) as end:
            bench.main(flags)
        shown = capsys.readouterr()
        assert end.value.code == 2 and problem in shown.err and not shown.out
    with pytest.raises(UserError, match="compile.sh"):
        bench_gpu.microsoft_kernel("no/libbitnet.so")


def test_weights_rotate_through_more_than_the_cache():
    for n, k in bench_gpu.SHAPES:
        for cache_bytes in (40 << 20, 50 << 20):
            count = bench_gpu.copies(n * k // 4, cache_bytes)
            assert count >= 2 and (count - 1) * n * k // 4 > 2 * cache_bytes - n * k // 4
    assert len(bench_gpu.SHAPES) == 10


def test_bf16_twin_decodes_what_it_reads():
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=64, block_size=12, vocab_size=20).resolved()
    torch.manual_seed(0)
    with torch.inference_mode():
        twin = bench_gpu.Bf16Twin(config, torch.device("cpu"))
        twin.layers = [[w * 10 for w in layer] for layer in twin.layers]
        twin.wte = twin.wte * 50
        tokens = torch.randint(0, 20, (3, 7))
        twin.reset(3, 12)
        whole = twin.prefill(tokens)
        twin.reset(3, 12)
        twin.prefill(tokens[:, :5])
        twin.at.fill_(5)
        for at in (5, 6):
            logits = twin.forward(tokens[:, at:at + 1], twin.at)
            twin.at.add_(1)
        assert (whole - logits).abs().max() < 0.1 * whole.abs().max()


def test_the_whole_table_as_if_on_a_gpu(tmp_path, monkeypatch, capsys):
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20)

    def gemv_row(n, k, *rest):
        if n == 3840:
            raise RuntimeError("misaligned address\nand more")
        us = {"ternary": 2.0, "bf16": 6.0, "microsoft": 3.0}
        return {"n": n, "k": k, "weight_bytes": n * k // 4, "exact": n != 4800,
                "us": {name: us[name] for name in us if (n, name) != (13824, "bf16")}}

    class Engine:
        cache, graphs = torch.empty(0), SimpleNamespace(refused={})

        def __init__(self, packed, device):
            assert packed.config.block_size == 19 and len(packed.tensors) > 8

        def generate(self, prompt, batch, tokens, temperature):
            if batch == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield from range(tokens)

        def reset(self, batch):
            assert batch == 1

        def feed(self, tokens):
            assert tokens.shape == (1, 4)

    for name, value in {"get_device_properties": lambda device: about, "device": contextlib.nullcontext,
                        "memory_allocated": lambda device: 0, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "require", lambda device: 0)
    monkeypatch.setattr(cuda, "device_called", lambda device: torch.device("cpu"))
    monkeypatch.setattr(cuda, "CUDAEngine", Engine)
    monkeypatch.setattr(bench_gpu, "bandwidth", lambda device: 2e12)
    monkeypatch.setattr(bench_gpu, "gemv_row", gemv_row)
    (tmp_path / "small.toml").write_text("n_layer = 1\nn_embd = 32\nn_head = 2\nvocab_size = 20\n")
    bench.main(["--device", "cuda", "--config", str(tmp_path / "small.toml"), "--decode", "3", "--prefill", "4",
                "--batch", "1,2", "--repeats", "2", "--save", str(tmp_path / "table")])
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "table.json").read_text())
    assert len(report["gemv"]) == 9 and [list(row["tok_per_sec"]) for row in report["model_rows"]] == [
        ["ternary", "bf16"], ["bf16"], ["ternary", "bf16"]]
    assert report["failed"] == {"GEMV 3840 x 2560": "RuntimeError: misaligned address",
                                "decode, batch 2, ternary": "OutOfMemoryError: CUDA out of memory"}
    lines = {line[:16].strip(): line for line in shown.splitlines()}
    assert re.search(r"2\.00 +6\.00 +3\.00 +41% +3\.00x +1\.50x$", lines["2560 x 2560"])
    assert re.search(r"2\.00 +- +3\.00 +221% +- +1\.50x$", lines["13824 x 2560"])
    assert "WRONG SUMS" in lines["4800 x 3200"] and shown.count("WRONG") == 1 and shown.count("left out: ") == 2
    assert re.search(r" - .* -$", lines["decode, batch 2"])


def test_random_weights_are_a_whole_model():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_ff=64, block_size=8, vocab_size=20).resolved()
    packed = bench_gpu.random_packed(config, "q8")
    made = cuda.CUDAEngine(packed, torch.device("cpu"))
    assert made.layers[1].qkv.n == 96 and made.layers[0].gate_up.n == 128 and made.wte is made.lm_head
