"""Hugging Face folders: transformers loads what goes out, and what transformers saves comes in."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers compiles its quantizers as it is imported

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interop_models import (
    CHARACTERS,
    TEXT,
    bpe_tokenizer,
    char_tokenizer,
    divergence,
    edit_json,
    make_run,
    our_logits,
    same_choices,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.bitnet import (
    ActQuant,
    AutoBitLinear,
    BitLinear,
    WeightQuant,
    pack_weights,
    unpack_weights,
)

from bitgpt.bitlinear import BitLinear as OurBitLinear
from bitgpt.bitlinear import quantize_activations, quantize_weight
from bitgpt.model import MODELS
from core.run_folder import read_config
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from gpt.model import rotary_tables
from interop import open_source
from interop.hf import HFSource, hf_name, write_hf
from interop.source import RunSource, weights_of, write_run
from interop.tokenizer_json import to_huggingface

torch.set_num_threads(1)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def our_model(run: Path):
    saved = read_config(run)
    model = MODELS[saved.twin](saved.model)
    model.load_state_dict(weights(run))
    return model.eval()


@torch.no_grad()
def their_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def ids_of(run: Path, count: int = 48) -> list[int]:
    vocab_size = read_config(run).model.vocab_size
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(5)).tolist()


# -- out ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("twin, packed", [("gpt", False), ("bitgpt", False), ("bitgpt", True)])
def test_transformers_computes_what_we_compute(tmp_path, twin, packed, tokenizer):
    run = make_run(tmp_path / "run", twin, char_tokenizer() if tokenizer == "char" else bpe_tokenizer())
    write_hf(RunSource(run), tmp_path / "hf", packed, quiet=True)
    model = load(tmp_path / "hf")
    assert type(model) is BitNetForCausalLM and model.dtype == torch.float32
    theirs = dict(model.named_modules())
    for weight in weights_of(read_config(run).model):
        name = hf_name(weight.name).removesuffix(".weight")
        latent = weights(run)[weight.name]
        if twin == "gpt" or not weight.linear:
            assert torch.equal(theirs[name].weight, latent)
            assert not isinstance(theirs[name], AutoBitLinear)
            continue
        w_trit, w_scale = quantize_weight(latent)
        linear = theirs[name]
        assert isinstance(linear, AutoBitLinear) and linear.online_quant is not packed
        if packed:
            assert torch.equal(linear.weight, w_trit.float()) and linear.weight_scale.item() == w_scale
        else:  # transformers multiplies trits by 1 / (1 / mean)
            assert torch.equal(WeightQuant.apply(linear.weight), w_trit * (1 / (1 / w_scale)))
    logits, wanted = their_logits(model, ids_of(run)), our_logits(run, ids_of(run))
    assert divergence(wanted, logits) < (1e-3 if twin == "bitgpt" else 1e-8)  # int8 rounding amplifies float noise
    assert same_choices(wanted, logits, margin=0.5 if twin == "bitgpt" else 1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_on_injected_inputs(tmp_path, packed):
    run = make_run(tmp_path / "run", n_layer=1)
    write_hf(RunSource(run), tmp_path / "hf", packed, quiet=True)
    ours, theirs = dict(our_model(run).named_modules()), dict(load(tmp_path / "hf").named_modules())
    for weight in weights_of(read_config(run).model):
        if weight.name.startswith("wte"):
            continue
        name = weight.name.removesuffix(".weight")
        x = torch.randn(50, weight.shape[-1], generator=torch.Generator().manual_seed(3)) * 3
        with torch.no_grad():
            y, wanted = theirs[hf_name(weight.name).removesuffix(".weight")](x), ours[name](x)
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
        if isinstance(ours[name], OurBitLinear):
            x_i8, x_scale = quantize_activations(x)
            assert torch.allclose(ActQuant.apply(x), x_i8 * x_scale, rtol=1e-6, atol=0)


def test_whole_blocks_of_the_full_precision_twin(tmp_path):
    run = make_run(tmp_path / "run", "gpt")
    write_hf(RunSource(run), tmp_path / "hf", quiet=True)
    ours, theirs = our_model(run), load(tmp_path / "hf")
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(3))
    config = ours.config
    cos, sin = rotary_tables(0, 20, config.head_dim, config.rope_theta, x.device)
    positions = theirs.model.rotary_emb(x, torch.arange(20)[None])
    assert torch.allclose(positions[0][0], torch.cat((cos, cos), -1), atol=1e-6)
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        with torch.no_grad():
            y, wanted = layer(x, position_embeddings=positions, attention_mask=None), block(x, cos, sin, None)
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("twin", ["gpt", "bitgpt"])
def test_a_trained_run_writes_the_same_text_there(tmp_path, trained, twin):
    write_hf(RunSource(trained[twin]), tmp_path / "hf", quiet=True)
    model, tokenizer = load(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = load_tokenizer(trained[twin] / "tokenizer.json").encode("The king ")
    assert tokenizer("The king ").input_ids == ids
    out = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False, pad_token_id=0)[0].tolist()
    wanted, logits = our_logits(trained[twin], out), their_logits(model, out)
    assert divergence(wanted, logits) < 1e-5
    top = wanted.topk(2).values
    for at in range(len(ids) - 1, len(out) - 1):
        if top[at, 0] - top[at, 1] < 1e-3:
            break  # from here on either text is right
        assert out[at + 1] == wanted[at].argmax()
    assert "best validation loss" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("twin, packed", [("gpt", False), ("bitgpt", False), ("bitgpt", True)])
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "act": "relu2"}, {"sub_norm": False},
                                   {"sub_norm": False, "tie_embeddings": False}])
def test_out_and_back_loses_nothing(tmp_path, twin, packed, shape):
    run = make_run(tmp_path / "run", twin, dropout=0.1, rope_theta=5e5, norm_eps=1e-6, **shape)
    write_hf(RunSource(run), tmp_path / "hf", packed, quiet=True, shard_bytes=10_000)
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    write_run(HFSource(tmp_path / "hf"), tmp_path / "back", quiet=True)
    assert read_config(tmp_path / "back") == read_config(run)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back/metrics.jsonl").read_text()) == {"step": 7, "val_loss": 1.25, "val_bpb": 2.5}
    before, after = weights(run), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if packed and "proj" in name:
            for was, now in zip(quantize_weight(weight), quantize_weight(after[name]), strict=True):
                assert torch.equal(was, now)
        else:
            assert torch.equal(weight, after[name])
    model = load(tmp_path / "hf")  # in shards, and as Llama where there are no sub-norms
    assert type(model) is (LlamaForCausalLM if shape.get("sub_norm") is False else BitNetForCausalLM)
    assert divergence(our_logits(run, ids_of(run)), their_logits(model, ids_of(run))) < 2e-3


def test_it_can_be_trained_on_there(tmp_path):
    write_hf(RunSource(make_run(tmp_path / "run")), tmp_path / "hf", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([ids_of(tmp_path / "run")])
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "tuned")
    write_run(HFSource(tmp_path / "tuned"), tmp_path / "back", quiet=True)
    tuned = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weights(tmp_path / "back")["blocks.0.mlp.up_proj.weight"], tuned)


# -- in ----------------------------------------------------------------------------------------------------------------

def made_by_transformers(folder: Path, kind: str, act: str, tied: bool, form: str) -> torch.nn.Module:
    """A small random model, saved by transformers in one of its forms; returns it as transformers loads it."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=len(CHARACTERS), hidden_size=32, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, hidden_act=act, max_position_embeddings=64,
                 tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-5,
                 rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    model = BitNetForCausalLM(BitNetConfig(**sizes)) if kind == "bitnet" else LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(1, 0.2)
            else:
                weight.mul_(5)
    model.save_pretrained(folder)
    to_huggingface(char_tokenizer(), folder, 64)
    if form != "plain":
        linear_class, mode = form.split("-")[:2]
        edit_json(folder / "config.json", quantization_config={
            "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode,
            "modules_to_not_convert": None})
        if mode == "offline":
            tensors = load_file(folder / "model.safetensors")
            for name, weight in list(tensors.items()):
                if "proj" in name:
                    w_trit, w_scale = quantize_weight(weight)
                    tensors[name] = w_trit.float() if form.endswith("unpacked") else pack_weights(w_trit.float())
                    tensors[name + "_scale"] = (1 / w_scale if linear_class == "bitlinear" else w_scale).reshape(1)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load(folder)
    if not form.startswith("autobitlinear-offline"):  # that form, transformers itself cannot save
        loaded.save_pretrained(folder)
    return loaded


