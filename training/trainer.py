"""One model in training: what a step is, when it is evaluated, and what of it is logged and saved.

    trainer = Trainer(BitGPT, model_config, config).begin()      # makes the run folder; a new run is evaluated
    while not trainer.done:
        trainer.advance()
    trainer.finish()

train.py drives one of these, compare.py two in lockstep. core/run_folder.py says what they leave behind.
"""

import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitgpt.model import load_model, trit_statistics
from core import checkpoint
from core.config import ModelConfig, convert, fields_of
from core.distributed import world
from core.files import UserError
from core.metrics import MetricsLog, Record, check_wandb, plot_losses
from core.run_folder import (
    BEST,
    LAST,
    PREVIOUS,
    FolderLock,
    check_free,
    check_sources,
    erase_run,
    read_config,
    remove_temporary,
    weights_file,
    write_config,
)
from core.runtime import (
    autocast,
    compiler_of_cpp,
    compiling_pays,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    seed_step,
    whole,
)
from data.bins import Corpus, prepare_bins
from data.loader import Loader
from data.tokenizer import Tokenizer, load_tokenizer
from gpt import fused
from gpt.model import GPT
from interop import as_run
from training.optimizers import make_optimizers, moments, restore_moments
from training.settings import WORTH_TUNING, TrainConfig, learning_rate, quantized_share

COUNTS = ("step", "position", "skipped", "skipped_in_a_row")
STATE = (*COUNTS, "best_val_loss", "losses", "seconds", "grad_norm")
SHARES = ("ternary_from", "warmup_quant", "max_iters")  # when quantization comes
MAX_SKIPS = 10  # steps in a row without a finite gradient: the run is lost


