"""Trains one run for every combination of settings and seeds, and tells which was best.

    python sweep.py --model gpt bitgpt --config configs/shakespeare.toml --lr 1e-3 2e-3 --seed 1 2 3
    python sweep.py --config configs/shakespeare.toml --act silu relu2      # more runs into the same table
    python sweep.py                                                         # the table and the plot once more

Any flag of train.py takes several values here. Runs are processes of train.py on one thread each, --jobs at once.
Leaves in --out-dir the run folders, results.jsonl (a line a finished run), table.txt and plot.png. Killed or stopped,
it goes on when called again: what is finished is not repeated, what is not is resumed, and a run that still trains (a
killed sweep leaves its runs alone) is waited for. A text that was edited since is another text.
"""

import core.script  # noqa: F401  quiet Ctrl-C

# isort: split
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.config import TWINS, fields_of, flag
from core.files import UserError, atomic_file, command_line, make_folder, write_text
from core.metrics import drawing, read_metrics, series
from core.progress import progress
from core.run_folder import FolderLock, holds_run, read_config, state_of
from data.bins import text_sha256
from training.settings import (
    NO_MATTER,
    OF_QUANTIZATION,
    SETTINGS,
    out_dir_of,
    read_arguments,
    settings_for,
    training_parser,
)

Settings = dict[str, Any]
# What of a path counts: the same text may lie elsewhere, and is known by its hash.
PATHS: dict[str, Callable[[str], str]] = {
    "dataset": lambda path: Path(path).name, "init_from": os.path.normpath, "distill": os.path.normpath}
FEW = 3  # settings, so that rows stay short
TOKENS = ("dataset", "text_sha256", "text_field", "tokenizer", "vocab_size")  # what losses are of
DEFAULTS = {name: field.default for name, (field, _) in fields_of(SETTINGS).items()}
TRAIN = Path(__file__).with_name("train.py")


@dataclasses.dataclass(eq=False)
class Run:
    """given: its own flags; settings: those that differ from the defaults, and the seed; steps: optimizer steps."""

    twin: str
    given: Settings
    settings: Settings
    text_sha256: str
    folder: Path
    steps: int

    def start(self, toml: str, errors: Path) -> subprocess.Popen[bytes]:
        """errors: the file for what it has to say; a pipe might fill before anybody reads it."""
        flags = [f"{flag(name)}={value}" for name, value in {"threads": 1, "verbose": 0, **self.given}.items()]
        flags += [f"--config={toml}"] * bool(toml) + ["--resume"] * holds_run(self.folder)
        with open(errors, "wb") as stderr:
            return subprocess.Popen([sys.executable, TRAIN, f"--model={self.twin}", f"--out-dir={self.folder}", *flags],
                                    stdout=subprocess.DEVNULL, stderr=stderr,
                                    start_new_session=True)  # Ctrl-C comes here alone, and is passed on

    def busy(self) -> bool:
        """Whether a process trains it already."""
        try:
            if self.folder.is_dir():
                FolderLock(self.folder).release()
        except UserError:
            return True
        return False

    def key(self) -> str:
        return key_of(self.twin, self.settings, self.text_sha256)

    def result(self) -> Settings:
        """Its line in results.jsonl."""
        records = read_metrics(self.folder)
        steps, losses = series(records, "val_loss")
        last = {key: values[-1] for key in ("train_loss", "zeros", "flipped")
                for values in [series(records, key)[1]] if values}
        return {"twin": self.twin, "settings": self.settings, "text_sha256": state_of(self.folder)["corpus"],
                "dtype": read_config(self.folder).train["dtype"],  # what the machine made of auto
                "steps": steps[-1], "val_loss": min(losses), "best_step": steps[losses.index(min(losses))],
                "final_val_loss": losses[-1], **last, "date": time.strftime("%Y-%m-%d")}


def key_of(twin: str, settings: Settings, text: str) -> str:
    """What tells a run from others."""
    return json.dumps([twin, settings, text], sort_keys=True)


def last_step(run: Path) -> int:
    """How far a run is, by its metrics."""
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):  # not begun, or in the middle of a line
        return 0


