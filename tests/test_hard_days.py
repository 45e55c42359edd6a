"""Hard days: damaged checkpoints, two runs in one folder, clocks that jump, changed texts, hostile run folders."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Call, english
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_errors import check
from test_train import records, trainer

from core import checkpoint
from core.files import UserError
from core.run_folder import PREVIOUS, FolderLock


def flip(path: Path, share: float) -> None:
    """Flips one bit, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 16
    path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the ternary run, to be spoilt."""
    return Path(shutil.copytree(trained["bitgpt"], tmp_path / "run"))


# -- damage ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("damage", "share"), [(flip, 0.01), (flip, 0.5), (flip, 0.99), (truncate, 0), (truncate, 0.5)])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(damage: Callable[[Path, float], None], share: float,
                                                                   run: Path, trained: dict[str, Path],
                                                                   call: Call) -> None:
    damage(run / "last.safetensors", share)
    more = ["--resume", "--max-iters", "16", "--out-dir"]
    result = call("bitgpt/train", *more, run)
    assert result.code == 0, result.err
    assert "last.safetensors is damaged" in result.err and f"{PREVIOUS}, step 8" in result.err
    whole = Path(shutil.copytree(trained["bitgpt"], run.parent / "whole"))
    os.replace(whole / PREVIOUS, whole / "last.safetensors")
    assert call("bitgpt/train", *more, whole).code == 0
    assert records(run) == records(whole) and records(run)[-1]["step"] == 16
    checkpoint.load(run / "last.safetensors"), checkpoint.load(run / PREVIOUS)


def test_a_kill_before_the_next_checkpoint_keeps_the_one_that_was_used(run: Path, call: Call,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    flip(run / "last.safetensors", 0.5)
    monkeypatch.setattr("train.lockstep", lambda trainers: sys.exit(9))
    assert call("bitgpt/train", "--resume", "--out-dir", run, "--max-iters", "16").code == 9
    assert checkpoint.load(run / "last.safetensors")[1]["step"] == 8 and not (run / PREVIOUS).exists()


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(at: float, bit: int, trained: dict[str, Path],
                                    tmp_path_factory: pytest.TempPathFactory) -> None:
    gold = (trained["gpt"] / "last.safetensors").read_bytes()
    content = bytearray(gold)
    content[int(len(content) * at)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        tensors, state = checkpoint.load(path)
    except UserError:
        return
    whole, whole_state = checkpoint.load(trained["gpt"] / "last.safetensors")  # it hit what means nothing
    assert state == whole_state and tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_what_a_disk_has_changed_is_not_packed(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    for twin in ("gpt", "bitgpt"):
        run = Path(shutil.copytree(trained[twin], tmp_path / twin))
        for name in ("model.ternary.safetensors", "model.bf16.safetensors"):
            (run / name).unlink(missing_ok=True)
        flags = ["--out-dir", run, "--kernel", "cpu", "--max-new-tokens", "1"]
        for which in ("best", "last"):
            assert call("generate", *flags, "--checkpoint", which).code == 0  # last: with the optimizer's state
        content = bytearray((run / "best.safetensors").read_bytes())
        content[-9] ^= 1
        (run / "best.safetensors").write_bytes(content)
        result = call("generate", *flags)
        assert result.code == 2 and "checksum" in result.err and "best.safetensors" in result.err


def test_checkpoints_without_a_checksum_are_taken(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors")
    assert checkpoint.load(tmp_path / "old.safetensors")[1] == {}


# -- two at once, clocks, texts ----------------------------------------------------------------------------------------

def test_two_processes_cannot_train_into_one_folder(run: Path, call: Call) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    hold = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n" \
           "from core.run_folder import FolderLock; lock = FolderLock(Path(sys.argv[2]))\n" \
           "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold, ROOT, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    for flags in (["--resume", "--max-iters", "16"], ["--overwrite"]):
        check(call("bitgpt/train", "--out-dir", run, *flags), None, "another process is training", "--out-dir")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    holder.kill()  # leaves no lock behind
    holder.communicate()
    assert call("bitgpt/train", "--resume", "--max-iters", "13", "--out-dir", run).code == 0
    assert {path.name for path in run.iterdir()} == before.keys()
    FolderLock(run)  # the run that is over lets go


def test_of_two_fresh_runs_one_gets_the_folder(tmp_path: Path, corpus: Path) -> None:
    first = trainer(tmp_path / "run", corpus, max_iters=2)
    with pytest.raises(UserError, match="holds a run|another process"):
        trainer(tmp_path / "run", corpus, max_iters=2)
    assert first.lock is not None


def test_clocks_that_jump_change_nothing(tmp_path: Path, corpus: Path, call: Call,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**9, 0, -86_400))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(jumps)))
        assert call("gpt/train", *TINY, "--dataset", corpus, "--out-dir", tmp_path / "jumps").code == 0
    lines = [json.loads(line) for line in (tmp_path / "jumps" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["dt_ms"] < 60_000 and line["tok_per_sec"] > 0 for line in lines if "dt_ms" in line)


def test_a_text_that_changes_under_a_run_is_noticed(tmp_path: Path, call: Call) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(english(8000))
    assert call("gpt/train", *TINY, "--dataset", text, "--out-dir", run).code == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    text.write_text(english(8000, seed=1))
    result = call("gpt/train", "--resume", "--max-iters", "16", "--out-dir", run)
    assert result.code == 2 and f"error: --dataset {text} is not the text that the run" in result.err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    text.write_text(english(8000))
    assert call("gpt/train", "--resume", "--max-iters", "16", "--out-dir", run).code == 0


def test_settings_of_another_version(run: Path, call: Call) -> None:
    saved = json.loads((run / "config.json").read_text())
    del saved["train"]["wd_until"]
    (run / "config.json").write_text(json.dumps(saved))
    result = call("bitgpt/train", "--resume", "--max-iters", "13", "--out-dir", run)
    assert result.code == 0 and "no 'wd_until'; taking the default 1.0" in result.err
    for key, value, part in (("lion_lr", 1, "unknown setting 'lion_lr'"), ("batch_size", "many", "a whole number"),
                             ("lr", -1, "above 0")):
        (run / "config.json").write_text(json.dumps(saved | {"train": saved["train"] | {key: value}}))
        check(call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run), None, "config.json", part)


# -- a stranger's run folder -------------------------------------------------------------------------------------------

LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train, generate
from bitgpt.model import BitGPT
with open("/proc/self/statm") as statm:
    here = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + (1 << 30), here + (1 << 30)))
for script, what, flags in ((train, BitGPT, ["--resume", "--max-iters", "16", "--verbose", "0"]),
                            (generate, "bitgpt", ["--kernel", "torch", "--device", "cpu", "--max-new-tokens", "1"])):
    try:
        script.main(what, [*flags, "--out-dir", sys.argv[1]])
    except SystemExit as stop:
        print(stop.code)
"""


