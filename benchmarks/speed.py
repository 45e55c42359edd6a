"""How fast, how big: the full-precision twin, the ternary one in torch, and the ternary one packed, side by side.

    python bench.py                                                  # random weights at the shape of shakespeare_10m
    python bench.py --config configs/gpt2_124m.toml --threads 2      # ... at another shape
    python bench.py --config configs/bitnet_2b.toml --engines gpt-cpu,bitgpt-cpu,bitgpt-cpu-1.6 --repeats 3
    python bench.py --out-dir runs/bitgpt                            # a trained run
    python bench.py memory --config configs/gpt2_124m.toml           # what weights take at every width
    python bench.py train                                            # how fast both twins train
    python bench.py --device cuda                                    # the GPU's kernels

Every engine runs in a process of its own, which tells its peak memory (on the GPU, where it computes there); the
processes take turns, round after round, because a machine's speed drifts by more than what engines differ. Medians are
shown; JSON and a plot go to --save.
Speed does not depend on what the weights are, so random ones will do where no run is given.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import ROOT, Worker, cpu_name, names_of, peak_memory, place
from core.config import MOST_THREADS, ModelConfig, build, fields_of, flag, parser, read_toml, setting
from core.files import UserError, atomic_file, write_json
from core.metrics import drawing
from core.run_folder import read_config, weights_file, write_config
from core.safetensors_file import huge_memory, open_safetensors
from engine import KV_CACHES, packed_file
from engine.cpu import CPUEngine, all_codes, library
from engine.packed_file import Entry, Packed, entries, scale_of
from engine.packing import unpackable
from kernels import gpu
from kernels.build import NoKernel
from kernels.format import KINDS, Array, valid_bytes
from training.settings import TrainConfig

ENGINES = {"gpt-torch": "full precision, torch fp32", "gpt-cpu": "full precision, C bf16",
           "bitgpt-torch": "ternary, torch int8", "bitgpt-cpu": "ternary, C 2 bits",
           "bitgpt-cpu-1.6": "ternary, C 1.6 bits", "bitgpt-triton": "ternary, Triton 2 bits, GPU"}
WEIGHTS = {"gpt-cpu": "bf16", "bitgpt-cpu": "trit2", "bitgpt-cpu-1.6": "trit1.6", "bitgpt-triton": "trit2"}
ON_GPU = ("bitgpt-triton",)


@dataclasses.dataclass
class BenchConfig:
    """What is measured."""

    out_dir: str = setting("", "a trained run folder (default: random weights at the shape of --config)", path=True)
    engines: str = setting("", f"which of {', '.join(ENGINES)} (default: all that run here)")
    head: str = setting("q8", "embedding and head of the packed ternary runs", choices=packed_file.HEADS)
    threads: int = setting(0, "CPU threads (0: the physical cores)", low=0, high=MOST_THREADS)
    prefill: int = setting(512, "tokens of the prompt, at most a trained run's block_size", low=1)
    decode: int = setting(128, "tokens to generate one by one, as far as block_size allows", low=1)
    depth: int = setting(0, "tokens in the cache before those", low=0)
    kv_cache: str = setting("fp32", "keys and values of the C engines", choices=KV_CACHES)
    batch: int = setting(8, "sequences of the batched decode", low=1)
    repeats: int = setting(5, "rounds; the median counts", low=1)
    save: str = setting("", "write SAVE.json and SAVE.png (default: runs/bench/ and the shape's name)", path=True)


# ---------------------------------------------------------------------------------------------------- one engine
def random_weights(scale: str = "tensor") -> Callable[[Entry], tuple[Array, Array | None]]:
    """`make` of packed_file.write: random codes with scales that keep activations near 1. scale: of ModelConfig."""
    rng = np.random.default_rng(0)

    def make(entry: Entry) -> tuple[Array, Array | None]:
        if not entry.kind:
            return np.ones(entry.shape, np.float32), None
        n, k = entry.shape
        shape = packed_file.packed_shape(entry.kind, n, k)
        if entry.kind == "bf16":  # sign, an exponent near 2^-6, random mantissa
            bits = rng.integers(0, 2**16, math.prod(shape) // 2, dtype=np.uint16)
            return (bits & 0x80FF | 0x3C00).astype("<u2").view(np.uint8).reshape(shape), None
        if not entry.kind.startswith("trit"):
            return rng.integers(0, 256, shape, dtype=np.uint8), np.full(n, 0.05 / KINDS[entry.kind].largest, np.float32)
        codes = valid_bytes(entry.kind)
        packed = codes[rng.integers(0, len(codes), shape, dtype=np.uint8)]
        return packed, np.full(n if scale == "row" else (), 1 / math.sqrt(k), np.float32)

    return make


def random_torch(twin: str, config: ModelConfig) -> Any:
    """A torch engine with random weights, whose latent matrices are never all in memory at once."""
    import torch

    from bitgpt.bitlinear import BitLinear
    from bitgpt.model import MODELS
    from engine.reference import TernaryLinear, TorchEngine

    with torch.device("meta"):
        model = MODELS[twin](config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BitLinear):
                setattr(module, name, TernaryLinear(BitLinear(child.in_features, child.out_features)))
        for name, weight in list(module.named_parameters(recurse=False)):
            values = torch.randn(weight.shape) * 0.02 if weight.dim() == 2 else torch.ones(weight.shape)
            setattr(module, name, torch.nn.Parameter(values))
    return TorchEngine(model)


def load_engine(spec: dict[str, Any]) -> Any:
    """The engine that a worker's specification names."""
    config = ModelConfig(**spec["model"])
    if spec["engine"].endswith("torch"):
        import torch

        torch.set_num_threads(spec["threads"])
        if spec["run"]:
            from engine.reference import TorchEngine
            return TorchEngine.from_run(Path(spec["run"]), device="cpu")
        return random_torch(spec["engine"].split("-")[0], config)
    if spec["engine"] in ON_GPU:
        from engine.cuda import CUDAEngine, device_called

        return CUDAEngine.from_file(Path(spec["packed"]), config, device_called("auto"))
    packed = packed_file.read(Path(spec["packed"]), config, lambda kind, packed: all_codes(library(), kind, packed))
    return CPUEngine(packed, spec["threads"], kv_cache=spec["kv_cache"])


