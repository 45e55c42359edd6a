"""What the tests share: a small corpus, small models, and the scripts called as a person would call them."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way
os.environ.setdefault("GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # none, but for the kernels' tests: triton_kernels.py

import pytest
from hypothesis import HealthCheck, settings

import compare
import evaluate
import generate
import train
from bitgpt.model import BitGPT
from data import bins
from gpt.model import GPT
from kernels import build

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs and their children ignore it

# pytest --hypothesis-profile=long tests/test_any_content.py   looks for what a hundred examples miss
for profile, examples in (("short", 100), ("long", 1000)):
    settings.register_profile(profile, max_examples=examples, deadline=None, database=None, suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("short")

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_triton.py"]  # there is none but for Linux
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4",
        "--max-iters", "12", "--eval-interval", "4", "--log-interval", "2", "--warmup-iters", "2", "--verbose", "0"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def english(length: int, seed: int = 0) -> str:
    """Text with something to learn: sentences of a few dozen words."""
    sentence = "the king of night shall speak and no more a crown is light to those who carry it over water"
    words, draw = sentence.split(), random.Random(seed)
    text = ""
    while len(text) < length:
        text += " ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + draw.choice([".\n", ", ", "?\n"])
    return text[:length]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "kings.txt"
    path.write_text(english(8000))
    return path


@pytest.fixture(autouse=True, scope="session")
def cache_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests of this process tokenize is not kept in the user's data/cache."""
    bins.DATA = tmp_path_factory.mktemp("data")


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """call("train", *flags): a script's main in this process. "gpt/train" has its model chosen already."""
    chosen = {"train": ((GPT,), (BitGPT,)), "generate": (("gpt",), ("bitgpt",))}

    def run(script: str, *flags: str | Path) -> Result:
        twin, _, name = script.rpartition("/")
        first = chosen[name][twin == "bitgpt"] if twin else (None,) if name in chosen else ()
        capsys.readouterr()
        code = 0
        try:
            scripts = {"train": train, "generate": generate, "compare": compare, "evaluate": evaluate}
            scripts[name].main(*first, [str(f) for f in flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
        if code in (130, 143):  # Ctrl-C or a kill that was meant for all tests
            pytest.exit(f"{script} was stopped", code)
        return Result(code, *capsys.readouterr())

    return run


def shell(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,  # type: ignore
                          timeout=120, **options)


def sanitized(script: str) -> list[str]:
    """What a script prints whose kernels are compiled with sanitizers; the test is skipped where those are not."""
    if sys.platform != "linux":
        pytest.skip("the sanitizers' libraries are preloaded the way of Linux")
    command = build.compiler()
    preload = [subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
               for name in ("libasan.so", "libubsan.so")]
    if not os.environ.get("CI") and not all(os.path.isabs(path) for path in preload):
        pytest.skip("the compiler has no sanitizer libraries")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    return done.stdout.split()


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each twin, trained for 12 steps."""
    folder = tmp_path_factory.mktemp("runs")
    for model_class in (GPT, BitGPT):
        train.main(model_class, [*TINY, "--dataset", str(corpus), "--out-dir", str(folder / model_class.name)])
    return {name: folder / name for name in ("gpt", "bitgpt")}
