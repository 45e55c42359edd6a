"""train.py: the schedules, the loop, and that a run that was stopped equals one that was not."""

import dataclasses
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Call, shell
from torch import _dynamo

from bitgpt.model import BitGPT
from core import checkpoint, distributed
from core.config import ModelConfig, from_saved, parser
from core.files import UserError
from core.run_folder import read_config
from core.runtime import compiling_pays
from gpt import fused
from gpt.model import GPT
from training import optimizers
from training.settings import (
    TrainConfig,
    learning_rate,
    quantized_share,
    read_arguments,
    settings_for,
    training_parser,
)
from training.trainer import MAX_SKIPS, Trainer

TIMING = ("dt_ms", "tok_per_sec")


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, but for what no clock gives twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def trainer(run: Path, corpus: Path, model_class: type[GPT] = BitGPT, resume: bool = False,
            **changes: Any) -> Trainer:
    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)
    config = TrainConfig(dataset=str(corpus), out_dir=str(run), batch_size=4, max_iters=12, eval_interval=4,
                         log_interval=2, warmup_iters=2, verbose=0)
    for key, value in changes.items():
        setattr(model if hasattr(model, key) else config, key, value)
    made = Trainer(model_class, model, config, resume)
    made.open()
    if not resume:
        made.evaluate()
    return made


def test_when_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    read = parser("", [TrainConfig]).parse
    for words, value in (("", None), ("--compile", "on"), ("--compile auto", "auto"), ("--compile=False", "off")):
        assert getattr(read(words.split()), "compile", None) == value
    assert from_saved(TrainConfig, {"compile": False}, "a run of before").compile == "off"
    monkeypatch.setattr("core.runtime.shutil.which", lambda name: name == "g++")
    monkeypatch.setattr("core.runtime.find_spec", lambda name: name)
    monkeypatch.setattr(_dynamo, "config", types.SimpleNamespace())
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [compiling_pays(*how) for how in ((gpu, 2000), (gpu, 1999), (cpu, 2000))] == [True, False, False]
    monkeypatch.setattr("core.runtime.shutil.which", lambda name: None)
    assert not compiling_pays(gpu, 2000)


# -- schedules ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("schedule", "expected"), [
    ("cosine", {10: 1.0, 60: 0.55, 110: 0.1}), ("linear", {10: 1.0, 60: 0.55, 110: 0.1}),
    ("wsd", {10: 1.0, 60: 1.0, 85: 0.55, 110: 0.1}), ("constant", {10: 1.0, 110: 1.0}),
    ("two-stage", {10: 1.0, 59: 0.51, 60: 0.5 * 2 / 3, 110: 0.1})])
def test_schedules(schedule: str, expected: dict[int, float]) -> None:
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_iters=10, max_iters=110, schedule=schedule)
    assert [learning_rate(config, step) for step in expected] == pytest.approx(list(expected.values()))
    assert [learning_rate(config, step) for step in (0, 4)] == pytest.approx([1 / 11, 5 / 11])


def test_decay_lr_off_and_lr_decay_iters() -> None:
    assert learning_rate(TrainConfig(lr=1.0, decay_lr=False, warmup_iters=0), 1999) == 1.0
    assert learning_rate(TrainConfig(lr=1.0, lr_decay_iters=500, warmup_iters=0), 500) == 0.0


def test_weight_decay_stops_where_asked(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, weight_decay=0.3, wd_until=0.5)
    seen = []
    while not run.done:
        run.advance()
        seen.append([group["weight_decay"] for group in run.optimizers[0].param_groups])
    assert seen == [[0.3, 0.0]] * 6 + [[0.0, 0.0]] * 6


def test_quantization_comes_where_and_as_fast_as_asked() -> None:
    config = TrainConfig(max_iters=100, ternary_from=0.5, warmup_quant=0.04)
    assert [quantized_share(config, step) for step in (0, 49, 50, 51, 53, 99)] == [0, 0, 0.5, 0.5**0.5, 1, 1]
    assert [quantized_share(TrainConfig(max_iters=100, ternary_from=0.5), step) for step in (49, 50)] == [0, 1]
    assert quantized_share(TrainConfig(), 0) == 1
    config = TrainConfig(max_iters=100, ternary_from=0.25, warmup_quant=0.5)
    assert [quantized_share(config, step) for step in (24, 25, 74, 99)] == [0, 0.02**0.5, 1, 1]


