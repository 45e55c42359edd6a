"""`python bench.py train`: how fast both twins train, what memory that takes, and where the time goes.

    python bench.py train                                            # three shapes, both twins
    python bench.py train --shapes baby --nanogpt path/to/nanoGPT    # ... and nanoGPT's own code in the same run
    python bench.py train --models gpt,bitgpt,gpt-compiled,bitgpt-compiled
    python bench.py train --device cuda --nanogpt path/to/nanoGPT    # on a GPU: 124M and 1.3B parameters, compiled

A step is forward, backward, clipping and one AdamW for all weights, on random tokens. Every model runs in a process of
its own, and they take turns, round after round; medians count. nanoGPT runs as its README has it run on a CPU: fp32,
eager, its own optimizer settings, no dropout; on a GPU in bf16 and compiled, as its README has that. A GPU's memory may
hold one model alone, so there they come one after the other. The share is that of the machine's own rate for products
of the kind a step is made of, measured in the same run: what it would reach if it consisted of them alone.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.process import cpu_name, names_of, peak_memory, place
from core.config import MOST_THREADS, TWINS, ModelConfig, build, parser, setting
from core.files import UserError, write_json
from kernels import gpu

# name: (batch, model). tiny and baby are nanoGPT's CPU recipe and its Shakespeare model, without dropout. 1b is GPT-3's
# shape of 1.3 billion parameters.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (12, {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_ff": 336, "block_size": 64, "vocab_size": 65}),
    "baby": (16, {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_ff": 1024, "block_size": 256, "vocab_size": 65}),
    "124m": (4, {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_ff": 2048, "block_size": 1024, "vocab_size": 50304}),
    "1b": (4, {"n_layer": 24, "n_head": 16, "n_embd": 2048, "n_ff": 5376, "block_size": 1024, "vocab_size": 50304})}
USUAL = {"cpu": ("tiny,baby,124m", ",".join(TWINS)),  # shapes and models of a device
         "cuda": ("124m,1b", ",".join(f"{twin}-compiled" for twin in TWINS))}
GPU_BATCH = {"124m": 16, "1b": 8}
MODELS = (*TWINS, *(f"{twin}-compiled" for twin in TWINS), "nanogpt")
KERNELS = ("products", "norms, activation, quantization", "attention", "loss", "weights")  # gpt/weights.h
PARTS = {"products": ("aten::mm", "aten::bmm", "aten::addmm"), "attention": ("scaled_dot_product",),
         "loss": ("nll_loss",), "optimizer": ("adamw", "foreach")}  # what torch calls them


@dataclasses.dataclass
class TrainBenchConfig:
    """What is measured."""

    device: str = setting("cpu", "cpu, cuda or cuda:N")
    shapes: str = setting("", f"which of {', '.join(SHAPES)} (default: tiny,baby,124m; on a GPU 124m,1b)")
    models: str = setting("", f"which of {', '.join(MODELS[:-1])} (default: gpt,bitgpt; on a GPU both compiled)")
    nanogpt: str = setting("", "a folder with nanoGPT's model.py, to measure it too")
    dtype: str = setting("auto", "of the twins' products", choices=("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads (0: the physical cores)", low=0, high=MOST_THREADS)
    repeats: int = setting(5, "rounds; the median counts", low=1)
    seconds: float = setting(1.0, "how long a model trains in a round, at least one step", above=0)
    checkpointing: bool = setting(False, "compute activations again in backward")
    save: str = setting("runs/bench/train", "write SAVE.json", path=True)


class Training:
    """A model in training on one batch of random tokens."""

    def __init__(self, model: str, config: dict[str, Any], batch: int, dtype: str, threads: int, nanogpt: str = "",
                 checkpointing: bool = False, device: str = "cpu") -> None:
        import torch

        from bitgpt.model import MODELS as CLASSES
        from core.runtime import keep_freed_memory, pick_device, pick_dtype

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.device = pick_device(device)
        on_gpu = self.device.type == "cuda"
        self.model: Any
        if model == "nanogpt":
            spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt) / "model.py")
            assert spec is not None and spec.loader is not None
            sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.dtype = pick_dtype("auto", self.device) if on_gpu else "float32"
            known = {key: value for key, value in config.items() if key != "n_ff"}
            self.model = module.GPT(module.GPTConfig(bias=False, dropout=0.0, **known)).to(self.device)
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), self.device.type)
            if on_gpu:
                self.model.compile()
        else:
            keep_freed_memory()
            self.dtype = pick_dtype(dtype, self.device)
            self.model = CLASSES[model.split("-")[0]](ModelConfig(**config).resolved()).to(self.device)
            self.model.checkpointing = checkpointing
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
            if model.endswith("compiled"):
                self.model.compile()
        self.x, self.y = torch.randint(config["vocab_size"], (2, batch, config["block_size"])).to(self.device)

    def step(self) -> float:
        """Takes a step; returns the loss, for which a GPU has to have done all of it."""
        import torch

        from core.runtime import autocast

        with autocast(self.device, self.dtype):
            _, loss = self.model(self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def peak_memory(self) -> int:
        """Bytes on the device at most."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory()

    def parts(self) -> dict[str, float]:
        """Share of a step's time that each of PARTS takes."""
        from torch.profiler import ProfilerActivity, profile

        from gpt import fused

        lib = fused.library()
        spent = [0.0] * len(KERNELS) if lib is None else (ctypes.c_double * len(KERNELS)).in_dll(lib, "fused_seconds")
        before, start = list(spent), time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.step()
            total = time.perf_counter() - start
        seconds = {name: after - first for name, after, first in zip(KERNELS, spent, before, strict=True)}
        for event in profiler.key_averages():
            for part, names in PARTS.items():
                if any(name in event.key for name in names):
                    seconds[part] = seconds.get(part, 0.0) + event.self_cpu_time_total * 1e-6
        shares = {part: second / total for part, second in seconds.items()}
        return shares | {"rest": 1 - sum(shares.values())}


