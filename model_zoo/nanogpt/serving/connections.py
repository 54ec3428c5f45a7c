"""Connections that do not wait for ever for a request: who opens hundreds of them and says little holds nothing up."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""In which the head of a request has to come, the first one or another. (Its body has the request's own time, app.py.)"""


class Connection(H11Protocol):
    """uvicorn's, which closes by itself only what has been silent after an answer."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _expect_a_head(self) -> None:
        """Unless a request is being answered; what comes of a head meanwhile gives it no more time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
