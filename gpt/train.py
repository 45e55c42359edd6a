"""Trains the full-precision GPT: train.py with the model already chosen."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import core.script  # noqa: E402, F401  before torch

# isort: split
from gpt.model import GPT  # noqa: E402
from train import main  # noqa: E402

if __name__ == "__main__":
    main(GPT)