FORMS = ["plain", "autobitlinear-online", "autobitlinear-offline", "autobitlinear-offline-unpacked",
         "bitlinear-offline"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, act, tied", [("bitnet", "silu", True), ("bitnet", "relu2", True),
                                             ("bitnet", "relu2", False), ("llama", "silu", False),
                                             ("llama", "silu", True)])
def test_what_transformers_saved_comes_in(tmp_path, kind, act, tied, form):
    model = made_by_transformers(tmp_path / "hf", kind, act, tied, form)
    write_run(open_source(tmp_path / "hf"), tmp_path / "run", quiet=True)
    saved = read_config(tmp_path / "run")
    assert saved.twin == ("gpt" if form == "plain" else "bitgpt")
    assert (saved.model.act, saved.model.tie_embeddings, saved.model.sub_norm) == (act, tied, kind == "bitnet")
    assert saved.model.rope_theta == 500000.0 and saved.model.block_size == 64
    for name, module in model.named_modules():
        if isinstance(module, BitLinear | AutoBitLinear):
            ours = weights(tmp_path / "run")[next(w.name for w in weights_of(saved.model)
                                                 if hf_name(w.name) == name + ".weight")]
            w_trit, w_scale = quantize_weight(ours)
            if isinstance(module, BitLinear):
                assert torch.equal(unpack_weights(module.weight, dtype=torch.float32), w_trit.float())
                assert torch.allclose(1 / module.weight_scale, w_scale, rtol=2e-7)
            elif module.online_quant:
                assert torch.equal(ours, module.weight)
            else:
                assert torch.equal(module.weight, w_trit.float()) and module.weight_scale.item() == w_scale
    ids = ids_of(tmp_path / "run")
    wanted, logits = their_logits(model, ids), our_logits(tmp_path / "run", ids)
    assert divergence(wanted, logits) < (1e-8 if form == "plain" else 1e-3)


