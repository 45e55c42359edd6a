"""Many processes: two of them, with gloo on a CPU, do what one does with twice the micro-batches, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import records

import train
from bitgpt.bitlinear import quantize_weight
from core import checkpoint, watch
from core.distributed import World
from core.files import UserError
from core.watch import Judge
from gpt.model import GPT

EXACT = ["--no-decay-lr", "--dtype", "float32"]  # bf16 roundings, too, amplify the noise of sums

# Runs several trainings one after the other: what starting costs is paid once.
SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import train
import torch.distributed as dist
from bitgpt.model import MODELS
main = train.main.__wrapped__.__wrapped__
for twin, *flags in json.loads(sys.argv[1]):
    main(MODELS[twin], flags)
dist.destroy_process_group()  # as who decorates main does: left to the interpreter's end it aborts, now and then
"""


def torchrun(script: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(script), *map(str, flags)], capture_output=True, text=True, timeout=240)


def two_ranks(*command: str | Path) -> list[tuple[int, str, str]]:
    """What torchrun starts, without torchrun: (exit code, stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                                              "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
             for rank in range(2)]
    try:
        return [(rank.wait(240), *said) for rank in ranks for said in [rank.communicate(timeout=240)]]
    finally:
        for rank in ranks:
            rank.kill()


def same(ours: Path, gold: Path, tolerance: float) -> None:
    """That two runs are one, up to the noise of sums in another order."""
    a_records, b_records = records(ours), records(gold)
    assert [record["step"] for record in a_records] == [record["step"] for record in b_records]
    for a, b in zip(a_records, b_records, strict=True):
        assert a.keys() == b.keys()
        for key in ("train_loss", "val_loss", "best_val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=100 * tolerance), a["step"]
    a_tensors, b_tensors = (checkpoint.load(run / "last.safetensors")[0] for run in (ours, gold))
    assert {name: (t.shape, t.dtype) for name, t in a_tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in b_tensors.items()}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes: TWIN-ddp, TWIN-fsdp, and some that others began or go on with."""
    out = tmp_path_factory.mktemp("ranks")
    more = [*EXACT, "--dataset", str(corpus), "--out-dir"]
    for name in ("from-one-to-fsdp", "from-one-to-ddp"):
        train.main(GPT, [*TINY, *more, str(out / name), "--grad-accum", "2", "--max-iters", "4"])
    several = []
    for twin in ("gpt", "bitgpt"):
        for way in ([], ["--fsdp"]):
            several.append([twin, *TINY, *more, f"{out}/{twin}{'-fsdp' if way else '-ddp'}", "--grad-accum", "2",
                            "--verbose", "1", *way])
    several.append(["bitgpt", *TINY, *more, f"{out}/bfloat16", "--fsdp", "--dtype", "bfloat16", "--eval-iters", "3",
                    "--max-iters", "2"])
    for name, way in (("from-ddp", []), ("from-one-to-fsdp", ["--resume", "--fsdp", "--grad-accum", "1"]),
                      ("from-one-to-ddp", ["--resume", "--grad-accum", "1"])):
        start = ["--out-dir", f"{out}/{name}"] if way else [*TINY, *more, f"{out}/{name}"]
        several.append(["gpt", *start, *way, "--max-iters", "8" if "--fsdp" in way else "12" if way else "4"])
    several.append(["gpt", "--resume", "--fsdp", "--out-dir", f"{out}/from-ddp", "--max-iters", "8"])
    several.append(["gpt", "--resume", "--no-fsdp", "--out-dir", f"{out}/from-one-to-fsdp", "--max-iters", "12"])
    said = two_ranks("-c", SEVERAL, json.dumps(several))
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[0][1].count("2 processes") == said[0][1].count("step     12") == said[0][1].count("best val") == 4
    assert said[1][1] == ""
    return out


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("twin", "noise"), [("gpt", 5e-6), ("bitgpt", 0.02)])  # int8 roundings amplify noise
def test_two_processes_equal_one_with_twice_the_micro_batches(twin: str, noise: float, way: str, runs: Path,
                                                              tmp_path: Path, corpus: Path, call: Call) -> None:
    one, two = tmp_path / "one", runs / f"{twin}-{way}"
    assert call(f"{twin}/train", *TINY, *EXACT, "--dataset", corpus, "--out-dir", one, "--grad-accum", "4").code == 0
    same(two, one, noise)
    assert records(two)[0]["val_loss"] == pytest.approx(records(one)[0]["val_loss"], abs=1e-6)  # before any noise
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert [checkpoint.load(run / "last.safetensors")[1]["position"] for run in (one, two)] == [48, 48]