def runs_of(given: dict[str, list[Any]], toml: str, out: Path) -> Iterator[Run]:
    """The runs asked for, seed by seed. UserError where the settings of one do not fit together."""
    hash_of = functools.cache(text_sha256)
    names = sorted(given, key=lambda name: name != "seed")
    for values in itertools.product(*(given[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        twin = chosen.pop("model")
        model, config = settings_for(twin, chosen, toml, out, resume=False)
        settings = {name: PATHS[name](value) if name in PATHS else value
                    for name, value in (dataclasses.asdict(model) | dataclasses.asdict(config)).items()
                    if name not in NO_MATTER and (name == "seed" or value != DEFAULTS[name])
                    and (twin == "bitgpt" or name not in OF_QUANTIZATION)}
        told = ",".join([twin, *(f"{name}={value}" for name, value in settings.items()
                                if name == "seed" or (name in chosen and name not in PATHS))])
        text = hash_of(config.dataset, config.text_field)
        mark = hashlib.sha256(key_of(twin, settings, text).encode()).hexdigest()[:8]
        yield Run(twin, chosen, settings, text, out / f"{told[:150].replace(os.sep, '-')},{mark}", config.max_iters)


def read_results(path: Path) -> list[Settings]:
    """The lines of results.jsonl, of a run that has several (two sweeps waited for it) the last."""
    results = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            result = json.loads(line)
            results[key_of(result["twin"], result["settings"], result["text_sha256"]), result["steps"]] = result
            float(result["val_loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged ({error!r}). Remove it; its run is then read again."
                            ) from None
    return list(results.values())


def train_all(runs: list[Run], toml: str, jobs: int, results: Path) -> int:
    """Trains the runs, `jobs` at once, and writes a line as each is done. Returns how many failed."""
    waiting, running, done, failed = list(runs), dict[Run, subprocess.Popen[bytes]](), list[Run](), 0
    told: list[Run] = []  # which are waited for
    for name in ("SIGTERM", "SIGHUP"):  # a kill, or a closed terminal, stops them as Ctrl-C does
        number = getattr(signal, name, None)  # Windows lacks one
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, signal.default_int_handler)
    with progress(total=sum(run.steps for run in runs), unit="step", disable=not runs) as bar, \
            tempfile.TemporaryDirectory() as temporary:
        try:
            while waiting or running:
                while len(running) < jobs and (run := next((run for run in waiting if not run.busy()), None)):
                    waiting.remove(run)
                    running[run] = run.start(toml, Path(temporary, run.folder.name))
                for run in waiting if len(running) < jobs else ():
                    if run not in told:
                        told.append(run)
                        bar.write(f"waiting for {run.folder.name}: another process trains it", sys.stderr)
                time.sleep(0.5)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    del running[run]
                    if last_step(run.folder) < run.steps and run.busy():  # another sweep was faster
                        waiting.append(run)
                        continue
                    done.append(run)
                    if last_step(run.folder) < run.steps:
                        failed += 1
                        said = Path(temporary, run.folder.name).read_text(encoding="utf-8", errors="replace")
                        bar.write(f"{run.folder.name}: {said[-2000:].strip()}", sys.stderr)
                        continue
                    result = run.result()
                    with open(results, "a", encoding="utf-8", newline="\n") as file:  # other sweeps may append to it
                        file.write(json.dumps(result) + "\n")
                    bar.write(f"{result['val_loss']:.4f}  {run.folder.name}")
                bar.update(sum(run.steps for run in done) + sum(last_step(run.folder) for run in running) - bar.n)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()
    return failed


def summary(results: list[Settings]) -> list[Settings]:
    """The runs that differ in nothing but the seed as one, the best first, those of other texts, tokenizers or
    evaluation batches apart.
    `what`: the settings that tell it from the others of the table; `tokens`: what its losses are of."""
    texts = defaultdict[Any, set[str]](set)
    for result in results:
        texts[result["settings"].get("dataset")].add(result["text_sha256"])
    groups = defaultdict[str, list[Settings]](list)
    for result in results:
        settings = {key: value for key, value in result["settings"].items() if key != "seed"}
        if len(texts[settings.get("dataset")]) > 1:  # one was edited, or has the name of another
            settings["text_sha256"] = result["text_sha256"][:8]
        key = json.dumps([result["twin"], settings, result["steps"]], sort_keys=True)
        groups[key].append(result | {"settings": settings})
    tables = [members[0]["settings"] for members in groups.values()]
    told = [key for key in dict.fromkeys(key for table in tables for key in table)
            if len({json.dumps(table.get(key)) for table in tables}) > 1]
    rows = []
    for members in groups.values():
        losses = [member["val_loss"] for member in members]
        twin, settings = members[0]["twin"], members[0]["settings"]
        if len(told) <= FEW:  # else what is not as by default is enough
            settings = {key: value for key, value in DEFAULTS.items()
                        if value != "" and (twin == "bitgpt" or key not in OF_QUANTIZATION)} | settings
        rows.append({"twin": twin, "losses": losses, "mean": statistics.fmean(losses),
                     "tokens": [settings.get(name) for name in TOKENS] + evaluated(settings),
                     "what": " ".join(f"{key}={settings[key]}" for key in told if key in settings)})
    return sorted(rows, key=lambda row: (str(row["tokens"]), row["mean"]))


def evaluated(settings: Settings) -> list[Any]:
    """What else a loss is of where an evaluation takes a few batches."""
    names = ("eval_iters", "batch_size", "block_size")
    return [settings.get(name, DEFAULTS[name]) for name in names] if settings.get("eval_iters") else []


def table(rows: list[Settings]) -> str:
    lines = ["  mean    lowest  highest  seeds  twin    what differs"]
    for i, row in enumerate(rows):
        lines += [""] * (i > 0 and row["tokens"] != rows[i - 1]["tokens"])
        lines.append(f"{row['mean']:.4f}  {min(row['losses']):.4f}   {max(row['losses']):.4f}  {len(row['losses']):5}  "
                     f"{row['twin']:6}  {row['what']}".rstrip())
    if "" in lines:
        lines += ["", "Losses are per token: those of other texts, tokenizers or evaluation batches stand apart, and "
                  "do not compare."]
    return "\n".join(lines) + "\n"


def plot(rows: list[Settings], path: Path) -> None:
    """A row a setting: a dot for each seed, a line at their mean."""
    pyplot = drawing()
    colors = dict(zip(TWINS, ("#1f6f8b", "#d1495b"), strict=True))
    labels = [f"{row['twin']} {row['what']}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(5 + 0.06 * max(map(len, labels)), 1 + 0.25 * len(rows)),  # 0.06: a letter
                                   layout="constrained")
    for y, row in enumerate(rows):
        axes.plot(row["losses"], [y] * len(row["losses"]), "o", color=colors[row["twin"]], markersize=4, alpha=0.6)
        axes.plot([row["mean"]] * 2, [y - 0.35, y + 0.35], color=colors[row["twin"]])
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("best validation loss, nats per token")
    axes.grid(alpha=0.25)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    pyplot.close(figure)


@command_line
def main(argv: list[str] | None = None) -> None:
    flags = training_parser(__doc__, several=True)
    flags.add_argument("--model", choices=TWINS, nargs="+", help="which twins [bitgpt]")
    flags.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    given, toml, resume, overwrite = read_arguments(flags, argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("sweep.py starts processes of its own: call it without torchrun, with --jobs.")
    if resume or overwrite:
        raise UserError("sweeps always resume and never overwrite. For new runs name another --out-dir.")
    jobs, folders = given.pop("jobs"), given.pop("out_dir", [out_dir_of({}, toml, "") or "runs/sweep"])
    if len(folders) > 1:
        raise UserError(f"--out-dir {' '.join(folders)}: a sweep has one folder. Name one.")
    out = Path(folders[0])
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least one run at a time.")
    results, failed = out / "results.jsonl", 0
    if given or toml:
        values: dict[str, list[Any]] = {"model": ["bitgpt"]}
        values |= {name: value or [True] if isinstance(value, list) else [value] for name, value in given.items()}
        there = {key_of(one["twin"], one["settings"], one["text_sha256"]) for one in read_results(results)}
        runs = list({run.folder: run for run in runs_of(values, toml, out)  # what is named twice is one run
                     if run.key() not in there}.values())
        foreign = next((name for name in ("table.txt", "plot.png") if (out / name).exists()), "")
        if foreign and not results.exists() and not any(out.glob("*/config.json")):
            raise UserError(f"--out-dir {out} holds {foreign}, which sweep.py did not write and would overwrite. Name "
                            "another folder.")
        make_folder(out, "--out-dir")
        failed = train_all(runs, toml, jobs, results)
    rows = summary(read_results(results))
    if rows:
        write_text(out / "table.txt", table(rows))
        plot(rows, out / "plot.png")
        print(f"\n{table(rows)}\nresults: {results}\ntable: {out / 'table.txt'}\nplot: {out / 'plot.png'}")
    if failed:
        raise UserError(f"{failed} of the runs failed, as said above. Called again, the sweep tries them once more.")
    if not rows:
        raise UserError(f"{results} has no finished run yet. Name what to try: sweep.py --lr 1e-3 2e-3 --seed 1 2 3")


if __name__ == "__main__":
    main()
