"""GGUF files: read back with the gguf package, and by us; and hostile ones. llama.cpp itself: run_in_llama_cpp.py."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interop_models import (
    TEXT,
    bpe_tokenizer,
    char_tokenizer,
    foreign_tokenizer,
    make_run,
    our_logits,
    same_choices,
    weights,
)

from bitgpt.bitlinear import quantize_weight
from core.files import UserError
from core.run_folder import read_config
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import CharTokenizer
from engine.packed_file import scale_of
from interop import open_source
from interop.gguf import GGUFSource, gguf_name, write_gguf
from interop.gguf_file import F16, F32, I2_S, GGUFFile, write_gguf_file
from interop.source import RunSource, weights_of, write_run
from interop.ternary import BLOCKS
from interop.tokenizer_json import escape, unescape

WIDE = {"n_embd": 256, "n_ff": 512, "n_layer": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rows every type can hold."""
    return make_run(tmp_path_factory.mktemp("wide") / "run", **WIDE)


@pytest.mark.parametrize("type", ["tq1_0", "tq2_0", "f16"])
def test_the_gguf_package_reads_exact_trits_and_scales(wide, tmp_path, type):
    write_gguf(RunSource(wide), tmp_path / "x.gguf", type, quiet=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for weight in weights_of(read_config(wide).model):
        tensor, latent = tensors.pop(gguf_name(weight.name)), weights(wide)[weight.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        if weight.linear:
            w_trit, w_scale = quantize_weight(latent)
            assert np.array_equal(values, w_trit) and tensor.tensor_type.name.lower() == type
            scale = tensors.pop(scale_of(gguf_name(weight.name)))
            assert scale.tensor_type == gguf.GGMLQuantizationType.F32 and scale.data.tolist() == [float(w_scale)]
        elif latent.dim() == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and np.array_equal(values, latent)
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F16 and np.array_equal(values, latent.half())
    assert not tensors


@pytest.mark.parametrize("tokenizer", [char_tokenizer(), bpe_tokenizer()], ids=["char", "bpe"])
def test_metadata_is_complete(tmp_path, tokenizer):
    run = make_run(tmp_path / "run", tokenizer=tokenizer, rope_theta=5e5, **WIDE)
    write_gguf(RunSource(run), tmp_path / "my model.gguf", quiet=True)
    reader = gguf.GGUFReader(tmp_path / "my model.gguf")
    got = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    model, want = read_config(run).model, "tokenizer.ggml."
    assert {key: value for key, value in got.items() if not isinstance(value, list)} == {
        "general.architecture": "bitnet", "general.name": "my model", "general.quantization_version": 2,
        "general.quantized_by": "BitGPT",
        "general.file_type": gguf.LlamaFileType.MOSTLY_TQ1_0, "bitnet.block_count": 1, "bitnet.context_length": 64,
        "bitnet.embedding_length": 256, "bitnet.feed_forward_length": 512, "bitnet.vocab_size": model.vocab_size,
        "bitnet.attention.head_count": 4, "bitnet.attention.head_count_kv": 2, "bitnet.rope.dimension_count": 64,
        "bitnet.rope.freq_base": 5e5, "bitnet.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        want + "add_bos_token": False, want + "add_eos_token": False,
        **({want + "model": "rwkv"} if tokenizer.name == "char" else
           {want + "model": "gpt2", want + "pre": "llama-bpe", want + "bos_token_id": 255, want + "eos_token_id": 255})}
    assert len(got[want + "tokens"]) == len(got[want + "token_type"]) == tokenizer.vocab_size
    if tokenizer.name == "bpe":  # tokens spelt as GPT-2 spells bytes
        spelling = {chr(c): b for b, c in zip(range(256), (ord(t) for t in got[want + "tokens"][:256]), strict=True)}
        assert [bytes(spelling[c] for c in token) for token in got[want + "tokens"]] == tokenizer.tokens
        assert {"".join(pair.split(" ")) for pair in got[want + "merges"]} == set(got[want + "tokens"][256:])


@pytest.mark.parametrize("type", ["auto", "tq2_0", "q2_0", "i2_s", "f16"])
def test_out_and_back(wide, tmp_path, type):
    write_gguf(RunSource(wide), tmp_path / "x.gguf", type, quiet=True)
    write_run(GGUFSource(tmp_path / "x.gguf"), tmp_path / "back", quiet=True)
    assert read_config(tmp_path / "back")[:2] == read_config(wide)[:2]
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (wide / "tokenizer.json").read_bytes()
    before, after = weights(wide), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "proj" in name:
            for was, now in zip(quantize_weight(weight), quantize_weight(after[name]), strict=True):
                assert torch.equal(was, now)
        else:
            assert torch.equal(weight if weight.dim() == 1 else weight.half().float(), after[name])
    ids = list(range(40))
    assert same_choices(our_logits(wide, ids), our_logits(tmp_path / "back", ids), margin=0.5)


def test_full_precision_out_and_back(tmp_path):
    run = make_run(tmp_path / "run", "gpt", bpe_tokenizer())
    write_gguf(RunSource(run), tmp_path / "x.gguf", quiet=True)
    assert not any(name.endswith(".scale") for name in GGUFFile(tmp_path / "x.gguf").tensors)
    write_run(GGUFSource(tmp_path / "x.gguf"), tmp_path / "back", quiet=True)
    assert read_config(tmp_path / "back")[:2] == read_config(run)[:2]
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    for name, weight in weights(run).items():
        assert torch.equal(weight if weight.dim() == 1 else weight.half().float(), weights(tmp_path / "back")[name])


@pytest.mark.parametrize("split", ["llama3", "gpt2"])
def test_a_foreign_tokenizer_goes_through(tmp_path, split):
    tokenizer = foreign_tokenizer(split)
    run = make_run(tmp_path / "run", tokenizer=tokenizer, n_layer=1, n_embd=64, n_ff=64)
    write_gguf(RunSource(run), tmp_path / "x.gguf", quiet=True)
    metadata = GGUFFile(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == {"llama3": "llama-bpe", "gpt2": "gpt-2"}[split]
    assert metadata["tokenizer.ggml.token_type"][-11:] == [1, 3, 3] + [5] * 8
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert metadata["tokenizer.ggml.tokens"][end] == "<|end_of_text|>"
    back = GGUFSource(tmp_path / "x.gguf").tokenizer
    assert back.name == "hf" and back.tokens == tokenizer.tokens
    for text in (TEXT, "<|begin_of_text|>a\n\n  b" + "i's 12345"):
        assert back.encode(text) == tokenizer.encode(text) and back.decode(back.encode(text)) == text


def test_a_tokenizer_that_llama_cpp_cannot_run_is_refused(tmp_path):
    content = foreign_tokenizer("llama3").content
    content["pre_tokenizer"] = {"type": "Whitespace"}
    run = make_run(tmp_path / "run", tokenizer=HFTokenizer(content, 420), n_layer=1, n_embd=64, n_ff=64)
    with pytest.raises(UserError, match="split rule"):
        write_gguf(RunSource(run), tmp_path / "x.gguf", quiet=True)


@pytest.mark.parametrize("shape, want, said", [
    ({"n_embd": 256, "n_ff": 768}, {"TQ1_0": 7},
     "auto: 7 of 7 matrices as tq1_0, 1.6875 bits per weight: the smallest for rows of 256 and 768 weights"),
    ({"n_embd": 128, "n_ff": 320}, {"Q2_0": 7}, "auto: 7 of 7 matrices as q2_0, 2.25 bits"),
    ({"n_embd": 128, "n_ff": 336}, {"Q2_0": 6, "F16": 1}, "1 of 7 matrices as f16, 16 bits per weight: rows of 336"),
    ({"n_embd": 256, "n_ff": 704}, {"TQ1_0": 6, "Q2_0": 1}, "1 of 7 matrices as q2_0"),
    ({"n_embd": 32, "n_ff": 96}, {"F16": 7}, "7 of 7 matrices as f16")])
def test_auto_takes_the_smallest_and_says_so(tmp_path, capsys, shape, want, said):
    run = make_run(tmp_path / "run", n_layer=1, **shape)
    write_gguf(RunSource(run), tmp_path / "x.gguf")
    assert said in capsys.readouterr().err
    kinds = {block.number: kind.upper() for kind, block in BLOCKS.items()} | {F16: "F16"}
    types = [kinds[t.type] for t in GGUFFile(tmp_path / "x.gguf").tensors.values()
             if t.name.endswith(".weight") and len(t.shape) == 2 and t.name.startswith("blk")]
    assert {kind: types.count(kind) for kind in types} == want


@pytest.mark.parametrize("twin, settings, type, words", [
    ("bitgpt", {"tie_embeddings": False}, "auto", ["untied head", "--tie-embeddings"]),
    ("bitgpt", {"sub_norm": False}, "auto", ["sub-norms", "--sub-norm"]),
    ("bitgpt", {"qk_norm": True}, "auto", ["qk_norm", "--no-qk-norm"]),
    ("bitgpt", {"act": "relu2"}, "tq2_0", ["relu2", "i2_s"]), ("gpt", {"act": "relu2"}, "auto", ["relu2"]),
    ("gpt", {}, "tq1_0", ["full precision", "f16"]), ("bitgpt", {}, "tq1_0", ["multiple of 256", "--n-embd"]),
    ("bitgpt", {}, "q2_0", ["multiple of 64"]), ("bitgpt", {"n_embd": 64}, "i2_s", ["64", "128", "i2_s"])])
def test_what_an_engine_cannot_hold_is_refused_by_name(tmp_path, twin, settings, type, words):
    run = make_run(tmp_path / "run", twin, n_layer=1, **settings)
    with pytest.raises(UserError) as error:
        write_gguf(RunSource(run), tmp_path / "x.gguf", type, quiet=True)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "x.gguf").exists()


def test_relu2_goes_to_bitnet_cpp(tmp_path):
    run = make_run(tmp_path / "run", act="relu2", n_layer=1, n_embd=128, n_ff=384)
    write_gguf(RunSource(run), tmp_path / "x.gguf", quiet=True)
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata["general.architecture"] == "bitnet-b1.58"
    assert file.tensors["blk.0.ffn_down.weight"].type == I2_S
    assert not any(name.endswith(".scale") for name in file.tensors)  # in the matrix's own tail there
    assert GGUFSource(tmp_path / "x.gguf").config == read_config(run).model


def test_a_llama_file_has_its_rotary_rows_put_in_order(tmp_path):
    """Llama's converter permutes the rows of q and k for its engine's rotary embeddings; undone on the way in."""
    run = make_run(tmp_path / "run", sub_norm=False, tie_embeddings=False, n_layer=1, **{"n_embd": 64, "n_ff": 128})
    config, latent = read_config(run).model, weights(run)

    def permute(matrix: np.ndarray, heads: int) -> np.ndarray:
        return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    tensors, data = [], {}
    for weight in weights_of(config):
        name, value = gguf_name(weight.name), latent[weight.name]
        if weight.linear:
            w_trit, w_scale = quantize_weight(value)
            matrix = w_trit.numpy()
            if "attn_q" in name or "attn_k" in name:
                matrix = permute(matrix, 4 if "attn_q" in name else 2)
            data[name] = (matrix * np.float32(w_scale)).view(np.uint8).ravel()
        else:
            data[name] = value.numpy().view(np.uint8).ravel()
        tensors.append((name, weight.shape, F32))
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "rwkv",
                "tokenizer.ggml.tokens": [escape(c) for c in char_tokenizer().characters]}
    metadata |= {f"llama.{key}": value for key, value in {
        "block_count": 1, "attention.head_count": 4, "attention.head_count_kv": 2, "embedding_length": 64,
        "feed_forward_length": 128, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5}.items()}
    write_gguf_file(tmp_path / "x.gguf", metadata, tensors, data.__getitem__, lambda size: None)
    write_run(open_source(tmp_path / "x.gguf"), tmp_path / "back", quiet=True)
    assert read_config(tmp_path / "back")[:2] == ("bitgpt", config)
    for name, weight in latent.items():
        was, now = ((weight,), (weights(tmp_path / "back")[name],)) if "proj" not in name else (
            quantize_weight(weight), quantize_weight(weights(tmp_path / "back")[name]))
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True)), name


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=1) | st.sampled_from("\n\t\r\\\0nx"))
def test_characters_spelt_for_llama_cpp(character):
    assert unescape(escape(character)) == character