def promise(run: Path, length: int, header: bytes) -> None:
    """Writes a header of the given text, said to be `length` bytes long, as every checkpoint."""
    for name in ("last", "best", "last.1"):
        (run / f"{name}.safetensors").write_bytes(length.to_bytes(8, "little") + header)


def gigabytes(run: Path) -> None:
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**17, 2**15], "data_offsets": [0, 2**34]}}).encode()
    promise(run, len(header), header)


def overflow(run: Path) -> None:
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()
    promise(run, len(header), header)


def wide(run: Path) -> None:
    change(run, n_embd=2**20, n_head=2, n_kv_head=2, n_ff=2**22)


def endless(run: Path) -> None:
    change(run, n_layer=10**12)


def deep(run: Path) -> None:
    change(run, n_layer=1000)


def change(run: Path, **settings: Any) -> None:
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"model": saved["model"] | settings}))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("spoil", [gigabytes, overflow, lambda run: promise(run, 2**40, b"{}"), wide, endless, deep],
                         ids=["gigabytes", "overflow", "long header", "wide", "endless", "deep"])
def test_what_a_run_only_promises_takes_no_memory(spoil: Callable[[Path], None], run: Path) -> None:
    spoil(run)  # and each is seen in a second or two, most of which is spent on imports
    result = subprocess.run([sys.executable, "-c", LIMITED, run], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["2", "2"], result.stderr
    told = result.stderr.splitlines()
    assert len(told) == 2 and all(line.startswith("error: ") and str(run) in line for line in told), told


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "last.safetensors", "metrics.jsonl"])
def test_pipes_and_devices_in_a_run_are_not_read(name: str, run: Path, call: Call) -> None:
    (run / PREVIOUS).unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (run / name).unlink()
        make(run / name)
        check(call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run), None, str(run))


