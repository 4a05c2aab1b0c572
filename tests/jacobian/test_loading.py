"""Fingerprints of models: the content of their files, wherever they lie; what adapters bring; damage by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from cepo.jacobian.loading import (
    ModelSource,
    embedding_width,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from tests.byte_tokenizer import CHATML, byte_tokenizer
from tests.models import tiny_model

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


def test_what_decides_the_model_counts_and_results_beside_it_do_not(tmp_path: Path) -> None:
    """A command may write its output into the model's folder, and resume it."""
    folder = folder_of(tmp_path / "model", FILES)
    found = {model_fingerprint(resolve_model(str(folder)))}
    for name in ("scores.jsonl", "scores.jsonl.settings.json", "matrices.safetensors", "report.html", "README.md"):
        (folder / name).write_text("result")
    assert {model_fingerprint(resolve_model(str(folder)))} == found
    for name in (
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling_own.py"),
        *("generation_config.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"),
        *("adapter_model.safetensors", "special_tokens_map.json", "vocab.json"),
    ):
        (folder / name).write_text("decides")
        found.add(model_fingerprint(resolve_model(str(folder))))
    assert len(found) == 13


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


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the folder of a tiny model whose tokenizer has no chat template."""
    tokenizer, folder = byte_tokenizer(), tmp_path / "base"
    tokenizer.chat_template = None
    tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_of(
    base: Path,
    folder: Path,
    *,
    new_tokens: tuple[str, ...] = (),
    template: str | None = None,
    rows: int = 0,
    save_rows: bool | str = "auto",
    targets: Sequence[str] = ("q_proj",),
) -> Any:
    """Save a LoRA adapter of the base, resized to its new tokens or to so many rows; return its model."""
    model, tokenizer = load_model(resolve_model(str(base)))
    saved = ["embed_tokens", "lm_head"] if new_tokens and save_rows else None
    if new_tokens:
        tokenizer.add_tokens(list(new_tokens), special_tokens=True)
    if new_tokens or rows:
        model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(targets), modules_to_save=saved)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(folder, save_embedding_layers=save_rows)
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return adapted


def test_an_adapter_brings_its_own_tokenizer_and_chat_template(base: Path, tmp_path: Path) -> None:
    """Prompts are rendered as they were in its training; without a tokenizer it takes the base model's."""
    adapter_of(base, tmp_path / "own", template=CHATML)
    adapter_of(base, tmp_path / "bare")
    for name, template in (("own", CHATML), ("bare", None)):
        source = resolve_model(str(tmp_path / name))
        assert load_tokenizer(source).chat_template == template
        assert load_model(source)[1].chat_template == template


def test_a_model_is_loaded_by_its_name_or_path(base: Path) -> None:
    """`load_model("folder")` is what anyone types first; it ended in "'str' object has no attribute 'base'"."""
    for name in (str(base), base):
        assert load_model(name)[1].name_or_path == str(base)
    with pytest.raises(ValueError, match="did you mean smollm2"):
        load_model("smolm2")


def test_an_adapter_with_tokens_of_its_own_grows_its_base(base: Path, tmp_path: Path) -> None:
    """As AutoPeftModel does: its saved embeddings have a row for each of its tokens."""
    trained = adapter_of(base, tmp_path / "adapter", new_tokens=("<think>", "</think>"), template=CHATML)
    model, tokenizer = load_model(resolve_model(str(tmp_path / "adapter")))
    ids = torch.tensor([tokenizer("<think>a</think>", add_special_tokens=False)["input_ids"]])
    assert ids.shape == (1, 3)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, trained(input_ids=ids).logits)


@pytest.mark.parametrize(("rows", "template"), [(258, CHATML), (258, None), (320, CHATML)])
def test_a_padded_base_gets_the_rows_that_its_adapter_was_saved_with(
    base: Path, tmp_path: Path, rows: int, template: str | None
) -> None:
    """A base of 288 rows for 258 tokens, cut to its tokens or padded further in training."""
    tiny_model("llama", dtype=torch.float32, vocab_size=288).save_pretrained(base)
    trained = adapter_of(base, tmp_path / "adapter", rows=rows, template=template)
    model, _ = load_model(resolve_model(str(tmp_path / "adapter")))
    ids = torch.tensor([[1, 2, 3, 40]])
    with torch.no_grad():
        logits_BTV = model(input_ids=ids).logits
        assert torch.equal(logits_BTV, trained(input_ids=ids).logits)
    assert logits_BTV.shape[-1] == rows


def test_embeddings_that_no_file_holds_are_refused_and_not_drawn_at_random(base: Path, tmp_path: Path) -> None:
    """Of tokens that an adapter added and did not save, or of a config of another vocabulary than the weights."""
    adapter_of(base, tmp_path / "adapter", new_tokens=("<think>",), template=CHATML, save_rows=False)
    lost = "adapter_model file holds no rows of embeddings, but its base has 258 and its tokenizer 259 tokens"
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'adapter'))}: its {lost}.*save_embedding_layers"):
        load_model(resolve_model(str(tmp_path / "adapter")))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 250}))
    with pytest.raises(
        ValueError, match=r"hold lm_head.weight of size \[258, 16\], but its config requires \[250, 16\]"
    ):
        load_model(resolve_model(str(base)))


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_lora_on_grown_embeddings_that_were_not_saved_is_refused(
    base: Path, tmp_path: Path, end: str, file: str
) -> None:
    """By the rows that it is for, with a way out; of the base's own size it needs none."""
    for rows in (258, 259):
        adapter_of(base, tmp_path / str(rows), rows=rows, save_rows=False, targets=["q_proj", end])
        weights = tmp_path / str(rows) / "adapter_model.safetensors"
        if file == "bin":
            torch.save(load_file(weights), weights.with_suffix(".bin"))
            weights.unlink()
    load_model(resolve_model(str(tmp_path / "258")))
    lost = "holds no rows of embeddings, but its base has 258 and its LoRA 259; .*save it again with them.*, or merged"
    with pytest.raises(ValueError, match=lost):
        load_model(resolve_model(str(tmp_path / "259")))


def test_damaged_models_are_refused_by_path_with_a_way_out(base: Path, tmp_path: Path) -> None:
    """Cut weights, a config of other weights, an adapter of another base, damaged JSON, a base of itself."""
    adapter = tmp_path / "adapter"
    adapter_of(base, adapter)
    settings = (adapter / "adapter_config.json").read_text()

    def refused(folder: Path, complaint: str, read: Callable[[ModelSource], Any] = load_model) -> None:
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{complaint}"):
            read(resolve_model(str(folder)))

    (adapter / "adapter_config.json").write_text(json.dumps({**json.loads(settings), "r": 3}))
    refused(adapter, "size mismatch.*check that its files are whole and belong together.*an adapter and its base")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    refused(adapter, "is its own base: correct base_model_name_or_path")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, "cannot be read: .*; save or download the model again")
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    content = weights.read_bytes()
    weights.write_bytes(content[:2000])
    refused(base, "SafetensorError.*check that its files are whole")
    weights.write_bytes(content)
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    refused(base, r"its files hold lm_head.weight of size \[258, 16\], but its config requires \[258, 32\]")
    more = config["num_hidden_layers"] + 1
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": more, "layer_types": None}))
    refused(base, "its files lack 9 of the weights that its config requires, such as model.layers")
    (base / "config.json").write_text("[")
    refused(base, "cannot be read", embedding_width)
    (base / "tokenizer.json").write_text("{}")
    refused(base, "", load_tokenizer)
