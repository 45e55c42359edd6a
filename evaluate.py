"""The validation loss of a trained run, through the kernel that is going to run it.

    python evaluate.py                          # the ternary run in runs/bitgpt, packed: Triton on a GPU, C without one
    python evaluate.py --kernel torch           # the models themselves, the reference
    python evaluate.py --model gpt --eval-iters 20
    python evaluate.py --out-dir runs/bitgpt --dataset path/to/another.txt

The text is the one that the run was trained on, in the windows that train.py evaluates (with --eval-iters in other
batches of them). generate.py's --kernel, --weights and --head mean the same here (engine/).
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import dataclasses
import sys
import time
from pathlib import Path

from core.config import TWINS, build, parser, setting
from core.files import UserError, command_line
from core.progress import progress
from core.run_folder import read_config, state_of
from data.bins import prepare_bins
from data.loader import Loader
from data.tokenizer import load_tokenizer
from engine import EngineConfig
from engine.evaluation import loss_of, windows_at_once


@dataclasses.dataclass
class EvaluateConfig:
    """On what a run is evaluated."""

    dataset: str = setting("", "as for train.py; its validation split counts (default: what the run was trained on)",
                           path=True)
    text_field: str = setting("", "the field of JSON lines, or the column of parquet, that holds the text (default: as "
                              "in training)")
    eval_iters: int = setting(0, "batches, spread over the split (0: all of it)", low=0)


@command_line
def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, [EvaluateConfig, EngineConfig])
    flags.add_argument("--model", choices=TWINS, help="which twin [that of --out-dir, or bitgpt]")
    given = vars(flags.parse(argv))
    twin = given.pop("model", None)
    config, kernel = build([EvaluateConfig, EngineConfig], given)
    run = Path(kernel.out_dir or f"runs/{twin or 'bitgpt'}")

    saved = read_config(run, twin)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    dataset = config.dataset or saved.train.get("dataset")
    if not dataset or not isinstance(dataset, str):
        raise UserError(f"{run} does not say what it was trained on. Name a text: --dataset.")
    corpus = prepare_bins(dataset, saved.train.get("tokenizer", tokenizer.name), saved.model.vocab_size,
                          tokenizer=tokenizer,
                          text_field=config.text_field or str(saved.train.get("text_field", "text")))
    if not config.dataset and state_of(run).get("corpus", "") not in ("", corpus.meta["source"]["sha256"]):
        raise UserError(f"{dataset} is no longer the text that {run} was trained on: what is held back now may be what "
                        f"it learned from. Restore that text, or evaluate on this one: --dataset {dataset}.")
    model = kernel.load(run)
    length = min(saved.model.block_size, corpus.meta["val_tokens"] - 1)
    batches = Loader(corpus.val, corpus.dtype, length, windows_at_once(model), seed=0)
    windows, rest = divmod(corpus.meta["val_tokens"] - 1, length)
    number = -(-windows // batches.batch_size) + (rest > 0)
    start = time.perf_counter()
    with progress(batches.eval_batches(limit=config.eval_iters), total=min(config.eval_iters or number, number),
                  unit="batch", leave=False) as bar:
        loss, tokens = loss_of(model, bar)
    seconds = time.perf_counter() - start
    print(f"{loss:.4f} nats per token, {corpus.bits_per_byte(loss):.4f} bits per byte")
    print(f"{tokens:,} tokens of {dataset} in {seconds:.1f} s: {tokens / seconds:,.0f} tok/s "
          f"({saved.twin}, {model.kernel} kernel)", file=sys.stderr)


if __name__ == "__main__":
    main()
