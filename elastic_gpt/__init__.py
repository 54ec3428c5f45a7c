"""What keeps a GPT training right while its nodes come and go."""

import warnings
from typing import Any

# DLRover needs the old package pynvml, and torch warns of it at each import: nothing that a user of ours can mend.
warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)


def __getattr__(name: str) -> Any:
    """`Elastic` and its kin, when they are asked for: most of this package runs without torch."""
    if name in ("Elastic", "Observer", "Step"):
        import importlib

        return getattr(importlib.import_module("elastic_gpt.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