def measure(engine: Any, tokens: Array, depth: int, lengths: list[int]) -> float:
    """Seconds to feed tokens (B, depth + T) in chunks of these lengths, from a cache that holds `depth` of them."""
    engine.reset(len(tokens))
    if depth:
        engine.forward(tokens[:, :depth])
    at, start = depth, time.perf_counter()
    for length in lengths:
        engine.forward(tokens[:, at:at + length])
        at += length
    return time.perf_counter() - start


def worker(spec: dict[str, Any]) -> None:
    """Answers each line of standard input, [what, batch, prefill or decode], with a line of JSON."""
    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    baseline, start = peak_memory(), time.perf_counter()
    try:
        engine: Any = None
        if spec["engine"] == "bandwidth":
            memory = huge_memory(spec["bytes"])
            memory[:] = 1
        else:
            engine = load_engine(spec)
            engine.forward(np.zeros((1, 1), np.int64))
    except (UserError, NoKernel) as error:
        say(error=str(error))
        return
    say(load_s=time.perf_counter() - start, isa=getattr(engine, "isa", ""), baseline_bytes=baseline)
    for line in sys.stdin:
        what, batch, length = json.loads(line)
        if what == "bandwidth":
            say(value=[statistics.median(
                library().bitgpt_bandwidth(memory.ctypes.data, memory.size, spec["threads"], streams, how)
                for _ in range(5)) for streams in (1, 2) for how in range(4)])  # how: enum prefetch
        elif what == "memory":
            say(value=getattr(engine, "peak_memory", peak_memory)())
        else:
            depth, lengths = (0, [length]) if what == "prefill" else (spec["depth"], [1] * length)
            tokens = np.random.default_rng(1).integers(0, engine.config.vocab_size, (batch, depth + length))
            for _ in range(3 if spec["engine"] in ON_GPU else 1):  # what comes a second time becomes a CUDA graph
                seconds = measure(engine, tokens, depth, lengths)
            say(value=batch * length / seconds)


