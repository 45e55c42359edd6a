"""configs/: the models they name have the published sizes, and a run can start from each."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bitgpt.model import BitGPT
from core.config import TWINS, ModelConfig, build, read_toml
from data.tokenizer import TRAINERS
from gpt.model import GPT
from training.settings import TrainConfig, learning_rate

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))
SIZES = {  # millions: of ternary weights, of the embedding and head
    "wikitext_47m": (16.777, 47.448), "tinystories_15m": (2.621, 12.866), "gpt2_124m": (84.935, 38.597),
    "bitnet_700m": (679.477, 49.152), "bitnet_2b": (2084.045, 328.335)}


def settings_of(path: Path, twin: str) -> tuple[ModelConfig, TrainConfig]:
    model, train = build([ModelConfig, TrainConfig], read_toml(path, [ModelConfig, TrainConfig], twin))
    return model.resolved(), train


def sizes(model: GPT) -> tuple[int, int, int]:
    """Ternary weights (those of both twins that are in blocks and matrices), embedding and head, norms."""
    weights = dict(model.named_parameters())
    linear = sum(w.numel() for name, w in weights.items() if name.startswith("blocks.") and w.dim() == 2)
    tables = sum(weights[name].numel() for name in ("wte.weight", "lm_head.weight") if name in weights)
    return linear, tables, model.num_params() - linear - tables


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_serves_both_twins(path: Path) -> None:
    for twin in TWINS:
        model, train = settings_of(path, twin)
        assert train.tokenizer in TRAINERS and learning_rate(train, train.max_iters // 3) > 0
        assert train.tokenizer != "gpt2" or model.vocab_size == 50257
        assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    path = next(path for path in CONFIGS if path.stem == name)
    for model_class in (GPT, BitGPT):
        with torch.device("meta"):
            linear, tables, norms = sizes(model_class(settings_of(path, model_class.name)[0]))
        assert (round(linear / 1e6, 3), round(tables / 1e6, 3)) == SIZES[name]
        assert norms < 0.001 * linear + 20_000


def test_published_totals() -> None:
    """What their authors count: without our sub-norms, and with the vocabulary that they had."""
    def total(name: str, **changes: object) -> tuple[int, int, int]:
        path = next(path for path in CONFIGS if path.stem == name)
        with torch.device("meta"):
            return sizes(GPT(dataclasses.replace(settings_of(path, "gpt")[0], **changes).resolved()))  # type: ignore

    linear, tables, norms = total("wikitext_47m", sub_norm=False)
    assert tables + norms == 47_452_672  # "Model size: 47,452,672 (47.5M)", which leaves the linear layers out
    assert round(sum(total("tinystories_15m")) / 1e6, 1) == 15.5
    assert sum(total("bitnet_700m", vocab_size=32002)) == 728_842_752
    assert round(sum(total("bitnet_2b")) / 1e9, 1) == 2.4
