"""The model card of an exported model: what it is, how it was trained, how to run it."""

import math
from typing import Any

from interop.source import Source, weights_of

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", "block_size", "vocab_size", "act", "sub_norm",
         "tie_embeddings", "rope_theta")
TRAINING = ("dataset", "max_iters", "batch_size", "grad_accum", "optimizer", "lr", "muon_lr", "schedule",
            "warmup_iters", "weight_decay", "ternary_from", "warmup_quant", "dtype", "seed")


def number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and 0.001 < abs(value) < 1000 else f"{value}"


def model_card(source: Source, name: str, packed: bool) -> str:
    """README.md, with the YAML header that the hub reads."""
    config, figures = source.config, source.figures
    weights = weights_of(config)
    total = sum(math.prod(weight.shape) for weight in weights)
    ternary = sum(math.prod(weight.shape) for weight in weights if weight.linear) if source.twin == "bitgpt" else 0
    tags = ["bitgpt", *(["bitnet", "ternary"] if ternary else [])]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]", "---",
             f"# {name}", ""]
    if ternary:
        lines += [f"A GPT of {total:,} parameters, {ternary:,} of them ternary (BitNet b1.58), made by BitGPT.",
                  "The weights are " + ("packed, 2 bits a ternary weight: for inference." if packed else
                                        "the fp32 latents that were trained, quantized as they are used: it can be "
                                        "trained further.")]
    else:
        lines += [f"A full-precision GPT of {total:,} parameters, made by BitGPT."]
    lines += ["", "| shape | |", "|---|---|", *(f"| {key} | {number(getattr(config, key))} |" for key in SHAPE),
              f"| tokenizer | {source.tokenizer.name} |"]
    evaluated = [record for record in figures.records if isinstance(record.get("val_loss"), int | float)]
    best = next((record for record in evaluated if record.get("step") == figures.state.get("step")),  # these weights'
                min(evaluated, key=lambda record: record["val_loss"], default=None))
    if best is not None or figures.train:
        lines += ["", "| training | |", "|---|---|"]
        lines += [f"| {key} | {number(figures.train[key])} |" for key in TRAINING if key in figures.train]
    if best is not None:
        lines += [f"| best validation loss (nats/token) | {best['val_loss']:.4f} |"]
        lines += [f"| {title} | {number(best[key])} |" for title, key in (("  at step", "step"),
                                                                         ("bits per byte", "val_bpb")) if key in best]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
              f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
              f'model = AutoModelForCausalLM.from_pretrained("{name}")'
              + ("        # needs accelerate" if ternary else ""),
              'ids = tokenizer("\\n", return_tensors="pt").input_ids',
              "print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))", "```", ""]
    return "\n".join(lines)