# ---------------------------------------------------------------------------------------------------- all of them
def packed_for(name: str, config: ModelConfig, run: Path | None, head: str, folder: Path) -> Path:
    """The packed file that engine `name` reads: made in `folder`, of the run's weights or of random ones."""
    weights = WEIGHTS[name]
    head = "bf16" if weights == "bf16" else head
    if run is None:
        path = folder / f"model.{name}.safetensors"
        packed_file.write(path, config, weights, head, {}, random_weights(config.scale))
        return path
    from engine.packing import pack_run

    copy = folder / name  # a run folder of its own, so that the run's own packed file stays as it is
    copy.mkdir()
    write_config(copy, "bitgpt", config, dataclasses.asdict(TrainConfig()))
    source = weights_file(run)
    (copy / source.name).symlink_to(source.resolve())
    return pack_run(copy, "best", weights, head)[0]


def bytes_read(packed: Packed, depth: int, decode: int, number_bytes: int) -> int:
    """What a decoded token makes the engine read, in the mean over `decode` of them behind `depth` others: the weights,
    all but the embedding, unless that is the head too; and keys and values of the tokens before it, `number_bytes` each
    of their numbers."""
    c = packed.config
    listed = [e.name for e in entries(c, packed.weights, packed.head) if c.tie_embeddings or e.name != "wte.weight"]
    weights = sum(packed.tensors[name].nbytes for entry in listed for name in (entry, scale_of(entry))
                  if name in packed.tensors)
    return weights + 2 * c.n_layer * c.n_kv_head * c.head_dim * number_bytes * (2 * depth + decode - 1) // 2


@contextlib.contextmanager
def workers(config: ModelConfig, names: list[str], run: Path | None, twin: str, settings: BenchConfig,
            threads: int) -> Iterator[tuple[dict[str, Worker], dict[str, int], dict[str, int]]]:
    """(workers by name, bytes on disk, bytes read a token)."""
    made: dict[str, Worker] = {}
    disk, read = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for name in names:
                print(f"loading {name} ...", file=sys.stderr, flush=True)
                of_run = run if run is not None and name.split("-")[0] == twin else None
                spec: dict[str, Any] = {
                    "engine": name, "model": dataclasses.asdict(config), "threads": threads, "packed": "",
                    "depth": settings.depth, "kv_cache": settings.kv_cache,
                    "run": str(of_run) if of_run else ""}
                if name in WEIGHTS:
                    path = packed_for(name, config, of_run, settings.head, Path(temporary))
                    spec["packed"], disk[name] = str(path), path.stat().st_size
                    tensors, metadata = open_safetensors(path)
                    packed = Packed(config, metadata["weights"], metadata["head"], tensors, metadata)
                    number_bytes = 2 if name in ON_GPU or settings.kv_cache == "bf16" else 4
                    read[name] = bytes_read(packed, settings.depth, settings.decode, number_bytes)
                else:  # torch reads the latent weights of either twin, fp32
                    disk[name] = 4 * sum(math.prod(e.shape) for e in entries(config, "bf16", "bf16"))
                made[name] = Worker(name, "speed", **spec)
            size = max([64 << 20, *read.values()])
            with contextlib.suppress(UserError):  # no compiler: no bandwidth
                made["bandwidth"] = Worker("bandwidth", "speed", engine="bandwidth", bytes=size, threads=threads)
            yield made, disk, read
        finally:
            for one in made.values():
                one.close()


