"""Many requests generated from the server's OpenAPI document: none breaks it, and each answer is as documented."""

from typing import Any

import hypothesis
import pytest

from tests.nanogpt.serving.conftest import Served

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402


def test_each_answer_is_one_that_the_document_has(random_bytes: Served) -> None:
    """Not through schemathesis' own plugin, which pytest 9.2 has left behind."""
    document = schemathesis.openapi.from_url(f"{random_bytes.url}/openapi.json")
    answered: set[tuple[str, int]] = set()

    def check(case: Any) -> None:
        # The document cannot say that a prompt has to fit the model's context, or who the model is.
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        answered.add((case.operation.label, answer.status_code))

    for found in document.get_all_operations():
        asked = hypothesis.given(found.ok().as_strategy())(check)
        hypothesis.settings(max_examples=12, suppress_health_check=list(hypothesis.HealthCheck))(asked)()
    assert len({label for label, _ in answered}) == 16
    assert ("POST /predict", 200) in answered
    assert not [status for _, status in answered if status >= 500]
