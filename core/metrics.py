"""metrics.jsonl: one JSON record a line, appended as training goes; and the plots drawn from it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import UserError, atomic_file

Record = dict[str, Any]
LARGEST = 1e300  # no number of a run comes near; sums of larger ones would overflow


class MetricsLog:
    """Appends records to a run's metrics.jsonl, and to Weights & Biases where that was asked for.

    keep: how many records of an interrupted run to go on from; what was logged after its checkpoint is dropped.
    writes: False for the ranks that only keep the records in mind.
    """

    def __init__(self, run: Path, keep: int, wandb_settings: dict[str, Any] | None, writes: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        there = keep and self.path.is_file()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:keep] if there else []
            if len(lines) < keep:
                raise UserError(f"{self.path} has {len(lines)} records, but the checkpoint was made after {keep}. "
                                "Restore the file, or train again with --overwrite.")
            self.records = [parse(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged ({error}). Restore it, or train again with --overwrite.") from None
        if writes:
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
        self.file = open(self.path if writes else os.devnull, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        self.wandb = None
        if wandb_settings is not None and writes:
            self.wandb = start_wandb(run, wandb_settings)

    def write(self, record: Record) -> None:
        """Numbers that are not finite are left out: JSON has none."""
        record = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
        self.records.append(record)
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk: which file it was about is not said otherwise
            error.filename = str(self.path)
            raise
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])

    def sync(self) -> None:
        """Makes sure that the disk has every record, before a checkpoint counts on them."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def parse(line: str) -> Record:
    """One line of a metrics.jsonl. ValueError where it is no record: the file may be a stranger's."""
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
        raise ValueError(f"{line[:60]!r} is no record")
    for key, value in record.items():
        numbers = value if key.endswith("_by_block") and isinstance(value, list) else [value]
        if not key.isascii() or any(type(n) not in (int, float) or not -LARGEST < n < LARGEST for n in numbers):
            raise ValueError(f"{key!r} is no number: {str(value)[:60]!r}")
    return record


def check_wandb(project: str) -> None:
    """UserError where nothing can be logged, before anything is written."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb-log needs the wandb package. Install it with `pip install wandb`.") from None
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in ("online", "offline", "disabled", "shared", "run", "dryrun"):
        raise UserError(f"WANDB_MODE is {mode!r}, which W&B does not know. Set it to online or offline, or unset it.")
    try:
        if mode not in ("offline", "disabled", "dryrun") and not wandb.login(prompt=False) and mode:
            raise UserError(f"--wandb-log: nobody is logged in, and WANDB_MODE is {mode}. Run `wandb login`, or set "
                            "WANDB_MODE=offline.")
    except (wandb.errors.Error, ValueError) as error:  # a key that is none
        raise no_wandb(error) from None
    wrong = sorted(set(project) & set("/\\#?%:"))
    if wrong or not 0 < len(project) <= 128:
        raise UserError(f"--wandb-project {project!r}: W&B takes 1 to 128 letters there"
                        f"{f', and no {wrong[0]}' if wrong else ''}. Name another project.")


def start_wandb(run: Path, settings: dict[str, Any]) -> Any:
    """A Weights & Biases run, offline where nobody is logged in."""
    import wandb

    offline = not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False)
    try:
        return wandb.init(project=settings["wandb_project"], name=run.name, dir=run, config=settings,
                          mode="offline" if offline else None, reinit="create_new",  # compare.py has two at once
                          settings=wandb.Settings(silent=not settings["verbose"]))
    except (wandb.errors.Error, ValueError) as error:
        raise no_wandb(error) from None


def no_wandb(error: Exception) -> UserError:
    return UserError(f"--wandb-log: {str(error).splitlines()[0].rstrip('.')}. Set WANDB_MODE=offline, or leave it out.")


def read_metrics(run: Path) -> list[Record]:
    """The records of a run. UserError where there are none."""
    path = run / "metrics.jsonl"
    try:
        records = [parse(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {run} is not a run folder. Name one that train.py made.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Restore it from a copy.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Remove the broken line.") from None
    if not any("val_loss" in record for record in records):
        raise UserError(f"{path} has no validation loss yet. Let the run reach its first evaluation.")
    return records


def series(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have `key`."""
    having = [record for record in records if key in record]
    return [record["step"] for record in having], [record[key] for record in having]


def loss_range(runs: Mapping[str, list[Record]]) -> tuple[float, float]:
    """The lowest and the highest loss that a plot shows: all validation losses but the first, which would squeeze
    everything that matters into a corner."""
    losses = [found for records in runs.values() if (found := series(records, "val_loss")[1])] or [[0.0]]
    lowest, later = min(map(min, losses)), [value for values in losses for value in values[1:] or values]
    return lowest - 0.15, max(*later, lowest + 0.5) + 0.15


def val_gap(first: list[Record], second: list[Record]) -> tuple[list[int], list[float]]:
    """(steps, differences of the validation losses) where both have one."""
    a, b = (dict(zip(*series(records, "val_loss"), strict=True)) for records in (first, second))
    steps = sorted(a.keys() & b.keys())
    return steps, [b[step] - a[step] for step in steps]


def plain_label(name: str) -> str:
    """A name as matplotlib shows it: neither mathematics between dollars, nor left out for a _ at its beginning; of a
    long one, such as a sweep's, the end."""
    name = name if len(name) <= 48 else "…" + name[-47:]
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def drawing() -> Any:
    """matplotlib.pyplot, which draws into files, whatever $MPLBACKEND says."""
    os.environ["MPLBACKEND"] = "Agg"  # which matplotlib reads as it is imported, and refuses if it is nonsense
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_losses(runs: Mapping[str, list[Record]], path: Path, comparable: bool = True) -> None:
    """Draws training (thin) and validation loss (marked) of one or more runs; for two, also their gap below, where
    their tokens are the same."""
    pyplot = drawing()

    gap = len(runs) == 2 and comparable
    figure, axes = pyplot.subplots(2 if gap else 1, 1, figsize=(8, 6.5 if gap else 4.5), sharex=True, squeeze=False,
                                   height_ratios=[3, 1] if gap else [1], layout="constrained")
    top = axes[0][0]
    for color, (run, records) in zip(("#1f6f8b", "#d1495b", "#6a994e", "#7b2d8b") * 9, runs.items(), strict=False):
        name = plain_label(run)
        steps, losses = series(records, "train_loss")
        top.plot(steps, losses, color=color, alpha=0.35, linewidth=1, label=f"{name}, training")
        steps, losses = series(records, "val_loss")
        best = (series(records, "best_val_loss")[1] or [min(losses, default=math.nan)])[-1]
        top.plot(steps, losses, color=color, marker="o", markersize=3.5, label=f"{name}, validation (best {best:.4f})")
    top.set_ylabel("loss, nats per token")
    top.set_ylim(*loss_range(runs))
    top.grid(alpha=0.25)
    top.legend(frameon=False)
    if gap:
        first, second = map(plain_label, runs)
        axes[1][0].axhline(0, color="gray", linewidth=0.8)
        axes[1][0].plot(*val_gap(*runs.values()), color="#444444", marker="o", markersize=3.5)
        axes[1][0].set_ylabel(f"{second} - {first}")
        axes[1][0].grid(alpha=0.25)
    axes[-1][0].set_xlabel("step")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
