"""convert.py as a person calls it, what it refuses, and --init-from with what others made."""

import os

from interop.files import atomic_folder
from interop.hf import FIGURES, HF

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shell
from interop_models import bpe_tokenizer, foreign_tokenizer, make_run, weights
from safetensors.torch import load_file, save_file

import convert
import interop
from core.files import UserError
from core.run_folder import read_config
from interop.gguf_file import GGUFFile
from interop.hf import write_hf
from interop.source import RunSource, weights_of


def run(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
        convert.main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    code, _, err = run(capsys, *flags)
    lines = err.splitlines()  # a bar may stand before the message
    assert code == 2 and lines[-1].startswith("error: ") and "Traceback" not in err, err
    return lines[-1]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "small", n_layer=1, n_embd=64, n_ff=128)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_way(small, tmp_path, capsys):
    hf, packed, file = tmp_path / "hf", tmp_path / "packed", tmp_path / "x.gguf"
    assert run(capsys, small, hf)[0] == run(capsys, small, packed, "--packed")[0] == run(capsys, small, file)[0] == 0
    assert (packed / "model.safetensors").stat().st_size < (hf / "model.safetensors").stat().st_size / 4
    for source, name in ((hf, "a"), (packed, "b"), (file, "c")):
        code, out, err = run(capsys, source, tmp_path / name)
        assert code == 0 and "sample it: python bitgpt/generate.py" in out and "100%" in err
        assert read_config(tmp_path / name).model == read_config(small).model
    code, _, err = run(capsys, packed, tmp_path / "y.gguf", "--type", "q2_0", "--quiet")  # from one format to the other
    assert code == 0 and not err
    data = [(GGUFFile(path), "blk.0.ffn_down.weight") for path in (file, tmp_path / "y.gguf")]
    assert data[0][0].data(data[0][1]).tobytes() == data[1][0].data(data[1][1]).tobytes()
    assert not [name for name in listing(tmp_path) if ".tmp" in name]


def test_an_imported_run_is_sampled_and_compared(small, tmp_path, call):
    write_hf(RunSource(small), tmp_path / "hf", quiet=True)
    convert.main([str(tmp_path / "hf"), str(tmp_path / "back"), "--quiet"])
    texts = [call("generate", "--out-dir", path, "--max-new-tokens", "20", "--num-samples", "1", "--prompt", "a")
             for path in (small, tmp_path / "back")]
    assert texts[0].code == texts[1].code == 0 and texts[0].out == texts[1].out
    result = call("compare", small, tmp_path / "back", "--out-dir", tmp_path / "report")
    assert result.code == 0 and "1.2500" in result.out, result.err


def test_an_existing_destination_stays(small, tmp_path, capsys):
    for name in ("hf", "x.gguf"):
        assert run(capsys, small, tmp_path / name, "--quiet")[0] == 0
        assert "--overwrite" in refused(capsys, small, tmp_path / name)
        assert run(capsys, small, tmp_path / name, "--overwrite", "--quiet")[0] == 0
    (tmp_path / "hf/thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    assert "thesis.txt" in refused(capsys, small, tmp_path / "hf", "--overwrite")
    assert "is a file" in refused(capsys, small, tmp_path / "hf/config.json")
    (tmp_path / "empty").mkdir()
    assert run(capsys, small, tmp_path / "empty", "--quiet")[0] == 0
    assert listing(tmp_path) == sorted([*before, "empty", *(f"empty/{n}" for n in listing(tmp_path / "empty"))])
    assert run(capsys, tmp_path / "empty", tmp_path / "r", "--quiet")[0] == 0
    assert "--overwrite" in refused(capsys, tmp_path / "x.gguf", tmp_path / "r")
    (tmp_path / "r/notes").mkdir()
    assert "notes" in refused(capsys, tmp_path / "x.gguf", tmp_path / "r", "--overwrite")
    (tmp_path / "folder.gguf").mkdir()
    assert "folder" in refused(capsys, small, tmp_path / "folder.gguf", "--overwrite")


def test_what_others_made_is_not_replaced(small, trained, tmp_path, capsys):
    write_hf(RunSource(small), tmp_path / "hf", quiet=True)
    (tmp_path / "precious.gguf").write_text("years of work")
    shutil.copytree(trained["gpt"], tmp_path / "run")
    shutil.copytree(tmp_path / "hf", tmp_path / "theirs")
    (tmp_path / "theirs/bitgpt.json").unlink()
    for source, name in ((small, "precious.gguf"), (tmp_path / "hf", "run"), (small, "theirs")):
        before = {path: path.read_bytes() for path in (tmp_path / name, *(tmp_path / name).glob("*")) if path.is_file()}
        assert "was not written by convert.py" in refused(capsys, source, tmp_path / name, "--overwrite")
        assert all(path.read_bytes() == content for path, content in before.items())


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path, capsys):
    shutil.copytree(trained["gpt"], tmp_path / "run")
    path = tmp_path / "run" / "best.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    for name in ("x.gguf", "hf"):
        assert "its checksum does not match" in refused(capsys, tmp_path / "run", tmp_path / name)


