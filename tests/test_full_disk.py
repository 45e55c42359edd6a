"""No space left, on a real disk that is too small: in the middle of a checkpoint, of metrics, of tokenizing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Call, english, shell
from test_train import records

from core import checkpoint
from core.files import UserError
from data import bins, pieces
from data.bins import prepare_bins


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB. Only root can make one, which .ci/run is."""
    if not os.environ.get("CI") and (sys.platform != "linux" or os.geteuid() != 0):
        pytest.skip("only root on Linux can make a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def leave(disk: Path, n_bytes: int) -> Path:
    """Fills the disk with one file, up to so many bytes."""
    path = disk / "ballast"
    free = shutil.disk_usage(disk).free
    path.write_bytes(b"\1" * (free - n_bytes))
    return path


@pytest.mark.parametrize("share", [0.2, 1.5], ids=["best", "last"])
def test_in_the_middle_of_a_checkpoint(share: float, disk: Path, tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--no-decay-lr", "--dataset", corpus, "--out-dir"]
    run, whole = disk / "run", tmp_path / "whole"
    assert call("bitgpt/train", *flags, run, "--max-iters", "4").code == 0
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    full = leave(disk, int(share * len(before["best.safetensors"])) + 40_000)
    result = call("bitgpt/train", "--resume", "--out-dir", run, "--max-iters", "12")
    assert result.code == 2 and "error: " in result.err and "No space left" in result.err, result.err
    assert "--resume" in result.err and "Traceback" not in result.err and not list(run.glob(".*.tmp"))
    after = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    assert [name for name in before if before[name] != after[name]] == ["best.safetensors"] * (share > 1)
    assert checkpoint.load(run / "last.safetensors")[1]["step"] == 4
    full.unlink()
    assert call("bitgpt/train", "--resume", "--out-dir", run, "--max-iters", "12").code == 0
    assert call("bitgpt/train", *flags, whole).code == 0
    assert records(run) == records(whole)


def test_in_the_middle_of_metrics(disk: Path, tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--no-decay-lr", "--log-interval", "1", "--dataset", corpus, "--out-dir"]
    run, whole = disk / "run", tmp_path / "whole"
    assert call("gpt/train", *flags, run, "--max-iters", "4").code == 0
    full = leave(disk, 20_000)
    more = ["--eval-interval", "1000", "--max-iters", "1000"]
    result = shell(ROOT / "gpt/train.py", "--resume", "--out-dir", run, *more)
    assert result.returncode == 2 and "metrics.jsonl: No space left on device" in result.stderr, result.stderr
    assert "--resume" in result.stderr and "Traceback" not in result.stderr and "ignored" not in result.stderr
    assert (run / "metrics.jsonl").stat().st_size > 4096 and checkpoint.load(run / "last.safetensors")[1]["step"] == 4
    full.unlink()
    assert call("gpt/train", "--resume", "--out-dir", run, "--eval-interval", "4", "--max-iters", "8").code == 0
    assert call("gpt/train", *flags, whole, "--max-iters", "8").code == 0
    assert records(run) == records(whole)


def test_in_the_middle_of_tokenizing(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    monkeypatch.setattr(bins, "JOURNAL_SECONDS", 0.0)
    (tmp_path / "tale.txt").write_text(english(8000) * 60)
    whole = prepare_bins(str(tmp_path / "tale.txt"), data=tmp_path / "straight")
    full = leave(disk, 400_000)
    with pytest.raises(UserError, match="No space left on device.*the same command goes on"):
        prepare_bins(str(tmp_path / "tale.txt"), data=disk)
    folder = disk / "cache" / whole.folder.name
    assert (folder / "progress.json").exists() and not (folder / "meta.json").exists()
    full.unlink()
    encoded: list[str] = []
    encode = type(whole.tokenizer).encode_array
    monkeypatch.setattr(type(whole.tokenizer), "encode_array",
                        lambda self, text: (encoded.append(text), encode(self, text))[1])
    prepare_bins(str(tmp_path / "tale.txt"), data=disk)
    assert 0 < len(encoded) < 25  # of 30: what was whole is not encoded again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()}