# -- the loop ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("twin", ["gpt", "bitgpt"])
def test_it_learns_and_writes_all_a_run_folder_holds(twin: str, tmp_path: Path, corpus: Path, call: Call) -> None:
    run = tmp_path / twin
    flags = [*TINY, "--max-iters", "120", "--eval-interval", "60", "--lr", "1e-2", "--verbose", "1"]
    result = call(f"{twin}/train", *flags, "--dataset", corpus, "--out-dir", run)
    assert result.code == 0 and "max_iters = 120" in result.out and "step    120" in result.out
    assert "weight_decay" in result.out and "beta2" not in result.out  # --verbose 1: what is worth tuning
    written = records(run)
    assert [r["step"] for r in written if "val_loss" in r] == [0, 60, 120]
    assert written[0]["val_loss"] == pytest.approx(torch.tensor(27.0).log(), abs=0.5)  # an even guess, about
    assert written[-1]["val_loss"] < 2.3 < written[0]["val_loss"]
    assert ("zeros" in written[-1]) == (twin == "bitgpt") == ("flipped" in written[-1])
    assert {"train_loss", "lr", "grad_norm", "skipped", "val_bpb", "best_val_loss"} <= written[-1].keys()
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "best.safetensors", "last.safetensors",
             "last.1.safetensors"}
    assert {path.name for path in run.iterdir()} == names
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights, state = checkpoint.load(run / "best.safetensors")
    assert state["step"] in (60, 120) and all("/" not in name for name in weights)


def test_zeros_and_flips_are_the_trits_own(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, lr=0.05, max_iters=8)
    before = run.model.trits()
    while run.step < 4:
        run.advance()
    after, record = run.model.trits(), run.log.records[-1]
    total = sum(trit.numel() for trit in after.values())
    assert record["zeros"] == sum(int((t == 0).sum()) for t in after.values()) / total
    assert record["flipped"] == sum(int((after[n] != before[n]).sum()) for n in after) / total > 0
    assert len(record["zeros_by_block"]) == len(record["flipped_by_block"]) == 2


@pytest.mark.parametrize("twin", [GPT, BitGPT])
def test_the_seed_is_honoured(twin: type[GPT], tmp_path: Path, corpus: Path) -> None:
    runs = [trainer(tmp_path / str(i), corpus, twin, seed=seed, dropout=0.1) for i, seed in enumerate((1, 1, 2))]
    for run in runs:  # one after the other: neither disturbs the next
        while not run.done:
            run.advance()
    first, same, other = (records(run.run) for run in runs)
    assert first == same and first[-1]["val_loss"] != other[-1]["val_loss"] and first[0] != other[0]


def test_accumulated_micro_batches_equal_one_batch_of_the_same_windows(tmp_path: Path, corpus: Path) -> None:
    one, two = (trainer(tmp_path / name, corpus, GPT, batch_size=size, grad_accum=accum, dtype="float32")
                for name, size, accum in (("one", 8, 1), ("two", 4, 2)))
    halves = [two.train_batches.batch(i) for i in range(2)]
    one.train_batches.batch = lambda position: tuple(  # type: ignore[method-assign, assignment, return-value]
        np.concatenate(part) for part in zip(*halves, strict=True))
    assert one.train_step() == pytest.approx(two.train_step(), rel=1e-6)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert two.position == 2


def test_full_precision_first_is_the_twins_own_run_and_is_judged_as_ternary(tmp_path: Path, corpus: Path) -> None:
    twin, run, never = (trainer(tmp_path / name, corpus, model_class, ternary_from=share) for name, model_class, share
                        in (("gpt", GPT, 0.0), ("bitgpt", BitGPT, 0.5), ("ternary", BitGPT, 0.0)))
    while run.step < 6:
        for one in (twin, run):
            one.advance()
    for ours, gold in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, gold, rtol=1e-4, atol=1e-6)
    never.model.load_state_dict(run.model.state_dict())
    assert run.val_loss() == never.val_loss() != twin.val_loss()
    run.advance()
    twin.advance()
    assert not torch.allclose(run.model.wte.weight, twin.model.wte.weight, rtol=1e-4, atol=1e-6)


