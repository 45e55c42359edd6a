"""Trains both twins in lockstep on the same batches and says what ternary weights cost and win.

    python compare.py --config configs/shakespeare.toml          # into runs/compare
    python compare.py --gpt-lr 1e-3 --bitgpt-lr 2e-3 --resume    # a setting for one twin alone; go on where stopped
    python compare.py runs/gpt runs/bitgpt                       # report on runs that are there, into runs/report

Leaves comparison.html (curves, table, samples, settings in one page), comparison.json, losses.png, samples.txt and the
two run folders, gpt/ and bitgpt/, in --out-dir.
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import contextlib
import dataclasses
import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from bitgpt.bitlinear import BitLinear
from bitgpt.model import MODELS
from core.config import TWINS, add_flag, convert, fields_of, flag, read_toml
from core.distributed import every_rank
from core.files import UserError, command_line, make_folder, read_json, write_json, write_text
from core.metrics import plot_losses, read_metrics, series
from core.page import clean, write_page
from core.run_folder import check_free, check_sources, holds_run, read_config, state_of, weights_file
from data.corpus import sha256
from data.tokenizer import Tokenizer, load_tokenizer
from engine import load
from engine.sampling import TextStream
from train import train
from training.settings import NO_MATTER, SETTINGS, out_dir_of, read_arguments, settings_for, training_parser
from training.trainer import Trainer

ONE_TWIN_ALONE = ("optimizer", "lr", "muon_lr", "min_lr", "schedule", "warmup_iters", "weight_decay",
                  "muon_weight_decay", "wd_until", "dropout", "distill", "distill_weight")
IN_COMMON = ("max_iters", "batch_size", "grad_accum", "block_size", "seed", "dataset", "text_field", "tokenizer")
HOW_ALONE = {"dataset", "init_from", "distill", "compile", "checkpointing", "fsdp"}  # where it lies, how it computes
PACKED_BITS = (8, 2, 1.6, 1)
LEAST_BITS = {"sign": 1, "int2": 2}  # of a weight; else a trit's
REPORT = ("comparison.html", "losses.png", "samples.txt", "comparison.json")  # by the last one it is known


def summary(run: Path) -> dict[str, Any]:
    """What the report says of one run: figures from its metrics, sizes from its shape, a sample."""
    import torch

    saved = read_config(run)
    records = read_metrics(run)
    evaluated = [record for record in records if "val_loss" in record]
    state = state_of(run)
    best = next((record for record in evaluated if record["step"] == state.get("step")),
                min(evaluated, key=lambda record: record["val_loss"]))  # of best.safetensors; an import may not say
    with torch.device("meta"):  # sizes need shapes, not weights
        model = MODELS[saved.twin](saved.model)
    linears = [module for module in model.modules() if isinstance(module, BitLinear)]
    ternary = sum(linear.weight.numel() for linear in linears)
    scales = sum(linear.out_features if linear.per_row else 1 for linear in linears)
    others = model.num_params() - ternary
    sizes = {f"size_bytes_at_{bits}_bits": math.ceil(ternary * bits / 8) + 4 * scales + 2 * others
             for bits in PACKED_BITS if bits >= LEAST_BITS.get(saved.model.weight_quant, 1.6)} if ternary else {}
    last = {key: values[-1] if values else None
            for key in ("zeros", "flipped") for values in [series(records, key)[1]]}
    tokenizer = load_tokenizer(run / "tokenizer.json")
    text = sample(run, tokenizer)  # first: it says what is wrong with a checkpoint
    return {"run": str(run), "twin": saved.twin, "tokenizer": f"{tokenizer.name} {tokenizer.vocab_size}",
            "tokenizer_sha256": sha256(json.dumps(tokenizer.to_json())),
            "text_sha256": str(state.get("corpus", "")), "eval_batches": eval_batches(state, saved.model.block_size),
            "steps": records[-1]["step"], "best_step": best["step"],
            "val_loss": best["val_loss"], "val_bpb": best.get("val_bpb"),
            "final_val_loss": series(records, "val_loss")[1][-1],
            "train_loss": series(records, "train_loss")[1][-1] if series(records, "train_loss")[1] else None,
            "optimizer": "adamw" if saved.train.get("optimizer") != "muon" else
                         f"muon {number(saved.train.get('muon_lr')) or ''}".strip(),
            "lr": number(saved.train.get("lr")), "dropout": saved.model.dropout,
            "tok_per_sec": statistics.median(series(records, "tok_per_sec")[1] or [0.0]),
            "parameters": model.num_params(), "ternary_parameters": ternary,
            "checkpoint_bytes": weights_file(run).stat().st_size, "size_bytes_at_16_bits": 2 * model.num_params(),
            **sizes, **last, "sample": text}


def eval_batches(state: dict[str, Any], block_size: int) -> list[int]:
    """`Trainer.eval_batches` of a checkpoint; empty where it does not say. It did not always say the block size."""
    found = state.get("eval_batches")
    if not isinstance(found, list) or not all(type(value) is int for value in found):
        return []
    return [*found, block_size if any(found) else 0] if len(found) == 2 else found


def number(value: Any) -> float | None:
    """The value where it is one: a config.json may be a stranger's, or that of an import."""
    return value if type(value) in (int, float) else None


