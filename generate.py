"""Samples text from a trained run: stdout is the text, as it comes, and stderr everything else.

    python bitgpt/generate.py --prompt "ROMEO:"              # the ternary run in runs/bitgpt
    python gpt/generate.py --num-samples 1 --temperature 0   # its full-precision twin, greedily
    python generate.py --model bitgpt --out-dir runs/compare/bitgpt --prompt-file - < scene.txt
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import dataclasses
import sys
import time
from pathlib import Path

from core.config import TWINS, build, parser, setting
from core.files import UserError, command_line
from core.run_folder import read_config
from data.tokenizer import load_tokenizer
from engine import EngineConfig
from engine.sampling import TextStream


@dataclasses.dataclass
class GenerateConfig:
    """How a run is sampled."""

    prompt: str = setting("", "text to continue (default: a new line)")
    prompt_file: str = setting("", "a file with the text to continue; - is standard input", path=True)
    num_samples: int = setting(2, "samples, generated as one batch", low=1, high=4096)
    max_new_tokens: int = setting(2000, "tokens to generate, of each sample", low=1)
    temperature: float = setting(1.0, "0 takes the likeliest token; below 1 is tamer, above wilder", low=0)
    top_k: int = setting(200, "draw from the k likeliest tokens (0: from all)", low=0)
    top_p: float = setting(1.0, "draw from the likeliest tokens that hold this share of probability", above=0, high=1)
    seed: int = setting(1337, "seed of the sampler", low=0, high=2**63 - 1)
    stop: str = setting("", "end a sample before this text")


def read_prompt(config: GenerateConfig) -> str:
    if not config.prompt_file:
        return config.prompt
    if config.prompt:
        raise UserError("--prompt and --prompt-file are both given. Take one of them.")
    if config.prompt_file == "-" and sys.stdin is None:
        raise UserError("--prompt-file -: standard input is closed. Name a text file.")
    try:
        content = sys.stdin.buffer.read() if config.prompt_file == "-" else Path(config.prompt_file).read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")  # as data/source.py reads a corpus
    except OSError as error:
        raise UserError(f"--prompt-file {config.prompt_file}: {error.strerror}. Name a text file, or - for standard "
                        "input.") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {config.prompt_file} is not UTF-8 text. Convert it first.") from None


@command_line
def main(twin: str | None = None, argv: list[str] | None = None) -> None:
    flags = parser(__doc__, [GenerateConfig, EngineConfig])
    if twin is None:
        flags.add_argument("--model", choices=TWINS, help="which twin [that of --out-dir, or bitgpt]")
    given = vars(flags.parse(argv))
    twin = given.pop("model", twin)
    config, kernel = build([GenerateConfig, EngineConfig], given)
    run = Path(kernel.out_dir or f"runs/{twin or 'bitgpt'}")
    prompt = read_prompt(config)

    saved = read_config(run, twin)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    ids = tokenizer.encode(prompt) or tokenizer.start()
    prompt = prompt or tokenizer.decode(ids)
    model = kernel.load(run)
    size = model.config.block_size
    if len(ids) > size:
        print(f"note: the prompt has {len(ids):,} tokens; the model sees the last {size:,} (its block_size)",
              file=sys.stderr)

    streams = [TextStream(tokenizer, config.stop) for _ in range(config.num_samples)]
    texts = [prompt] * config.num_samples
    print(prompt, end="", flush=True)
    start, steps = time.perf_counter(), 0
    for new in model.generate(ids, config.num_samples, config.max_new_tokens, config.temperature, config.top_k,
                              config.top_p, config.seed):
        steps += 1
        for i, (stream, id) in enumerate(zip(streams, new.tolist(), strict=True)):
            piece = stream.feed(id)
            texts[i] += piece
            if i == 0 and piece:  # the first sample streams; the others come whole when all are done
                print(piece, end="", flush=True)
        if all(stream.done for stream in streams):
            break
    seconds = time.perf_counter() - start
    print(streams[0].finish())
    for text, stream in zip(texts[1:], streams[1:], strict=True):
        print("-" * 15)
        print(text + stream.finish())
    tokens = steps * config.num_samples
    print(f"{config.num_samples} x {steps} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tok/s "
          f"({saved.twin}, {model.kernel} kernel)", file=sys.stderr)


if __name__ == "__main__":
    main()
