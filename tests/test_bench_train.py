"""bench.py train: what it measures and writes, and what it says where there is no GPU."""

import json
from pathlib import Path

import pytest

import bench
from benchmarks import process, training
from core.files import UserError
from kernels import gpu

SHAPE = {"n_layer": 1, "n_head": 4, "n_embd": 128, "n_ff": 176, "block_size": 32, "vocab_size": 65}


def test_both_twins_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(training.SHAPES, "toy", (2, SHAPE))
    bench.main(["train", "--shapes", "toy", "--repeats", "1", "--seconds", "0.01", "--save", str(tmp_path / "speed")])
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [one["model"] for one in report["results"]] == ["gpt", "bitgpt"] and "toy bitgpt" in shown
    for one in report["results"]:
        assert one["tok_per_sec"] == pytest.approx(64 / one["step_s"]) and one["peak_memory_bytes"] > 1e7
        assert sum(one["parts"].values()) == pytest.approx(1) and one["parts"]["products"] > 0
    with pytest.raises(SystemExit) as stop:
        bench.main(["train", "--shapes", "babby"])
    assert stop.value.code == 2 and "Did you mean baby?" in capsys.readouterr().err


def test_on_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    class Worker:
        def __init__(self, name: str, script: str, **spec: object) -> None:
            asked.append((name, spec["device"]))
            if name == "gpt-compiled" and spec["batch"] == 8:
                raise UserError("out of memory")
            self.about = {"value": {"bfloat16": 1e15}, "dtype": "bfloat16", "first_step_s": 9.0, "parameters": 10**9}

        def ask(self, what: str, *_: object) -> object:
            return {"train": 0.1, "memory": 4e10, "parts": {}}[what]

        def close(self) -> None:
            pass

    flags = ["train", "--device", "cuda", "--save", str(tmp_path / "speed")]
    monkeypatch.setattr(gpu, "capabilities", tuple)
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    assert stop.value.code == 2 and "no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "capabilities", lambda: ((9, 0),))
    monkeypatch.setattr(training, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(process, "Worker", Worker)
    bench.main(flags)
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [(one["shape"], one["model"], one["batch"]) for one in report["results"]] == [
        ("124m", "gpt-compiled", 16), ("124m", "bitgpt-compiled", 16), ("1b", "bitgpt-compiled", 8)]
    assert report["results"][0]["tok_per_sec"] == 163840 and "a GPU" in shown.out and "time goes" not in shown.out
    assert "1b gpt-compiled is left out: out of memory" in shown.err and {device for _, device in asked} == {"cuda"}
