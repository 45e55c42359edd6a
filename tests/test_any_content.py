"""Property-based: whatever stands in settings and files, what reads them understands it or says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import checkpoint
from core.config import ModelConfig, from_saved, read_toml
from core.files import UserError
from core.metrics import MetricsLog, read_metrics
from core.page import charts
from core.run_folder import read_config
from core.safetensors_file import open_safetensors
from data.bins import find_source, prepare_bins
from data.tokenizer import load_tokenizer
from training.settings import TrainConfig, learning_rate

SCALARS = st.none() | st.booleans() | st.integers(-10**400, 10**400) | st.integers(-9, 99) | st.floats() | st.text(
    max_size=8) | st.text("\0\ud800\x1b/.\\", max_size=4)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                         max_size=3), max_leaves=6)
MODEL, TRAIN = (st.sampled_from(list(config.__dataclass_fields__)) for config in (ModelConfig, TrainConfig))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with something in it exchanged, left out or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        what = draw(st.integers(0, 9))
        return rest if what == 0 else rest | {draw(st.text(max_size=8)): value[key]} if what == 1 else \
            rest | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1:]]
    return draw(VALUES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@given(st.dictionaries(MODEL | st.text(max_size=8), VALUES, max_size=3))
def test_any_model_settings(changes: dict[str, Any]) -> None:
    try:
        config = from_saved(ModelConfig, vars(ModelConfig()) | changes, "config.json").resolved()
    except UserError:
        return
    assert 1 <= config.n_layer <= 1000 and config.n_embd % config.n_head == 0


@given(st.dictionaries(TRAIN | st.text(max_size=8), VALUES, max_size=3), st.integers(0, 10**6))
def test_any_training_settings(changes: dict[str, Any], step: int) -> None:
    try:
        config = from_saved(TrainConfig, vars(TrainConfig()) | changes, "config.json")
    except UserError:
        return
    assert 0 <= learning_rate(config, step) <= max(config.lr, config.min_lr)
    json.dumps(vars(config), allow_nan=False, ensure_ascii=False).encode()


@given(data=st.data())
def test_any_config_of_a_run(data: st.DataObject, trained: dict[str, Path], folder: Path) -> None:
    saved = json.loads((trained["gpt"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data.draw(changed(saved) | VALUES)))
    try:
        twin, model, train = read_config(folder)
    except UserError:
        return
    assert twin in ("gpt", "bitgpt") and 1 <= model.vocab_size <= 2**24 and isinstance(train, dict)


LINES = st.lists(st.tuples(MODEL | TRAIN | st.text(max_size=5) | st.sampled_from(["[gpt]", "[bitgpt]", "[gpt.gpt]"]),
                           st.sampled_from([" = ", "", "=", "]"]), st.text(max_size=6) | VALUES.map(repr)), max_size=4)


@given(lines=LINES)
def test_any_toml(lines: list[tuple[str, str, str]], folder: Path) -> None:
    text = "\n".join("".join(line) for line in lines)
    (folder / "any.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        settings = read_toml(folder / "any.toml", [ModelConfig, TrainConfig], "gpt")
    except UserError as error:
        assert "any.toml" in str(error)
        return
    assert settings.keys() <= {*vars(ModelConfig()), *vars(TrainConfig())}


@given(data=st.data())
def test_any_tokenizer(data: st.DataObject, trained: dict[str, Path], folder: Path) -> None:
    saved = json.loads((trained["gpt"] / "tokenizer.json").read_text())
    saved = data.draw(st.sampled_from([saved, {"format": 1, "kind": "bpe", "split": "llama3",
                                               "tokens": [chr(i) for i in range(256)] + ["ab"]}]))
    (folder / "tokenizer.json").write_text(json.dumps(data.draw(changed(saved) | VALUES)))
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except UserError:
        return
    assert tokenizer.vocab_size > 0 and isinstance(tokenizer.decode(tokenizer.start()), str)


@given(data=st.data())
def test_any_metrics(data: st.DataObject, trained: dict[str, Path], folder: Path) -> None:
    """Read for a report and its curves, and to go on with."""
    saved = [json.loads(line) for line in (trained["bitgpt"] / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(line) for line in data.draw(changed(saved).filter(lambda value: isinstance(value, list)))]
    lines = data.draw(st.permutations(lines)) if data.draw(st.booleans()) else lines
    (folder / "metrics.jsonl").write_text("\n".join(lines) + data.draw(st.sampled_from(["", "\n", "\n{", "\n\0"])))
    try:
        records = read_metrics(folder)
        for runs in ({"a": records}, {"a": records, "b": saved}):
            json.dumps(charts(runs, True), allow_nan=False)
    except UserError as error:
        assert "metrics.jsonl" in str(error)
    try:
        MetricsLog(folder, data.draw(st.integers(0, 9)), None).close()
    except UserError as error:
        assert "metrics.jsonl" in str(error)


@given(data=st.data())
def test_any_header_of_a_checkpoint(data: st.DataObject, trained: dict[str, Path], folder: Path) -> None:
    """For torch's reader and for the engine's own."""
    content = (trained["bitgpt"] / "last.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    fewer = {name: header[name] for name in ("norm.weight", "__metadata__")}
    text = json.dumps(data.draw(changed(header) | changed(fewer) | VALUES)).encode()
    length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    path = folder / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + content[end:])
    for read in (checkpoint.load, open_safetensors):
        try:
            read(path)
        except UserError as error:
            assert "any.safetensors" in str(error)


@given(files=st.lists(st.tuples(st.sampled_from(["txt", "jsonl"]), st.binary(max_size=40) | st.text(max_size=30).map(
    lambda text: json.dumps({"text": text}).encode())), min_size=1, max_size=3))
def test_any_corpus(files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tmp_path_factory.mktemp("corpus")
    (data / "texts").mkdir()
    for number, (ending, content) in enumerate(files):
        (data / "texts" / f"{number}.{ending}").write_bytes(content)
    try:
        corpus = prepare_bins(str(data / "texts"), data=data)
    except UserError:
        assert not list(data.glob("cache/*/*.bin"))
        return
    assert corpus.meta["train_tokens"] >= 2 and find_source(str(data / "texts")).files


@given(data=st.data())
def test_any_progress_of_tokenizing(data: st.DataObject, folder: Path) -> None:
    """What a kill left behind and a disk then damaged: used where it is right, or begun anew."""
    text = folder / "tale.txt"
    text.write_text("once upon a time " * 20)
    whole = prepare_bins(str(text), data=folder)
    files = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    counts = {"jobs": 0} | {f"{part}_{what}": 0 for part in ("train", "val") for what in ("tokens", "bytes", "size")}
    progress = data.draw(changed({"source": whole.meta["source"], "counts": counts}))
    if isinstance(progress, dict) and isinstance(progress.get("counts"), dict) and all(
            isinstance(value, (int, float)) for value in progress["counts"].values()):
        progress["source"] = {}  # numbers that lie are for checksums of the file system to find
    (whole.folder / "progress.json").write_text(json.dumps(progress))
    (whole.folder / "meta.json").unlink()
    for part in ("train", "val"):
        (whole.folder / f"{part}.bin").rename(whole.folder / f"{part}.part")
    assert prepare_bins(str(text), data=folder).folder == whole.folder
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == files
