"""compare.py: the twins in lockstep, the report, and going on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, Call

import compare
from core import checkpoint
from core.files import UserError
from train import Trainer


@pytest.fixture(scope="module")
def flags(corpus: Path) -> list[str]:
    return [*TINY, "--verbose", "1", "--dataset", str(corpus)]


def test_lockstep_gives_table_plot_samples_and_two_whole_runs(flags: list[str], tmp_path: Path, call: Call) -> None:
    out = tmp_path / "compare"
    result = call("compare", *flags, "--bitgpt-lr", "4e-3", "--gpt-dropout", "0.1", "--out-dir", out)
    assert result.code == 0, result.err
    for row in ("validation loss", "bits per byte", "training speed", "ternary at 1.6 bits", "zeros", "flipped"):
        assert row in result.out
    assert "gap" in result.out and str(out / "losses.png") in result.out
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    gpt, bitgpt = json.loads((out / "comparison.json").read_text())["runs"]
    assert (gpt["twin"], bitgpt["twin"]) == ("gpt", "bitgpt") and gpt["parameters"] == bitgpt["parameters"]
    assert (gpt["lr"], bitgpt["lr"], gpt["dropout"], bitgpt["dropout"]) == (1e-3, 4e-3, 0.1, 0.0)
    assert len(bitgpt["sample"]) > 100 and bitgpt["sample"] in (out / "samples.txt").read_text()
    trits, rest = bitgpt["ternary_parameters"], bitgpt["parameters"] - bitgpt["ternary_parameters"]
    assert bitgpt["size_bytes_at_2_bits"] == trits // 4 + 2 * rest + 4 * 14
    for twin in ("gpt", "bitgpt"):
        assert (out / twin / "last.safetensors").exists() and (out / twin / "loss.png").exists()


def test_each_twin_in_lockstep_trains_as_it_would_alone(flags: list[str], tmp_path: Path, call: Call) -> None:
    more = ["--dropout", "0.1", "--verbose", "0"]
    assert call("compare", *flags, *more, "--out-dir", tmp_path / "both").code == 0
    for twin in ("gpt", "bitgpt"):
        assert call(f"{twin}/train", *flags, *more, "--out-dir", tmp_path / twin).code == 0
        ours, gold = (checkpoint.load(folder / "last.safetensors")[0]
                      for folder in (tmp_path / "both" / twin, tmp_path / twin))
        assert all(torch.equal(ours[name], gold[name]) for name in gold)


def test_resume_takes_up_both_wherever_each_was(flags: list[str], tmp_path: Path, call: Call) -> None:
    out, short = tmp_path / "compare", ["--no-decay-lr"]
    assert call("compare", *flags, *short, "--max-iters", "4", "--out-dir", out).code == 0
    assert call("gpt/train", "--resume", "--out-dir", out / "gpt", "--max-iters", "8").code == 0  # one is ahead
    result = call("compare", "--resume", "--out-dir", out, "--max-iters", "12")
    assert result.code == 0, result.err
    assert call("compare", *flags, *short, "--out-dir", tmp_path / "whole").code == 0
    ours, gold = (json.loads((folder / "comparison.json").read_text())["runs"] for folder in (out, tmp_path / "whole"))
    assert [run["val_loss"] for run in ours] == [run["val_loss"] for run in gold]
    again = call("compare", "--resume", "--out-dir", out)  # nothing left to train: the report once more
    assert again.code == 0 and "validation loss" in again.out
    shutil.rmtree(out / "bitgpt")
    lone = call("compare", "--resume", "--max-iters", "13", "--out-dir", out)  # with which settings would it begin?
    assert lone.code == 2 and "no run of bitgpt to go on with" in lone.err and not (out / "bitgpt").exists()


def test_a_comparison_killed_in_its_first_evaluation_goes_on(flags: list[str], tmp_path: Path, call: Call,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    out, given = tmp_path / "compare", [*flags, "--lr", "0.003"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(UserError("killed")))
        assert call("compare", *given, "--out-dir", out).code == 2
    assert call("compare", "--resume", "--out-dir", out).code == 0
    for twin in ("gpt", "bitgpt"):
        assert json.loads((out / twin / "config.json").read_text())["train"]["lr"] == 0.003


def test_a_finished_comparison_is_not_said_to_have_other_settings(flags: list[str], tmp_path: Path, call: Call) -> None:
    out = tmp_path / "compare"
    assert call("compare", *flags, "--out-dir", out).code == 0
    for other, said in ((["--seed", "9"], "--seed 1337; 9 would"), (["--bitgpt-lr", "0.5"], "--lr 0.001; 0.5 would")):
        result = call("compare", "--resume", *other, "--out-dir", out)
        assert result.code == 2 and said in result.err
    (tmp_path / "moved.txt").write_text(Path(flags[-1]).read_text())
    again = call("compare", *flags[:-1], tmp_path / "moved.txt", "--resume", "--compile", "off", "--out-dir", out)
    assert again.code == 0 and "validation loss" in again.out
    (tmp_path / "other.toml").write_text("lr = 0.5\n")
    result = call("compare", "--resume", "--config", tmp_path / "other.toml", "--out-dir", out)
    assert result.code == 2 and "--lr 0.001; 0.5 would" in result.err


def test_a_report_replaces_no_file_of_others(flags: list[str], trained: dict[str, Path], tmp_path: Path,
                                             call: Call) -> None:
    (tmp_path / "samples.txt").write_text("mine")
    for arguments in (flags, list(trained.values())):
        result = call("compare", *arguments, "--out-dir", tmp_path)
        assert result.code == 2 and "which compare.py did not write" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.txt"]


def test_losses_of_other_texts_are_not_subtracted(trained: dict[str, Path], corpus: Path, tmp_path: Path,
                                                  call: Call) -> None:
    (tmp_path / "other.txt").write_text(corpus.read_text()[::-1])
    assert call("bitgpt/train", *TINY, "--dataset", tmp_path / "other.txt", "--out-dir", tmp_path / "other").code == 0
    result = call("compare", trained["gpt"], tmp_path / "other", "--out-dir", tmp_path / "report")
    row = next(line for line in result.out.splitlines() if line.startswith("validation loss (nats"))
    assert result.code == 0 and len(row.split()) == 6 and "text (sha256)" in result.out  # no difference


def test_finished_runs_are_compared_as_they_are(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    result = call("compare", trained["gpt"], trained["bitgpt"], "--out-dir", tmp_path / "report")
    assert result.code == 0 and "difference" in result.out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "comparison.html", "comparison.json", "losses.png", "samples.txt"}
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    assert call("compare", trained["gpt"], trained["bitgpt"], "--out-dir", a_file).code == 2
    begun = shutil.copytree(trained["gpt"], tmp_path / "begun")  # killed after its first record
    for name in ("best", "last"):
        (begun / f"{name}.safetensors").unlink()
    told = call("compare", begun, trained["bitgpt"], "--out-dir", tmp_path / "none")
    assert told.code == 2 and "begun" in told.err and "Traceback" not in told.err
    third = shutil.copytree(trained["gpt"], tmp_path / "third")
    three = call("compare", trained["gpt"], trained["bitgpt"], third, "--out-dir", tmp_path / "three")
    assert three.code == 0 and "difference" not in three.out
    again = tmp_path / "begun" / ".." / "third"
    twice = call("compare", third, trained["bitgpt"], again, "--out-dir", tmp_path / "twice")
    assert twice.code == 2 and "named twice" in twice.err


def test_the_figures_of_a_report(trained: dict[str, Path], tmp_path: Path) -> None:
    """The best is that of best.safetensors, whatever other batches gave; speed is a median; second minus first."""
    runs = []
    for twin, more in (("gpt", 0.0), ("bitgpt", 0.5)):
        run = Path(shutil.copytree(trained[twin], tmp_path / twin))
        best = checkpoint.load(run / "best.safetensors")[1]["step"]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
            {"step": best - 1, "val_loss": 1.0}, {"step": best, "val_loss": 2.0 + more, "tok_per_sec": 100.0},
            {"step": best + 1, "val_loss": 3.0, "tok_per_sec": 900.0}, {"step": best + 2, "tok_per_sec": 200.0})))
        runs.append(compare.summary(run) | {"label": twin})
        assert runs[-1]["best_step"] == best and runs[-1]["final_val_loss"] == 3.0
    shown = {line[0]: line[1:] for line in compare.cells(runs)}
    assert shown["validation loss (nats/token, best)"] == ["2.0000", "2.5000", "+0.5000"]
    assert shown["training speed (tok/s, median)"] == ["200", "200", "x 1.00"]


def test_what_compares() -> None:
    def run(text: str = "a", tokenizer: str = "b", batches: tuple[int, ...] = (0, 0, 0)) -> dict[str, object]:
        return {"text_sha256": text, "tokenizer_sha256": tokenizer, "eval_batches": batches}

    few = run(batches=(3, 2, 16))
    for other, per_token, per_byte in ((run(), True, True), (run(text=""), True, True), (run(batches=()), True, True),
                                       (run(tokenizer="c"), False, True), (run(text="c"), False, False),
                                       (few, False, False)):
        assert [compare.comparable([run(), other], how) for how in (False, True)] == [per_token, per_byte], other
    for other, same in ((few, True), (run(batches=(3, 2, 48)), False), (run(tokenizer="c", batches=(3, 2, 16)), False)):
        assert [compare.comparable([few, other], how) for how in (False, True)] == [same, same], other
    for saved, read in (([3, 2], [3, 2, 16]), ([0, 0], [0, 0, 0]), ([3, 2, 48], [3, 2, 48]), (None, []), ([""], [])):
        assert compare.eval_batches({"eval_batches": saved}, 16) == read
