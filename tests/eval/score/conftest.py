"""The command line of `cepo score`, as a fixture."""

import pytest

from tests.eval.score.rollouts import Cepo


@pytest.fixture
def cepo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cepo:
    return Cepo(monkeypatch, capsys)
