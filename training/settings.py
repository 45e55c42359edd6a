"""The settings of training: what they are, the learning rate that follows from them, and which source wins where two
disagree."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from core.config import MOST_THREADS, ModelConfig, Parser, build, from_saved, parser, read_toml, setting
from core.files import UserError
from core.run_folder import read_config
from data.tokenizer import load_tokenizer


@dataclasses.dataclass
class TrainConfig:
    """How a model is trained."""

    dataset: str = setting("shakespeare", "shakespeare, astro, a .txt, .jsonl or .parquet file, a folder of those, a "
                           "text in data/, or hf:NAME:CONFIG of Hugging Face", path=True)
    text_field: str = setting("text", "the field of JSON lines, or the column of parquet, that holds the text")
    tokenizer: str = setting("char", "what a token is; bpe is trained on the text, hf is that of an imported model",
                             choices=("char", "bpe", "gpt2", "hf"))
    out_dir: str = setting("", "the run folder (default: runs/ and the model's name)", path=True)
    init_from: str = setting("", "start from the weights of a run of either twin, a Hugging Face folder or a GGUF",
                             path=True)
    max_iters: int = setting(2000, "optimizer steps", low=1)
    batch_size: int = setting(12, "sequences in a micro-batch", low=1)
    grad_accum: int = setting(1, "micro-batches in a step", low=1)
    optimizer: str = setting("adamw", "adamw, or muon for the matrices of the blocks (AdamW for the rest)",
                             choices=("adamw", "muon"))
    lr: float = setting(1e-3, "peak learning rate (with --optimizer muon: AdamW's)", above=0)
    muon_lr: float = setting(0.02, "Muon's peak learning rate", above=0)
    schedule: str = setting("linear", "how the learning rate decays after the warm-up",
                            choices=("cosine", "linear", "wsd", "two-stage", "constant"))
    decay_lr: bool = setting(True, "decay the learning rate")
    warmup_iters: int = setting(100, "steps over which the learning rate rises", low=0)
    lr_decay_iters: int = setting(0, "step at which min_lr is reached (0: max_iters)", low=0)
    min_lr: float = setting(0.0, "learning rate at the end", low=0)
    decay_share: float = setting(0.5, "fraction of the steps after the warm-up over which schedule wsd decays", above=0,
                                 high=1)
    weight_decay: float = setting(0.1, "AdamW's decay of matrices and embeddings", alias="wd", low=0)
    wd_until: float = setting(1.0, "fraction of the steps after which weight decay is off; BitNet's recipe: 0.5", low=0,
                              high=1)
    muon_weight_decay: float = setting(0.0, "decay of Muon's matrices", low=0)
    muon_momentum: float = setting(0.95, "Muon's momentum", low=0, below=1)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", low=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the second moment", low=0, below=1)
    ternary_from: float = setting(0.0, "bitgpt: fraction of the steps in full precision, before quantization starts",
                                  low=0, below=1)
    warmup_quant: float = setting(0.0, "bitgpt: fraction of the steps over which quantization is then blended in",
                                  low=0, high=1)
    distill: str = setting("", "teacher run for distillation: its probabilities are learned beside the text", path=True)
    distill_weight: float = setting(0.5, "weight of the distillation loss", above=0, high=1)
    grad_clip: float = setting(1.0, "clip the gradient's norm to this (0: off)", low=0)
    eval_interval: int = setting(250, "steps from one evaluation and checkpoint to the next", low=1)
    eval_iters: int = setting(0, "batches in an evaluation (0: the whole validation split)", low=0)
    log_interval: int = setting(10, "steps from one record of the training loss to the next", low=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of the matrix products; weights stay fp32; auto: bfloat16 where it is fast",
                         choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "torch.compile; auto: on one GPU, for runs long enough to pay (a CPU is faster with "
                           "the kernels of gpt/fused.c)", choices=("auto", "on", "off"))
    checkpointing: bool = setting(False, "compute activations again in backward instead of keeping them: less memory")
    fsdp: bool = setting(False, "with torchrun: a share of the weights on each process, for models too large for one")
    threads: int = setting(0, "CPU threads (0: torch's choice); results repeat with the same number", low=0,
                           high=MOST_THREADS)
    seed: int = setting(1337, "seed of weights, batches and dropout", low=0, high=2**63 - 1)
    wandb_log: bool = setting(False, "also log to Weights & Biases, offline where nobody is logged in")
    wandb_project: str = setting("bitgpt", "its project there")
    verbose: int = setting(1, "0: nothing but problems, 1: the settings worth tuning, 2: all settings", low=0, high=2)


SETTINGS = (ModelConfig, TrainConfig)  # of a run
WORTH_TUNING = ("dataset", "tokenizer", "n_layer", "n_head", "n_embd", "n_ff", "block_size", "dropout", "max_iters",
                "batch_size", "optimizer", "lr", "schedule", "warmup_iters", "weight_decay", "dtype", "seed", "out_dir")


OF_QUANTIZATION = {"weight_quant", "activation_quant", "scale", "ternary_from", "warmup_quant"}  # bitgpt's alone
# What may differ between two runs that count as one.
NO_MATTER = {"out_dir", "verbose", "threads", "device", "log_interval", "wandb_log", "wandb_project"}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_iters:
        return config.lr * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr or config.schedule == "constant":
        return config.lr
    end = config.lr_decay_iters or config.max_iters
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    if config.schedule == "two-stage":  # BitNet b1.58's: falls as if to zero, and at half the way drops by a third
        return max(config.min_lr, config.lr * (1 - progress) * (1 if progress < 0.5 else 2 / 3))
    left = {"cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "wsd": min(1.0, (1 - progress) / config.decay_share)}[config.schedule]  # arXiv 2404.06395
    return config.min_lr + (config.lr - config.min_lr) * left


def quantized_share(config: TrainConfig, step: int) -> float:
    """How far the ternary twin is quantized in a step: 0 not at all, 1 altogether. While it is blended in, the square
    root of the progress: the error grows with the square of the share, and so linearly in time."""
    first, steps = quantization_steps(config)
    if not steps:
        return float(step >= first)
    return math.sqrt(min(1.0, max(0.0, (step + 1 - first) / steps)))


def quantization_steps(config: TrainConfig) -> tuple[int, int]:
    """The step with which quantization begins, and how many it takes to be whole."""
    first = round(config.ternary_from * config.max_iters)
    return first, round((config.ternary_from + config.warmup_quant) * config.max_iters) - first


def settings_for(twin: str, given: dict[str, Any], toml: str, run: Path,
                 resume: bool) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a run: defaults < the saved run or the one to start from < the TOML file < flags."""
    from_toml = read_toml(toml, SETTINGS, twin)
    asked = from_toml | given
    saved: dict[str, Any] = {}
    if resume:
        before = read_config(run, twin)
        free = asked.keys() & before.train.keys() - {"tokenizer", "optimizer", "init_from"}  # to be changed, below
        train = from_saved(TrainConfig, before.train | {key: asked[key] for key in free}, f"{run}/config.json")
        saved = dataclasses.asdict(before.model) | dataclasses.asdict(train) | {"out_dir": str(run)}
    elif asked.get("init_from"):
        from interop import as_run  # only who imports a model pays for it

        start = as_run(Path(asked["init_from"]))
        source = read_config(start)
        saved = {name: value for name, value in dataclasses.asdict(source.model).items()
                 if source.twin == "bitgpt" or name not in OF_QUANTIZATION}
        saved["tokenizer"] = load_tokenizer(start / "tokenizer.json").name
    model, config = build(SETTINGS, saved, from_toml, given)
    if config.tokenizer == "hf" and not saved:
        raise UserError("--tokenizer hf is for imported models alone. Name one with --init-from, or choose char, bpe "
                        "or gpt2.")
    if given.get("vocab_size") and config.tokenizer != "bpe" and not saved:
        raise UserError(f"--vocab-size {given['vocab_size']}: only --tokenizer bpe takes one; {config.tokenizer} has a "
                        "vocabulary of its own. Leave it out, or take --tokenizer bpe.")
    if saved:
        fixed = {field.name for field in dataclasses.fields(ModelConfig)} - {"dropout", "block_size", "vocab_size"}
        fixed |= {"tokenizer", "block_size", "optimizer", "init_from"} if resume else set()
        fixed |= {"tokenizer"} & given.keys()  # a TOML file may be another model's
        fixed |= {"vocab_size"} & given.keys() if not resume else set()  # bpe may have found fewer than were asked for
        for key in fixed & asked.keys() & saved.keys():
            now = getattr(model.resolved() if hasattr(model, key) else config, key)
            same_place = key == "init_from" and now and saved[key] and Path(now).resolve() == Path(saved[key]).resolve()
            if now != saved[key] and not same_place:
                where = run if resume else config.init_from
                raise UserError(f"{key} is {saved[key] or 'not set'} in {where}, not {now}. Leave it as it was, or "
                                "train from scratch into another --out-dir.")
    if config.min_lr > config.lr:
        raise UserError(f"min_lr {config.min_lr:g} is above lr {config.lr:g}. Lower --min-lr.")
    if 0 < config.lr_decay_iters <= config.warmup_iters:
        raise UserError(f"lr_decay_iters {config.lr_decay_iters} is within the {config.warmup_iters} steps of warm-up. "
                        "Raise --lr-decay-iters, or lower --warmup-iters.")
    first, steps = quantization_steps(config)
    if twin == "bitgpt" and first + steps > config.max_iters:
        raise UserError(f"quantization would only be complete at step {first + steps}, and max_iters is "
                        f"{config.max_iters}. Lower --warmup-quant or --ternary-from, or raise --max-iters.")
    return model.resolved(), config


def training_parser(doc: str | None, several: bool = False) -> Parser:
    """The flags of a training script: all settings (several: with lists of values), and what to do with a run that is
    there."""
    flags = parser(doc, SETTINGS, several=several)
    flags.add_argument("--config", metavar="FILE", help="a TOML file with settings; flags win over it", default="")
    flags.add_argument("--resume", action="store_true", help="go on with the run in --out-dir", default=False)
    flags.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir", default=False)
    return flags


def out_dir_of(given: dict[str, Any], toml: str, twin: str) -> str:
    """The run folder that flags or else the TOML file name, "" where neither does. twin: whose, "" for both."""
    return str(given.get("out_dir") or read_toml(toml, SETTINGS, twin).get("out_dir", ""))


def read_arguments(flags: Parser, argv: list[str] | None) -> tuple[dict[str, Any], str, bool, bool]:
    """(settings that were given, --config, --resume, --overwrite) of a training script's command line."""
    given = vars(flags.parse(argv))
    toml, resume, overwrite = given.pop("config"), given.pop("resume"), given.pop("overwrite")
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it. Take one of them.")
    return given, toml, resume, overwrite
