"""A model wherever it lies: what all formats come down to on the way from one to another. And the run folder's side.

A `Source` gives one tensor at a time, so that a conversion needs memory for a few times the largest of them. hf.py and
gguf.py have theirs; here are the base and the one of a run folder, and the writer of run folders.
"""

import abc
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from bitgpt.quantizers import quantize_weight
from core.checkpoint import checksum
from core.config import ModelConfig
from core.files import UserError, write_text
from core.metrics import read_metrics
from core.progress import progress
from core.run_folder import BEST, LAST, OWN_FILES, PREVIOUS, read_config, weights_file, write_config
from data.tokenizer import Tokenizer, load_tokenizer
from engine.packed_file import entries
from interop.files import Kind, Spec, atomic_folder, write_safetensors
from interop.ternary import Unpacked, check_scale, latents


class Weight(NamedTuple):
    """A weight of the model: where it is ternary in bitgpt, a norm, or an embedding (or head)."""

    name: str
    shape: tuple[int, ...]
    linear: bool


def weights_of(config: ModelConfig) -> list[Weight]:
    """All weights of a model, by the names of the checkpoint."""
    return [Weight(entry.name, entry.shape, entry.kind == "trit2") for entry in entries(config, "trit2", "q8")]


@dataclasses.dataclass
class Figures:
    """What is known of a model's training. train: its settings; state: of its checkpoint; records: its metrics."""

    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Source(abc.ABC):
    """A model that can be read. Opening it reads and checks everything but the weights, and of those what tells which
    twin it is."""

    path: Path
    config: ModelConfig
    twin: str
    tokenizer: Tokenizer
    figures: Figures

    @abc.abstractmethod
    def stored(self, weight: Weight) -> Tensor | Unpacked:
        """What the file holds: fp32, or of a linear also trits and their scale. ValueError where that is broken."""

    def read(self, weight: Weight) -> Tensor | Unpacked:
        try:
            value = self.stored(weight)
            if isinstance(value, Unpacked):
                check_scale(value.w_scale)
        except (ValueError, SafetensorError) as error:
            raise UserError(f"{self.path}: {weight.name} cannot be taken: {error}.") from None
        shape = tuple(value.w_trit.shape if isinstance(value, Unpacked) else value.shape)
        if shape != weight.shape:
            raise UserError(f"{self.path}: {weight.name} is {shape}, but the model's settings make it {weight.shape}. "
                            "The file is damaged, or of another model than its settings say.")
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise UserError(f"{self.path}: {weight.name} holds numbers that are not finite. Restore it from a copy.")
        return value

    def latent(self, weight: Weight) -> Tensor:
        """The weight as training knows it, fp32."""
        value = self.read(weight)
        return torch.from_numpy(latents(*value)) if isinstance(value, Unpacked) else value

    def ternary(self, weight: Weight) -> Unpacked:
        """The weight as bitgpt computes with it: trits and scale."""
        value = self.read(weight)
        if isinstance(value, Unpacked):
            return value
        w_trit, w_scale = quantize_weight(value, self.config.weight_quant)
        return Unpacked(w_trit.numpy(), float(w_scale))


def check_quantizers(source: Source, place: str, weight_quant: tuple[str, ...]) -> None:
    """UserError where the model uses what `place` cannot express."""
    unfit = source.config.unfit(source.twin, norm=("sub",), weight_quant=weight_quant, scale=("tensor",),
                                activation_quant=("int8",))
    if unfit:
        raise UserError(f"{source.path} was trained with {unfit}, which {place} cannot express. Train without it to "
                        "export.")


class Checkpoints:
    """The tensors of one or more safetensors files by name, opened at once and read one by one."""

    def __init__(self, paths: list[Path]) -> None:
        self.files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                self.files |= dict.fromkeys(file.keys(), file)  # noqa: SIM118 - not a dict
                self.metadata: dict[str, str] = file.metadata() or {}
            except FileNotFoundError:
                raise UserError(f"{path} is missing. Copy the folder as a whole.") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or cut short ({error}). Restore it from a copy.") from None

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"there is no {name}")
        return self.files[name].get_tensor(name)


class RunSource(Source):
    """A run folder's best weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.twin, self.config, train = read_config(path)
        self.tokenizer = load_tokenizer(path / "tokenizer.json")
        check_vocab_size(self.config, self.tokenizer, path)
        file = weights_file(path)
        if not file.exists():
            raise UserError(f"{file} is missing, so there is nothing to convert. Train the run first.")
        self.tensors = Checkpoints([file])
        self.check_sum(file)
        records = read_metrics(path) if (path / "metrics.jsonl").exists() else []
        try:
            self.figures = Figures(train, json.loads(self.tensors.metadata.get("state", "{}")), records)
        except ValueError as error:
            raise UserError(f"{file}: its state is no JSON ({error}). Restore it from a copy.") from None

    def check_sum(self, file: Path) -> None:
        metadata = self.tensors.metadata
        if "crc32" not in metadata:  # an import
            return
        found = checksum(((name, self.tensors.get(name)) for name in sorted(self.tensors.files)),
                         metadata.get("state", "{}"))
        if found != metadata["crc32"]:
            raise UserError(f"{file} is damaged (its checksum does not match). Restore it from a copy, or train the "
                            "run again.")

    def stored(self, weight: Weight) -> Tensor:
        return self.tensors.get(weight.name).float()


def check_vocab_size(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    """UserError where a tokenizer can say ids that the model does not know."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}. "
                        "They belong to different models; put the right tokenizer beside the weights.")


def bytes_bar(title: str, total: int, quiet: bool) -> "tqdm[Any]":
    return progress(None, title, total=total, unit="B", unit_scale=True, disable=quiet)


def is_import(run: Path) -> bool:
    """Whether write_run made the folder, and nobody has trained there."""
    with contextlib.suppress(UserError, ValueError, OSError):
        state = json.loads(Checkpoints([run / BEST]).metadata.get("state", "{}"))
        return "imported_from" in state and not any((run / name).exists() for name in (LAST, PREVIOUS))
    return False


RUN = Kind(is_import, lambda name: name in OWN_FILES)


def write_run(source: Source, folder: Path, overwrite: bool = False, quiet: bool = False) -> None:
    """A run folder: what generate.py runs and --init-from takes; with metrics, what compare.py reports on."""
    listed = {weight.name: weight for weight in weights_of(source.config)}
    specs = [Spec(weight.name, "F32", weight.shape) for weight in listed.values()]
    # A step says that this checkpoint was trained, so that no --resume takes the folder for a run that never began.
    state = {"step": 1, **source.figures.state, "imported_from": source.path.name}
    with atomic_folder(folder, overwrite, RUN) as temporary:
        with bytes_bar(str(source.path), sum(spec.size_bytes for spec in specs), quiet) as bar:
            write_safetensors(temporary / BEST, specs, lambda name: source.latent(listed[name]),
                              {"state": json.dumps(state)}, bar.update)
        source.tokenizer.save(temporary / "tokenizer.json")
        write_config(temporary, source.twin, source.config, source.figures.train)
        if source.figures.records:
            write_text(temporary / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in source.figures.records))
