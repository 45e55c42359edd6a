"""What a script imports before anything else, and a library never, since it replaces sys.excepthook.

Ctrl-C is quiet, also in the seconds that importing torch takes, and Apple's MPS may leave to the CPU what it cannot do,
for which torch looks only while it is imported.
"""

import os
import sys
from collections.abc import Sequence
from types import TracebackType

from core import MPS_FALLBACK


def quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


def may_take_mps(platform: str, argv: Sequence[str]) -> bool:
    """Whether a command line asks for MPS, or leaves the choice of a device to a Mac."""
    asked = [following for word, following in zip(argv, (*argv[1:], ""), strict=True) if word == "--device"]
    asked += [word.partition("=")[2] for word in argv if word.startswith("--device=")]
    return platform == "darwin" and (not asked or asked[-1] in ("mps", "auto"))


sys.excepthook = quiet_interrupt
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115  closed
if may_take_mps(sys.platform, sys.argv):
    os.environ.setdefault(MPS_FALLBACK, "1")
