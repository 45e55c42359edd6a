"""What all scripts share. Imported first, it makes Ctrl-C quiet, also in the seconds that importing torch takes."""

import os
import sys
from types import TracebackType


def quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt
