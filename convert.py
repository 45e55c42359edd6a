"""Takes a model from one place to another: a run folder, a Hugging Face folder, or a GGUF file for llama.cpp.

    python convert.py runs/bitgpt hf/                  # transformers loads it, and can train it on
    python convert.py runs/bitgpt hf/ --packed         # the same in 2 bits per weight, to run only
    python convert.py runs/bitgpt bitgpt.gguf          # llama.cpp runs it
    python convert.py some-bitnet-folder runs/x        # the other way round, for generate.py and --init-from
    python convert.py model.gguf runs/x

What SOURCE is follows from its contents. DESTINATION is a GGUF file if its name ends so, else a folder: a Hugging Face
one for a run, a run for everything else. It is written whole or not at all.
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import os
import shlex
from pathlib import Path

from core.config import Parser
from core.files import UserError, command_line
from interop import open_source
from interop.files import check_free
from interop.gguf import GGUF, TYPES, write_gguf
from interop.hf import HF, write_hf
from interop.source import RUN, RunSource, write_run


def flags() -> Parser:
    made = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                  allow_abbrev=False)
    made.add_argument("source", metavar="SOURCE", type=Path, help="a run folder, a Hugging Face folder, a GGUF file")
    made.add_argument("destination", metavar="DESTINATION", type=Path, help="a folder, or a file that ends in .gguf")
    made.add_argument("--type", choices=TYPES, help="of a GGUF's ternary weights; auto: the smallest that fits [auto]")
    made.add_argument("--packed", action="store_true", help="Hugging Face: 2 bits per weight, not trainable latents")
    made.add_argument("--block-size", type=int, default=0, metavar="INT",
                      help="cut an imported model's context to this many tokens [its own]")
    made.add_argument("--overwrite", action="store_true", help="replace what convert.py wrote to DESTINATION before")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


@command_line
def main(argv: list[str] | None = None) -> None:
    given = flags().parse(argv)
    path, destination = given.source, given.destination
    to_gguf = destination.suffix.lower() == ".gguf"
    if inside(path, destination) or (path.is_dir() and not to_gguf and inside(destination, path)):
        raise UserError(f"{destination} and {path} overlap: one contains the other. Name another DESTINATION.")
    if given.block_size < 0:
        raise UserError(f"--block-size is {given.block_size}, but must be at least 1, or 0 for the model's own.")
    source = open_source(path, given.block_size)
    to_hf = isinstance(source, RunSource) and not to_gguf
    if given.type and not to_gguf:
        raise UserError(f"--type is for a GGUF file; {destination} is none. Leave it out.")
    if given.packed and not to_hf:
        raise UserError(f"--packed is for a Hugging Face folder, made from a run; {destination} is none. Leave it out.")
    if given.block_size and isinstance(source, RunSource):
        raise UserError(f"--block-size is for models that are imported; {path} is a run. Leave it out.")
    check_free(destination, given.overwrite, GGUF if to_gguf else HF if to_hf else RUN)
    if to_gguf:
        write_gguf(source, destination, given.type or "auto", given.overwrite, given.quiet)
    elif to_hf:
        write_hf(source, destination, given.packed, given.overwrite, given.quiet)
    else:
        write_run(source, destination, given.overwrite, given.quiet)
    if not given.quiet:
        files = [file for file in destination.rglob("*") if file.is_file()] if destination.is_dir() else [destination]
        print(f"{destination}: {sum(file.stat().st_size for file in files) / 1e6:,.2f} MB")
        if not to_gguf and not to_hf:
            print(f"sample it: python {source.twin}/generate.py --out-dir {shlex.quote(str(destination))}")


if __name__ == "__main__":
    main()