def engines_here() -> list[str]:
    """All engines that this machine can run; says what is left out for want of a compiler, or on a GPU."""
    left_out: list[str] = []
    try:
        gpu.require()
    except NoKernel as why:
        left_out += ON_GPU
        if gpu.capabilities():
            print(f"note: {', '.join(ON_GPU)} left out: {why}", file=sys.stderr)
    try:
        library()
    except NoKernel as why:
        of_c = [name for name in WEIGHTS if name not in ON_GPU]
        left_out += of_c
        print(f"note: {', '.join(of_c)} left out: {why}", file=sys.stderr)
    return [name for name in ENGINES if name not in left_out]


def main(argv: list[str]) -> None:
    flags = parser(__doc__, [BenchConfig, ModelConfig])
    flags.add_argument("--config", help="a TOML file whose shape is taken [configs/shakespeare_10m.toml]")
    given = vars(flags.parse(argv))
    settings: BenchConfig = build([BenchConfig], given)[0]
    names = names_of(settings.engines, ENGINES, "--engines") if settings.engines else engines_here()
    run = Path(settings.out_dir) if settings.out_dir else None
    twin, label = "", ""
    if run is not None:
        shape = [flag(name) for name in given if name in ("config", *fields_of([ModelConfig]))]
        if shape:
            raise UserError(f"{shape[0]}: {run} has a shape of its own. Leave it out, or take --out-dir out for random "
                            "weights.")
        twin, config, _ = read_config(run)
        label = run.name
    else:
        path = given.pop("config", None) or str(ROOT / "configs" / "shakespeare_10m.toml")
        config = build([ModelConfig], read_toml(path, [ModelConfig, TrainConfig], "bitgpt"), given)[0].resolved()
        config.vocab_size = config.vocab_size or 512
        needed = max(settings.prefill, settings.depth + settings.decode)
        if needed > config.block_size and "block_size" in given:
            raise UserError(f"--block-size {config.block_size} has no room for the {needed} tokens of --prefill, or of "
                            "--depth and --decode. Raise it, or lower those.")
        config.block_size = max(config.block_size, needed)
        label = Path(path).stem
    unfit = {name: unpackable(name.split("-")[0], config) for name in WEIGHTS}
    if any(unfit.get(name) for name in names):
        others = ",".join(name for name in ENGINES if not unfit.get(name))
        raise UserError(f"the packed kernels do not know {next(filter(None, unfit.values()))}. Measure others: "
                        f"--engines {others}.")
    prefill, decode = min(settings.prefill, config.block_size), min(settings.decode, config.block_size - settings.depth)
    if decode < 1:
        raise UserError(f"--depth {settings.depth} leaves no room in the run's block_size of {config.block_size}. "
                        "Take less.")
    settings = dataclasses.replace(settings, prefill=prefill, decode=decode)
    from engine.cpu import default_threads

    threads = settings.threads or default_threads()
    save = place(settings.save or f"runs/bench/{label}")
    runs = {name: dict[str, list[float]](decode=[], decode_batch=[], prefill=[]) for name in names}
    bandwidths: list[list[float]] = []  # of each round, of every way to read
    with workers(config, names, run, twin, settings, threads) as (processes, disk, read):
        engines = {name: processes[name] for name in names}
        for one in engines.values():  # caches and clocks warm
            one.ask("decode", 1, min(8, decode))
        memory = {}
        for name, one in engines.items():
            one.ask("prefill", 1, prefill)
            memory[name] = one.ask("memory")  # of one sequence: the batch comes later
        for round_ in range(settings.repeats):
            print(f"round {round_ + 1} of {settings.repeats}", file=sys.stderr, flush=True)
            for name, one in engines.items():
                runs[name]["decode"].append(one.ask("decode", 1, decode))
                runs[name]["prefill"].append(one.ask("prefill", 1, prefill))
                runs[name]["decode_batch"].append(one.ask("decode", settings.batch, max(1, decode // 4)))
            if "bandwidth" in processes:
                bandwidths.append(processes["bandwidth"].ask("bandwidth"))
        about = {name: one.about for name, one in engines.items()}
    bandwidth = max(map(statistics.median, zip(*bandwidths, strict=True)), default=0.0)
    results = []
    for name in names:
        medians = {f"{key}_tok_per_sec": statistics.median(values) for key, values in runs[name].items()}
        of_cpu = name in read and name not in ON_GPU and bandwidth
        share = medians["decode_tok_per_sec"] * read[name] / bandwidth if of_cpu else None
        results.append({"engine": name, "what": ENGINES[name], "isa": about[name]["isa"], **medians,
                        "disk_bytes": disk[name], "read_bytes_per_token": read.get(name),
                        "share_of_bandwidth": share, "peak_memory_bytes": int(memory[name]),
                        "load_s": about[name]["load_s"], "rounds": runs[name]})
    weights = "random" if run is None else "trained" if all(name.split("-")[0] == twin for name in names) else \
        f"trained ({twin}) and random"
    report = {"command": "python bench.py " + " ".join(argv), "date": datetime.date.today().isoformat(),
              "cpu": cpu_name(), "threads": threads, "shape": label, "model": dataclasses.asdict(config),
              "weights": weights, "head": settings.head, "prefill": prefill, "decode": decode,
              "depth": settings.depth, "kv_cache": settings.kv_cache, "batch": settings.batch,
              "bandwidth_bytes_per_sec": bandwidth, "results": results}
    print(table(report))
    write_json(save.with_name(save.name + ".json"), report)
    plot(report, save.with_name(save.name + ".png"))
    print(f"{save}.json and {save}.png written", file=sys.stderr)


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"{report['shape']}, {report['weights']} weights; {report['cpu']}, {report['threads']} threads; "
             f"memory reads at {report['bandwidth_bytes_per_sec'] / 1e9:.1f} GB/s; tok/s, medians"
             + (f"; decoding behind {report['depth']:,} tokens" if report["depth"] else "")
             + ("; the C engines keep keys and values as bf16" if report["kv_cache"] == "bf16" else ""),
             f"{'':28}{'decode':>9}{'batch ' + str(report['batch']):>10}{'prefill':>10}{'on disk':>11}{'in memory':>11}"
             f"{'bandwidth':>11}"]
    first = report["results"][0]["decode_tok_per_sec"]
    for one in report["results"]:
        share = "-" if not one["share_of_bandwidth"] else \
            f"{one['share_of_bandwidth']:.0%}" if one["share_of_bandwidth"] < 1.2 else "in caches"
        lines.append(f"{one['what']:28}{one['decode_tok_per_sec']:9,.1f}{one['decode_batch_tok_per_sec']:10,.1f}"
                     f"{one['prefill_tok_per_sec']:10,.1f}{one['disk_bytes'] / 1e6:8,.1f} MB"
                     f"{one['peak_memory_bytes'] / 1e6:8,.0f} MB{share:>11}"
                     f"{one['decode_tok_per_sec'] / first:8.1f}x")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: decode, prefill, bytes on disk and in memory, an engine a bar."""
    plt = drawing()
    results = report["results"]
    panels = (("decode_tok_per_sec", 1.0, "decode, tok/s"), ("prefill_tok_per_sec", 1.0, "prefill, tok/s"),
              ("disk_bytes", 1e-6, "on disk, MB"), ("peak_memory_bytes", 1e-6, "in memory, MB"))
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 1 + 0.5 * len(results)), sharey=True)
    colors = ["tab:gray" if one["engine"].startswith("gpt") else "tab:blue" for one in results]
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        bars = axis.barh([one["what"] for one in results], [one[key] * unit for one in results], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.25)
        axis.invert_yaxis() if axis is axes[0] else None
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['shape']} ({report['weights']} weights), {report['cpu']}, {report['threads']} threads")
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