def test_the_context_can_be_cut(tmp_path):
    made_by_transformers(tmp_path / "hf", "bitnet", "silu", True, "plain")
    assert open_source(tmp_path / "hf", block_size=16).config.block_size == 16
    assert open_source(tmp_path / "hf", block_size=999).config.block_size == 64


# -- tokenizers --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    pairs = {}
    for ours in (char_tokenizer(), bpe_tokenizer()):
        folder = tmp_path_factory.mktemp(ours.name)
        (folder / "config.json").write_text('{"model_type": "bitnet"}')
        to_huggingface(ours, folder, 64)
        pairs[ours.name] = ours, AutoTokenizer.from_pretrained(folder)
    return pairs


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from(CHARACTERS)))
def test_char_ids_are_ours(tokenizers, text):
    ours, theirs = tokenizers["char"]
    ids = theirs(text).input_ids
    assert ids == ours.encode(text) and theirs.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])) | st.text(st.sampled_from("aeing .'\nkthol")))
def test_bpe_ids_are_ours(tokenizers, text):
    ours, theirs = tokenizers["bpe"]
    ids = theirs(text).input_ids
    assert ids == ours.encode(text) and theirs.decode(ids) == text


def test_texts_that_tokenizers_stumble_over(tokenizers):
    for name in ("char", "bpe"):
        ours, theirs = tokenizers[name]
        for text in ("", "\n", " ", "  \n  \n", "\r\n\r\n", "a\tb", "\u2028", "|<>|", "i's o'll"):
            assert theirs(text).input_ids == ours.encode(text), (name, text)
    ours, theirs = tokenizers["bpe"]
    assert theirs(TEXT).input_ids == ours.encode(TEXT)
    with pytest.raises(Exception, match="UNK"):  # as ours, it refuses what it has never seen
        tokenizers["char"][1]("Z")


def test_a_foreign_tokenizer_is_kept_and_runs(tmp_path):
    """A SentencePiece-like one, with special tokens and fewer tokens than the model has rows."""
    made_by_transformers(tmp_path / "hf", "llama", "silu", True, "plain")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "Replace", "pattern": {
            "String": " "}, "content": "\u2581"}, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [{"id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": {"\u2581": 0, "a": 1, "b": 2, "ab": 3, "<0x0A>": 4}, "merges": [["a", "b"]],
                  "byte_fallback": True, "unk_token": None}}))
    write_run(open_source(tmp_path / "hf"), tmp_path / "run", quiet=True)
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer.json")
    assert tokenizer.name == "hf" and tokenizer.vocab_size == len(CHARACTERS)
    assert tokenizer.encode("ab a\n<s>") == [3, 0, 1, 4, 5] and tokenizer.decode([3, 0, 1, 4, 5]) == "ab a\n<s>"
    assert [tokenizer.tokens[id] for id in (0, 4, 9)] == [b" ", b"\n", b""]
    write_hf(RunSource(tmp_path / "run"), tmp_path / "again", quiet=True)
    assert json.loads((tmp_path / "again/tokenizer.json").read_text()) == json.loads(
        (tmp_path / "hf/tokenizer.json").read_text())


def test_ours_come_back_as_ours(tmp_path):
    for tokenizer in (char_tokenizer(), bpe_tokenizer()):
        run = make_run(tmp_path / tokenizer.name / "run", tokenizer=tokenizer, n_layer=1)
        write_hf(RunSource(run), run.with_name("hf"), quiet=True)
        back = HFSource(run.with_name("hf")).tokenizer
        assert type(back) in (CharTokenizer, BPETokenizer) and back.to_json() == tokenizer.to_json()
        shutil.rmtree(run.with_name("hf"))
