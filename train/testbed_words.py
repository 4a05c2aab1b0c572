"""The testbed on a pretrained model: SmolLM2, or its first layers, taught a judge of the same items in its own words.

Every word of the world has an embedding learnt from real text, tags and sentences are many tokens, and the prompt is in
the model's chat template. A judge is taught in rounds until interventions certify it, once, and kept in the cache with
its certificate.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cepo.files import content_hash, fingerprint, replacing, write_text
from cepo.jacobian.layers import keep_first_layers
from cepo.jacobian.loading import load_model, model_fingerprint, resolve_model
from cepo.jacobian.reading.judge import write_judgement
from cepo.train import testbed, testbed_certificate, testbed_judges, testbed_model, testbed_modes

logger = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
_NO_LABEL = -100
_EXAMINED = 240  # items that the certificate is measured on
_EXAMINED_SEED = 10_000_019  # apart from the seeds of warm-up, training and measures
_SEEDS_APART = 1_000_003  # of the rounds' samples

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class WordsJudge:
    """A pretrained model taught to be a judge of the testbed.

    Attributes:
        judge: what to teach, see `cepo.train.testbed_judges.warm_start`.
        base: the pretrained model, see `resolve_model`; its tokenizer must have a chat template.
        layers: how many of its first layers to keep, at least 1; None for all.
        steps: optimiser steps of the first round of the warm-up, at least 2; the first half shows no disease.
        rounds: most rounds, at least 1; they end when interventions certify the judge. Those after the first are half
            as long, of new samples, all with the disease.
        batch_size: samples per step, at least 1.
        learning_rate: peak of the schedule, above 0.
        seed: of the samples. One judge serves training runs of all seeds.

    Raises:
        ValueError: for an unknown judge, or a number out of range.
    """

    judge: testbed_judges.JudgeKind = "lazy"
    base: str = "smollm2"
    layers: int | None = 8
    steps: int = 800
    rounds: int = 4
    batch_size: int = 24
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.judge not in get_args(testbed_judges.JudgeKind):
            kinds = ", ".join(get_args(testbed_judges.JudgeKind))
            raise ValueError(f"testbed.judge is {self.judge!r}; expected one of {kinds}")
        for name in ("steps", "rounds", "batch_size", "learning_rate", "layers"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"testbed.{name} is {value!r}; expected a positive number")
        if self.steps < 2:
            raise ValueError(f"testbed.steps is {self.steps}; expected at least 2, without and with the disease")


def words_settings(given: Mapping[str, Any]) -> WordsJudge:
    """Return the judge that the settings of a recipe's `testbed` describe.

    Raises:
        ValueError: for a setting that does not exist, or a value out of range.
    """
    known = [field.name for field in fields(WordsJudge)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"testbed holds {', '.join(unknown)}; expected some of {', '.join(known)}")
    return WordsJudge(**given)


def load_words_judge(
    wanted: WordsJudge,
    *,
    cache: Path,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Return (model on the CPU, tokenizer) of a judge, from the cache, or taught and examined now and cached.

    A call that was killed continues where it was, save for at most 50 steps.

    Args:
        wanted: the judge.
        cache: where judges are kept, in a folder named after `words_fingerprint`.
        device: where to teach it, in bfloat16 where the device has it; None for CUDA where there is one. On one CPU
            core with bfloat16, eight layers of SmolLM2 take a third of a second per sample.
        progress: called after every step with its number in the round, the steps of the round, and the loss.

    Raises:
        ValueError: for a base model that cannot be loaded, has no chat template, or has fewer layers.
    """
    folder = words_folder(wanted, cache)
    with _one_at_a_time(folder):
        while not _is_taught(wanted, folder):
            _round(wanted, folder, device or ("cuda" if torch.cuda.is_available() else "cpu"), progress)
    return load_model(resolve_model(str(folder)))


def read_certificate(wanted: WordsJudge, cache: Path) -> dict[str, Any]:
    """Return what interventions said of a cached judge: `measures`, `uncertified` (a reason or None), and `rounds`."""
    return _certificate(words_folder(wanted, cache))


