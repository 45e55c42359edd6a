"""Hugging Face folders, out and in: what transformers' `AutoModelForCausalLM.from_pretrained` loads.

    write_hf(source, folder)            # BitNetForCausalLM, or LlamaForCausalLM for a run without sub-norms
    HFSource(folder)                    # either of the two, ternary or not, packed or not, in one file or in shards

transformers knows a ternary model in three forms, told apart by config.json's quantization_config:
    online   autobitlinear: the fp32 latents, quantized at every step, as in training; the form to train on
    offline  autobitlinear, packed or plain trits: y = (x @ w_trit.T) * weight_scale
    offline  bitlinear, the same with y / weight_scale
and without quantization_config all weights are used as they are: so the full-precision twin goes out.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import OF_TRITS, ModelConfig, from_saved
from core.files import UserError, write_json, write_text
from data.tokenizer import Tokenizer
from interop.card import model_card
from interop.files import Kind, Spec, atomic_folder, read_foreign_json, write_safetensors
from interop.source import (
    Checkpoints,
    Figures,
    Source,
    Weight,
    bytes_bar,
    check_quantizers,
    check_vocab_size,
    weights_of,
)
from interop.ternary import Unpacked, check_scale, from_scaled, pack_rows, unpack_rows
from interop.tokenizer_json import from_huggingface, to_huggingface

SHARD_BYTES = 5 * 10**9
FIGURES = "bitgpt.json"  # what transformers has no place for, so that a run comes back whole
OWN_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", FIGURES,
             "model.safetensors.index.json")
ACTS = {"silu": "silu", "relu2": "relu2", "swish": "silu"}
LINEAR_CLASSES, MODES = ("bitlinear", "autobitlinear"), ("offline", "online")


HF = Kind(lambda path: (path / FIGURES).is_file(),
          lambda name: name in OWN_FILES or (name.startswith("model") and name.endswith(".safetensors")))


def hf_name(name: str) -> str:
    """A weight's name in transformers' BitNet and Llama."""
    for ours, theirs in (("blocks.", "model.layers."), ("attn_norm.", "input_layernorm."),
                         ("wte.", "model.embed_tokens."), ("mlp_norm.", "post_attention_layernorm."),
                         ("attn.sub_norm.", "self_attn.attn_sub_norm."),
                         ("mlp.sub_norm.", "mlp.ffn_sub_norm."), (".attn.", ".self_attn.")):
        name = name.replace(ours, theirs)
    return "model." + name if name.startswith("norm.") else name


# -- out ---------------------------------------------------------------------------------------------------------------

def hf_config(config: ModelConfig, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json. Every field is written: the classes' defaults are other models'."""
    name, kind = ("BitNet", "bitnet") if config.sub_norm else ("Llama", "llama")
    content: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"], "model_type": kind, "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd, "intermediate_size": config.n_ff, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim,
        "hidden_act": config.act, "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "dtype": "float32", "torch_dtype": "float32"}
    if kind == "bitnet":
        del content["mlp_bias"]
    return content | ({"quantization_config": quantization} if quantization else {})