def test_distilling_learns_the_teachers_probabilities(tmp_path: Path, corpus: Path) -> None:
    teacher = trainer(tmp_path / "teacher", corpus, GPT, lr=1e-2, dropout=0.3)  # which a teacher has no more
    while not teacher.done:
        teacher.advance()
    shutil.copy(tmp_path / "teacher/last.safetensors", tmp_path / "teacher/best.safetensors")
    run = trainer(tmp_path / "run", corpus, GPT, distill=str(tmp_path / "teacher"), distill_weight=0.25)
    x, y = run.to_device(run.train_batches.batch(0))
    theirs, ours = (torch.log_softmax(one.model.eval()(x, all_logits=True)[0].double(), -1)  # (B, T, V)
                    for one in (teacher, run))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    loss, aim = (value.item() for value in run.objective(x, y))
    assert aim == pytest.approx(0.75 * loss + 0.25 * divergence, rel=1e-5)
    run.model.load_state_dict(teacher.model.state_dict())
    run.config.distill_weight = 1.0
    assert run.objective(x, y)[1].item() == pytest.approx(0, abs=1e-6)
    assert not any(weight.requires_grad for weight in run.teacher.parameters())  # type: ignore[union-attr]


def test_a_teacher_must_know_the_same_tokens_and_context(trained: dict[str, Path], tmp_path: Path, corpus: Path,
                                                         call: Call) -> None:
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 500)
    for flags, told in ((["--dataset", other], "a different tokenizer"),
                        (["--dataset", corpus, "--block-size", "32"], "16 tokens of context"),
                        (["--dataset", corpus, "--distill", tmp_path], "holds no trained run")):
        result = call("bitgpt/train", *TINY, "--distill", trained["gpt"], "--out-dir", tmp_path / "run", *flags)
        assert result.code == 2 and told in result.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_train_close_to_float32(dtype: str, tmp_path: Path, corpus: Path) -> None:
    for twin in (GPT, BitGPT):
        mixed = trainer(tmp_path / f"{twin.name}-mixed", corpus, twin, dtype=dtype)
        exact = trainer(tmp_path / f"{twin.name}-exact", corpus, twin)
        for run in (mixed, exact):
            while not run.done:
                run.advance()
        assert all(weight.dtype == torch.float32 for weight in mixed.model.parameters())
        assert mixed.log.records[-1]["val_loss"] == pytest.approx(exact.log.records[-1]["val_loss"], abs=0.05)


def test_evaluation_of_the_whole_split_is_the_mean_over_its_tokens(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, GPT, dtype="float32")
    losses = []
    for x, y in run.val_batches.eval_batches(1):
        logits, _ = run.model.eval()(torch.from_numpy(x), all_logits=True)
        losses += torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(y[0]), reduction="none").tolist()
    assert len(losses) == len(run.val_batches.tokens) - 1
    assert run.val_loss() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_step_without_finite_gradient_is_skipped_and_many_end_the_run(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, max_iters=100, eval_interval=50)
    run.advance()
    weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    broken = run.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    run.advance()
    assert run.skipped == 1 and all(torch.equal(weights[n], w) for n, w in run.model.state_dict().items())
    broken.remove()
    run.advance()
    assert run.skipped_in_a_row == 0 and not torch.equal(weights["norm.weight"], run.model.norm.weight)
    run.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(Exception, match="lower --lr"):
        for _ in range(MAX_SKIPS):
            run.advance()
    run.save_last()  # as a signal would
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["step"] == 0  # the last good one


def test_a_loss_that_is_not_finite_leaves_valid_json_and_a_plot(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, GPT)
    run.losses, run.seconds = [float("nan")], 1.0
    run.val_loss = lambda: float("nan")  # type: ignore[method-assign]
    best = run.best_val_loss
    run.evaluate()
    run.finish()
    assert run.best_val_loss == best and "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_wandb_is_imported_only_when_asked_for_and_works_offline(tmp_path: Path, corpus: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; from bitgpt.model import BitGPT\n" \
             "train.main(BitGPT, sys.argv[1:]); print('wandb' in sys.modules)"
    flags = [*TINY, "--dataset", corpus, "--out-dir"]
    assert shell("-c", script, *flags, tmp_path / "a").stdout.strip() == "False"
    logged = shell("-c", script, *flags, tmp_path / "b", "--wandb-log", env={"PATH": "/usr/bin:/bin",
                                                                           "HOME": str(tmp_path)})
    assert logged.stdout.strip().endswith("True"), logged.stderr
    assert list((tmp_path / "b" / "wandb").glob("offline-run-*/*.wandb"))


