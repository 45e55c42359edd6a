"""macOS and Windows, as far as Linux can show them: MPS, and the main path without anything that only Linux has."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import core.script
from core import runtime

# A Windows of sorts: our own modules find no Linux modules and functions, open files can neither be replaced nor
# removed, folders cannot be opened, and the console speaks cp1252.
WINDOWS = f"""
import builtins, fcntl, io, os, pathlib, signal, sys, types
sys.path.insert(0, {str(ROOT)!r})
import matplotlib.pyplot, safetensors.torch, torch, torch._dynamo, torch.testing, tqdm, numpy.testing

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK = 1
msvcrt.locking = lambda number, mode, size: fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, size)
sys.modules["msvcrt"] = msvcrt
sys.platform = "win32"
for module, names in ((os, "sched_getaffinity fork getuid geteuid mkfifo getpgid killpg"),
                      (signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 alarm setitimer")):
    for name in names.split():
        delattr(module, name)

real_import = builtins.__import__
def without_linux(name, scope=None, *arguments, **options):
    ours = (scope or {{}}).get("__file__", "").startswith({str(ROOT)!r})
    if ours and name.split(".")[0] in ("fcntl", "resource", "termios", "pty", "grp", "pwd", "posix"):
        raise ModuleNotFoundError(f"No module named {{name!r}}")
    return real_import(name, scope, *arguments, **options)
builtins.__import__ = without_linux

def in_use(path):
    path = os.path.realpath(path)
    descriptors = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return any(os.path.realpath(link) == path for link in descriptors) or any(
        line.rstrip().endswith(path) for line in open("/proc/self/maps", encoding="utf-8"))
def refusing(call, which):
    def checked(*paths, **options):
        if in_use(paths[which]):
            raise PermissionError(13, "another program uses this file", str(paths[which]))
        return call(*paths, **options)
    return checked
os.replace, os.unlink, os.remove = refusing(os.replace, 1), refusing(os.unlink, 0), refusing(os.remove, 0)
real_open = os.open
def open_file(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *arguments, **options)
os.open = open_file
for name in ("stdout", "stderr"):
    setattr(sys, name, io.TextIOWrapper(getattr(sys, name).buffer, encoding="cp1252", write_through=True))

import compare, generate, train
from bitgpt.model import BitGPT
from gpt.model import GPT

out, text, *flags = sys.argv[1:]
train.main(BitGPT, [*flags, "--dataset", text, "--tokenizer", "bpe", "--vocab-size", "300", "--out-dir", out + "/run"])
train.main(BitGPT, ["--resume", "--max-iters", "6", "--out-dir", out + "/run"])
trainer = train.Trainer
class Stopped(trainer):
    def train_step(self):
        signal.raise_signal(signal.SIGINT)
        return trainer.train_step(self)
train.Trainer = Stopped
try:
    train.main(BitGPT, ["--resume", "--max-iters", "9", "--out-dir", out + "/run"])
except SystemExit as stop:
    assert stop.code == 130, stop.code
train.Trainer = trainer
train.main(BitGPT, ["--resume", "--max-iters", "9", "--out-dir", out + "/run"])
train.main(BitGPT, [*flags, "--overwrite", "--dataset", text, "--out-dir", out + "/run"])
compare.main([*flags, "--dataset", text, "--out-dir", out + "/both"])
try:
    train.main(BitGPT, ["--resume", "--max-iters", "10**9", "--out-dir", out + "/run"])
except SystemExit as stop:
    assert stop.code == 2, stop.code
generate.main("bitgpt", ["--num-samples", "1", "--max-new-tokens", "40", "--prompt", "\\u2192 \\u65e5", "--out-dir",
                         out + "/run"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are in use")
def test_the_main_path_on_windows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Zwölf Boxkämpfer → jagen 日本 über den großen Sylter Deich. " * 200,
                                       encoding="utf-8")
    flags = [*TINY, "--max-iters", "4", "--eval-interval", "2"]
    result = subprocess.run([sys.executable, "-c", WINDOWS, tmp_path, tmp_path / "text.txt", *flags],
                            capture_output=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert "→ 日" in result.stdout.decode("utf-8") and b"stopped after step 7" in result.stderr
    assert (tmp_path / "both" / "comparison.html").exists()


def test_only_a_mac_that_may_take_mps_asks_for_its_fallback() -> None:
    for flags, wanted in (("", True), ("--device mps", True), ("--device=auto", True), ("--device cpu", False),
                          ("--device=cpu", False), ("--device", False), ("--device cpu --device mps", True)):
        assert core.script.may_take_mps("darwin", ["train.py", *flags.split()]) == wanted, flags
        assert not core.script.may_take_mps("linux", ["train.py", *flags.split()])


def test_a_program_that_imports_the_engine_keeps_its_own_excepthook() -> None:
    program = "import sys; sys.excepthook = lambda *_: print('mine'); import engine, gpt.model, bitgpt.model; 1 / 0"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "mine\n", result.stderr


@pytest.mark.parametrize("script", ["train.py", "gpt/train.py", "bitgpt/train.py", "compare.py"])
def test_the_fallback_is_asked_for_before_torch_is_imported(script: str) -> None:
    spy = "import os, runpy, sys; sys.platform = 'darwin'; sys.argv = sys.argv[1:]\n" \
          "class Spy:\n    def find_spec(self, name, *_):\n        if name == 'torch':\n" \
          "            print(os.environ.get('PYTORCH_ENABLE_MPS_FALLBACK'), flush=True); os._exit(0)\n" \
          "sys.meta_path.insert(0, Spy()); runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", spy, ROOT / script], capture_output=True, text=True, timeout=60)
    assert result.stdout == "1\n", result.stderr


def test_mps_is_picked_and_its_fallback_told_once(monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(core.MPS_FALLBACK, "1")
    runtime.say_once.cache_clear()
    assert [runtime.pick_device(name).type for name in ("auto", "mps", "auto")] == ["mps"] * 3
    assert capsys.readouterr().err.count("MPS") == 1
    monkeypatch.setenv(core.MPS_FALLBACK, "0")  # somebody wants to see what is missing
    runtime.say_once.cache_clear()
    assert runtime.pick_device("mps").type == "mps" and capsys.readouterr().err == ""