def test_nothing_outside_is_written_through_links(run: Path, call: Call) -> None:
    outside = run.parent / "outside"
    outside.mkdir()
    for path in list(run.iterdir()):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    (run / f".metrics.jsonl.{os.getpid()}.tmp").symlink_to(outside / "config.json")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    assert call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run).code == 0
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@pytest.mark.parametrize("path", ["/elsewhere/run", "../elsewhere", "..\\elsewhere", "~/elsewhere", "file:///x"])
def test_paths_in_a_config_lead_nowhere(path: str, run: Path, call: Call) -> None:
    saved = json.loads((run / "config.json").read_text())
    saved["train"] |= {"out_dir": path, "init_from": path, "wandb_project": path}
    (run / "config.json").write_text(json.dumps(saved))
    before = {path for path in run.parent.iterdir()}
    assert call("bitgpt/train", "--resume", "--max-iters", "13", "--out-dir", run).code == 0
    assert {path for path in run.parent.iterdir()} == before and not Path(path).expanduser().exists()
    assert json.loads((run / "config.json").read_text())["train"]["out_dir"] == str(run)


@pytest.mark.parametrize(("key", "value"), [
    ("run", "/elsewhere"), ("train_step", "x"), ("step", "many"), ("step", None), ("step", float("inf")),
    ("step", -5), ("step", 3.7), ("position", -1), ("position", 10**30), ("skipped", True),
    ("losses", ["a"]), ("losses", 3),
    ("records", -1), ("records", "3"), ("records", 10**9), ("best_val_loss", {}), ("scaler", 5)])
def test_a_checkpoint_can_set_no_more_than_the_loop(key: str, value: Any, run: Path, call: Call) -> None:
    tensors, state = checkpoint.load(run / "last.safetensors")
    checkpoint.save(run / "last.safetensors", tensors, state | {key: value})
    result = call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run)
    if key in ("run", "train_step", "scaler"):  # not taken, so nothing happens
        assert result.code == 0 and not Path("/elsewhere").exists()
    else:
        check(result, None, "last.safetensors" if value != 10**9 else "metrics.jsonl")


def test_moments_that_are_missing_are_missed(run: Path, call: Call) -> None:
    tensors, state = checkpoint.load(run / "last.safetensors")
    left = {name: value for name, value in tensors.items() if not name.startswith("optimizer/") or "wte" not in name}
    assert len(left) == len(tensors) - 3
    checkpoint.save(run / "last.safetensors", left, state)
    check(call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run), None, "last.safetensors")


@pytest.mark.parametrize("name", ["optimizer/exp_avg/wte.weight", "optimizer/step", "optimizer/../../x", "trits/x",
                                  "elsewhere/x", "optimizer/max/wte.weight"])
def test_tensors_that_no_run_saves_are_refused(name: str, run: Path, call: Call) -> None:
    tensors, state = checkpoint.load(run / "last.safetensors")
    checkpoint.save(run / "last.safetensors", tensors | {name: torch.zeros(7)}, state)
    check(call("bitgpt/train", "--resume", "--max-iters", "16", "--out-dir", run), None, "last.safetensors")