# -- stopping and going on ---------------------------------------------------------------------------------------------

# Runs train.main, and kills its own process with SIGKILL at the n-th call of a function that writing goes through.
KILLER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from bitgpt.model import BitGPT
name, left = sys.argv.pop(1), int(sys.argv.pop(1))
real = getattr(os, name)
def counting(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(os, name, counting)
train.main(BitGPT, sys.argv[1:])
"""


def test_a_run_killed_again_and_again_equals_one_that_never_was(tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--dropout", "0.1", "--dataset", str(corpus), "--out-dir"]
    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert call("bitgpt/train", *flags, whole).code == 0
    # before the first checkpoint; before its rename; inside the writing of later ones, and before their renames
    for function, count in (("replace", 2), ("replace", 4), ("fsync", 9), ("replace", 5), ("fsync", 11)):
        more = ["--resume"] if run.exists() else []
        killed = shell("-c", KILLER, function, str(count), *flags, run, *more)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert call("bitgpt/train", "--resume", "--out-dir", run, "--verbose", "0").code == 0
    assert records(run) == records(whole)
    for name in ("best", "last"):
        ours, gold = (checkpoint.load(folder / f"{name}.safetensors")[0] for folder in (run, whole))
        assert ours.keys() == gold.keys() and all(torch.equal(ours[key], gold[key]) for key in gold)
    assert not list(run.glob(".*.tmp"))


def test_signals_save_and_the_rest_is_bit_identical(tmp_path: Path, corpus: Path, call: Call) -> None:
    """Ctrl-C exits 130, a kill's SIGTERM 143, a closed terminal 129."""
    flags = [*TINY, "--max-iters", "500", "--eval-interval", "100", "--log-interval", "7", "--dataset", str(corpus)]
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps = [0]
    for number, wait, more in ((signal.SIGINT, 10, flags), (signal.SIGTERM, 30, ["--resume"])):
        process = subprocess.Popen([sys.executable, ROOT / "gpt" / "train.py", *more, "--out-dir", run],
                                   cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while len(records(run) if (run / "metrics.jsonl").exists() else []) < wait:  # it is on its way
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "--resume" in errors and "Traceback" not in errors, errors
        steps.append(checkpoint.load(run / "last.safetensors")[1]["step"])
    master, slave = pty.openpty()  # a terminal, which is closed
    command = [sys.executable, ROOT / "gpt" / "train.py", "--resume", "--verbose", "1", "--out-dir", run]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    time.sleep(0.1)
    while len(records(run)) < 50:
        assert process.poll() is None
        os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    steps.append(checkpoint.load(run / "last.safetensors")[1]["step"])
    assert steps[0] < steps[1] < steps[2] < steps[3] < 500
    assert call("gpt/train", "--resume", "--out-dir", run).code == 0
    assert call("gpt/train", *flags, "--out-dir", whole).code == 0
    assert records(run) == records(whole)


@pytest.mark.parametrize("twin", [GPT, BitGPT])
def test_muon_takes_the_matrices_of_blocks_and_goes_on_bit_for_bit(twin: type[GPT], tmp_path: Path,
                                                                   corpus: Path) -> None:
    def run(folder: str, **changes: Any) -> Trainer:
        return trainer(tmp_path / folder, corpus, twin, optimizer="muon", muon_weight_decay=0.1, **changes)

    whole, stopped = run("whole"), run("stopped")
    muon = {id(weight) for weight in whole.optimizers[1].param_groups[0]["params"]}
    names = {name for name, weight in whole.model.named_parameters() if id(weight) in muon}
    assert len(names) == 14 and all(name.endswith("_proj.weight") for name in names)
    while stopped.step < 6:
        stopped.advance()
    stopped.save_last()
    stopped.lock.release()  # type: ignore[union-attr]
    resumed = run("stopped", resume=True)
    for one in (whole, resumed):
        while not one.done:
            one.advance()
    ours, gold = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("stopped", "whole"))
    assert ours.keys() == gold.keys() and all(torch.equal(ours[key], gold[key]) for key in gold)
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert sum(key.startswith("optimizer/momentum_buffer/") for key in gold) == 14


def test_moments_of_another_dtype_are_refused(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path, corpus, GPT, optimizer="muon")
    run.advance()
    run.save_last()
    run.lock.release()  # type: ignore[union-attr]
    tensors, state = checkpoint.load(tmp_path / "last.safetensors")
    halves = {name: value.half() if "momentum_buffer" in name else value for name, value in tensors.items()}
    checkpoint.save(tmp_path / "last.safetensors", halves, state)
    with pytest.raises(UserError, match="is no checkpoint"):  # the kernels would take them for fp32
        trainer(tmp_path, corpus, GPT, optimizer="muon", resume=True)
    weight = torch.nn.Parameter(torch.ones(16, 16))
    assert fused.fit_matrices([weight] * 64, [weight] * 64, [weight] * 64)
    assert not fused.fit_matrices([weight] * 64, [weight] * 64, [weight.half()] * 64)


@pytest.mark.parametrize("at_once", [None, 1, 2**22])
def test_matrices_move_as_torchs_muon_moves_each(at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_once:
        monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
        monkeypatch.setattr(fused, "library", lambda: None)
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    torch.manual_seed(1)
    start = [torch.randn(shape) * 0.1 for shape in [(32, 32), (48, 32), (32, 32), (32, 48), (64, 16)]]
    moved = []
    for kind in (optimizers.Muon, torch.optim.Muon):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = kind(weights, **settings)
        for _ in range(3):
            for weight in weights[:-1]:  # the last has no gradient
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        moved.append([weight.detach() - before for weight, before in zip(weights, start, strict=True)])
    for ours, torchs in zip(*moved, strict=True):
        assert (ours - torchs).norm() <= 0.02 * torchs.norm()  # bf16, or fp32 against torch's bf16
    assert not moved[0][-1].any() and all(ours.norm() > 0.1 for ours in moved[0][:-1])


def test_a_run_does_not_change_its_optimizer(trained: dict[str, Path], call: Call) -> None:
    result = call("gpt/train", "--resume", "--out-dir", trained["gpt"], "--max-iters", "20", "--optimizer", "muon")
    assert result.code == 2 and "optimizer is adamw" in result.err


def test_the_best_of_other_batches_counts_no_more(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained["gpt"], run)
    tensors, state = checkpoint.load(run / "last.safetensors")
    checkpoint.save(run / "last.safetensors", tensors, state | {"best_val_loss": 0.5})
    assert call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "13").code == 0
    assert checkpoint.load(run / "last.safetensors")[1]["best_val_loss"] == 0.5
    assert call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "14", "--eval-iters", "1").code == 0
    assert checkpoint.load(run / "best.safetensors")[1]["step"] == 14
    shutil.copytree(trained["gpt"], tmp_path / "whole")
    report = call("compare", run, tmp_path / "whole", "--out-dir", tmp_path / "report")  # of batches and of all
    row = next(line for line in report.out.splitlines() if line.startswith("validation loss (nats"))
    assert report.code == 0 and len(row.split()) == 6  # no difference