def test_an_ending_may_be_written_large(small, tmp_path, capsys):
    assert run(capsys, small, tmp_path / "X.GGUF", "--quiet")[0] == 0 and (tmp_path / "X.GGUF").is_file()
    assert run(capsys, tmp_path / "X.GGUF", tmp_path / "back", "--quiet")[0] == 0


def test_a_mistake_is_told(small, tmp_path, capsys):
    hf = tmp_path / "hf"
    write_hf(RunSource(small), hf, quiet=True)
    for flags, words in [
            ((tmp_path / "none", hf), ["none", "not there"]), ((tmp_path, tmp_path.parent / "y"), ["neither a run"]),
            ((small, small), ["contains the other"]), ((small, small / "hf"), ["contains the other"]),
            ((small, small.parent), ["contains the other"]), ((small, tmp_path / "no/such/place"), ["is no folder"]),
            ((small, tmp_path / "x.gguf", "--packed"), ["--packed", "Hugging Face"]),
            ((hf, tmp_path / "r", "--packed"), ["--packed"]),
            ((small, tmp_path / "b", "--type", "f16"), ["--type", "GGUF"]),
            ((small, tmp_path / "x.gguf", "--type", "q4_0"), ["--type", "tq1_0"]), ((small,), ["DESTINATION"]),
            ((small, tmp_path / "b", "--overwite"), ["--overwite", "Did you mean --overwrite"]),
            ((small, tmp_path / "b", "--block-size", "5"), ["--block-size", "imported"]),
            ((hf, tmp_path / "b", "--block-size", "-5"), ["--block-size", "at least 1"]),
            ((small, tmp_path / "b", "--block-size", "x"), ["--block-size"])]:
        message = refused(capsys, *flags)
        assert all(word in message for word in words), message
    assert listing(tmp_path) == sorted(["hf", *(f"hf/{n}" for n in listing(hf)), "runs",
                                        *(f"runs/{n}" for n in listing(tmp_path / "runs"))])
    qk = make_run(tmp_path / "qk", qk_norm=True, n_layer=1)
    assert "qk_norm" in refused(capsys, qk, tmp_path / "b")
    odd = make_run(tmp_path / "odd", n_layer=1, n_ff=90)
    assert "multiples of 4" in refused(capsys, odd, tmp_path / "b", "--packed")
    full = make_run(tmp_path / "full", "gpt", n_layer=1)
    assert "nothing to pack" in refused(capsys, full, tmp_path / "b", "--packed")
    assert not (tmp_path / "b").exists()


# -- folders that a BitGPT cannot be, or that lie ----------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"model_type": "qwen2"}, "'qwen2'"), ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"), ({"head_dim": 128}, "head_dim"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": [1]}, "rope_parameters"), ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 2**60, "head_dim": None}, "n_embd"), ({"num_hidden_layers": 3}, "model.layers.1"),
    ({"num_attention_heads": 0}, "n_head"), ({"vocab_size": -1}, "vocab_size"),
    ({"rms_norm_eps": float("nan")}, "norm_eps"),
    ({"intermediate_size": 64}, "settings make it"), ({"tie_word_embeddings": False}, "lm_head"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"quantization_config": 5}, "5"),
    ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
    ({"quantization_config": {"quant_method": "bitnet", "linear_class": "ternary"}}, "ternary"),
    ({"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["model.layers.0.mlp"]}}, "layers.0"),
    ({"quantization_config": {"quant_method": "bitnet"}}, "_scale")])
def test_configurations_that_are_refused_by_name(small, tmp_path, capsys, change, words):
    write_hf(RunSource(small), tmp_path / "hf", quiet=True)
    saved = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(saved | change))
    assert words in refused(capsys, tmp_path / "hf", tmp_path / "r")
    assert not (tmp_path / "r").exists() and not [name for name in listing(tmp_path) if ".tmp" in name]