class Start(NamedTuple):
    """A checkpoint that training begins with."""

    tokenizer: Tokenizer
    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Trainer:
    """One model in training. `advance` takes a step, and evaluates, logs and saves where that is due.

    A step is a function of the checkpoint, the seed and the step's number alone, so what was stopped and resumed
    equals what was not: bit for bit on a CPU with the same number of threads. With several processes each takes every
    size-th micro-batch, and the step is that of one process with as many times the grad_accum.
    """

    def __init__(self, model_class: type[GPT], model_config: ModelConfig, config: TrainConfig, resume: bool = False,
                 overwrite: bool = False) -> None:
        """Raises UserError. Nothing is written or removed before `open`."""
        self.world = world()
        self.config = config = dataclasses.replace(config, out_dir=config.out_dir or f"runs/{model_class.name}",
                                                   verbose=config.verbose if self.world.is_main else 0)
        self.name = model_class.name
        self.run = Path(config.out_dir)
        self.set_device()
        if config.wandb_log:
            check_wandb(config.wandb_project)
        if not resume:
            check_free(self.run, overwrite)
        if overwrite:
            check_sources([self.run], config)
        self.lock = FolderLock(self.run) if self.world.is_main and self.run.is_dir() else None

        if resume and not any((self.run / name).exists() for name in (LAST, PREVIOUS)) \
                and not got_anywhere(self.run):
            resume, overwrite = False, True  # killed before its first checkpoint: nothing to keep
        shard = config.fsdp and self.world.size > 1
        first = torch.device("cpu") if shard else self.device  # where it is whole, before the ranks share it out
        start = self.load_start(resume, first)
        self.corpus: Corpus = self.world.in_turn(lambda: prepare_bins(  # and all have looked into the folder by then
            config.dataset, config.tokenizer, model_config.vocab_size, block_size=model_config.block_size,
            tokenizer=start and start.tokenizer, text_field=config.text_field,
            text_sha256=str(start.state.get("corpus", "")) if resume and start else "", quiet=not config.verbose))
        config.tokenizer = self.corpus.tokenizer.name  # a run that starts from a checkpoint keeps its tokenizer
        self.model = self.make_model(model_class, model_config, start, first)
        self.teacher = self.load_teacher(Path(config.distill)) if config.distill else None
        self.parallel = self.world.parallel(self.model, self.device, [*self.model.blocks] if shard else [])
        self.compile()
        self.optimizers = make_optimizers(self.model, config)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.train_batches, self.val_batches = (
            Loader(path, self.corpus.dtype, self.model.config.block_size, config.batch_size, config.seed)
            for path in (self.corpus.train, self.corpus.val))

        self.step = 0            # optimizer steps taken
        self.position = 0        # micro-batches drawn, by all processes
        self.best_val_loss = math.inf
        self.skipped = 0         # steps without a finite gradient, in all
        self.skipped_in_a_row = 0
        self.losses: list[float] = []   # of the steps since the last record
        self.seconds = 0.0              # that those steps took
        self.grad_norm = 0.0
        self.trits: dict[str, Tensor] = {}  # the ternary weights at the last evaluation
        self.resumes, self.overwrites = resume, overwrite
        self.kept_records = self.restore(start) if resume and start else 0
        if resume and self.name == "bitgpt" and config.verbose:
            self.tell_less_ternary()
        self.undamaged = start.path if resume and start and start.path.name == PREVIOUS else None

    def set_device(self) -> None:
        config = self.config
        self.device = self.world.device(pick_device(config.device))
        config.dtype = pick_dtype(config.dtype, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if config.threads:
            torch.set_num_threads(config.threads)

    def load_start(self, resume: bool, device: torch.device) -> Start | None:
        """What training begins with: the newest checkpoint of this run, or the best of the one to start from."""
        if not resume and not self.config.init_from:
            return None
        run = self.run if resume else as_run(Path(self.config.init_from))
        tokenizer = load_tokenizer(run / "tokenizer.json")
        if resume:
            return Start(tokenizer, *checkpoint.load_newest(run, device))
        return Start(tokenizer, weights_file(run), *checkpoint.load(weights_file(run), device))

    def make_model(self, model_class: type[GPT], model_config: ModelConfig, start: Start | None,
                   device: torch.device) -> GPT:
        model_config = dataclasses.replace(model_config, vocab_size=self.corpus.tokenizer.vocab_size).resolved()
        if start is not None:
            checkpoint.check_settings(model_class, model_config, start.tensors, start.path)
        torch.manual_seed(self.config.seed)
        model = model_class(model_config).to(device)
        if start is not None:
            checkpoint.load_into(model, start.tensors, start.path)
        model.checkpointing = self.config.checkpointing
        return model

    def compile(self) -> None:
        """torch.compile where it is asked for, or pays."""
        asked = self.config.compile
        if asked == "on" and self.device.type == "cpu" and not compiler_of_cpp():
            raise UserError("--compile on needs a C++ compiler here, and there is none. Install g++, or take --compile "
                            "off.")
        if asked == "on" or (asked == "auto" and self.world.size == 1
                             and compiling_pays(self.device, self.config.max_iters)):
            self.parallel.compile()

    def open(self) -> None:
        """Makes the run folder and the log."""
        config = self.config
        if self.world.is_main:
            self.make_folder(self.overwrites)
            if self.undamaged is not None:  # the damaged one must not take its place
                os.replace(self.undamaged, self.run / LAST)
        settings = dataclasses.asdict(self.model.config) | dataclasses.asdict(config)
        self.log = MetricsLog(self.run, self.kept_records, settings if config.wandb_log else None, self.world.is_main)
        if config.verbose:
            many = f", {self.world.size} processes" if self.world.size > 1 else ""
            print(f"{self.name}: {self.model.num_params():,} parameters on {self.device}{many}")
            for key in settings if config.verbose == 2 else WORTH_TUNING:
                print(f"  {key} = {settings[key]}")
            self.tell_slow()

    def tell_slow(self) -> None:
        """Says so where a CPU could train faster if settings were others."""
        window = torch.empty(1, self.model.config.block_size)
        with autocast(self.device, self.config.dtype):
            fits = self.model.fits_kernels() and fused.fits(self.model.config, window)
        if self.device.type == "cpu" and not fits and self.config.compile != "on" and fused.library():
            print("note: the C kernels do not support these settings (README, 'Training speed'); training in plain "
                  "PyTorch, which is slower", file=sys.stderr)

    def tell_less_ternary(self) -> None:
        """Says so where a resumed run is quantized less than it was: it was given more steps, and quantization begins
        at a share of them."""
        saved, known = read_config(self.run).train, fields_of([TrainConfig])
        try:
            before = dataclasses.replace(self.config, **{name: convert(*known[name], saved[name], name)
                                                         for name in SHARES if name in saved})
        except UserError:  # an older run, whose --warmup-quant were steps
            return
        if quantized_share(self.config, self.step) < quantized_share(before, max(0, self.step - 1)):
            print("note: with so many steps this run is less quantized than before: --ternary-from and --warmup-quant "
                  "are fractions of them. To train on as ternary as it is: --ternary-from 0 --warmup-quant 0",
                  file=sys.stderr)

    def load_teacher(self, run: Path) -> GPT:
        """The model of a run, as it is at its best, to learn from. UserError where its tokens or context differ."""
        model_config = read_config(run).model
        ours, theirs = self.corpus.tokenizer, load_tokenizer(run / "tokenizer.json")
        if ours.to_json() != theirs.to_json():
            raise UserError(f"--distill {run}: it uses a different tokenizer. Train it on the same text, with the same "
                            "--tokenizer.")
        if model_config.block_size < self.model.config.block_size:
            raise UserError(f"--distill {run}: it knows {model_config.block_size} tokens of context, this run has "
                            f"{self.model.config.block_size}. Lower --block-size.")
        return load_model(run, device=self.device).eval().requires_grad_(False)

    def make_folder(self, overwrite: bool) -> None:
        """Makes the run folder and what a run has from its start."""
        try:
            self.run.mkdir(parents=True, exist_ok=self.lock is not None)
            self.lock = self.lock or FolderLock(self.run)
            if overwrite:
                erase_run(self.run)
            remove_temporary(self.run)
            if not self.done:  # else nothing will be trained with what was asked for now
                write_config(self.run, self.name, self.model.config, dataclasses.asdict(self.config))
            self.corpus.tokenizer.save(self.run / "tokenizer.json")
        except OSError as error:
            raise UserError(f"--out-dir {self.run} cannot be written: {error.strerror}. Name another folder.") from None

    @property
    def done(self) -> bool:
        return self.step >= self.config.max_iters

    @property
    def tok_per_sec(self) -> float:
        tokens = self.config.batch_size * self.config.grad_accum * self.model.config.block_size * self.world.size
        return tokens * len(self.losses) / self.seconds if self.seconds else 0.0

    def advance(self) -> None:
        start = time.perf_counter()
        self.losses.append(self.train_step())
        self.seconds += time.perf_counter() - start
        if self.done or self.step % self.config.eval_interval == 0:
            self.evaluate()
        elif self.step % self.config.log_interval == 0:
            self.write_record({})

    # -- one step --------------------------------------------------------------------------------------------------

    def train_step(self) -> float:
        """Forward, backward and update; returns the training loss in nats per token."""
        config = self.config
        seed_step(config.seed, self.step, self.world.rank, self.device)
        for group in self.groups:
            group["lr"] = group["ratio"] * learning_rate(config, self.step)
            group["weight_decay"] = group["decays"] if self.step < config.wd_until * config.max_iters else 0.0
        self.model.quantize(quantized_share(config, self.step))
        if not self.model.training:
            self.model.train()
        total = torch.zeros((), device=self.device)
        with fused.cached_weights(not config.fsdp):
            for micro in range(1, config.grad_accum + 1):
                x, y = self.to_device(self.train_batches.batch(self.position + self.world.rank))  # (B, T) each
                self.position += self.world.size
                self.parallel.require_backward_grad_sync = micro == config.grad_accum  # type: ignore[assignment]
                with autocast(self.device, config.dtype):
                    loss, aim = self.objective(x, y)
                self.scaler.scale(aim / config.grad_accum).backward()
                total += loss.detach() / config.grad_accum
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        train_loss, self.grad_norm = self.world.all_reduce_mean(total, whole(norm))  # the step's one synchronisation
        if math.isfinite(train_loss) and math.isfinite(self.grad_norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skip()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return train_loss

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss in nats per token, and what training lowers: the same, or with a teacher a blend of it and
        KL(teacher || model). arXiv 1503.02531"""
        if self.teacher is None:
            _, loss = self.parallel(x, y)
            return loss, loss
        logits = self.parallel(x, all_logits=True)[0].flatten(0, 1).float()                           # (B T, V)
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(x, all_logits=True)[0].flatten(0, 1).float(), dim=-1)
        loss = F.cross_entropy(logits, y.flatten())
        divergence = F.kl_div(F.log_softmax(logits, dim=-1), wanted, reduction="batchmean", log_target=True)
        return loss, loss.lerp(divergence, self.config.distill_weight)

    def skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPS:
            raise UserError(f"the loss or its gradient was not finite for {MAX_SKIPS} steps in a row, up to step "
                            f"{self.step}. {self.run / LAST} is from before. Try a lower --lr, more "
                            "--warmup-iters, or --dtype float32.")

    def to_device(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(array) for array in batch)
        pinned = self.device.type == "cuda"  # what is not pinned may be gone before a copy that nobody waits for
        if pinned:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=pinned), y.to(self.device, non_blocking=pinned)

    # -- once in a while: evaluate, log, save ----------------------------------------------------------------------

    @torch.no_grad()
    def val_loss(self) -> float:
        """Nats per token over the whole validation split, or over eval_iters of its batches."""
        self.model.eval()
        small = 4096 // self.model.config.block_size  # evaluation needs no gradients: larger batches fit
        size = self.config.batch_size if self.config.eval_iters else max(self.config.batch_size, small)
        total, tokens = 0.0, 0.0
        batches = self.val_batches.eval_batches(size, self.config.eval_iters)
        with fused.cached_weights(not self.config.fsdp):
            for batch, counts in self.world.shard(batches):
                x, y = self.to_device(batch)
                with autocast(self.device, self.config.dtype):
                    _, loss = self.model(x, y)
                total += loss.item() * y.numel() * counts
                tokens += y.numel() * counts
        total, tokens = self.world.all_reduce_sum(total, tokens)
        return total / tokens

    @property
    def eval_batches(self) -> list[int]:
        """(batches, windows in each, tokens in each window) of an evaluation that does not take the whole split, else
        zeros: losses on other batches do not compare."""
        if not self.config.eval_iters:
            return [0, 0, 0]
        return [self.config.eval_iters, self.config.batch_size, self.model.config.block_size]

    def evaluate(self) -> None:
        """Measures, logs and saves: `best` where it is the best, `last` always."""
        val_loss = self.val_loss()
        is_best = val_loss < self.best_val_loss
        if is_best:
            self.best_val_loss = val_loss
        trits = self.model.trits()
        self.write_record({"val_loss": val_loss, "val_bpb": self.corpus.bits_per_byte(val_loss),
                           "best_val_loss": self.best_val_loss, **trit_statistics(trits, self.trits)})
        self.trits = trits
        if is_best:
            self.save(BEST, self.model.state_dict())
        self.save_last()

    def write_record(self, evaluation: Record) -> None:
        record: Record = {"step": self.step}
        if self.losses:
            finite = [loss for loss in self.losses if math.isfinite(loss)]
            record |= {"train_loss": float(np.mean(finite)) if finite else math.nan,
                       "lr": learning_rate(self.config, self.step - 1), "grad_norm": self.grad_norm,
                       "skipped": self.skipped, "dt_ms": 1e3 * self.seconds / len(self.losses),
                       "tok_per_sec": self.tok_per_sec}
        self.log.write(record | evaluation)
        self.losses, self.seconds = [], 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {**{key: getattr(self, key) for key in STATE}, "records": len(self.log.records),
                "corpus": self.corpus.meta["source"]["sha256"], "scaler": self.scaler.state_dict(),
                "eval_batches": self.eval_batches}

    def save_last(self) -> None:
        if self.skipped_in_a_row:  # these weights may be what made the gradient overflow
            return
        trits = {f"trits/{name}": value for name, value in self.trits.items()}
        self.save(LAST, self.model.state_dict() | moments(self.model, self.optimizers) | trits, self.run / PREVIOUS)

    def save(self, name: str, tensors: dict[str, Tensor], previous: Path | None = None) -> None:
        """Called by every rank: one writes."""
        tensors = self.world.gathered(tensors)
        if self.world.is_main:
            with self.world.working():
                self.log.sync()
                checkpoint.save(self.run / name, tensors, self.state(), previous)

    def restore(self, start: Start) -> int:
        """Takes up the optimizer and the loop where a checkpoint left them; returns how many records of metrics.jsonl
        belong to it. Nothing in it is taken on trust: the file may be a stranger's."""
        _, path, tensors, state = start
        try:
            if any(type(state[name]) is not int or not 0 <= state[name] < 2**53 for name in (*COUNTS, "records")):
                raise ValueError("counts")
            for name in STATE:
                setattr(self, name, type(getattr(self, name))(state[name]))
            extra = {name: value for name, value in tensors.items() if "/" in name}
            trits = {name: extra.pop(f"trits/{name}") for name in self.model.trits()}
            if any(value.shape != tensors[name].shape for name, value in trits.items()):
                raise ValueError("trits")
            restore_moments(self.model, self.optimizers, extra, taken=self.step > self.skipped)
            self.losses = [float(loss) for loss in self.losses]
            before = state.get("eval_batches", self.eval_batches)
            if before[:2] != self.eval_batches[:2]:  # a run's windows stay as long as they are
                self.best_val_loss = math.inf  # measured on other batches
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise UserError(f"{path} is no checkpoint of train.py ({error!r}). Start from its weights: --init-from "
                            f"{self.run} and another --out-dir.") from None
        self.trits = trits
        return state["records"]

    def finish(self) -> None:
        """Draws the losses and closes the log."""
        self.log.close()
        if self.world.is_main:
            plot_losses({self.name: self.log.records}, self.run / "loss.png")


def got_anywhere(run: Path) -> bool:
    """Whether a run took a step that its files still show."""
    best = run / BEST
    return best.exists() and checkpoint.load(best)[1].get("step", 0) > 0
