"""Many processes: two of them, with gloo on a CPU, do what one does with twice the micro-batches, and end together."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Call
from test_train import records

from core import checkpoint


def torchrun(script: Path, *flags: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(processes), str(script), *map(str, flags)], capture_output=True, text=True, timeout=240)


def same(ours: list[dict[str, Any]], gold: list[dict[str, Any]], tolerance: float) -> None:
    """That two logs tell of one run, up to the noise of sums in another order."""
    assert [record["step"] for record in ours] == [record["step"] for record in gold]
    for a, b in zip(ours, gold, strict=True):
        assert a.keys() == b.keys()
        for key in ("train_loss", "val_loss", "best_val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


@pytest.mark.parametrize(("twin", "noise"), [("gpt", 2e-5), ("bitgpt", 0.02)])  # int8 roundings amplify noise
def test_two_processes_equal_one_with_twice_the_micro_batches(twin: str, noise: float, tmp_path: Path, corpus: Path,
                                                              call: Call) -> None:
    flags = [*TINY, "--dataset", corpus, "--out-dir"]
    two = torchrun(ROOT / twin / "train.py", *flags, tmp_path / "two", "--grad-accum", "2", "--verbose", "1")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("2 processes") == two.stdout.count("step     12") == two.stdout.count("best val") == 1
    assert call(f"{twin}/train", *flags, tmp_path / "one", "--grad-accum", "4").code == 0
    same(records(tmp_path / "two"), records(tmp_path / "one"), noise)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for run in ("one", "two"):
        assert checkpoint.load(tmp_path / run / "last.safetensors")[1]["position"] == 48


def test_a_run_goes_from_two_processes_to_one_and_back(tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--no-decay-lr", "--dataset", corpus, "--out-dir"]
    assert call("gpt/train", *flags, tmp_path / "whole", "--grad-accum", "2").code == 0
    run = tmp_path / "run"
    assert torchrun(ROOT / "gpt/train.py", *flags, run, "--max-iters", "4").returncode == 0
    assert call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "8", "--grad-accum", "2").code == 0
    back = torchrun(ROOT / "gpt/train.py", "--resume", "--out-dir", run, "--max-iters", "12", "--grad-accum", "1")
    assert back.returncode == 0, back.stderr
    same(records(run), records(tmp_path / "whole"), 2e-5)
    assert checkpoint.load(run / "last.safetensors")[1]["position"] == 24


# Runs train.main; rank 1 alone meets what its first argument says, in the step that its second one names.
TROUBLE = f"""
import hashlib, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from gpt.model import GPT
kind, when, out = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
step = train.Trainer.train_step
def troubled(self):
    if self.world.rank == 1 and self.step == when:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.model.norm.weight.register_hook(lambda grad: grad * float("nan") if self.step == when else grad)
    if self.world.rank == 1 and self.step == when + 2:
        os.kill(os.getpid(), signal.SIGTERM)
    loss = step(self)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in self.model.parameters())
    with open(f"{{out}}.{{self.world.rank}}", "a") as file:
        print(self.step, self.skipped, hashlib.sha256(weights).hexdigest(), file=file)
    return loss
train.Trainer.train_step = troubled
train.main(GPT, sys.argv[1:])
"""


def test_all_ranks_skip_and_stop_alike(tmp_path: Path, corpus: Path, call: Call) -> None:
    (tmp_path / "trouble.py").write_text(TROUBLE)
    result = torchrun(tmp_path / "trouble.py", "nan", "2", tmp_path / "log", *TINY, "--dataset", corpus, "--out-dir",
                      tmp_path / "run")
    assert result.stderr.count("stopped after step 5; saved") == 1 and result.returncode, result.stderr
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


def test_the_twins_in_lockstep_with_two_processes(tmp_path: Path, corpus: Path) -> None:
    result = torchrun(ROOT / "compare.py", *TINY, "--dataset", corpus, "--out-dir", tmp_path / "c")
    assert result.returncode == 0 and result.stdout.count("validation loss (nats") == 1, result.stderr
    runs = json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"]
    assert [(run["twin"], run["steps"]) for run in runs] == [("gpt", 12), ("bitgpt", 12)]


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    result = torchrun(ROOT / "gpt/train.py", "--n-layer", "4.5", "--out-dir", tmp_path / "run")
    assert result.stderr.count("error: --n-layer '4.5': expected a whole number.") == 1, result.stderr
    assert result.returncode and result.stdout == "" and not (tmp_path / "run").exists()
