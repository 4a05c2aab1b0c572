"""Protects a judge's settings: refused early by name, and told apart where they change judgements."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.judges.settings import JudgeSettings, check_judge, decisive_settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "tgi"}, "backend is 'tgi'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"model": "./nowhere"}, "model is './nowhere'"),
        ({"base_url": "http://localhost"}, "base_url is"),
        ({"backend": "server"}, "base_url is None"),
        ({"backend": "server", "base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
        ({"backend": "server", "base_url": "http://localhost", "force_format": True}, "force_format"),
        ({"backend": "server", "base_url": "http://localhost", "timeout_s": 0.0}, "timeout_s 0"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_loaded(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_judge(JudgeSettings(**{"model": "smollm2", **change}))


def test_vllm_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install vllm"):
        check_judge(JudgeSettings("owner/name", backend="vllm"))


def test_the_key_is_never_shown_and_speed_settings_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = JudgeSettings(str(tmp_path), api_key="sk-secret")
    assert "sk-secret" not in repr(settings)
    decisive = decisive_settings(settings)
    assert decisive == decisive_settings(replace(settings, batch_size=3, device="cuda", concurrency=1))
    assert decisive != decisive_settings(replace(settings, max_new_tokens=3))


def test_weights_decide_by_their_content_and_not_by_their_folders_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, two = (JudgeSettings(str(tmp_path / name)) for name in ("one", "two"))
    assert decisive_settings(one) == decisive_settings(two)
    before = decisive_settings(one)
    (tmp_path / "one" / "model.safetensors").write_bytes(b"trained")
    assert decisive_settings(one) != before


def test_a_server_is_known_by_its_address_and_its_name_of_the_model() -> None:
    settings = JudgeSettings("name", backend="server", base_url="http://localhost:1/v1")
    assert decisive_settings(settings)["model"] == "name"
    for change in ({"model": "other"}, {"base_url": "http://localhost:2/v1"}):
        assert decisive_settings(replace(settings, **change)) != decisive_settings(settings)
