"""bench.py memory: the figures are those of the shape, and each is measured in a process of its own."""

import json
from pathlib import Path

import pytest

import bench
from benchmarks import memory

SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "64", "--n-ff", "128", "--vocab-size", "32", "--block-size",
         "16", "--batch-size", "2", "--threads", "1", "--tokens", "8"]


def report_of(tmp_path: Path, *flags: str) -> dict:
    bench.main(["memory", *SMALL, *flags, "--save", str(tmp_path / "out" / "memory")])
    return json.loads((tmp_path / "out" / "memory.json").read_text())


def test_every_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(tmp_path)
    shown = capsys.readouterr().out
    linear, tables, norms = 4 * 64 * 64 + 3 * 64 * 128, 32 * 64, 4 * 64 + 128
    assert (report["linear_weights"], report["table_weights"], report["norm_weights"]) == (linear, tables, norms)
    rows = {row["width"]: row for row in report["widths"]}
    assert [row["computed_bytes"] for row in rows.values()] == [
        4 * (linear + tables + norms), 2 * (linear + tables) + 4 * norms, linear + tables + 4 * norms,
        linear // 4 + tables + 4 * norms, linear // 5 + tables + 4 * norms]
    for width in ("bf16", "2 bits"):  # the file: that, its scales and its header
        assert 0 < rows[width]["disk_bytes"] - rows[width]["computed_bytes"] < 6000
    assert rows["fp32"]["disk_bytes"] == rows["fp32"]["computed_bytes"] and rows["8 bits"]["disk_bytes"] is None
    assert all(row["peak_bytes"] > row["baseline_bytes"] > 1e6 for row in rows.values())
    assert [row["twin"] for row in report["training"]] == ["gpt", "bitgpt"]
    least = 16 * (linear + tables + norms)
    assert all(row["peak_bytes"] > row["at_least_bytes"] == least for row in report["training"])
    assert "1.6 bits" in shown and "training bitgpt, 2 x 16 tokens: peak" in shown


def test_more_than_there_is_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    report = report_of(tmp_path)
    assert {row["peak_bytes"] for row in report["widths"] + report["training"]} == {None}
    assert "more than there is" in capsys.readouterr().out
    assert report_of(tmp_path, "--no-train")["training"] == []
