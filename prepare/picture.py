"""Drawing says nothing on a terminal.

That a font lacks a letter, or that there is no folder for a cache, nobody there can do anything about.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Also a decorator. What imports matplotlib or draws with it runs within it."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(text: str) -> str:
    """`text` as it is drawn: between two dollar signs matplotlib would read a formula."""
    return text.replace("$", r"\$")