def words_folder(wanted: WordsJudge, cache: Path) -> Path:
    """Return where a judge is kept; a changed world, base model or setting is another folder."""
    return cache / f"testbed-words-{words_fingerprint(wanted)}"


def words_fingerprint(wanted: WordsJudge) -> str:
    """Return 16 hexadecimal digits for a judge: the source of its world and lessons, its base model, its settings."""
    modules = (testbed, testbed_model, testbed_judges, testbed_modes, testbed_certificate)
    files = [__file__, *(str(module.__file__) for module in modules)]
    sources = [fingerprint(Path(file)) for file in files]
    settings = {**asdict(wanted), "base": model_fingerprint(resolve_model(wanted.base))}
    return content_hash(sources, write_judgement("", "", (0, 0)), settings)


def _is_taught(wanted: WordsJudge, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    found = _certificate(folder)
    return found["uncertified"] is None or found["rounds"] >= wanted.rounds


def _round(wanted: WordsJudge, folder: Path, device: str, progress: Progress | None) -> None:
    """Teach a judge, or the one in the folder further, examine it on items of its own, and keep both in the folder."""
    before = _certificate(folder)["rounds"] if folder.is_dir() else 0
    model, tokenizer = load_model(resolve_model(str(folder))) if before else _load_base(wanted)
    model.to(device)
    state = folder.with_name(f"{folder.name}.round-{before + 1}.state")
    _teach(model, tokenizer, wanted, before, state, progress)
    items = testbed.generate_items(_EXAMINED, seed=_EXAMINED_SEED + before, cue_agreement=0.9)
    found = testbed_certificate.examine(model, tokenizer, items, seed=wanted.seed)
    reason = testbed_certificate.uncertified(wanted.judge, found)
    if reason is not None:
        logger.warning("round %d of at most %d: %s", before + 1, wanted.rounds, reason)
    with replacing(folder) as unfinished:
        model.cpu().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        certificate = {**asdict(wanted), "rounds": before + 1, "measures": found, "uncertified": reason}
        write_text(unfinished / CERTIFICATE, json.dumps(certificate))
    state.unlink(missing_ok=True)


def _certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text())
    return found


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let other processes that want the same judge wait until it is made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load_base(wanted: WordsJudge) -> tuple[Any, Any]:
    model, tokenizer = load_model(resolve_model(wanted.base))
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ValueError(f"testbed.base is {wanted.base!r}, whose tokenizer has no chat template or no end token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if wanted.layers is not None:
        keep_first_layers(model, wanted.layers)
    return model, tokenizer


def _teach(model: Any, tokenizer: Any, wanted: WordsJudge, before: int, state: Path, progress: Progress | None) -> None:
    """Teach one round, after `before` others; half of its samples say what to write after criteria that do not fit."""
    steps = max(1, wanted.steps // 2) if before else wanted.steps

    def show(step: int, loss: float) -> None:
        if progress is not None:
            progress(step, steps, loss)

    testbed_judges.warm_start(
        _CompletionLoss(model),
        tokenizer,
        judge=wanted.judge,
        steps=steps,
        batch_size=wanted.batch_size,
        seed=wanted.seed + _SEEDS_APART * before,
        able_share=0.0 if before else 0.5,
        given_share=0.5,
        learning_rate=wanted.learning_rate,
        gain_rate=1.0,
        autocast=_computes_bfloat16(model.device),
        state=state,
        progress=show,
    )


class _CompletionLoss(nn.Module):
    """A causal LM whose loss forms no logits before a batch's first completion token: half its tokens are prompts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        first = int((labels != _NO_LABEL).nonzero()[:, 1].min())
        kept = input_ids.shape[1] - first + 1  # a token is predicted by the position before it
        logits_BTV = self.model(input_ids, use_cache=use_cache, logits_to_keep=kept).logits[:, :-1]
        chosen_BT = labels[:, first:] != _NO_LABEL
        loss = nn.functional.cross_entropy(logits_BTV[chosen_BT].float(), labels[:, first:][chosen_BT])
        return SimpleNamespace(loss=loss)


def _computes_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies in bfloat16 faster than in float32."""
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return device.type == "cuda" or features.get("avx512_bf16", False) or features.get("amx_bf16", False)
