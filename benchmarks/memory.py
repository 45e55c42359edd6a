"""`python bench.py memory`: what a model weighs, at any width of its weights, on disk, in memory and in training.

    python bench.py memory --config configs/gpt2_124m.toml
    python bench.py memory --config configs/bitnet_2b.toml --no-train

The first column is computed: the linear layers at so many bits; embedding and head at 32, 16, and from there on 8 bits
(--head for what is measured), norms in fp32. The measured ones come from the engines that compute at that width: the
file they read, and the memory of their process, one each, after generating. Training is measured in a process for each
twin: two steps of the config's batch with AdamW, as train.py takes them. Weights are random: nothing here depends on
what they are.
"""

import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import speed
from benchmarks.process import COMMAND, ROOT, Worker, cpu_name, of_proc, peak_memory, place
from benchmarks.training import Training
from core.config import MOST_THREADS, TWINS, ModelConfig, build, parser, read_toml, setting
from core.files import UserError, write_json
from engine import packed_file
from engine.packed_file import entries
from training.settings import TrainConfig

WIDTHS = {"fp32": (32, 32, "gpt-torch"), "bf16": (16, 16, "gpt-cpu"), "8 bits": (8, 8, "bitgpt-torch"),
          "2 bits": (2, 8, "bitgpt-cpu"), "1.6 bits": (1.6, 8, "bitgpt-cpu-1.6")}  # linear, tables, engine


@dataclasses.dataclass
class MemoryConfig:
    """What is measured."""

    head: str = setting("q8", "embedding and head of the packed ternary files", choices=packed_file.HEADS)
    threads: int = setting(0, "CPU threads (0: the physical cores)", low=0, high=MOST_THREADS)
    tokens: int = setting(128, "tokens that are generated, at most block_size", low=1)
    train: bool = setting(True, "measure training too")
    batch_size: int = setting(0, "sequences in a micro-batch (0: the config's)", low=0)
    save: str = setting("", "write SAVE.json (default: runs/bench/ and the shape's name)", path=True)


def main(argv: list[str]) -> None:
    flags = parser(__doc__, [MemoryConfig, ModelConfig], command="memory")
    flags.add_argument("--config", help="a TOML file whose shape is taken [configs/shakespeare_10m.toml]")
    given = vars(flags.parse(argv))
    settings: MemoryConfig = build([MemoryConfig], given)[0]
    path = given.pop("config", None) or str(ROOT / "configs" / "shakespeare_10m.toml")
    toml = read_toml(path, [ModelConfig, TrainConfig], "bitgpt")
    config, train = build([ModelConfig, TrainConfig], toml, {key: given[key] for key in given if key != "batch_size"})
    config = config.resolved()
    config.vocab_size = config.vocab_size or 512
    batch_size = settings.batch_size or train.batch_size
    from engine.cpu import default_threads

    threads = settings.threads or default_threads()
    save = place(settings.save or f"runs/bench/{Path(path).stem}-memory")
    linear, tables, norms = counts(config)
    rows = []
    for width, (bits, table_bits, engine) in WIDTHS.items():
        computed = math.ceil((linear * bits + tables * table_bits) / 8) + 4 * norms
        rows.append({"width": width, "computed_bytes": computed, "engine": engine,
                     **generating(engine, config, settings, threads, computed)})
    least = 16 * (linear + tables + norms)  # weights, gradients and AdamW's two moments, all fp32
    training = []
    for twin in TWINS if settings.train else ():
        if least > available():
            training.append({"twin": twin, "peak_bytes": None, "at_least_bytes": least})
        else:
            print(f"training {twin} ...", file=sys.stderr, flush=True)
            spec = {"model": twin, "config": dataclasses.asdict(config), "batch": batch_size, "dtype": train.dtype,
                    "threads": threads, "checkpointing": train.checkpointing}
            training.append({"twin": twin, "at_least_bytes": least, **alone(spec)})
    report = {"command": "python bench.py memory " + " ".join(argv), "date": datetime.date.today().isoformat(),
              "cpu": cpu_name(), "shape": Path(path).stem, "model": dataclasses.asdict(config),
              "head": settings.head, "linear_weights": linear, "table_weights": tables, "norm_weights": norms,
              "tokens": settings.tokens, "batch_size": batch_size, "dtype": train.dtype, "widths": rows,
              "training": training}
    print(table(report))
    write_json(save.with_name(save.name + ".json"), report)
    print(f"{save}.json written", file=sys.stderr)