def test_more_steps_that_would_undo_quantization_are_told(tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--verbose", "1", "--dataset", corpus, "--out-dir", tmp_path / "run"]
    assert call("bitgpt/train", *flags, "--ternary-from", "0.5").code == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())
    saved["train"]["max_iters"] = str(saved["train"]["max_iters"])  # by hand: read as a number
    (tmp_path / "run/config.json").write_text(json.dumps(saved))
    longer = call("bitgpt/train", "--resume", "--max-iters", "30", "--out-dir", tmp_path / "run")
    assert longer.code == 0 and "less quantized than before" in longer.err
    again = call("bitgpt/train", "--resume", "--max-iters", "32", "--ternary-from", "0", "--out-dir", tmp_path / "run")
    assert again.code == 0 and "less quantized" not in again.err


def test_a_full_precision_run_takes_any_quantizer(trained: dict[str, Path], tmp_path: Path, corpus: Path,
                                                  call: Call) -> None:
    flags = ["--init-from", trained["gpt"], "--dataset", corpus, "--max-iters", "1", "--verbose", "0", "--scale", "row"]
    assert call("bitgpt/train", *flags, "--weight-quant", "int2", "--out-dir", tmp_path / "run").code == 0
    assert read_config(tmp_path / "run").model.weight_quant == "int2"
    flags[1] = trained["bitgpt"]
    result = call("bitgpt/train", *flags, "--weight-quant", "int2", "--out-dir", tmp_path / "other")
    assert result.code == 2 and ("is absmean in" in result.err or "is tensor in" in result.err)


