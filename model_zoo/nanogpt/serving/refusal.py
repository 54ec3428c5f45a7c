"""The refusal of a request, in any dialect."""


class Refusal(Exception):
    """Ends a request with an HTTP status of 400 or more.

    Args:
        status: the HTTP status.
        message: one line that says what is wrong and how to mend it.
        param: the field of the request that is meant.
        code: a word for machines, as OpenAI's API has them.
        retry_after: seconds after which another try may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def headers(self) -> dict[str, str]:
        """Further HTTP headers of the answer."""
        told = {401: {"WWW-Authenticate": "Bearer"}}.get(self.status, {})
        return told if self.retry_after is None else told | {"Retry-After": str(self.retry_after)}
