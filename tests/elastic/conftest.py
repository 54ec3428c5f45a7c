"""Run directories on object stores, for the tests of several rooms."""

import uuid

import pytest

from elastic_gpt import mirror


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on a store."""
    monkeypatch.setattr(mirror, "PART", 200)  # two or three lines
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.01)
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://bucket/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}"