def test_a_finished_run_goes_on_when_given_more_steps(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "12", "--lr", "0.5")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert done.code == 2 and "already at step 12 of 12" in done.err and "--max-iters" in done.err
    assert call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "16").code == 0
    assert records(run)[-1]["step"] == 16 and records(run)[:7] == records(trained["gpt"])


def test_weights_of_the_other_twin_start_a_run(trained: dict[str, Path], tmp_path: Path, corpus: Path,
                                               call: Call) -> None:
    result = call("bitgpt/train", "--init-from", trained["gpt"], "--out-dir", tmp_path / "run", "--dataset", corpus,
                  "--max-iters", "1", "--lr", "1e-9", "--verbose", "0")
    assert result.code == 0, result.err
    source, started = (checkpoint.load(folder / "last.safetensors")[0] for folder in (trained["gpt"], tmp_path / "run"))
    best = checkpoint.load(trained["gpt"] / "best.safetensors")[0]
    assert all(torch.allclose(best[name], started[name], atol=1e-6) for name in best)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["n_embd"] == 32
    assert source.keys() - started.keys() == set()


# -- flags -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "key", "value"), [
    (["--n-layer", "1"], "n_layer", 1), (["--d", "0.25"], "dropout", 0.25), (["--dropout", "0.5"], "dropout", 0.5),
    (["--wd", "0.3"], "weight_decay", 0.3), (["--min-lr", "1e-5"], "min_lr", 1e-5), (["--seed", "7"], "seed", 7),
    (["--decay-lr"], "decay_lr", True), (["--no-decay-lr"], "decay_lr", False),
    (["--decay-lr", "False"], "decay_lr", False), (["--decay-lr=true"], "decay_lr", True),
    (["--max-iters", "1e0"], "max_iters", 1), (["--seed", "9_007_199_254_740_993"], "seed", 9007199254740993),
    (["--dataset=~/x.txt"], "dataset", str(Path.home() / "x.txt"))])
def test_flags_are_typed(flags: list[str], key: str, value: object, tmp_path: Path) -> None:
    given, toml, resume, _ = read_arguments(training_parser(""), flags)
    settings = [dataclasses.asdict(one) for one in settings_for("gpt", given, toml, tmp_path, resume)]
    assert {**settings[0], **settings[1]}[key] == value and type(settings[key in settings[1]][key]) is type(value)


def test_precedence_defaults_below_file_below_flags(tmp_path: Path, corpus: Path, call: Call) -> None:
    toml = tmp_path / "tiny.toml"
    toml.write_text("n_layer = 2\nn_embd = 32\nn_head = 2\nbatch_size = 2\nmax_iters = 2\nverbose = 0\nlr = 1e-4\n"
                    "[bitgpt]\nlr = 3e-3\n[gpt]\nlr = 2e-3\n")
    for twin, flags, lr in (("bitgpt", [], 3e-3), ("gpt", [], 2e-3), ("gpt", ["--lr", "5e-3"], 5e-3)):
        run = tmp_path / f"{twin}{lr}"
        assert call(f"{twin}/train", "--config", toml, "--dataset", corpus, "--out-dir", run, *flags).code == 0
        saved = json.loads((run / "config.json").read_text())
        assert (saved["train"]["lr"], saved["model"]["n_layer"], saved["train"]["beta1"]) == (lr, 2, 0.9)


@pytest.mark.parametrize("script", ["train.py", "gpt/train.py", "bitgpt/train.py", "generate.py", "gpt/generate.py",
                                    "bitgpt/generate.py", "compare.py"])
