"""Text to the ids of a prompt, and the ids of a generation to text, as they come."""

import codecs
from collections.abc import Iterable, Iterator

from prepare.tokenizer import Tokenizer


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of `prompt`. An empty prompt means the beginning of a text."""
    if not prompt and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]  # the token before each text
    return tokenizer.encode(prompt or "\n").tolist()


class TextStream:
    """Turns ids that come one by one into text, up to the first of `stops`, which is left out.

    An id may end within a UTF-8 character, and a stop may extend over several ids. So text that may
    be the beginning of either is held back until the next ids. Bytes that are not UTF-8 become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self.stopped = False
        """Whether a stop was found, so that the text has ended."""
        self.length = 0
        """Characters so far, including those held back, but without a stop and what follows it."""
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, id_: int) -> str:
        """Take the next id. Returns the text that is certain now."""
        come = self._decoder.decode(self._tokenizer.decode_bytes([id_]))
        self._held += come
        self.length += len(come)
        if found := [place for stop in self._stops if (place := self._held.find(stop)) >= 0]:
            self.stopped = True
            self.length += min(found) - len(self._held)
            return self._held[: min(found)]
        ready = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def finish(self) -> str:
        """The text that was held back, when there are no more ids."""
        return self._held + self._decoder.decode(b"", final=True)


def text_stream(ids: Iterable[int], tokenizer: Tokenizer, stops: Iterable[str] = ()) -> Iterator[str]:
    """Pieces of text as the ids come, see `TextStream`."""
    stream = TextStream(tokenizer, stops)
    for id_ in ids:
        if text := stream.push(id_):
            yield text
        if stream.stopped:
            return
    yield stream.finish()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