def test_shards_are_gathered_before_they_are_made_ternary(runs: Path, tmp_path: Path, corpus: Path,
                                                          call: Call) -> None:
    """mean|W| is that of the whole matrix, in fp32 also where the products are bf16."""
    for name in ("bitgpt-fsdp", "bfloat16"):
        tensors = checkpoint.load(runs / name / "last.safetensors")[0]
        trits = {key.removeprefix("trits/"): trit for key, trit in tensors.items() if key.startswith("trits/")}
        assert len(trits) == 14
        assert all(torch.equal(quantize_weight(tensors[key])[0], trit) for key, trit in trits.items())
    assert call("bitgpt/train", *TINY, "--dataset", corpus, "--out-dir", tmp_path / "one", "--dtype", "bfloat16",
                "--eval-iters", "3", "--max-iters", "1").code == 0
    ours, gold = (records(run)[0]["val_loss"] for run in (runs / "bfloat16", tmp_path / "one"))
    assert ours == pytest.approx(gold, abs=1e-6)  # before the first step: no latent was rounded on its way


def test_a_run_goes_on_with_another_number_of_processes(runs: Path, tmp_path: Path, corpus: Path, call: Call) -> None:
    """DDP, FSDP, one; one, FSDP, DDP; one, DDP, one."""
    whole = tmp_path / "whole"
    flags = [*TINY, *EXACT, "--dataset", corpus, "--out-dir", whole, "--grad-accum", "2"]
    assert call("gpt/train", *flags).code == 0
    assert call("gpt/train", "--resume", "--out-dir", runs / "from-ddp", "--max-iters", "12", "--grad-accum",
                "2").code == 0  # its config still says fsdp: one process has nothing to share out
    for name in ("from-ddp", "from-one-to-fsdp", "from-one-to-ddp"):
        same(runs / name, whole, 5e-6)
        assert checkpoint.load(runs / name / "last.safetensors")[1]["position"] == 24
    for run in (runs / "from-one-to-ddp", whole):
        more = call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "14", "--grad-accum", "2")
        assert more.code == 0, more.err
    same(runs / "from-one-to-ddp", whole, 5e-6)


# Runs train.main; rank 1 alone meets what its first argument says, in the step that its second one names.
TROUBLE = f"""
import hashlib, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from core import checkpoint, watch
from gpt.model import GPT
kind, when, out = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
step, save = train.Trainer.train_step, checkpoint.save
def troubled(self):
    if self.world.rank == 1 and self.step == when:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(1000)
        self.model.norm.weight.register_hook(lambda grad: grad * float("nan") if self.step == when else grad)
    if self.world.rank == 1 and self.step == when + 2:
        os.kill(os.getpid(), signal.SIGTERM)
    loss = step(self)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in self.model.parameters())
    with open(f"{{out}}.{{self.world.rank}}", "a") as file:
        print(self.step, self.skipped, hashlib.sha256(weights).hexdigest(), file=file)
    return loss
def slowly(path, tensors, state, previous=None):
    if kind == "hang" and state["step"] == 4 and previous is not None:
        time.sleep(1.5 * watch.BEAT * watch.PATIENCE)
    save(path, tensors, state, previous)
train.Trainer.train_step, checkpoint.save = troubled, slowly
if kind == "hang":
    watch.BEAT = 0.25
train.main(GPT, sys.argv[1:])
"""


def test_all_ranks_skip_and_stop_alike(tmp_path: Path, corpus: Path, call: Call) -> None:
    said = two_ranks("-c", TROUBLE, "nan", "2", tmp_path / "log", *TINY, "--dataset", corpus, "--out-dir",
                     tmp_path / "run")
    assert [code for code, _, _ in said] == [128 + signal.SIGTERM] * 2, said
    assert [err.count("stopped after step 5; saved") for _, _, err in said] == [1, 0], said
    logs = [(tmp_path / f"log.{rank}").read_text().splitlines() for rank in range(2)]
    assert logs[0] == logs[1] and len(logs[0]) == 5
    assert [int(line.split()[1]) for line in logs[0]] == [0, 0, 1, 1, 1]
    assert logs[0][1].split()[2] == logs[0][2].split()[2] != logs[0][3].split()[2]
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["step"] == 5
    assert call("gpt/train", "--resume", "--out-dir", tmp_path / "run").code == 0


