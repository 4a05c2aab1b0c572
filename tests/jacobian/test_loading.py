"""Fingerprints of models: the content of their files, wherever they lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from cepo.jacobian.loading import ModelSource, embedding_width, model_fingerprint, resolve_model

FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "words"}


def folder_of(path: Path, files: dict[str, str]) -> Path:
    """Write files into a new folder."""
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_equal_content_has_one_fingerprint_and_one_changed_byte_another(tmp_path: Path) -> None:
    """Weights, config and tokenizer all count; the place and the time of the files do not."""
    first, second = folder_of(tmp_path / "first", FILES), folder_of(tmp_path / "second", FILES)
    wanted = model_fingerprint(resolve_model(str(first)))
    assert model_fingerprint(resolve_model(str(second))) == wanted
    for name, text in FILES.items():
        (second / name).write_text(text[:-1] + "?")
        assert model_fingerprint(resolve_model(str(second))) != wanted
        (second / name).write_text(text)
    assert model_fingerprint(resolve_model(str(second))) == wanted


def test_a_gguf_file_is_its_own_content(tmp_path: Path) -> None:
    """Other files in the folder and the file's own name play no part."""
    first, renamed = tmp_path / "model.gguf", tmp_path / "renamed.gguf"
    first.write_bytes(b"GGUF weights")
    shutil.copy(first, renamed)
    wanted = model_fingerprint(resolve_model(str(first)))
    assert model_fingerprint(resolve_model(str(renamed))) == wanted
    renamed.write_bytes(b"GGUF weight?")
    assert model_fingerprint(resolve_model(str(renamed))) != wanted
    assert model_fingerprint(resolve_model(str(first))) == wanted


def test_a_gguf_file_is_parsed_once_while_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To parse one takes seconds; a file that was written again is another."""
    parsed: list[str] = []

    class Reader:
        def __init__(self, path: str) -> None:
            parsed.append(path)
            self.fields: dict[str, object] = {}

    monkeypatch.setattr("gguf.gguf_reader.GGUFReader", Reader)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    source = resolve_model(str(file))
    assert [embedding_width(source), embedding_width(source)] == [None, None]
    assert parsed == [str(file)]
    os.utime(file, ns=(1, 1))
    embedding_width(source)
    assert len(parsed) == 2


def test_an_adapter_covers_its_base(tmp_path: Path) -> None:
    """The same adapter on overwritten base weights is another model."""
    base = folder_of(tmp_path / "base", FILES)
    config = json.dumps({"base_model_name_or_path": str(base)})
    adapter = folder_of(tmp_path / "adapter", {"adapter_config.json": config, "adapter_model.safetensors": "low rank"})
    wanted = model_fingerprint(resolve_model(str(adapter)))
    assert wanted != model_fingerprint(resolve_model(str(base)))
    (adapter / "adapter_model.safetensors").write_text("low ran?")
    changed_adapter = model_fingerprint(resolve_model(str(adapter)))
    (adapter / "adapter_model.safetensors").write_text("low rank")
    (base / "model.safetensors").write_text("weight?")
    changed_base = model_fingerprint(resolve_model(str(adapter)))
    assert len({wanted, changed_adapter, changed_base}) == 3


def test_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commit of the snapshot decides; a model that nobody has is refused by its name."""
    commit = "a" * 40

    def snapshot(hub_id: str, **_: object) -> str:
        if hub_id != "org/model":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = ModelSource("org/model", "org/model")
    first = model_fingerprint(source)
    assert first == model_fingerprint(ModelSource("another name for it", "org/model"))
    commit = "b" * 40
    assert model_fingerprint(source) != first
    with pytest.raises(ValueError, match="'org/none' was found neither on the hub nor .* which is not a folder here"):
        model_fingerprint(ModelSource("org/none", "org/none"))
