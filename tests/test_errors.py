"""What a person can get wrong: a message with problem, value and remedy, exit code 2, and nothing left behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Call, english, shell

from core.files import UserError, atomic_file
from core.run_folder import check_sources, read_config
from training.settings import TrainConfig


def check(result: object, out: Path | None, *parts: str) -> None:
    code, stdout, err = result  # type: ignore[misc]
    assert code == 2, (code, stdout, err)
    message = [line for line in err.splitlines() if not line.startswith(("note:", "compiling"))]
    assert message[0].startswith("error: ") and len(message) <= 2 and "Traceback" not in err, err
    for part in parts:
        assert part in err, err
    assert out is None or not out.exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "neither a file"), (b"", "empty"), (b"  \n \n", "empty"), (b"ab\0cd" * 999, "binary"),
    (b"caf\xe9 " * 999, "UTF-8"), (b"short", "longer than the text")])
def test_corpora_that_cannot_be_used(content: bytes | None, message: str, tmp_path: Path, call: Call) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    check(call("train", *TINY, "--dataset", text, "--out-dir", tmp_path / "run"), tmp_path / "run", message)


@pytest.mark.parametrize(("flags", "parts"), [
    (["--dataset", "shakespear"], ["shakespear", "Did you mean shakespeare?"]),
    (["--tokenizer", "chars"], ["chars", "Did you mean char?"]),
    (["--n-layers", "4"], ["--n-layers", "Did you mean --n-layer?", "--help"]),
    (["stray"], ["stray"]),
    (["--act", "gelu"], ["gelu", "silu, relu2"]), (["--schedule", "cosin"], ["Did you mean cosine?"]),
    (["--n-embd", "33"], ["33", "divisible", "Try --n-embd"]),
    (["--n-embd", "6", "--n-head", "2"], ["3 wide", "even"]),
    (["--n-kv-head", "3"], ["n_kv_head 3", "divisor"]),
    (["--block-size", "99999"], ["99999", "longer than the text", "--block-size"]),
    (["--n-layer", "0"], ["--n-layer", "at least 1"]), (["--n-layer", "-2"], ["-2", "at least 1"]),
    (["--n-layer", "2.5"], ["2.5", "whole number"]), (["--n-layer", "many"], ["many", "whole number"]),
    (["--batch-size", "0"], ["at least 1"]), (["--max-iters", "0"], ["at least 1"]),
    (["--lr", "0"], ["above 0"]), (["--lr", "-1e-3"], ["above 0"]), (["--lr", "nan"], ["a number"]),
    (["--lr", "fast"], ["fast", "a number"]), (["--lr", "inf"], ["a number"]), (["--lr"], ["--lr"]),
    (["--dropout", "1"], ["below 1"]), (["--d", "-0.1"], ["at least 0"]), (["--decay-lr", "maybe"], ["true or false"]),
    (["--dtype", "int8"], ["float32"]), (["--device", "tpu"], ["tpu"]), (["--device", "gpu"], ["auto"]),
    (["--config", "nowhere.toml"], ["nowhere.toml", "no such file"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    (["--resume"], ["holds no trained run"]), (["--init-from", "nowhere"], ["nowhere", "holds no trained run"]),
    (["--min-lr", "1"], ["above lr"]), (["--lr-decay-iters", "1"], ["warm-up"]),
    (["--warmup-quant", "0.9", "--ternary-from", "0.5"], ["complete at step", "--warmup-quant"]),
    (["--seed", "9" * 30], ["at most"]), (["--n-embd", "1000000"], ["memory"]),
    (["--tokenizer", "bpe", "--vocab-size", "10"], ["10", "256"])])
def test_flags_that_cannot_be_meant(flags: list[str], parts: list[str], tmp_path: Path, corpus: Path,
                                    call: Call) -> None:
    run = tmp_path / "run"
    check(call("bitgpt/train", *TINY, "--dataset", corpus, "--out-dir", run, *flags), run, *parts)


@pytest.mark.parametrize("flags", [["--gpt-lr", "0"], ["--gpt-n-layer", "3"], ["--resume"], ["--bitgpt-dropout", "2"],
                                   ["--resume", "--overwrite"]])
def test_flags_of_compare(flags: list[str], tmp_path: Path, corpus: Path, call: Call) -> None:
    check(call("compare", *TINY, "--dataset", corpus, "--out-dir", tmp_path / "c", *flags), tmp_path / "c")


@pytest.mark.parametrize(("flags", "part"), [
    (["--temperature", "-1"], "at least 0"), (["--top-k", "-5"], "at least 0"), (["--top-k", "x"], "whole number"),
    (["--top-p", "0"], "above 0"), (["--num-samples", "0"], "at least 1"), (["--max-new-tokens", "0"], "at least 1"),
    (["--prompt-file", "nowhere.txt"], "No such file"), (["--kernel", "tourch"], "Did you mean torch?"),
    (["--out-dir", "nowhere"], "holds no trained run"), (["--device", "tpu"], "tpu"),
    (["--prompt", "a", "--prompt-file", "b"], "Take one")])
def test_flags_of_generate(flags: list[str], part: str, trained: dict[str, Path], call: Call) -> None:
    check(call("gpt/generate", "--out-dir", trained["gpt"], *flags), None, part)


@pytest.mark.parametrize(("toml", "parts"), [
    ("n_layers = 3", ["n_layers", "Did you mean n_layer?"]), ("[gpt]\nlearning = 1", ["learning"]),
    ("lr = ", ["not valid TOML"]), ("n_layer = 'two'", ["whole number"]), ("n_layer = 2.5", ["whole number"]),
    ("decay_lr = 3", ["true or false"]), ("act = 1", ["text"]), ("[bitgtp]\nlr = 1e-3", ["Did you mean bitgpt?"])])
def test_config_files(toml: str, parts: list[str], tmp_path: Path, corpus: Path, call: Call) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(toml)
    check(call("gpt/train", "--config", path, "--dataset", corpus, "--out-dir", tmp_path / "run"), tmp_path / "run",
          "wrong.toml", *parts)


def test_a_file_where_the_output_folder_should_be(tmp_path: Path, corpus: Path, call: Call) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    for script in ("gpt/train", "compare"):
        check(call(script, *TINY, "--dataset", corpus, "--out-dir", path), None, "run", "Name a")
        check(call(script, *TINY, "--dataset", corpus, "--out-dir", path / "below"), None, "below", "cannot be written")
    assert path.read_text() == "mine"


def test_a_text_may_move_under_a_run(trained: dict[str, Path], tmp_path: Path, corpus: Path, call: Call) -> None:
    run, moved = Path(shutil.copytree(trained["gpt"], tmp_path / "run")), tmp_path / "moved.txt"
    moved.write_bytes(corpus.read_bytes())
    assert call("gpt/train", "--resume", "--out-dir", run, "--dataset", moved, "--max-iters", "14").code == 0
    assert read_config(run).train["dataset"] == str(moved)
    other = call("gpt/train", "--resume", "--out-dir", run, "--init-from", trained["bitgpt"])
    check(other, None, "init_from is not set")


def test_compare_keeps_the_run_that_the_other_learns_from(trained: dict[str, Path], tmp_path: Path, corpus: Path,
                                                          call: Call) -> None:
    teacher = Path(shutil.copytree(trained["gpt"], tmp_path / "gpt"))
    before = (teacher / "last.safetensors").read_bytes()
    for overwrite in ([], ["--overwrite"]):
        check(call("compare", *TINY, "--dataset", corpus, "--out-dir", tmp_path, "--bitgpt-distill", teacher,
                   *overwrite), None, "--overwrite")
    assert (teacher / "last.safetensors").read_bytes() == before


def test_other_peoples_files_are_named_for_what_they_are(tmp_path: Path, call: Call) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text('{"architectures": ["BitNetForCausalLM"]}')
    for run in (tmp_path, tmp_path / "x.gguf"):
        check(call("bitgpt/generate", "--out-dir", run), None, f"python convert.py {run}")


def test_a_folder_that_holds_another_run_is_neither_mixed_nor_erased(trained: dict[str, Path], tmp_path: Path,
                                                                     corpus: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    flags = ["--dataset", corpus, "--out-dir", run]
    check(call("gpt/train", *TINY, *flags), None, "--resume", "--overwrite")
    check(call("bitgpt/train", *TINY, *flags, "--resume"), None, "a run of gpt", "--init-from")
    check(call("gpt/train", "--out-dir", run, "--resume", "--n-embd", "64"), None, "n_embd is 32", "not 64")
    (tmp_path / "other.txt").write_text(english(8000, seed=1))
    check(call("gpt/train", "--out-dir", run, "--resume", "--dataset", tmp_path / "other.txt"), None, "is not the text")
    check(call("gpt/train", *TINY, *flags, "--overwrite", "--n-head", "3"), None, "divisible")
    for flag in ("--init-from", "--distill"):
        check(call("gpt/train", "--overwrite", flag, run, "--out-dir", run), None, f"{flag} takes")
    check(call("bitgpt/generate", "--out-dir", run), None, "a run of gpt")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert call("gpt/train", *TINY, *flags, "--overwrite", "--seed", "5").code == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "last.safetensors").read_bytes() != before["last.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["bitgpt"], tmp_path / "run"))
    for name in ("last.safetensors", "last.1.safetensors", "best.safetensors"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:int(len(content) * share)])
    check(call("bitgpt/train", "--resume", "--out-dir", run, "--max-iters", "20"), None, "last.safe", "cut short")
    check(call("bitgpt/generate", "--out-dir", run), None, "best.safetensors", "cut short")


@pytest.mark.parametrize(("name", "content", "part"), [
    ("config.json", "{", "JSON"), ("config.json", "[]", "format"), ("config.json", '{"format": 99}', "format"),
    ("tokenizer.json", "{}", "tokenizer"), ("metrics.jsonl", "", "records")])
def test_a_damaged_run_folder(name: str, content: str, part: str, trained: dict[str, Path], tmp_path: Path,
                              call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    (run / name).write_text(content)
    check(call("gpt/train", "--resume", "--out-dir", run, "--max-iters", "20"), None, name, part)


def test_a_setting_of_another_version_is_named(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["n_expert"] = 8
    (run / "config.json").write_text(json.dumps(saved))
    check(call("gpt/generate", "--out-dir", run), None, "n_expert")
    del saved["model"]["n_expert"], saved["model"]["qk_norm"]
    (run / "config.json").write_text(json.dumps(saved))
    result = call("gpt/generate", "--out-dir", run, "--max-new-tokens", "2")
    assert result.code == 0 and "qk_norm" in result.err


def test_weights_of_another_architecture_are_refused(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text())
    for change, part in (({"n_layer": 3}, "weight blocks.2"), ({"n_ff": 96}, "mlp"), ({"sub_norm": False}, "sub_norm")):
        (run / "config.json").write_text(json.dumps(saved | {"model": saved["model"] | change}))
        check(call("gpt/generate", "--out-dir", run, "--kernel", "torch"), None, part)


def test_compare_refuses_runs_that_are_none_and_flags_beside_runs(trained: dict[str, Path], tmp_path: Path,
                                                                 call: Call) -> None:
    out = ["--out-dir", tmp_path / "report"]
    check(call("compare", trained["gpt"], tmp_path / "nothing", *out), tmp_path / "report", "holds no trained run")
    check(call("compare", trained["gpt"], trained["bitgpt"], "--lr", "1e-3", *out), tmp_path / "report", "no training")
    check(call("compare", trained["gpt"], "--out-dir", trained["gpt"]), None, "one of the runs")


def test_errors_look_the_same_from_the_shell(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(english(3000))
    result = shell(ROOT / "bitgpt/train.py", "--dataset", "text.txt", "--n-layer", "4.5", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == [tmp_path / "text.txt"]
    assert result.stderr == "error: --n-layer '4.5': expected a whole number.\n"


def test_atomic_file_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError), atomic_file(path) as temporary:
        temporary.write_text("new, but not whole")
        raise UserError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_twin_whose_settings_are_wrong_costs_the_other_nothing(tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--dataset", corpus, "--out-dir", tmp_path / "both", "--max-iters", "2"]
    assert call("compare", *flags).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "both").glob("*/*.safetensors")}
    check(call("compare", *flags, "--overwrite", "--bitgpt-distill", "nowhere"), None, "nowhere", "no trained run")
    check(call("compare", *flags, "--overwrite", "--init-from", tmp_path / "both" / "bitgpt"), None, "would remove")
    assert before == {path: path.read_bytes() for path in (tmp_path / "both").glob("*/*.safetensors")}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "metrics.jsonl"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path, corpus: Path, call: Call) -> None:
    (tmp_path / name).write_text('{"architectures": ["BitNetForCausalLM"]}')
    for flag in ([], ["--overwrite"]):
        check(call("gpt/train", *TINY, "--dataset", corpus, "--out-dir", tmp_path, *flag), None, f"holds {name}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_goes_on_from_the_checkpoint_before_the_last(trained: dict[str, Path], tmp_path: Path, corpus: Path,
                                                           call: Call) -> None:
    run = Path(shutil.copytree(trained["gpt"], tmp_path / "run"))
    (run / "last.safetensors").rename(run / "last.1.safetensors")
    (run / "best.safetensors").unlink()
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    result = call("gpt/train", "--resume", "--out-dir", run, "--max-iters", step + 2)
    assert result.code == 0 and "last.1" in result.err, result.err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step + 2


@pytest.mark.parametrize(("script", "flags", "problem"), [
    ("gpt/train", ["--threads", "100000"], "--threads"), ("generate", ["--threads", "40000"], "--threads"),
    ("gpt/train", ["--config", "README.md/x.toml"], "Not a directory"),
    ("gpt/train", ["--out-dir", "x" * 300], "File name too long"),
    ("generate", ["--prompt", "-hello"], "--flag=-value"),
    ("train", ["--model", "gpt", "--out-dir", "y" * 300], "File name too long")])
def test_what_no_machine_has_and_no_disk_holds(script: str, flags: list[str], problem: str, corpus: Path, call: Call,
                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    check(call(script, *flags, *(["--dataset", corpus] if "train" in script else [])), None, problem)


def test_a_kill_while_packing_leaves_nothing_for_long(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(trained["bitgpt"], tmp_path / "run"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [run / f".model.ternary.safetensors.{process}.tmp" for process in (gone.pid, os.getppid(), f"5.{gone.pid}")]
    for path in left:
        path.write_text("half")
        os.utime(path, (0, 0))
    (run / "model.ternary.safetensors").unlink(missing_ok=True)
    assert call("bitgpt/generate", "--out-dir", run, "--max-new-tokens", "1", "--kernel", "cpu").code == 0
    assert set(run.glob(".*.tmp")) == set(left[1:])  # who lives may write on; the last is of a file of another name


def test_what_is_packed_and_no_more_says_what_it_is(trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    shutil.copytree(trained["bitgpt"], tmp_path / "run")
    flags = ["--out-dir", tmp_path / "run", "--kernel", "cpu", "--max-new-tokens", "3"]
    assert call("generate", *flags, "--weights", "trit1.6").code == 0
    for name in ("best", "last", "last.1"):
        (tmp_path / "run" / f"{name}.safetensors").unlink(missing_ok=True)
    result = call("generate", *flags)
    assert result.code == 0 and "has trit1.6, head q8, and there is no checkpoint" in result.err
    result = call("generate", *flags, "--checkpoint", "last")
    assert result.code == 2 and "last.safetensors is missing" in result.err


def test_what_cannot_be_logged_is_told_before_a_run_is_replaced(trained: dict[str, Path], tmp_path: Path, call: Call,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained["gpt"], run)
    before = sorted(path.name for path in run.iterdir())
    for project in ("a/b", ""):
        result = call("gpt/train", *TINY, "--overwrite", "--wandb-log", f"--wandb-project={project}", "--out-dir", run)
        assert result.code == 2 and "W&B takes 1 to 128 letters" in result.err
    for name, value, said in (("WANDB_API_KEY", "abc", "--wandb-log: "), ("WANDB_MODE", "nonsense", "WANDB_MODE"),
                              ("WANDB_MODE", "online", "nobody is logged in")):
        with monkeypatch.context() as patch:
            patch.setenv("HOME", str(tmp_path))
            patch.setenv(name, value)
            result = call("gpt/train", *TINY, "--overwrite", "--wandb-log", "--out-dir", run)
            assert result.code == 2 and said in result.err, result.err
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = call("gpt/train", *TINY, "--overwrite", "--wandb-log", "--out-dir", run)
    assert result.code == 2 and "pip install wandb" in result.err
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("section", ["", "[gpt]\n"])
def test_a_run_goes_on_where_its_toml_file_says(section: str, trained: dict[str, Path], tmp_path: Path,
                                                call: Call) -> None:
    shutil.copytree(trained["gpt"], tmp_path / "run")
    (tmp_path / "run.toml").write_text(f"{section}out_dir = {json.dumps(str(tmp_path / 'run'))}\nmax_iters = 13\n")
    assert call("gpt/train", "--config", tmp_path / "run.toml", "--resume").code == 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 13


def test_flags_that_could_not_be_heeded(trained: dict[str, Path], tmp_path: Path, corpus: Path, call: Call) -> None:
    flags = [*TINY, "--dataset", corpus, "--out-dir", tmp_path / "run"]
    for others, said in ((["--vocab-size", "300"], "only --tokenizer bpe takes one"),
                         (["--init-from", trained["gpt"], "--tokenizer", "bpe"], "tokenizer is char in"),
                         (["--init-from", trained["gpt"], "--vocab-size", "300"], "vocab_size is")):
        result = call("gpt/train", *flags, *others)
        assert result.code == 2 and said in result.err and not (tmp_path / "run").exists()
    (tmp_path / "uneven.toml").write_text("[gpt]\nbatch_size = 2\n")
    result = call("compare", "--config", tmp_path / "uneven.toml", "--dataset", corpus, "--out-dir", tmp_path / "run")
    assert result.code == 2 and "the twins' batch_size differ (2 and" in result.err and not (tmp_path / "run").exists()


def test_a_config_of_other_editors(tmp_path: Path, corpus: Path, call: Call) -> None:
    toml = tmp_path / "config.toml"
    toml.write_bytes(b"\xef\xbb\xbfn_layer = 1\n")
    check(call("gpt/train", "--config", toml, "--n-head", "3", "--dataset", corpus), None, "divisible")
    toml.write_text("x = " + "[" * 5000)
    check(call("gpt/train", "--config", toml, "--dataset", corpus), None, "not valid TOML")
    toml.write_text("gpt = 3")
    check(call("gpt/train", "--config", toml, "--dataset", corpus), None, "[gpt]")


def test_what_a_run_learns_from_is_known_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "gpt"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    for name in ("link", "runs/../runs/gpt"):
        with pytest.raises(UserError, match="would remove"):
            check_sources([run], TrainConfig(distill=name))


def test_closed_outputs_do_not_matter(tmp_path: Path, corpus: Path) -> None:
    flags = [*TINY, "--verbose", "1", "--dataset", corpus, "--out-dir", tmp_path / "run"]
    command = shlex.join(map(str, [sys.executable, ROOT / "gpt" / "train.py", *flags]))
    assert subprocess.run(f"{command} 2>&- >&-", shell=True).returncode == 0
    assert (tmp_path / "run" / "loss.png").exists()