def test_help_works_from_any_folder(script: str, tmp_path: Path) -> None:
    result = shell(ROOT / script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "--out-dir" in result.stdout and "--seed" in result.stdout
    assert ("--model {gpt,bitgpt}" in result.stdout) == (script in ("train.py", "generate.py"))


@pytest.mark.parametrize("grad_clip", [0.5, 0.0])
def test_a_step_is_that_of_the_settings(grad_clip: float, tmp_path: Path, corpus: Path) -> None:
    """AdamW with the schedule's rate, these moments and clipping, by hand; and the record says what it was."""
    run = trainer(tmp_path / "run", corpus, GPT, dtype="float32", lr=0.02, min_lr=0.005, schedule="cosine",
                  weight_decay=0.3, beta1=0.8, beta2=0.9, grad_clip=grad_clip, grad_accum=2, log_interval=1)
    model = GPT(run.model.config)
    model.load_state_dict(run.model.state_dict())
    by_hand = torch.optim.AdamW([{"params": [w for w in model.parameters() if (w.dim() < 2) == norms],
                                  "weight_decay": 0.0 if norms else 0.3} for norms in (False, True)], betas=(0.8, 0.9))
    for step in range(3):
        for batch in (2 * step, 2 * step + 1):
            x, y = run.to_device(run.train_batches.batch(batch))
            (model(x, y)[1] / 2).backward()  # type: ignore[operator]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or torch.inf)
        for group in by_hand.param_groups:
            group["lr"] = learning_rate(run.config, step)
        by_hand.step()
        by_hand.zero_grad()
        run.advance()
        assert run.grad_norm == pytest.approx(norm.item(), rel=1e-3) and norm > 0.5
        assert run.log.records[-1]["lr"] == by_hand.param_groups[0]["lr"]
    for ours, gold in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, gold, rtol=1e-3, atol=1e-4)
    run.losses, run.seconds = [1.0, 2.0, 4.5], 4.0
    run.write_record({})
    assert run.log.records[-1] | {"tok_per_sec": 3 * 2 * 4 * 16 / 4, "dt_ms": 4000 / 3, "train_loss": 2.5} == \
        run.log.records[-1]


def test_muons_rate_is_its_own(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path / "run", corpus, GPT, optimizer="muon", muon_lr=0.05)
    run.advance()
    rate = learning_rate(run.config, 0)
    assert [one.param_groups[0]["lr"] for one in run.optimizers] == pytest.approx([rate, rate * 0.05 / run.config.lr])


def test_ranks_drop_what_others_keep(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run", corpus, GPT, dropout=0.5, lr=1e-12, weight_decay=0.0)

    def loss(rank: int) -> float:
        monkeypatch.setattr(run.world, "rank", rank)
        run.step, run.position = 3, 5 - rank  # of the same batch
        return run.train_step()

    assert loss(0) == loss(0) != loss(1) == loss(1)


def test_the_scale_of_float16_gradients_goes_on(tmp_path: Path, corpus: Path) -> None:
    run = trainer(tmp_path, corpus, GPT, dtype="float16")
    run.advance()
    run.scaler.update(1024.0)
    run.save_last()
    run.lock.release()  # type: ignore[union-attr]
    assert trainer(tmp_path, corpus, GPT, dtype="float16", resume=True).scaler.get_scale() == 1024


def test_the_umask_says_who_may_read_a_checkpoint(tmp_path: Path, corpus: Path) -> None:
    umask = os.umask(0o027)
    try:
        trainer(tmp_path / "run", corpus, GPT)
    finally:
        os.umask(umask)
    for name in ("last.safetensors", "best.safetensors", "config.json"):
        assert (tmp_path / "run" / name).stat().st_mode & 0o777 == 0o640


def test_a_second_signal_ends_at_once() -> None:
    world = distributed.world()
    with pytest.raises(KeyboardInterrupt), world.heed_signals():
        signal.raise_signal(signal.SIGINT)
        assert world.stop == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_are_as_asked_for(tmp_path: Path, corpus: Path) -> None:
    before = torch.get_num_threads()
    try:
        trainer(tmp_path / "run", corpus, GPT, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
