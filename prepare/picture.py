"""Keeps matplotlib quiet: users can do nothing about its warnings of missing letters or a missing cache folder."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context (or decorator) for code that imports matplotlib or draws with it: no warnings on the terminal."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(text: str) -> str:
    """`text` with its dollar signs escaped: between two of them matplotlib reads a formula."""
    return text.replace("$", r"\$")
