"""`python bench.py --device cuda`: the ternary kernels on a GPU, beside bf16 and beside Microsoft's, in one table.

    python bench.py --device cuda                                     # about five minutes; JSON into docs/results/
    python bench.py --device cuda --microsoft BitNet/gpu/bitnet_kernels/libbitnet.so      # built by its compile.sh

GEMV, batch 1: microseconds and share of the measured memory bandwidth at the ten shapes that Microsoft's kernel knows,
int8 activations in, one float an output; each shape's sums are compared with torch's first. Each launch takes another
copy of the weights, all together more than the L2 cache holds, and a CUDA graph launches them, so what is timed is the
GPU; ours overlap as they do in a model (dependent launches), the others do not. Whole model, at the shape of --config
with random weights: decode as `generate` runs it, sampling and copying ids to the host included, and prefill until the
logits are there. Its bf16 twin does the same in torch: graphs, a static KV cache, q, k, v and gate, up joined; it
copies ids once, at the end. Both take turns, and medians count.

JSON is written row by row, and a row that fails is named and left out: the others count all the same.
"""

import ctypes
import dataclasses
import datetime
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.process import ROOT, place
from benchmarks.speed import random_weights
from bitgpt.bitlinear import int_mm
from core.config import ModelConfig, build, parser, read_toml, setting
from core.files import UserError, write_json
from engine import packed_file
from engine.packed_file import Packed, scale_of
from gpt.model import rotary_tables, rotate
from kernels import gpu
from kernels.build import NoKernel
from training.settings import TrainConfig

# (N, K) of github.com/microsoft/BitNet, gpu/bitnet_kernels/bitnet_kernels.cu
SHAPES = ((2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912), (3200, 3200), (4800, 3200), (3200, 10240),
          (20480, 3200), (5120, 27648), (55296, 5120))
PROMPT = 16  # tokens before a decode
LAUNCHES = 200  # in a graph, at least: between two replays nothing overlaps
Made = TypeVar("Made")


@dataclasses.dataclass
class CudaConfig:
    """What is measured."""

    device: str = setting("cuda", "cuda or cuda:N")
    config: str = setting(str(ROOT / "configs" / "bitnet_2b.toml"), "a TOML file whose shape is taken")
    decode: int = setting(256, "tokens to generate one by one", low=2)
    prefill: str = setting("512,2048", "lengths of prompts, separated by commas")
    batch: str = setting("1,8", "numbers of sequences that are decoded at once, separated by commas")
    head: str = setting("q8", "embedding and head of the packed weights", choices=packed_file.HEADS)
    repeats: int = setting(5, "rounds; the median counts", low=1)
    microsoft: str = setting("", "libbitnet.so, to be measured beside ours")
    save: str = setting("", "write SAVE.json (default: docs/results/cuda-, the GPU's name and the date)", path=True)


