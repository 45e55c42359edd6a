"""Measures how fast and how large both twins are, in every engine. `bench.py COMMAND --help` describes each command.

    python bench.py                          # decode, prefill, size, memory: benchmarks/speed.py
    python bench.py memory                   # what weights take at every width, and training: benchmarks/memory.py
    python bench.py train                    # how fast both twins train: benchmarks/training.py
    python bench.py --device cuda            # the GPU's kernels: benchmarks/gpu.py
"""

import core.script  # noqa: F401  first, so that Ctrl-C is quiet while torch is imported

# isort: split
import json
import sys
from importlib import import_module

from core.config import did_you_mean
from core.files import UserError, command_line

COMMANDS = {"speed": "speed", "memory": "memory", "train": "training"}  # python bench.py [COMMAND] FLAGS


@command_line
def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["worker"]:  # benchmarks/process.py
        import_module(f"benchmarks.{arguments[1]}").worker(json.loads(arguments[2]))
        return
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "speed"
    if command not in COMMANDS:
        raise UserError(f"bench.py {command!r} is not known.{did_you_mean(command, COMMANDS)} "
                        f"Choose from: {', '.join(COMMANDS)}.")
    on_device = any(argument.partition("=")[0] == "--device" for argument in arguments)
    module = "gpu" if on_device and command == "speed" else COMMANDS[command]
    import_module(f"benchmarks.{module}").main(arguments)


if __name__ == "__main__":
    main()