def test_tensors_that_are_refused(small, tmp_path, capsys):
    write_hf(RunSource(small), tmp_path / "hf", packed=True, quiet=True)
    file = tmp_path / "hf/model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
    for key, value, words in [
            (name + "_scale", torch.ones(128), "128 scales"), (name + "_scale", torch.tensor([float("nan")]), "scale"),
            (name + "_scale", torch.tensor([0.0]), "scale"), (name, torch.full_like(tensors[name], 255), "no trits"),
            (name, torch.randn(128, 64), "other numbers than -1, 0 and 1"),
            (name, tensors[name][:5], "settings make it"), (name, None, "there is no"),
            ("model.norm.weight", torch.full((64,), float("inf")), "not finite"),
            ("model.layers.0.mlp.up_proj.bias", torch.zeros(128), "no biases"),
            ("model.layers.0.self_attn.q_norm.weight", torch.zeros(16), "no place")]:
        changed = {k: v for k, v in (tensors | {key: value}).items() if v is not None}
        save_file(changed, file, {"format": "pt"})
        assert words in refused(capsys, tmp_path / "hf", tmp_path / "r"), words
    assert not (tmp_path / "r").exists()


def test_files_that_are_refused(small, tmp_path, capsys):
    hf = tmp_path / "hf"
    write_hf(RunSource(small), hf, quiet=True, shard_bytes=20_000)
    index = hf / "model.safetensors.index.json"
    saved = json.loads(index.read_text())
    for bad in ({"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": {"a": 5}}, [], {"weight_map": 5}):
        index.write_text(json.dumps(bad))
        assert "index" in refused(capsys, hf, tmp_path / "r")
    index.write_text(json.dumps(saved))
    shard = hf / sorted(set(saved["weight_map"].values()))[0]
    content = shard.read_bytes()
    for bad in (b"", content[:7], content[:50], content[:-1], b"\xff" * 8 + content[8:],
                content.replace(b'"shape": [', b'"shape": [9', 1), content.replace(b"F32", b"F99")):
        shard.write_bytes(bad)
        assert "damaged" in refused(capsys, hf, tmp_path / "r")
    shard.unlink()
    assert "missing" in refused(capsys, hf, tmp_path / "r")
    for path in hf.glob("model*"):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "can run code" in refused(capsys, hf, tmp_path / "r")
    (hf / "pytorch_model.bin").unlink()
    for name, bad, words in (("tokenizer.json", "{}", "tokenizer"), ("tokenizer.json", "[" * 9999, "tokenizer.json"),
                             ("bitgpt.json", "[]", "bitgpt.json"), ("config.json", "[]", "configuration")):
        write_hf(RunSource(small), hf, overwrite=hf.exists(), quiet=True)
        (hf / name).write_text(bad)
        assert words in refused(capsys, hf, tmp_path / "r")
    (hf / "config.json").unlink()
    assert "neither" in refused(capsys, hf, tmp_path / "r")


def test_a_tokenizer_of_another_model_is_refused(small, tmp_path, capsys):
    (small / "tokenizer.json").write_text(json.dumps(bpe_tokenizer().to_json()))
    for name in ("hf", "x.gguf"):
        assert "different models" in refused(capsys, small, tmp_path / name)


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    big = make_run(tmp_path / "big", n_layer=8, n_embd=256, n_ff=1024)
    for name in ("hf", "x.gguf"):
        process = subprocess.Popen([sys.executable, str(ROOT / "convert.py"), str(big), str(tmp_path / name)],
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f".{name}*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
        assert (tmp_path / name).exists() == (process.returncode == 0)


# -- --init-from -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("twin, place", [("gpt", "hf"), ("gpt", "x.gguf"), ("bitgpt", "hf"), ("bitgpt", "packed"),
                                         ("bitgpt", "x.gguf")])
def test_training_goes_on_from_what_others_hold(tmp_path, trained, corpus, call, twin, place):
    """Imported, and as the other twin: a full-precision model turns ternary by training on."""
    source = trained[twin]
    if place == "x.gguf":  # 32 wide: f16 throughout, trits all the same
        convert.main([str(source), str(tmp_path / place), "--type", "f16", "--quiet"])
    else:
        write_hf(RunSource(source), tmp_path / place, place == "packed", quiet=True)
    result = call("bitgpt/train", "--init-from", tmp_path / place, "--out-dir", tmp_path / "on", "--dataset", corpus,
                  "--max-iters", "2", "--eval-interval", "2", "--warmup-iters", "0", "--batch-size", "4", "--verbose",
                  "0")
    assert result.code == 0, result.err
    first = json.loads((tmp_path / "on/metrics.jsonl").read_text().splitlines()[0])
    if twin == "bitgpt":
        records = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
        assert abs(first["val_loss"] - min(r["val_loss"] for r in records if "val_loss" in r)) < 2e-3
    assert read_config(tmp_path / "on").model == read_config(source).model
    assert (tmp_path / "on/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert call("generate", "--out-dir", tmp_path / "on", "--max-new-tokens", "5", "--prompt", "The").code == 0


def test_a_run_with_the_tokenizer_of_another_model_goes_on(tmp_path, corpus, call):
    source = make_run(tmp_path / "run", tokenizer=foreign_tokenizer("gpt2"), n_layer=1, block_size=16)
    flags = ["--out-dir", tmp_path / "on", "--eval-interval", "2", "--batch-size", "2", "--verbose", "0"]
    result = call("bitgpt/train", "--init-from", source, "--dataset", corpus, "--max-iters", "2", "--warmup-iters", "0",
                  *flags)
    assert result.code == 0 and read_config(tmp_path / "on").train["tokenizer"] == "hf", result.err
    assert call("bitgpt/train", "--resume", "--max-iters", "4", *flags).code == 0
    assert call("evaluate", "--out-dir", tmp_path / "on").code == 0
    result = call("bitgpt/train", "--tokenizer", "hf", "--dataset", corpus, "--out-dir", tmp_path / "new")
    assert result.code == 2 and "--init-from" in result.err


def test_init_from_a_broken_file_leaves_nothing(tmp_path, call, corpus):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    result = call("bitgpt/train", "--init-from", tmp_path / "x.gguf", "--out-dir", tmp_path / "on", "--dataset", corpus)
    assert result.code == 2 and "x.gguf" in result.err and not (tmp_path / "on").exists()


def test_an_import_is_gone_when_the_program_ends(small, tmp_path):
    write_hf(RunSource(small), tmp_path / "hf", quiet=True)
    code = f"import interop, pathlib; print(interop.as_run(pathlib.Path({str(tmp_path / 'hf')!r})))"
    result = shell("-c", code, cwd=ROOT)
    folder = Path(result.stdout.strip())
    assert result.returncode == 0 and folder.name == "run" and not folder.exists(), result.stderr
    assert interop.as_run(small) == small


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    """A run of 50 MB in matrices of 0.5 MB, out and in."""
    run = make_run(tmp_path / "run", n_layer=20, n_embd=256, n_ff=512)
    assert sum(weight.numel() * 4 for weight in weights(run).values()) > 40e6
    code = """if True:
        import sys, convert, interop.source
        def kilobytes():
            return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
        before = most = kilobytes()
        class Bar(interop.source.tqdm):
            def update(self, n=1):  # after every tensor
                global most
                most = max(most, kilobytes())
                return super().update(n)
        interop.source.tqdm = Bar
        convert.main(sys.argv[1:])
        print("kB", most - before)"""
    for flags in ((run, tmp_path / "hf"), (run, tmp_path / "p", "--packed"), (run, tmp_path / "x.gguf"),
                  (tmp_path / "p", tmp_path / "a"), (tmp_path / "x.gguf", tmp_path / "b")):
        result = shell("-c", code, *flags, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert int(result.stdout.split("kB")[1]) < 20_000, (flags, result.stdout)


def test_an_error_while_reading_leaves_nothing(small, tmp_path, monkeypatch):
    source = RunSource(small)
    wanted = weights_of(source.config)[-1]

    def broken(weight):
        if weight == wanted:
            raise ValueError("a bad sector")
        return type(source).stored(source, weight)

    monkeypatch.setattr(source, "stored", broken)
    for name in ("hf", "x.gguf"):
        with pytest.raises(UserError, match="bad sector"):
            write_hf(source, tmp_path / name, quiet=True)
    assert listing(tmp_path) == sorted(["runs", *(f"runs/{n}" for n in listing(tmp_path / "runs"))])


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "hf", Path.rename
    folder.mkdir()
    (folder / FIGURES).write_text("{}")

    def refuse(self: Path, to: Path) -> Path:
        if self.name == f".hf.{os.getpid()}.tmp":
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="No space left"), atomic_folder(folder, True, HF) as temporary:
        (temporary / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert [path.name for path in folder.iterdir()] == [FIGURES]