def counts(config: ModelConfig) -> tuple[int, int, int]:
    """How many weights are in linear layers (ternary in bitgpt), in embedding and head, and in norms."""
    sizes = {"linear": 0, "tables": 0, "norms": 0}
    for entry in entries(config, "trit2", "q8"):
        sizes[{"trit2": "linear", "q8": "tables"}.get(entry.kind, "norms")] += math.prod(entry.shape)
    return sizes["linear"], sizes["tables"], sizes["norms"]


def available() -> int:
    """Bytes of memory that are free for a process; where nobody tells, all that can be asked for."""
    free = of_proc("meminfo", "MemAvailable")
    return 1024 * int(free.split()[0]) if free else 2**63


def generating(engine: str, config: ModelConfig, settings: MemoryConfig, threads: int,
               computed: int) -> dict[str, int | None]:
    """Bytes of the file that the engine reads, of its process after generating, and before it had loaded anything."""
    nothing: dict[str, int | None] = {"disk_bytes": None, "peak_bytes": None, "baseline_bytes": None}
    if 1.2 * computed > available():
        return nothing
    print(f"generating with {engine} ...", file=sys.stderr, flush=True)
    spec: dict[str, Any] = {"engine": engine, "model": dataclasses.asdict(config), "threads": threads, "packed": "",
                            "run": "", "depth": 0, "kv_cache": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        disk = 4 * sum(counts(config)) if engine == "gpt-torch" else None  # torch packs the 8 bits as it loads
        if engine in speed.WEIGHTS:
            path = speed.packed_for(engine, config, None, settings.head, Path(folder))
            spec["packed"], disk = str(path), path.stat().st_size
        worker = Worker(engine, "speed", **spec)
        try:
            worker.ask("decode", 1, min(settings.tokens, config.block_size))
            return {"disk_bytes": disk, "peak_bytes": int(worker.ask("memory")),
                    "baseline_bytes": worker.about["baseline_bytes"]}
        finally:
            worker.close()


def alone(spec: dict[str, Any]) -> dict[str, int | None]:
    """`worker` in a process of its own. UserError where that ends before it has told."""
    process = subprocess.run([*COMMAND, "memory", json.dumps(spec)], text=True, stdout=subprocess.PIPE,
                             env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])})
    if process.returncode:
        raise UserError(f"training {spec['model']} ended (exit code {process.returncode}); out of memory? Take a "
                        "smaller --batch-size, or --no-train.")
    answer: dict[str, int | None] = json.loads(process.stdout)
    return answer


def worker(spec: dict[str, Any]) -> None:
    """Prints what two steps on random tokens took: the second one has its moments from the start."""
    baseline = peak_memory()
    training = Training(**spec)
    for _ in range(2):
        training.step()
    print(json.dumps({"peak_bytes": peak_memory(), "baseline_bytes": baseline}))


def size(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e10 else f"{n_bytes / 1e9:,.1f} GB"


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"{report['shape']}: {report['linear_weights'] / 1e6:,.2f}M weights in linear layers (ternary in bitgpt), "
             f"{report['table_weights'] / 1e6:,.2f}M in embedding and head, {report['norm_weights']:,} in norms",
             f"{'weights':10}{'computed':>14}{'on disk':>14}{'generating':>14}{'before loading':>16}  engine"]
    for row in report["widths"]:
        lines.append(f"{row['width']:10}{size(row['computed_bytes']):>14}{size(row['disk_bytes']):>14}"
                     f"{size(row['peak_bytes']):>14}{size(row['baseline_bytes']):>16}  {speed.ENGINES[row['engine']]}")
    for row in report["training"]:
        peak = size(row["peak_bytes"]) if row["peak_bytes"] else "not measured: more than there is"
        lines.append(f"training {row['twin']}, {report['batch_size']} x {report['model']['block_size']} tokens: peak "
                     f"{peak} (weights, gradients and AdamW alone: {size(row['at_least_bytes'])})")
    return "\n".join(lines)