def test_a_rank_that_dies_ends_the_run_which_goes_on(tmp_path: Path, corpus: Path, call: Call) -> None:
    (tmp_path / "trouble.py").write_text(TROUBLE)
    result = torchrun(tmp_path / "trouble.py", "kill", "6", tmp_path / "log", *TINY, "--dataset", corpus, "--out-dir",
                      tmp_path / "run")
    assert result.returncode and time.time() - (tmp_path / "log.1").stat().st_mtime < 60  # since its last step
    assert "error: rank 0 of 2 lost another process" in result.stderr and "--resume" in result.stderr
    assert "SIGKILL" in result.stderr and str(-signal.SIGKILL) in result.stderr  # which, says torchrun
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["step"] == 4
    assert call("gpt/train", "--resume", "--out-dir", tmp_path / "run").code == 0


def test_a_rank_that_hangs_ends_the_run_and_one_that_writes_for_long_does_not(tmp_path: Path, corpus: Path) -> None:
    start = time.monotonic()
    said = two_ranks("-c", TROUBLE, "hang", "6", tmp_path / "log", *TINY, "--dataset", corpus, "--out-dir",
                     tmp_path / "run")
    assert [code for code, _, _ in said] == [2, 2] and time.monotonic() - start < 200, said
    assert "error: rank 1 of 2 hangs" in said[0][2] and "go on with --resume" in said[0][2], said
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["step"] == 4  # written while the others waited
    assert len((tmp_path / "log.1").read_text().splitlines()) == 6


def heard(judge: Judge, beats: int, signs: list[list[int]], at_first: bool = False) -> list[int]:
    """What is said after so many heartbeats in which ranks beat, where their first number is not 0, but do not move."""
    hanging: list[int] = []
    for beat in range(beats):
        hanging = judge.hear([[(id(signs) + beat) * sign[0], *sign[1:]] for sign in signs], at_first)
        if hanging:
            break
    return hanging


def test_who_hangs() -> None:
    patience, first = watch.PATIENCE, watch.AT_FIRST
    assert watch.BEAT * patience <= 60 and watch.BEAT * first <= 600
    assert heard(Judge(3), patience, [[1, 7, 0], [1, 7, 0], [1, 7, 0]]) == []
    assert heard(Judge(3), patience + 1, [[1, 7, 0], [1, 6, 0], [1, 7, 0]]) == [1]  # it lags behind
    assert heard(Judge(3), patience + 1, [[1, 7, 0]] * 3) == [0, 1, 2]              # nobody can tell
    assert heard(Judge(3), patience + 1, [[1, 7, 1], [0, 7, 0], [1, 7, 0]]) == [1]  # stopped, while one writes
    assert heard(Judge(3), 10_000, [[1, 7, 1], [1, 7, 0], [1, 7, 0]]) == []         # writes for long
    assert heard(Judge(3), first, [[1, 7, 0]] * 3, at_first=True) == []
    slow = Judge(2)
    assert heard(slow, 100, [[1, 0, 0]] * 2, at_first=True) == []
    assert heard(slow, 399, [[1, 1, 0]] * 2) == [] and heard(slow, 10, [[1, 1, 0]] * 2) == [0, 1]  # moves in long steps


@given(st.lists(st.lists(st.integers(1, watch.PATIENCE - 1), min_size=2, max_size=2), min_size=1, max_size=50))
@settings(max_examples=50)
def test_nobody_hangs_who_moves_now_and_then(pauses: list[list[int]]) -> None:
    judge, moves = Judge(2), [0, 0]
    for number, (first, second) in enumerate(pauses):
        for rank, beats in enumerate((first, second)):
            moves[rank] += 1
            assert not any(judge.hear([[number * 10**6 + rank * 1000 + beat, moves[0], 0],
                                       [number * 10**6 + rank * 1000 + beat, moves[1], 0]], False)
                           for beat in range(beats))


def test_the_twins_in_lockstep_with_two_processes(tmp_path: Path, corpus: Path) -> None:
    result = torchrun(ROOT / "compare.py", *TINY, "--fsdp", "--dataset", corpus, "--out-dir", tmp_path / "c")
    assert result.returncode == 0 and result.stdout.count("validation loss (nats") == 1, result.stderr
    runs = json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"]
    assert [(run["twin"], run["steps"]) for run in runs] == [("gpt", 12), ("bitgpt", 12)]


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    result = torchrun(ROOT / "gpt/train.py", "--n-layer", "4.5", "--out-dir", tmp_path / "run")
    assert result.stderr.count("error: --n-layer '4.5': expected a whole number.") == 1, result.stderr
    assert result.returncode and result.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value", "said"), [
    ("WORLD_SIZE", "", "WORLD_SIZE is ''"), ("WORLD_SIZE", "-1", "WORLD_SIZE is '-1'"),
    ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"), ("RANK", "x", "RANK is 'x'"), ("WORLD_SIZE", "2", "RANK is not set")])
def test_an_environment_that_torchrun_has_not_made(name: str, value: str, said: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        World()