# -- files that lie ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    run = make_run(folder / "run", tokenizer=CharTokenizer("abc\n"), n_layer=1, n_embd=64, n_ff=64)
    write_gguf(RunSource(run), folder / "x.gguf", quiet=True)
    return (folder / "x.gguf").read_bytes()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        source = open_source(path)
        for weight in weights_of(source.config):
            source.latent(weight)
    return str(error.value)


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    draw = random.Random(1)
    for length in [0, 3, 4, 8, 23, 24, 60, len(small) - 1, *(draw.randrange(len(small)) for _ in range(60))]:
        refused(tmp_path / "x.gguf", small[:length])


def test_flipped_bytes_never_crash(small, tmp_path):
    draw = random.Random(2)
    for _ in range(300):
        content = bytearray(small)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(3000)] = draw.randrange(256)
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            source = open_source(tmp_path / "x.gguf")
            for weight in weights_of(source.config)[:4]:
                source.latent(weight)
        except UserError:
            pass  # nothing else may be raised


def header(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs)


def key(name: str, type: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", type) + value


def tensor(shape: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q1sI{len(shape)}QIQ", 1, b"t", len(shape), *shape, type, offset)


@pytest.mark.parametrize("content, words", [
    (b"GGML" + bytes(40), "begin with GGUF"), (header(version=1) + bytes(40), "version 1"),
    (header(version=0x03000000) + bytes(40), "version"), (header(2**63) + bytes(90), "0 dimensions"),
    (header(0, 2**64 - 1), "ends within"), (header(0, 1) + struct.pack("<Q", 2**63) + bytes(40), "ends within"),
    (header(0, 1) + key("a", 9, struct.pack("<IQ", 8, 2**60)) + bytes(40), "texts"),
    (header(0, 1) + key("a", 9, struct.pack("<IQ", 4, 2**62)) + bytes(40), "numbers"),
    (header(0, 1) + key("a", 9, struct.pack("<IQ", 9, 1)) + bytes(40), "list of the unknown type"),
    (header(0, 1) + key("a", 77, b"") + bytes(40), "unknown type 77"),
    (header(0, 2) + 2 * key("a", 7, b"\1") + bytes(40), "twice"),
    (header(0, 1) + key("general.alignment", 4, struct.pack("<I", 0)) + bytes(40), "alignment"),
    (header(1) + tensor((2**62, 4)) + bytes(99), "more weights"),
    (header(1) + tensor((2**33, 2**33)) + bytes(99), "more weights"),
    (header(1) + tensor((8,), 0, 2**63) + bytes(99), "outside"),
    (header(1) + tensor((8,), 0, 7) + bytes(99), "outside"),
    (header(1) + tensor((800,)) + bytes(99), "outside"), (header(1) + tensor((8,), 99) + bytes(99), "type 99"),
    (header(1) + tensor((8,), 34) + bytes(99), "blocks of 256"), (header(2) + 2 * tensor((8,)) + bytes(99), "twice"),
    (header(1) + tensor((1,) * 5) + bytes(99), "5 dimensions"), (header() + bytes(40), "architecture None"),
    (header(0, 1) + key("general.architecture", 8, struct.pack("<Q", 4) + b"qwen") + bytes(40), "'qwen'")])
def test_hostile_headers(tmp_path, content, words):
    assert words in refused(tmp_path / "x.gguf", content)


def test_weights_that_are_no_trits_or_of_another_shape(small, tmp_path):
    at = GGUFFile(write(tmp_path / "ok.gguf", small))
    place = at.start + at.tensors["blk.0.attn_q.weight"].offset
    assert "no trits" in refused(tmp_path / "x.gguf", small[:place + 2] + b"\xff" + small[place + 3:])
    scale = at.start + at.tensors["blk.0.attn_q.scale"].offset
    for bad in (float("nan"), -1.0, 0.0, 1e-9):
        assert "scale" in refused(tmp_path / "x.gguf", small[:scale] + struct.pack("<f", bad) + small[scale + 4:])
    norm = at.start + at.tensors["output_norm.weight"].offset
    assert "not finite" in refused(tmp_path / "x.gguf", small[:norm] + struct.pack("<f", np.inf) + small[norm + 4:])
    heads = small.replace(b"bitnet.feed_forward_length\x04\0\0\0\x40", b"bitnet.feed_forward_length\x04\0\0\0\x80")
    assert heads != small and "settings make it" in refused(tmp_path / "x.gguf", heads)
    layers = small.replace(b"bitnet.block_count\x04\0\0\0\x01", b"bitnet.block_count\x04\0\0\0\xff")
    assert layers != small and "layers" in refused(tmp_path / "x.gguf", layers)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
