"""sweep.py: every combination once, going on after a stop, the table, and mistakes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Result

import sweep

SMALL = [*TINY, "--n-layer", "1", "--eval-interval", "12", "--jobs", "2"]


@pytest.fixture
def call_sweep(capsys: pytest.CaptureFixture[str]):
    def run(*flags: str | Path) -> Result:
        capsys.readouterr()
        code = 0
        try:
            sweep.main([str(flag) for flag in flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())
    return run


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_combination_once_and_a_table_of_all(corpus: Path, tmp_path: Path, call_sweep) -> None:
    flags = [*SMALL, "--dataset", corpus, "--out-dir", tmp_path]
    result = call_sweep(*flags, "--model", "gpt", "bitgpt", "--seed", "1", "2", "--lr", "1e-2")
    assert result.code == 0, result.err
    first = lines(tmp_path)
    assert {(line["twin"], line["settings"]["seed"]) for line in first} == {
        (twin, seed) for twin in ("gpt", "bitgpt") for seed in (1, 2)}
    for line in first:
        assert line["steps"] == 12 and 1 < line["val_loss"] < 4 and len(line["text_sha256"]) == 64
        assert line["settings"]["dataset"] == corpus.name and line["settings"]["lr"] == 0.01
    again = call_sweep(*flags, "--model", "gpt", "bitgpt", "--seed", "1", "2", "3", "--lr", "1e-2", "--qk-norm",
                       "false", "--no-wandb-log")
    assert again.code == 0 and lines(tmp_path)[:4] == first and len(lines(tmp_path)) == 6  # what is new is trained
    table = (tmp_path / "table.txt").read_text()
    assert table in again.out and [row.split()[3:] for row in table.splitlines()[1:]] in (
        [["3", "gpt"], ["3", "bitgpt"]], [["3", "bitgpt"], ["3", "gpt"]])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = call_sweep("--out-dir", tmp_path)
    assert shown.code == 0 and table in shown.out


def test_a_sweep_that_was_stopped_goes_on_with_its_runs(corpus: Path, tmp_path: Path, call_sweep) -> None:
    flags = [*SMALL, "--max-iters", "1500", "--eval-interval", "1500", "--dataset", corpus]
    process = subprocess.Popen([sys.executable, ROOT / "sweep.py", *flags, "--out-dir", tmp_path / "stopped"],
                               stderr=subprocess.PIPE, text=True)
    while not any(sweep.last_step(run) for run in (tmp_path / "stopped").glob("*seed*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    [run] = (tmp_path / "stopped").glob("*seed*")
    assert 0 < sweep.last_step(run) < 1500 and not lines_there(tmp_path / "stopped")
    for name in ("stopped", "whole"):
        assert call_sweep(*flags, "--out-dir", tmp_path / name).code == 0
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_runs_that_differ_have_folders_of_their_own(corpus: Path, tmp_path: Path) -> None:
    given = {"model": ["bitgpt"], "seed": [1], "dataset": [str(corpus)]}
    for other in ({"tokenizer": ["bpe"], "vocab_size": [1000, 2000]}, {"distill": ["a/gpt", "b/gpt"]}):
        assert len({run.folder for run in sweep.runs_of(given | other, "", tmp_path)}) == 2


def test_a_text_is_known_by_what_it_says(corpus: Path, tmp_path: Path, call_sweep) -> None:
    flags = [*SMALL, "--model", "gpt", "--out-dir", tmp_path / "sweep", "--dataset"]
    for name, text in (("a", corpus.read_text()), ("b", corpus.read_text()[::-1]), ("c", corpus.read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text(text)
        assert call_sweep(*flags, tmp_path / name / "same.txt").code == 0
    assert len({line["text_sha256"] for line in lines(tmp_path / "sweep")}) == len(lines(tmp_path / "sweep")) == 2
    (tmp_path / "a" / "same.txt").write_text(corpus.read_text().upper())
    assert call_sweep(*flags, *(tmp_path / name / "same.txt" for name in "abc")).code == 0
    assert len(lines(tmp_path / "sweep")) == 3
    assert (tmp_path / "sweep/table.txt").read_text().count("text_sha256=") == 3


def test_runs_that_another_process_trains_are_waited_for(corpus: Path, tmp_path: Path, call_sweep) -> None:
    flags = [*SMALL, "--max-iters", "600", "--eval-interval", "600", "--dataset", corpus, "--out-dir", tmp_path]
    killed = subprocess.Popen([sys.executable, ROOT / "sweep.py", *flags], stderr=subprocess.DEVNULL)
    while not any(sweep.last_step(run) for run in tmp_path.glob("*seed*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    result = call_sweep(*flags)
    assert result.code == 0 and "waiting for" in result.err and "failed" not in result.err, result.err
    assert [line["steps"] for line in lines(tmp_path)] == [600]


def test_a_run_may_say_more_than_a_pipe_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "train.py").write_text("import sys\nsys.exit(200_000 * 'x' + ' at last')")
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    run = sweep.Run("gpt", {}, {}, "", tmp_path / "run", steps=5)
    assert sweep.train_all([run], "", 1, tmp_path / "results.jsonl") == 1
    assert "xx at last" in capsys.readouterr().err


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(
        {"twin": "gpt", "settings": {"dataset": "x.txt", "seed": seed}, "steps": 5, "val_loss": 1.0 + seed,
         "text_sha256": text * 64}) + "\n" for seed, text in ((1, "a"), (2, "a"), (3, "b"))))
    rows = sweep.summary(sweep.read_results(tmp_path / "results.jsonl"))
    assert [(row["losses"], row["what"]) for row in rows] == [
        ([2.0, 3.0], "text_sha256=aaaaaaaa"), ([4.0], "text_sha256=bbbbbbbb")]


def test_full_precision_has_no_quantizers_to_try(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 call_sweep) -> None:
    given = {"model": ["gpt", "bitgpt"], "seed": [1], "dataset": [str(corpus)], "weight_quant": ["absmean", "int2"]}
    assert [run.twin for run in {run.folder: run for run in sweep.runs_of(given, "", tmp_path)}.values()] == [
        "gpt", "bitgpt", "bitgpt"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call_sweep("--lr", "1e-3")
    assert result.code == 2 and "without torchrun" in result.err


def test_losses_of_other_tokens_stand_apart() -> None:
    rows = sweep.summary([{"twin": "gpt", "settings": {**tokens, "lr": lr, "seed": 1}, "steps": 5, "val_loss": loss,
                           "text_sha256": ""}
                          for tokens, lr, loss in (({"tokenizer": "bpe"}, 1, 5.0), ({}, 1, 2.0), ({}, 2, 3.0),
                                                   ({"tokenizer": "bpe"}, 2, 1.0))])
    assert [row["mean"] for row in rows] == [1.0, 5.0, 2.0, 3.0]
    assert sweep.table(rows).splitlines()[3] == "" and "do not compare" in sweep.table(rows)
    assert "do not compare" not in sweep.table(rows[:2])


def test_a_toml_file_may_name_folder_and_seed(corpus: Path, tmp_path: Path, call_sweep) -> None:
    (tmp_path / "sweep.toml").write_text(f"seed = 5\nout_dir = {json.dumps(str(tmp_path / 'here'))}\n")
    flags = [*SMALL, "--dataset", corpus, "--config", tmp_path / "sweep.toml"]
    assert call_sweep(*flags).code == 0
    assert [line["settings"]["seed"] for line in lines(tmp_path / "here")] == [5]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.txt").write_text("mine")
    result = call_sweep(*flags, "--out-dir", tmp_path / "mine")
    assert result.code == 2 and "sweep.py did not write" in result.err
    assert (tmp_path / "mine/table.txt").read_text() == "mine"


def lines_there(out: Path) -> bool:
    return (out / "results.jsonl").exists()


def test_a_run_that_fails_is_told_and_the_others_go_on(corpus: Path, tmp_path: Path, call_sweep) -> None:
    result = call_sweep(*SMALL, "--dataset", corpus, "--out-dir", tmp_path, "--block-size", "16", "7000")
    assert result.code == 2 and "1 of the runs failed" in result.err and "7000" in result.err
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize(("flags", "told"), [
    (["--lr", "1e-3", "x"], "expected a number"), (["--lrr", "1"], "Did you mean --lr"),
    (["--n-head", "3"], "divisible"), (["--resume"], "always resume"),
    (["--lr", "1e-3", "--jobs", "0"], "at least one"), ([], "no finished run yet"),
    (["--config", "nothing.toml"], "no such file"), (["--dataset", "a/input.txt"], "neither a file")])
def test_mistakes_are_told_before_anything_runs(flags: list[str], told: str, tmp_path: Path, call_sweep) -> None:
    result = call_sweep(*flags, "--out-dir", tmp_path / "sweep")
    assert result.code == 2 and told in result.err and not (tmp_path / "sweep").exists()


def test_results_that_are_damaged_are_told_by_line(tmp_path: Path, call_sweep) -> None:
    for broken in ("{}", "[1]", "{", '{"twin": "gpt", "settings": {}, "text_sha256": "", "steps": 1, "val_loss": "x"}'):
        (tmp_path / "results.jsonl").write_text(f"{broken}\n")
        result = call_sweep("--out-dir", tmp_path)
        assert result.code == 2 and "line 1 is damaged" in result.err


def test_runs_that_differ_in_their_seed_are_one_row() -> None:
    rows = sweep.summary([{"twin": "bitgpt", "settings": {**lr, "seed": seed, "n_ff": 8}, "steps": 5, "val_loss": loss,
                           "text_sha256": ""}
                          for lr, seed, loss in (({}, 1, 2.0), ({}, 2, 3.0), ({"lr": 2}, 1, 2.4))])
    assert [(row["mean"], row["what"], len(row["losses"])) for row in rows] == [(2.4, "lr=2", 1), (2.5, "lr=0.001", 2)]
    assert sweep.table(rows).splitlines()[2].split() == ["2.5000", "2.0000", "3.0000", "2", "bitgpt", "lr=0.001"]


def test_the_best_loss_of_a_run_counts(trained: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "val_loss": loss}) + "\n"
                                               for step, loss in ((0, 3.0), (4, 2.0), (8, 2.5))))
    found = sweep.Run("gpt", {}, {}, "", run, 8).result()
    assert [found[key] for key in ("val_loss", "best_step", "final_val_loss", "steps")] == [2.0, 4, 2.5, 8]


def test_losses_of_a_few_batches_stand_apart_by_what_those_hold() -> None:
    rows = sweep.summary([{"twin": "gpt", "settings": {"seed": 1, "eval_iters": few, "batch_size": size}, "steps": 5,
                           "val_loss": loss, "text_sha256": ""}
                          for few, size, loss in ((3, 2, 2.0), (3, 8, 3.0), (0, 2, 2.5), (0, 8, 2.6))])
    assert [row["mean"] for row in rows] == [2.0, 3.0, 2.5, 2.6]
    assert sweep.table(rows).splitlines()[1:].index("") == 1
