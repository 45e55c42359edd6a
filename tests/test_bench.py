"""bench.py: every engine measured in its own process, the figures add up, mistakes are told."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import bench
from benchmarks import speed
from bitgpt.model import BitGPT
from core import checkpoint
from core.config import ModelConfig
from core.run_folder import write_config
from kernels import gpu
from training.settings import TrainConfig

SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "64", "--n-ff", "128", "--vocab-size", "32", "--repeats", "2",
         "--prefill", "12", "--decode", "8", "--batch", "3", "--threads", "2"]


def result(tmp_path, capsys, *flags):
    bench.main([*flags, "--save", str(tmp_path / "out" / "speed")])
    assert (tmp_path / "out" / "speed.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((tmp_path / "out" / "speed.json").read_text()), capsys.readouterr().out


def test_all_engines_on_random_weights(tmp_path, capsys):
    report, shown = result(tmp_path, capsys, *SMALL)
    assert [one["engine"] for one in report["results"]] == speed.engines_here()
    assert (report["threads"], report["weights"], report["batch"]) == (2, "random", 3)
    for one in report["results"]:
        assert one["what"] in shown
        assert all(one[f"{key}_tok_per_sec"] > 0 for key in ("decode", "decode_batch", "prefill"))
        assert len(one["rounds"]["decode"]) == 2 and one["peak_memory_bytes"] > 10e6
    disk = {one["engine"]: one["disk_bytes"] for one in report["results"]}
    assert disk["bitgpt-cpu-1.6"] < disk["bitgpt-cpu"] < disk["gpt-cpu"] < disk["gpt-torch"]
    memory = {one["engine"]: one["peak_memory_bytes"] for one in report["results"]}
    assert memory["bitgpt-cpu"] < memory["bitgpt-torch"] - 50e6  # no torch in it
    packed = next(one for one in report["results"] if one["engine"] == "bitgpt-cpu")
    ternary = 4 * 64 * 64 + 3 * 64 * 128
    head, norms = 32 * 64 + 32 * 4, (4 * 64 + 128) * 4
    cache = 2 * 64 * 4 * 7 // 2  # keys and values in fp32, of 0 to 7 tokens before the one that is decoded
    assert packed["read_bytes_per_token"] == ternary // 4 + 7 * 4 + head + norms + cache


def test_decoding_far_into_a_text(tmp_path, capsys):
    read = {}
    for flags in ((), ("--depth", "5"), ("--depth", "5", "--kv-cache", "bf16")):
        report, shown = result(tmp_path, capsys, *SMALL, "--engines", "bitgpt-cpu", *flags)
        read[flags] = report["results"][0]["read_bytes_per_token"]
        assert ("decoding behind 5 tokens" in shown) == bool(flags)
    empty, far, half = read.values()
    assert far - empty == 2 * 64 * 4 * 5 and far - half == 2 * 64 * 2 * 17 // 2  # 5 to 12 tokens, 8.5 in the mean


def test_a_trained_run_is_measured_and_left_as_it_is(tmp_path, capsys):
    run = tmp_path / "trained"
    run.mkdir()
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=20).resolved()
    torch.manual_seed(0)
    write_config(run, "bitgpt", config, dataclasses.asdict(TrainConfig()))
    checkpoint.save(run / "best.safetensors", BitGPT(config).state_dict(), {})
    before = sorted(path.name for path in run.iterdir())
    report, _ = result(tmp_path, capsys, "--out-dir", str(run), "--engines", "gpt-cpu,bitgpt-cpu", "--repeats", "1")
    assert (report["weights"], report["shape"], report["prefill"], report["decode"]) == (
        "trained (bitgpt) and random", "trained", 16, 16)
    assert report["results"][1]["isa"] and sorted(path.name for path in run.iterdir()) == before


def test_the_gpus_engine_is_measured_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "capabilities", tuple)
    assert speed.engines_here() == [name for name in speed.ENGINES if name != "bitgpt-triton"]
    with pytest.raises(SystemExit) as end:
        bench.main([*SMALL, "--engines", "bitgpt-triton"])
    assert end.value.code == 2 and "bitgpt-triton: no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "capabilities", lambda: ((7, 5),))
    assert "bitgpt-triton" not in speed.engines_here()
    assert "bitgpt-triton left out: the GPU has compute capability 7.5" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "require", lambda: 0)
    assert speed.engines_here() == list(speed.ENGINES)


@pytest.mark.parametrize(("flags", "problem"), [
    (["--engines", "bitgpt-gpu"], "Did you mean bitgpt-cpu?"),
    (["sped"], "Did you mean speed?"),
    (["--repeats", "0"], "at least 1"),
    (["--config", "configs/none.toml"], "no such file"),
    (["--out-dir", "nowhere"], "holds no trained run"),
    (["--out-dir", "nowhere", "--n-layer", "2"], "--n-layer: nowhere has a shape of its own"),
    (["--kv-cache", "fp16"], "Choose from: fp32, bf16"),
    (["--frobnicate"], "unknown argument"),
    (["--engines", ","], "names none"),
    (["train", "--shapes", ","], "names none"),
    (["--engines", "bitgpt-cpu", "--weight-quant", "int2"], "do not know --weight-quant int2"),
    (["--engines", "gpt-cpu", "--norm", "inner"], "do not know --norm inner"),
    (["--block-size", "8"], "no room for the 512 tokens"),
    (["--save", "/proc/x"], "nothing can be written to /proc"),
])
def test_mistakes_are_told(flags, problem, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(flags)
    shown = capsys.readouterr()
    assert end.value.code == 2 and problem in shown.err and "Traceback" not in shown.err and not shown.out


def test_every_token_is_fed_once() -> None:
    class Engine:
        def __init__(self) -> None:
            self.fed: list[list[list[int]]] = []

        def reset(self, batch: int) -> None:
            self.fed.clear()

        def forward(self, tokens: np.ndarray) -> None:
            self.fed.append(tokens.tolist())

    engine = Engine()
    speed.measure(engine, np.arange(8)[None], 3, [2, 1, 2])
    assert engine.fed == [[[0, 1, 2]], [[3, 4]], [[5]], [[6, 7]]]