def write_hf(source: Source, folder: Path, packed: bool = False, overwrite: bool = False, quiet: bool = False,
             shard_bytes: int = SHARD_BYTES) -> None:
    """packed: 2 bits a ternary weight instead of fp32 latents; not for training on."""
    config = source.config
    if packed:
        check_quantizers(source, "transformers' BitNet", OF_TRITS)
    else:  # it quantizes the latents itself
        check_quantizers(source, "transformers' online BitNet", ("absmean",))
    if config.qk_norm:
        raise UserError(f"{source.path}: transformers' BitNet and Llama have no norms on queries and keys (qk_norm). "
                        "Train with --no-qk-norm to export.")
    if packed and source.twin == "gpt":
        raise UserError(f"{source.path} is a run of gpt, full precision throughout: there is nothing to pack. Leave "
                        "out --packed.")
    specs: dict[str, list[Spec]] = {}       # our name -> the tensors it becomes
    for weight in weights_of(config):
        name = hf_name(weight.name)
        if packed and weight.linear:
            rows, columns = weight.shape
            if rows % 4:
                raise UserError(f"{source.path}: {weight.name} has {rows} rows, but the packed form holds four in a "
                                "byte. Leave out --packed, or train with widths that are multiples of 4.")
            specs[weight.name] = [Spec(name, "U8", (rows // 4, columns)), Spec(name + "_scale", "F32", (1,))]
        else:
            specs[weight.name] = [Spec(name, "F32", weight.shape)]
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "use_rms_norm": False,
                    "quantization_mode": "offline" if packed else "online", "rms_norm_eps": config.norm_eps,
                    "modules_to_not_convert": ["lm_head"]} if source.twin == "bitgpt" else None
    with atomic_folder(folder, overwrite, HF) as temporary:
        write_json(temporary / "config.json", hf_config(config, quantization))
        write_json(temporary / "generation_config.json", {
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "do_sample": True, "top_k": 200,
            "temperature": 0.8})
        to_huggingface(source.tokenizer, temporary, config.block_size)
        write_weights(source, temporary, specs, shard_bytes, str(folder), quiet)
        figures = source.figures
        write_json(temporary / FIGURES, {"format": 1, "twin": source.twin, "dropout": config.dropout,
                                         "train": figures.train, "state": figures.state, "records": figures.records})
        write_text(temporary / "README.md", model_card(source, folder.name, packed))


def write_weights(source: Source, folder: Path, specs: dict[str, list[Spec]], shard_bytes: int, title: str,
                  quiet: bool) -> None:
    """model.safetensors, or numbered shards of at most `shard_bytes` (or one weight) each with their index."""
    shards: list[dict[str, list[Spec]]] = [{}]
    room = shard_bytes
    for name, listed in specs.items():
        size_bytes = sum(spec.size_bytes for spec in listed)
        if size_bytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = listed
        room -= size_bytes
    weights = {weight.name: weight for weight in weights_of(source.config)}
    total = sum(spec.size_bytes for listed in specs.values() for spec in listed)
    index: dict[str, str] = {}
    with bytes_bar(title, total, quiet) as bar:
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            flat = [spec for listed in shard.values() for spec in listed]
            index |= {spec.name: file for spec in flat}
            write_safetensors(folder / file, flat, tensor_maker(source, shard, weights), {"format": "pt"}, bar.update)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def tensor_maker(source: Source, specs: dict[str, list[Spec]], weights: dict[str, Weight]) -> Callable[[str], Tensor]:
    """name -> tensor, for names in the order of `specs`: a scale follows its matrix."""
    owner = {spec.name: name for name, listed in specs.items() for spec in listed}
    scale = torch.zeros(1)

    def make(name: str) -> Tensor:
        weight = weights[owner[name]]
        if len(specs[weight.name]) == 1:
            return source.latent(weight)
        if name.endswith("_scale"):
            return scale
        w_trit, scale[0] = source.ternary(weight)
        return torch.from_numpy(pack_rows(w_trit))

    return make


# -- in ----------------------------------------------------------------------------------------------------------------

def is_hf(path: Path) -> bool:
    """A folder with transformers' config.json."""
    return (path / "config.json").is_file() and isinstance(saved := read_foreign_json(path / "config.json"), dict) and (
        "model_type" in saved or "architectures" in saved)


class HFSource(Source):
    """BitNetForCausalLM or LlamaForCausalLM, ternary in any of transformers' forms or not at all."""

    def __init__(self, path: Path, block_size: int = 0) -> None:
        self.path = path
        saved = read_foreign_json(path / "config.json")
        self.config = model_config(saved, path)
        self.form = quantization_form(saved, path)
        self.twin = "bitgpt" if self.form else "gpt"
        self.tensors = Checkpoints(weight_files(path))
        self.figures = read_figures(path, self.config)
        if block_size:
            self.config.block_size = min(block_size, self.config.block_size)
        self.tokenizer = read_tokenizer(path, self.config)
        known = {hf_name(weight.name) for weight in weights_of(self.config)}
        known |= {name + "_scale" for name in known} | {"lm_head.weight"}
        for name in self.tensors.files:
            if name not in known and not name.endswith("rotary_emb.inv_freq"):
                remedy = "A BitGPT has no biases." if name.endswith(".bias") else \
                    "Only the graphs of transformers' BitNet and Llama are read."
                raise UserError(f"{path} has a tensor {name}, which a BitGPT has no place for. {remedy}")

    def stored(self, weight: Weight) -> Tensor | Unpacked:
        name = hf_name(weight.name)
        if not weight.linear or self.form in ("", "online"):
            tensor = self.tensors.get(name)
            if not tensor.is_floating_point():
                raise ValueError(f"it is {tensor.dtype} where numbers are expected")
            return tensor.float()
        stored, scale = self.tensors.get(name), self.tensors.get(name + "_scale").float()
        if scale.numel() != 1:
            raise ValueError(f"it has {scale.numel()} scales, where b1.58 has one a matrix")
        w_scale = check_scale(float(scale) if self.form == "autobitlinear" else float(1 / scale))
        if stored.dtype == torch.uint8:
            return Unpacked(unpack_rows(stored.numpy()), w_scale)
        trits = from_scaled(stored.float().numpy())
        if trits is None or trits.w_scale != 1:
            raise ValueError("it is said to be ternary, but holds other numbers than -1, 0 and 1")
        return Unpacked(trits.w_trit, w_scale)


def weight_files(path: Path) -> list[Path]:
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        pickled = sorted(path.glob("pytorch_model*.bin"))
        raise UserError(f"{path} has no model.safetensors" + (
            f", and {pickled[0].name} is a pickle, which can run code when it is opened. Save it again with "
            "save_pretrained(safe_serialization=True)." if pickled else ". Copy the folder as a whole."))
    saved = read_foreign_json(index)
    names = saved.get("weight_map") if isinstance(saved, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index} is not an index of shards in its folder. Restore it from a copy.")
    return [path / name for name in sorted(set(names.values()))]


def model_config(saved: Any, path: Path) -> ModelConfig:
    """The shape of the model that a config.json describes. UserError, by name, for what a BitGPT cannot be."""
    kind = saved.get("model_type") if isinstance(saved, dict) else None
    if kind not in ("bitnet", "llama"):
        raise UserError(f"{path} is a model of type {kind!r}. Known: bitnet and llama (BitNetForCausalLM and "
                        "LlamaForCausalLM), whose graph a BitGPT has too.")

    def refuse(key: str, value: Any, what: str) -> UserError:
        return UserError(f"{path}: {key} is {value!r}: {what}.")

    for key in ("attention_bias", "mlp_bias"):
        if saved.get(key):
            raise refuse(key, saved[key], "a BitGPT has no biases")
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_parameters", rope, "a table is expected")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("rope_type", rope_type, "only plain rotary embeddings over the whole head are known")
    act = saved.get("hidden_act", "relu2" if kind == "bitnet" else "silu")
    if act not in ACTS:
        raise refuse("hidden_act", act, "a BitGPT has silu or relu2")
    default_theta = 500000.0 if kind == "bitnet" else 10000.0
    sizes = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
             "n_ff": "intermediate_size", "vocab_size": "vocab_size", "block_size": "max_position_embeddings"}
    for key in sizes.values():
        if not isinstance(saved.get(key), int):
            raise refuse(key, saved.get(key), "a whole number is expected")
    content = dataclasses.asdict(ModelConfig()) | {ours: saved[theirs] for ours, theirs in sizes.items()}
    content |= {"n_kv_head": saved.get("num_key_value_heads") or saved["num_attention_heads"], "act": ACTS[act],
                "sub_norm": kind == "bitnet",
                "tie_embeddings": saved.get("tie_word_embeddings", False),
                "rope_theta": rope.get("rope_theta", saved.get("rope_theta", default_theta)),
                "norm_eps": saved.get("rms_norm_eps", 1e-5 if kind == "bitnet" else 1e-6)}
    config: ModelConfig = from_saved(ModelConfig, content, f"{path}/config.json").resolved()
    head_dim = saved.get("head_dim")
    if head_dim not in (None, config.head_dim):
        raise refuse("head_dim", head_dim, f"a BitGPT's heads are hidden_size / num_attention_heads = "
                                           f"{config.head_dim} wide")
    return config


def quantization_form(saved: dict[str, Any], path: Path) -> str:
    """ "" for full precision, "online", or the class of the packed linears."""
    quantization = saved.get("quantization_config")
    if quantization is None:
        return ""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{path} is quantized by {method!r}, not by bitnet (b1.58). Export it in full precision first.")
    linear, mode = quantization.get("linear_class", "bitlinear"), quantization.get("quantization_mode", "offline")
    if linear not in LINEAR_CLASSES or mode not in MODES:
        raise UserError(f"{path}: linear_class {linear!r}, quantization_mode {mode!r} are unknown. Known: "
                        f"{' and '.join(LINEAR_CLASSES)}, {' and '.join(MODES)}.")
    if quantization.get("use_rms_norm"):
        raise UserError(f"{path}: use_rms_norm adds a norm to every linear, and a BitGPT has no place for those.")
    left = [name for name in quantization.get("modules_to_not_convert") or [] if "lm_head" not in name]
    if left:
        raise UserError(f"{path}: {left[0]!r} is left in full precision, but in a BitGPT all linears are ternary.")
    return "online" if mode == "online" and linear == "autobitlinear" else linear


def read_figures(path: Path, config: ModelConfig) -> Figures:
    """What a folder made here says of the training, and the model's dropout; nothing of any other folder's."""
    if not (path / FIGURES).exists():
        return Figures()
    saved = read_foreign_json(path / FIGURES)
    saved = saved if isinstance(saved, dict) else {}
    train, state, records = saved.get("train"), saved.get("state"), saved.get("records")
    if not (isinstance(train, dict) and isinstance(state, dict) and isinstance(records, list)
            and all(isinstance(record, dict) for record in records)):
        raise UserError(f"{path / FIGURES} is not what convert.py writes. Remove it: the model is read without it.")
    dropout = saved.get("dropout")
    config.dropout = float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0
    return Figures(train, state, records)


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    if not (path / "tokenizer.json").exists():
        raise UserError(f"{path} has no tokenizer.json, so there is no text in and out. Load its tokenizer with "
                        "transformers' AutoTokenizer and save it into that folder.")
    tokenizer = from_huggingface(read_foreign_json(path / "tokenizer.json"), config.vocab_size, path / "tokenizer.json")
    check_vocab_size(config, tokenizer, path)
    return tokenizer
