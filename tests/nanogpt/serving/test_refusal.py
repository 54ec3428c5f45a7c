"""What a refusal's head says, in every dialect."""

import pytest

from model_zoo.nanogpt.serving import kserve, openai, vertex
from model_zoo.nanogpt.serving.refusal import Refusal


def test_only_who_may_come_back_is_told_when_and_only_a_stranger_how_to_identify_himself() -> None:
    assert Refusal(400, "no").headers() == {}
    assert Refusal(401, "who?").headers() == {"WWW-Authenticate": "Bearer"}
    assert Refusal(429, "later", retry_after=7).headers() == {"Retry-After": "7"}


@pytest.mark.parametrize(
    ("status", "kind", "google"),
    [
        (400, "invalid_request_error", "INVALID_ARGUMENT"),
        (401, "invalid_request_error", "UNAUTHENTICATED"),
        (404, "invalid_request_error", "NOT_FOUND"),
        (429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
        (500, "server_error", "INTERNAL"),
        (503, "server_error", "UNAVAILABLE"),
    ],
)
def test_each_dialect_has_its_own_form_of_it(status: int, kind: str, google: str) -> None:
    refusal = Refusal(status, "no: do otherwise", param="n")
    found = openai.error(refusal)["error"]
    assert (found["message"], found["type"], found["param"]) == ("no: do otherwise", kind, "n")
    assert vertex.error(refusal) == {"error": {"code": status, "message": "no: do otherwise", "status": google}}
    assert kserve.error(refusal) == {"error": "no: do otherwise"}