def attempt(what: str, work: Callable[[], Made], failed: dict[str, str]) -> Made | None:
    """What `work` returns. Where it fails, `failed` gets the reason."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    try:
        return work()
    except Exception as error:  # whatever it is
        failed[what] = f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]
        print(f"  left out: {failed[what]}", file=sys.stderr)
        return None


# ---------------------------------------------------------------------------------------------------- what is timed
def copies(weight_bytes: int, cache_bytes: int) -> int:
    """How many copies of a matrix it takes that none is in a cache of this size when its turn comes again."""
    return max(2, math.ceil(4 * cache_bytes / weight_bytes))


def microseconds(launches: Sequence[Callable[[], object]], target_s: float = 0.02) -> Callable[[], float]:
    """A clock for these launches, one after the other in a CUDA graph: the mean of one, replayed for `target_s`."""
    for launch in launches:  # kernels are compiled and loaded before they are captured
        launch()
    graph, rounds = torch.cuda.CUDAGraph(), -(-LAUNCHES // len(launches))
    with torch.cuda.graph(graph):
        for launch in [*launches] * rounds:
            launch()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replays(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    replays(1)
    times = max(1, round(1e6 * target_s / replays(2) * 2))
    return lambda: replays(times) / (times * rounds * len(launches))


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth(device: torch.device) -> float:
    """Bytes a second that the GPU reads: the faster one of a sum over 2 GB and a copy of them."""
    source = torch.ones(1 << 29, device=device)
    to = torch.empty_like(source)
    read, both = microseconds([source.sum]), microseconds([partial(to.copy_, source)])
    return 1e6 * source.nbytes * max(1 / statistics.median(read() for _ in range(3)),
                                     2 / statistics.median(both() for _ in range(3)))


def microsoft_kernel(path: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], None]:
    """Their `bitlinear_int8xint2`: (x_i8, w, y, x_scale, w_scale, N, K) on the current stream."""
    try:
        function = ctypes.CDLL(str(Path(path).resolve())).bitlinear_int8xint2
    except (OSError, AttributeError) as error:
        raise UserError(f"--microsoft {path}: {error}. Name the libbitnet.so that gpu/bitnet_kernels/compile.sh of "
                        "github.com/microsoft/BitNet makes.") from None

    def launch(x_i8: Tensor, w: Tensor, y: Tensor, x_scale: Tensor, w_scale: Tensor, n: int, k: int) -> None:
        function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_i8, w, y, x_scale, w_scale)), ctypes.c_int(1),
                 ctypes.c_int(n), ctypes.c_int(k), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))

    return launch


def gemv_row(n: int, k: int, device: torch.device, cache_bytes: int, microsoft: str, repeats: int,
             failed: dict[str, str]) -> dict[str, Any]:
    """One shape: the median microseconds of ours, of bf16, and of Microsoft's kernel where there is one."""
    from kernels import launch
    from kernels.gpu_format import TRITS, Matrix, row_bytes, unpack_trits

    torch.cuda.empty_cache()
    width = row_bytes(k, TRITS)
    x = launch.quantize(torch.randn(1, k, device=device))
    row = launch.row_for(width // 4, 1, TRITS)
    assert row is not None
    scale, y = torch.ones(n, device=device), torch.empty(1, n, device=device)
    ours = [Matrix(torch.randint(0, 256, (n, width), dtype=torch.uint8, device=device), scale, k, TRITS)
            for _ in range(copies(n * width, cache_bytes))]
    acc_i32 = torch.empty(1, n, dtype=torch.int32, device=device)
    launch.gemv(x, ours[0], acc_i32, "acc", row)
    exact = attempt(f"GEMV {n} x {k}, sums", lambda: torch.equal(
        acc_i32, int_mm(x.x_i8[:, :k].contiguous(), unpack_trits(ours[0].w, k))), failed)

    def ternary() -> Callable[[], float]:
        return microseconds([partial(launch.gemv, x, m, y, "scaled", row) for m in ours])

    def bf16() -> Callable[[], float]:
        x_bf16 = torch.randn(1, k, device=device, dtype=torch.bfloat16)
        return microseconds([partial(F.linear, x_bf16, torch.randn(n, k, device=device, dtype=torch.bfloat16))
                             for _ in range(copies(2 * n * k, cache_bytes))])

    def theirs() -> Callable[[], float]:
        kernel = microsoft_kernel(microsoft)
        one = torch.ones(6, device=device, dtype=torch.bfloat16)
        x_i8 = torch.ones(k, dtype=torch.int8, device=device)
        y_bf16 = torch.full((n,), math.nan, dtype=torch.bfloat16, device=device)
        kernel(x_i8, torch.zeros(n, k // 4, dtype=torch.uint8, device=device), y_bf16, one, one, n, k)
        if y_bf16.isnan().any():  # its launches fail in silence
            raise RuntimeError("Microsoft's kernel has not written its results")
        return microseconds([partial(kernel, x_i8, torch.randint(0, 256, (n, k // 4), dtype=torch.uint8, device=device),
                                     y_bf16, one, one, n, k) for _ in range(copies(n * k // 4, cache_bytes))])

    clocks = {name: attempt(f"GEMV {n} x {k}, {name}", make, failed)
              for name, make in (("ternary", ternary), ("bf16", bf16), ("microsoft", theirs))
              if name != "microsoft" or microsoft}
    rounds: dict[str, list[float]] = {name: [] for name, clock in clocks.items() if clock}
    for _ in range(repeats):
        for name in rounds:
            rounds[name].append(clocks[name]())  # type: ignore[misc]
    return {"n": n, "k": k, "copies": len(ours), "weight_bytes": n * k // 4, "exact": exact,
            "us": {name: statistics.median(values) for name, values in rounds.items()}, "rounds_us": rounds}


# ---------------------------------------------------------------------------------------------------- whole models
def random_packed(config: ModelConfig, head: str) -> Packed:
    """A packed model of random weights, as if read from a file."""
    make = random_weights()
    tensors = {}
    for entry in packed_file.entries(config, "trit2", head):
        array, scale = make(entry)
        tensors[entry.name] = array
        if scale is not None:
            tensors[scale_of(entry.name)] = scale
    return Packed(config, "trit2", head, tensors, {})


def relu2(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Bf16Twin:
    """The full-precision twin in bf16, as fast as plain torch runs it: joined matrices, compiled
    elementwise functions, static cache, CUDA graphs."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        c, self.device = config, device
        self.config = config
        qkv = c.n_embd + 2 * c.n_kv_head * c.head_dim
        self.wte = self.random(c.vocab_size, c.n_embd)
        self.layers = [[self.random(*shape) for shape in ((qkv, c.n_embd), (c.n_embd, c.n_embd), (2 * c.n_ff, c.n_embd),
                                                          (c.n_embd, c.n_ff))] for _ in range(c.n_layer)]
        self.ones = {width: torch.ones(width, device=device, dtype=torch.bfloat16) for width in (c.n_embd, c.n_ff)}
        self.tables = rotary_tables(0, c.block_size, c.head_dim, c.rope_theta, device)
        self.positions = torch.arange(c.block_size, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        compiled = torch.compile if device.type == "cuda" else lambda function: function
        self.rotate, self.gated = compiled(rotate), compiled(relu2 if c.act == "relu2" else silu)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16) * 0.02

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.ones[x.shape[-1]], self.config.norm_eps)

    def reset(self, batch: int, window: int) -> None:
        """A cache of `window` positions, for `batch` sequences."""
        from engine.cuda import Graphs

        c = self.config
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.graphs, self.window = Graphs(self.device), window
        self.cache = torch.zeros((2, c.n_layer, batch, c.n_kv_head, window, c.head_dim), device=self.device,
                                 dtype=torch.bfloat16)
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Logits (B, V) of the last of tokens (B, T), which stand at positions `at` (T,)."""
        c = self.config
        (B, T), D = tokens.shape, c.head_dim
        cos, sin = (table[at] for table in self.tables)
        mask = None if T > 1 else self.positions[:self.window] <= at[:, None]                  # (T, S)
        x = F.embedding(tokens, self.wte)
        for i, (qkv, o, gate_up, down) in enumerate(self.layers):
            both, v = F.linear(self.norm(x), qkv).view(B, T, -1, D).transpose(1, 2).split(
                (c.n_head + c.n_kv_head, c.n_kv_head), dim=1)                                  # (B, heads, T, D)
            q, k = self.rotate(both, cos, sin).split((c.n_head, c.n_kv_head), dim=1)
            self.cache[0, i].index_copy_(2, at, k)
            self.cache[1, i].index_copy_(2, at, v)
            if mask is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.n_head != c.n_kv_head)
                y = y.transpose(1, 2)
            else:  # one query a head: heads of a group side by side, as plain products
                keys, values = self.cache[:, i]
                scores = q.reshape(B, c.n_kv_head, -1, D) @ keys.transpose(-1, -2) * D**-0.5   # (B, G, H / G, S)
                y = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ values
            x = x + F.linear(self.norm(y.reshape(B, T, -1)), o)
            gate, up = F.linear(self.norm(x), gate_up).chunk(2, dim=-1)
            x = x + F.linear(self.norm(self.gated(gate, up)), down)
        return F.linear(self.norm(x[:, -1]), self.wte)

    def decode(self) -> Tensor:
        self.ids.copy_(self.forward(self.ids, self.at).argmax(dim=-1, keepdim=True))
        self.at.add_(1)
        return self.ids

    def prefill(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        return self.graphs.run(T, lambda tokens: self.forward(tokens, self.positions[:T]), tokens)


def model_rows(config: ModelConfig, settings: CudaConfig, device: torch.device, batches: list[int],
               lengths: list[int], sizes: dict[str, int], failed: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Decode and prefill of both twins: rows of the report. `sizes` gets the bytes of each one's weights."""
    from engine.cuda import CUDAEngine

    def built(name: str, make: Callable[[], Made]) -> Made | None:
        before = torch.cuda.memory_allocated(device)
        made = attempt(f"{name} weights", make, failed)
        sizes[name] = torch.cuda.memory_allocated(device) - before
        return made

    engine = built("ternary", lambda: CUDAEngine(random_packed(config, settings.head), device))
    twin = built("bf16", lambda: Bf16Twin(config, device))
    if engine is not None:
        sizes["ternary"] -= engine.cache.nbytes
    rng = np.random.default_rng(0)

    def row(what: str, tokens: int, works: dict[str, Callable[[], object] | None]) -> dict[str, Any]:
        made = timed(what, tokens, works, settings.repeats, failed)
        for name, model in (("ternary", engine), ("bf16", twin)):
            if model is not None and model.graphs.refused:  # then it is slower than it could be
                failed[f"{what}, {name}: CUDA graphs"] = model.graphs.refused
        return made

    for batch in batches:
        prompt = rng.integers(0, config.vocab_size, PROMPT).tolist()
        works: dict[str, Callable[[], object] | None] = {
            "ternary": partial(decode, engine, prompt, batch, settings.decode) if engine else None,
            "bf16": partial(decode_bf16, twin, prompt, batch, settings.decode) if twin else None}
        if twin:
            attempt(f"bf16 cache, batch {batch}", partial(twin.reset, batch, PROMPT + settings.decode), failed)
        yield row(f"decode, batch {batch}", batch * settings.decode, works)
    for length in lengths:
        tokens = rng.integers(0, config.vocab_size, (1, length))
        if twin:
            attempt(f"bf16 cache, {length} tokens", partial(twin.reset, 1, length), failed)
        works = {"ternary": partial(prefill, engine, tokens) if engine else None,
                 "bf16": partial(prefill_bf16, twin, tokens) if twin else None}
        yield row(f"prefill, {length} tokens", length, works)


def decode(engine: Any, prompt: list[int], batch: int, tokens: int) -> None:
    for _ in engine.generate(prompt, batch, tokens, temperature=0):
        pass


def prefill(engine: Any, tokens: Any) -> None:
    engine.reset(1)
    engine.feed(tokens)


def prefill_bf16(twin: Bf16Twin, tokens: Any) -> None:
    twin.prefill(torch.from_numpy(tokens))


def decode_bf16(twin: Bf16Twin, prompt: list[int], batch: int, tokens: int) -> None:
    twin.prefill(torch.tensor([prompt] * batch))
    twin.at.fill_(len(prompt))
    for _ in range(tokens - 1):
        ids = twin.graphs.run("step", twin.decode)
    ids.cpu()


def timed(what: str, tokens: int, works: dict[str, Callable[[], object] | None], repeats: int,
          failed: dict[str, str]) -> dict[str, Any]:
    """tok/s of those that work, taking turns; two rounds before, in which kernels are compiled and graphs captured."""
    def twice(work: Callable[[], object]) -> Callable[[], object]:
        work()
        work()
        return work

    ready = {name: attempt(f"{what}, {name}", partial(twice, work), failed) for name, work in works.items() if work}
    rounds: dict[str, list[float]] = {name: [] for name, work in ready.items() if work}

    def take_turns() -> None:
        for _ in range(repeats):
            for name in rounds:
                rounds[name].append(tokens / seconds(ready[name]))  # type: ignore[arg-type]

    attempt(f"{what}, {repeats} rounds", take_turns, failed)
    return {"what": what, "tok_per_sec": {name: statistics.median(values) for name, values in rounds.items() if values},
            "rounds_tok_per_sec": rounds}


# ---------------------------------------------------------------------------------------------------- the report
def numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--{flag} {text!r}: whole numbers from 1 on are wanted, separated by commas: --{flag} 1,8.")
    return found


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person; - where nothing could be measured."""
    rate = report["bandwidth_bytes_per_sec"] or math.nan

    def cell(value: float, text: str) -> str:
        return "-" if math.isnan(value) else text.format(value)

    def of(row: dict[str, float], name: str) -> float:
        return row.get(name, math.nan)

    names = ["ternary", "bf16", *["microsoft"] * any("microsoft" in row["us"] for row in report["gemv"])]
    lines = [f"{report['gpu']}, {report['date']}; memory reads at {cell(rate / 1e9, '{:,.0f}')} GB/s",
             f"{'GEMV, us':16}" + "".join(f"{name:>12}" for name in names) + f"{'bandwidth':>11}"
             + "".join(f"{name + ' /':>13}" for name in names[1:])]
    for row in report["gemv"]:
        us = [of(row["us"], name) for name in names]
        lines.append(f"{row['n']:6} x {row['k']:<7}" + "".join(f"{cell(value, '{:.2f}'):>12}" for value in us)
                     + f"{cell(row['weight_bytes'] / (us[0] * 1e-6 * rate), '{:.0%}'):>11}"
                     + "".join(f"{cell(value / us[0], '{:.2f}x'):>13}" for value in us[1:])
                     + {True: "", False: "  WRONG SUMS", None: "  sums not compared"}[row["exact"]])
    lines.append(f"{report['shape'] + ', tok/s':24}{'ternary':>12}{'bf16':>12}")
    for row in report["model_rows"]:
        ours, bf16 = (of(row["tok_per_sec"], name) for name in ("ternary", "bf16"))
        lines.append(f"{row['what']:24}{cell(ours, '{:,.1f}'):>12}{cell(bf16, '{:,.1f}'):>12}"
                     f"{cell(ours / bf16, '{:.2f}x'):>9}")
    lines.append("weights on the GPU: " + ", ".join(f"{name} {size / 1e6:,.0f} MB"
                                                    for name, size in report["weight_bytes"].items()))
    return "\n".join(lines + [f"left out: {what}: {why}" for what, why in report["failed"].items()])


def main(argv: list[str]) -> None:
    given = vars(parser(__doc__, [CudaConfig]).parse(argv))
    settings: CudaConfig = build([CudaConfig], given)[0]
    batches, lengths = numbers(settings.batch, "batch"), numbers(settings.prefill, "prefill")
    config: ModelConfig = build([ModelConfig], read_toml(settings.config, [ModelConfig, TrainConfig], "bitgpt"))[0]
    config = config.resolved()
    config.vocab_size = config.vocab_size or 512
    config.block_size = max(*lengths, PROMPT + settings.decode)
    try:
        gpu.require(settings.device)  # before Triton is imported, which may not be there
        from engine.cuda import device_called

        device = device_called(settings.device)
    except NoKernel as why:
        raise UserError(f"--device {settings.device}: {why}. Without --device, bench.py measures the CPU.") from None
    if settings.microsoft:
        microsoft_kernel(settings.microsoft)  # a wrong path is told at once
    about, today = torch.cuda.get_device_properties(device), datetime.date.today().isoformat()
    failed: dict[str, str] = {}
    report: dict[str, Any] = {
        "command": "python bench.py --device cuda " + " ".join(argv), "date": today, "gpu": about.name,
        "capability": f"{about.major}.{about.minor}", "processors": about.multi_processor_count,
        "l2_cache_bytes": about.L2_cache_size, "torch": torch.__version__, "cuda": torch.version.cuda,
        "shape": Path(settings.config).stem, "model": dataclasses.asdict(config), "head": settings.head,
        "weights": "random", "decode": settings.decode, "prompt": PROMPT, "bandwidth_bytes_per_sec": None,
        "weight_bytes": {}, "gemv": [], "model_rows": [], "failed": failed}
    name = re.sub(r"[^a-z0-9]+", "-", about.name.lower()).strip("-")
    save = place(settings.save or str(ROOT / "docs" / "results" / f"cuda-{name}-{today}"))
    start = time.perf_counter()

    def keep() -> None:
        report["seconds"] = time.perf_counter() - start
        write_json(save.with_name(save.name + ".json"), report)

    with torch.cuda.device(device), torch.inference_mode():
        report["bandwidth_bytes_per_sec"] = attempt("bandwidth", partial(bandwidth, device), failed)
        for n, k in SHAPES:
            row = attempt(f"GEMV {n} x {k}", partial(gemv_row, n, k, device, about.L2_cache_size, settings.microsoft,
                                                     settings.repeats, failed), failed)
            report["gemv"] += [row] if row else []
            keep()
        for row in model_rows(config, settings, device, batches, lengths, report["weight_bytes"], failed):
            report["model_rows"].append(row)
            keep()
    print(table(report))
    print(f"{save}.json written", file=sys.stderr)