def sample(run: Path, tokenizer: Tokenizer, tokens: int = 300) -> str:
    """A text from the run's best weights; the same for the same weights."""
    stream = TextStream(tokenizer)
    ids = load(run, kernel="torch").generate(tokenizer.start(), max_new_tokens=tokens, temperature=0.8, top_k=200)
    return clean("".join([stream.feed(int(new[0])) for new in ids] + [stream.finish()])).strip("\n")


def same_text(runs: list[dict[str, Any]]) -> bool:
    """As far as the runs say what they were trained on."""
    return len({run["text_sha256"] for run in runs if run["text_sha256"]}) <= 1


def comparable(runs: list[dict[str, Any]], per_byte: bool = False) -> bool:
    """Whether their losses are of the same tokens, as far as the runs say which those are; or, per byte, of the same
    text: the tokenizers may be different where all of it is evaluated."""
    batches = {tuple(run["eval_batches"]) for run in runs if run["eval_batches"]}
    same_tokenizer = len({run["tokenizer_sha256"] for run in runs}) == 1
    return same_text(runs) and len(batches) <= 1 and (same_tokenizer or per_byte and not any(map(any, batches)))


def cells(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The summaries side by side, a row a figure; for two runs also how the second compares with the first. Losses of
    different tokens are not compared, only bits per byte, and nothing between different texts."""
    per_token, per_byte = comparable(runs), comparable(runs, per_byte=True)

    def count(value: float) -> str:
        return f"{value:,.0f}"

    def size(value: float) -> str:
        return f"{value / 1e6:,.2f} MB"

    def share(value: float) -> str:
        return f"{100 * value:.1f}%"

    rows: list[tuple[str, str, Any]] = [
        ("validation loss (nats/token, best)", "val_loss", "{:.4f}".format), ("  at step", "best_step", count),
        ("validation loss at the last step", "final_val_loss", "{:.4f}".format),
        ("bits per byte", "val_bpb", "{:.4f}".format), ("training loss, last", "train_loss", "{:.4f}".format),
        *([] if same_text(runs) else [("text (sha256)", "text_sha256", lambda text: text[:8])]),
        ("tokenizer", "tokenizer", str), ("optimizer", "optimizer", str),
        ("learning rate", "lr", "{:g}".format), ("dropout", "dropout", "{:g}".format),
        ("training speed (tok/s, median)", "tok_per_sec", count), ("parameters", "parameters", count),
        ("  of them ternary", "ternary_parameters", count), ("checkpoint, fp32, on disk", "checkpoint_bytes", size),
        ("weights at 16 bits (computed)", "size_bytes_at_16_bits", size),
        *((f"ternary at {bits:g} bits, rest at 16 (computed)", f"size_bytes_at_{bits}_bits", size)
          for bits in PACKED_BITS),
        ("zeros among the trits", "zeros", share), ("trits flipped since the previous evaluation", "flipped", share)]
    lines = [["", *(run["label"] for run in runs)] + (["difference"] if len(runs) == 2 else [])]
    for title, key, text in rows:
        values = [run.get(key) for run in runs]
        line = [title, *("-" if value is None else text(value) for value in values)]
        if len(runs) == 2:
            a, b = (value or 0 for value in values)
            line.append(f"{b - a:+.4f}" if a and b and (per_byte if key == "val_bpb" else per_token and "loss" in key)
                        else f"x {b / a:.2f}" if a and b and key in ("tok_per_sec", "checkpoint_bytes") else "")
        lines.append(line)
    return [line for line in lines if any(cell not in ("-", "") for cell in line[1:])]


def table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def report(runs: list[Path], out: Path, command: list[str]) -> None:
    """Prints the table and the samples of the runs and writes them, with a plot and a page, into `out`. command: the
    arguments that this script was given."""
    summaries = [summary(run) for run in runs]
    twins = [run["twin"] for run in summaries]
    for run in summaries:  # runs of one twin are told apart by their folders
        run["label"] = run["twin"] if len(set(twins)) == len(twins) else Path(run["run"]).name
    labels = [run["label"] for run in summaries]
    if len(set(labels)) < len(labels):
        for run in summaries:
            run["label"] = run["run"]
    make_folder(out, "--out-dir")
    write_json(out / "comparison.json", {"runs": summaries})
    records = {run["label"]: read_metrics(Path(run["run"])) for run in summaries}
    plot_losses(records, out / "losses.png", comparable(summaries))
    samples = "\n".join(f"--- {run['label']} ---\n{run['sample']}\n" for run in summaries)
    write_text(out / "samples.txt", samples)
    lines = cells(summaries)
    write_page(out / "comparison.html", " and ".join(records), machine(),
               shlex.join(["python", "compare.py", *command]), records, comparable(summaries), lines,
               {run["label"]: run["sample"] for run in summaries},
               {run["label"]: settings_of(Path(run["run"])) for run in summaries})
    print(f"\n{table(lines)}\n\n{samples}")
    print(f"page: {out / 'comparison.html'}\ntable: {out / 'comparison.json'}\nplot: {out / 'losses.png'}\n"
          f"samples: {out / 'samples.txt'}")
    print(f"runs: {', '.join(map(str, runs))}; sample one with python {twins[-1]}/generate.py "
          f"--out-dir {shlex.quote(str(runs[-1]))}")


def settings_of(run: Path) -> dict[str, Any]:
    saved = read_config(run)
    return dataclasses.asdict(saved.model) | saved.train


def machine() -> str:
    """Where and when the report was made."""
    import torch

    return f"{date.today()}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads, " \
           f"Python {platform.python_version()}, torch {torch.__version__}"


def check_report(out: Path) -> None:
    """UserError where the report would take the place of a file that is none."""
    with contextlib.suppress(UserError):
        before = read_json(out / REPORT[-1])
        if isinstance(before, dict) and "runs" in before:
            return
    foreign = next((name for name in REPORT if (out / name).exists()), "")
    if foreign:
        raise UserError(f"--out-dir {out} holds {foreign}, which compare.py did not write and would overwrite. Name "
                        "another folder.")


def check_unchanged(trainer: Trainer, asked: Iterable[str]) -> None:
    """UserError where a run that is finished was trained with other settings than those that were asked for. (That a
    text or a model under another name is the same one has been checked before.)"""
    saved, now = settings_of(trainer.run), dataclasses.asdict(trainer.model.config) | dataclasses.asdict(trainer.config)
    known = fields_of(SETTINGS)
    for name in asked:
        before = convert(*known[name], saved[name], name) if name in saved else now[name]
        if name not in NO_MATTER | HOW_ALONE and before != now[name]:
            raise UserError(f"{trainer.run} is finished, and was trained with {flag(name)} {before}; {now[name]} "
                            "would change nothing now. Leave it out, train longer with --max-iters, or train again "
                            "with --overwrite.")


@command_line
@every_rank
def main(argv: list[str] | None = None) -> None:
    flags = training_parser(__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished runs to report on",
                       default=argparse.SUPPRESS)
    fields = fields_of(SETTINGS)
    for twin in TWINS:
        group = flags.add_argument_group(f"{twin} alone")
        for name in ONE_TWIN_ALONE:
            add_flag(group, *fields[name], prefix=f"{twin}_")
    command = sys.argv[1:] if argv is None else argv
    given, toml, resume, overwrite = read_arguments(flags, command)
    runs = given.pop("runs", [])
    out = Path(out_dir_of(given, toml, "") or ("runs/report" if runs else "runs/compare"))
    given.pop("out_dir", None)
    if runs:
        if given or toml or resume or overwrite:
            raise UserError("runs that are there are compared as they are: give no training flags beside them.")
        if any(out.resolve() == run.resolve() for run in runs):
            raise UserError(f"--out-dir {out} is one of the runs. Name another folder for the report.")
        if len({run.resolve() for run in runs}) < len(runs):
            raise UserError("a run is named twice. Name each run once.")
        check_report(out)
        report(runs, out, command)
        return
    alone = {twin: {name: given.pop(f"{twin}_{name}") for name in ONE_TWIN_ALONE if f"{twin}_{name}" in given}
             for twin in TWINS}
    if resume and not any(holds_run(out / twin) for twin in TWINS):
        raise UserError(f"{out} holds no comparison to go on with. Leave out --resume, or name its --out-dir.")
    goes_on = {twin: resume and holds_run(out / twin) for twin in TWINS}  # a kill may have come before the second
    if resume and not all(goes_on.values()):
        twin = next(twin for twin in TWINS if not goes_on[twin])
        raise UserError(f"{out} has no run of {twin} to go on with. Begin anew with --overwrite, or train that "
                        "run alone, with the settings in the other's config.json.")
    settings = {twin: settings_for(twin, given | alone[twin], toml, out / twin, goes_on[twin]) for twin in TWINS}
    for name in IN_COMMON:
        values = {twin: (vars(model) | vars(config))[name] for twin, (model, config) in settings.items()}
        if len(set(values.values())) > 1:
            raise UserError(f"the twins' {name} differ ({' and '.join(map(str, values.values()))}). In lockstep they "
                            f"take the same steps on the same batches: give one {flag(name)}.")
    check_report(out)
    for _, config in settings.values() if overwrite else ():
        check_sources([out / twin for twin in TWINS], config)
    for twin in TWINS:  # before the first of them writes anything
        if not goes_on[twin]:
            check_free(out / twin, overwrite)
    trainers = [Trainer(MODELS[twin], model, dataclasses.replace(config, out_dir=str(out / twin)), goes_on[twin],
                        overwrite) for twin, (model, config) in settings.items()]
    for twin, trainer in zip(TWINS, trainers, strict=True):
        if goes_on[twin] and trainer.done:
            check_unchanged(trainer, (read_toml(toml, SETTINGS, twin) | given | alone[twin]).keys())
    if trainers[0].corpus.tokenizer.to_json() != trainers[1].corpus.tokenizer.to_json():
        raise UserError("the twins' tokenizers differ, and with them the batches. Start both from the same model, or "
                        "neither.")
    for left in [out / name for name in REPORT if (out / name).exists()]:  # of an earlier comparison in this folder
        left.unlink()
    train(trainers)
    if trainers[0].world.is_main:
        report([trainer.run for trainer in trainers], out, command)


if __name__ == "__main__":
    main()
