"""Run directories on object stores, for the tests of several rooms."""

import uuid

import pytest

from elastic_gpt import claim, mirror, storeclaim


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mirror, "PART", 200)  # two or three lines
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(storeclaim, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(storeclaim, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(claim, "LOOK_SECONDS", 0.02)
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://bucket/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}"
