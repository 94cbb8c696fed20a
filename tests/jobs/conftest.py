"""What tests of jobs share."""

import pytest


@pytest.fixture
def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer plans are solved than users get, and measured on fewer documents."""
    monkeypatch.setattr("layerwise.jobs.contest.DOCUMENTS", 4)
    monkeypatch.setattr("layerwise.jobs.dense.SOLVED", 2)
    monkeypatch.setattr("layerwise.jobs.dense.SHARES", (0.5,))
