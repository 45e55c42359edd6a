"""The way in and out: Hugging Face folders and GGUF files. convert.py and `train.py --init-from` come in here.

    open_source("some/folder")        a run folder, a Hugging Face folder or a GGUF file, seen from what it holds
    as_run("model.gguf")              the same as a run folder: itself, or an import that lasts as long as the program

source.py: what a model comes down to between formats; hf.py and gguf.py: the formats; ternary.py: their bits;
tokenizer_json.py: their tokenizers.
"""

import atexit
import contextlib
import functools
import tempfile
from pathlib import Path

from core.files import UserError
from interop.gguf import GGUFSource, is_gguf
from interop.hf import HFSource, is_hf
from interop.source import RunSource, Source, write_run

LIFETIME = contextlib.ExitStack()  # of imports by as_run: until the program ends
atexit.register(LIFETIME.close)


def open_source(path: Path, block_size: int = 0) -> Source:
    """The model at `path`. block_size: at most so many tokens of context, of an imported one (0: its own)."""
    if is_gguf(path):
        return GGUFSource(path, block_size)
    if is_hf(path):
        return HFSource(path, block_size)
    if (path / "config.json").is_file():
        return RunSource(path)
    problem = "neither a run folder, nor a Hugging Face folder (config.json and safetensors), nor a GGUF file"
    raise UserError(f"{path} is {problem if path.exists() else 'not there'}. Name one of the three.")


@functools.cache
def as_run(path: Path) -> Path:
    """A run folder with the model at `path`: an import of it, or `path` itself where that is no other format."""
    if not is_gguf(path) and not is_hf(path):
        return path
    folder = Path(LIFETIME.enter_context(tempfile.TemporaryDirectory(prefix="bitgpt-"))) / "run"
    write_run(open_source(path), folder)
    return folder
