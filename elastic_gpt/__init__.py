"""What keeps a GPT training right while its nodes come and go."""

import warnings
from typing import Any

# DLRover needs the old package pynvml, and torch warns of it at each import. Users can do nothing about it.
warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)


def __getattr__(name: str) -> Any:
    """Imports `Elastic` and its kin only when they are used, since most of this package runs without torch."""
    if name in ("Elastic", "Observer", "Step"):
        import importlib

        return getattr(importlib.import_module("elastic_gpt.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