def product_rates(threads: int, device: str) -> dict[str, float]:
    """Operations a second of torch's own products of 2048 x 1024 x 1024 (on a GPU 16384 x 8192 x 8192), by dtype."""
    import torch

    from core.runtime import pick_device

    torch.set_num_threads(threads)
    on_gpu, rates = pick_device(device).type == "cuda", {}
    M, K = (16384, 8192) if on_gpu else (2048, 1024)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        a, b = (torch.ones(M, K, dtype=dtype, device=device), torch.ones(K, K, dtype=dtype, device=device))
        times = []
        for _ in range(40):
            start = time.perf_counter()
            torch._int_mm(a, b.t() if on_gpu else b) if dtype == torch.int8 else a @ b
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
            if sum(times) > 3:  # a CPU without units for it may take seconds for one
                break
        rates[name] = 2 * M * K * K / statistics.median(times[5:] or times)
    return rates


def operations(config: ModelConfig) -> int:
    """Multiplications and additions a token of forward and backward: six a weight of a product, and attention's."""
    kv = config.n_kv_head * config.head_dim
    weights = config.n_layer * (2 * config.n_embd * (config.n_embd + kv) + 3 * config.n_embd * config.n_ff)
    attention = config.n_layer * 6 * config.block_size * config.n_embd  # causal: half of all pairs
    return 6 * (weights + config.n_embd * config.vocab_size) + attention


def worker(spec: dict[str, Any]) -> None:
    """Answers each line of standard input, [what, ...], with a line of JSON."""
    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    try:
        if spec["model"] == "rates":
            say(value=product_rates(spec["threads"], spec["device"]))
            return
        start = time.perf_counter()
        baseline = peak_memory()
        with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints
            training = Training(**spec)
        training.step()
        first = time.perf_counter() - start
        training.step()
    except UserError as error:
        say(error=str(error))
        return
    parameters = sum(weight.numel() for weight in training.model.parameters())
    say(baseline_bytes=baseline, first_step_s=first, parameters=parameters, dtype=training.dtype)
    for line in sys.stdin:
        what, _, seconds = json.loads(line)
        if what == "train":
            times: list[float] = []
            while sum(times) < seconds:
                start = time.perf_counter()
                training.step()
                times.append(time.perf_counter() - start)
            say(value=statistics.median(times))
        elif what == "memory":
            say(value=training.peak_memory())
        else:
            say(value=training.parts() if training.device.type == "cpu" else {})


def gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def main(argv: list[str]) -> None:
    given = vars(parser(__doc__, [TrainBenchConfig], command="train").parse(argv))
    settings: TrainBenchConfig = build([TrainBenchConfig], given)[0]
    kind = settings.device.partition(":")[0]
    if kind not in USUAL:
        raise UserError(f"--device {settings.device}: training is measured on cpu, cuda or cuda:N.")
    if kind == "cuda" and not gpu.capabilities():
        raise UserError(f"--device {settings.device}: no NVIDIA GPU, or no driver for it, on this machine. Without "
                        "--device, the CPU is measured.")
    shapes = names_of(settings.shapes or USUAL[kind][0], SHAPES, "--shapes")
    models = names_of(settings.models or USUAL[kind][1], MODELS[:-1], "--models")
    if settings.nanogpt:
        if not (Path(settings.nanogpt) / "model.py").is_file():
            raise UserError(f"--nanogpt {settings.nanogpt}: no model.py there. Name a folder with nanoGPT's code.")
        models = ["nanogpt", *models]
    from engine.cpu import default_threads

    threads, save = settings.threads or default_threads(), place(settings.save)
    rates = process.Worker("rates", "training", model="rates", threads=threads, device=settings.device).about["value"]
    report = {"command": "python bench.py train " + " ".join(argv), "date": datetime.date.today().isoformat(),
              "cpu": cpu_name(), "gpu": gpu_name(settings.device) if kind == "cuda" else None, "threads": threads,
              "operations_per_sec": rates, "results": []}
    for shape in shapes:
        for together in [[name] for name in models] if kind == "cuda" else [models]:
            try:
                report["results"] += taking_turns(shape, together, settings, threads, rates)
            except UserError as error:  # as where a GPU's memory is too small for one of them
                if kind == "cpu":
                    raise
                print(f"note: {shape} {together[0]} is left out: {error}", file=sys.stderr)
            write_json(save.with_name(save.name + ".json"), report)
    print(table(report))
    print(f"{save}.json written", file=sys.stderr)


def taking_turns(shape: str, models: list[str], settings: TrainBenchConfig, threads: int,
                 rates: dict[str, float]) -> list[dict[str, Any]]:
    """The results of some models of a shape, which are there at the same time."""
    batch, sizes = SHAPES[shape]
    batch = batch if settings.device == "cpu" else GPU_BATCH.get(shape, batch)
    config = ModelConfig(**sizes).resolved()
    tokens, results = batch * config.block_size, []
    running: dict[str, process.Worker] = {}
    rounds: dict[str, list[float]] = {name: [] for name in models}
    try:
        for name in models:
            print(f"{shape}: {name} takes its first steps ...", file=sys.stderr, flush=True)
            running[name] = process.Worker(name, "training", model=name, config=sizes, batch=batch, threads=threads,
                                           dtype=settings.dtype, nanogpt=settings.nanogpt, device=settings.device,
                                           checkpointing=settings.checkpointing)
        for round_ in range(settings.repeats):
            print(f"{shape}: round {round_ + 1} of {settings.repeats}", file=sys.stderr, flush=True)
            for name, one in running.items():
                rounds[name].append(one.ask("train", 0, settings.seconds))
        for name, one in running.items():
            step_s, dtype = statistics.median(rounds[name]), one.about["dtype"]
            results.append({
                "shape": shape, "model": name, "batch": batch, "tok_per_sec": tokens / step_s, "step_s": step_s,
                **one.about, "share_of_products": tokens * operations(config) / step_s / rates[dtype],
                "peak_memory_bytes": int(one.ask("memory")), "parts": one.ask("parts"), "rounds": rounds[name]})
    finally:
        for one in running.values():
            one.close()
    return results


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in report["operations_per_sec"].items())
    lines = [f"{report['gpu'] or report['cpu']}, {report['threads']} threads; products alone, G operations/s: {rates}",
             f"{'':20}{'tok/s':>10}{'ratio':>8}{'of products':>13}{'peak memory':>13}{'first step':>12}"
             f"{'parameters':>13}"]
    for one in report["results"]:
        base = next(r for r in report["results"] if r["shape"] == one["shape"])["tok_per_sec"]
        lines.append(f"{one['shape'] + ' ' + one['model']:20}{one['tok_per_sec']:10,.0f}"
                     f"{one['tok_per_sec'] / base:7.2f}x{one['share_of_products']:13.0%}"
                     f"{one['peak_memory_bytes'] / 1e6:10,.0f} MB{one['first_step_s']:10.1f} s{one['parameters']:13,}")
    divided = [one for one in report["results"] if one["parts"]]
    lines += ["", "where a step's time goes:"] if divided else []
    for one in divided:
        parts = ", ".join(f"{part} {share:.0%}" for part, share in one["parts"].items() if not math.isclose(share, 0))
        lines.append(f"{one['shape'] + ' ' + one['model']:20}{parts}")
    return "\n".join(lines)
