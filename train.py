"""Trains a GPT or its ternary twin: the one training loop.

    python bitgpt/train.py --n-layer 4                        # the ternary GPT, into runs/bitgpt
    python gpt/train.py --config configs/shakespeare.toml     # its full-precision twin, into runs/gpt
    python bitgpt/train.py --resume                           # go on where the last run was stopped
    python train.py --model bitgpt --dataset path/to/book.txt
    torchrun --nproc-per-node 8 bitgpt/train.py               # one run on many GPUs: core/distributed.py

training/trainer.py says what a step is; compare.py drives two trainers in lockstep.
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import shlex
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bitgpt.model import MODELS
from core.config import TWINS
from core.distributed import every_rank
from core.files import UserError, command_line
from core.progress import progress
from gpt.model import GPT
from training.settings import out_dir_of, read_arguments, settings_for, training_parser
from training.trainer import Trainer


def train(trainers: list[Trainer]) -> None:
    """Trains one model, or several in lockstep: the one that is behind goes first. Ctrl-C saves and exits 130."""
    try:
        for trainer in trainers:  # all of them before any is evaluated, which may take minutes: --resume finds them all
            trainer.open()
        for trainer in trainers:
            if not trainer.resumes:
                trainer.evaluate()
        lockstep(trainers)
    finally:
        for trainer in trainers:
            if trainer.lock is not None:
                trainer.lock.release()


def lockstep(trainers: list[Trainer]) -> None:
    world, quiet = trainers[0].world, not trainers[0].config.verbose
    last = max(trainer.config.max_iters for trainer in trainers)
    with world.heed_signals(), progress(total=last, initial=min(t.step for t in trainers), unit="step",
                                        disable=quiet) as bar:
        while True:
            step = min(trainer.step for trainer in trainers)
            evaluated = [t.log.records[-1]["step"] for t in trainers if "val_loss" in t.log.records[-1]]
            if not quiet and evaluated == [step] * len(trainers):
                tqdm.write(evaluation_line(trainers))
            if step >= last:
                break
            for trainer in trainers:
                if trainer.step == step:
                    trainer.advance()
            bar.update(1)
            if any(trainer.losses for trainer in trainers):
                bar.set_postfix_str(" | ".join(f"{t.name} loss {np.mean(t.losses):.3f} {t.tok_per_sec:,.0f} tok/s"
                                               for t in trainers if t.losses), refresh=False)
            if world.stop:
                break
    for trainer in trainers:
        if world.stop:
            trainer.save_last()
        trainer.finish()
    world.shutdown()  # for rank 0 to have written: torchrun ends it when another has ended with a signal's exit code
    if world.stop:
        runs = " and ".join(str(trainer.run) for trainer in trainers)
        if world.is_main:
            saved = "saved" if not any(trainer.skipped_in_a_row for trainer in trainers) else \
                "the checkpoint from before the skipped steps is kept"
            print(f"stopped after step {step + 1}; {saved} in {runs}. Go on with --resume.", file=sys.stderr)
        raise SystemExit(128 + world.stop)


def evaluation_line(trainers: list[Trainer]) -> str:
    records = [trainer.log.records[-1] for trainer in trainers]
    line = f"step {records[0]['step']:>6}"
    for trainer, record in zip(trainers, records, strict=True):
        train_loss = f"train {record['train_loss']:.4f}  " if "train_loss" in record else " " * 14
        line += f"  |  {trainer.name}: {train_loss}val {record['val_loss']:.4f}"
    if len(records) == 2:
        line += f"  |  gap {records[1]['val_loss'] - records[0]['val_loss']:+.4f}"
    return line


@command_line
@every_rank
def main(model_class: type[GPT] | None = None, argv: list[str] | None = None) -> None:
    flags = training_parser(__doc__)
    if model_class is None:
        flags.add_argument("--model", choices=TWINS, default="bitgpt", help="which twin [bitgpt]")
    given, toml, resume, overwrite = read_arguments(flags, argv)
    model_class = model_class or MODELS[given.pop("model")]
    run = Path(out_dir_of(given, toml, model_class.name) or f"runs/{model_class.name}")
    model_config, config = settings_for(model_class.name, given, toml, run, resume)
    trainer = Trainer(model_class, model_config, config, resume, overwrite)
    if trainer.done and resume:
        raise UserError(f"{trainer.run} is already at step {trainer.step} of {config.max_iters}. "
                        f"Train longer with --max-iters {2 * trainer.step}.")
    train([trainer])
    if trainer.config.verbose:
        print(f"best validation loss {trainer.best_val_loss:.4f} nats per token; weights, metrics, plot: {trainer.run}")
        print(f"sample it: python {trainer.name}/generate.py --out-dir {shlex.quote(str(trainer.run))}")


if __name__ == "__main__":
    main()
