"""Load the policy to train and its data by name: a real model with real data, or a testbed's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from cepo.files import content_hash, fingerprint
from cepo.fusion.settings import check_names, check_settings
from cepo.jacobian.loading import load_model, model_fingerprint, resolve_model
from cepo.jacobian.reading.judge import write_judgement
from cepo.train import testbed, testbed_judges, testbed_model
from cepo.train.config import REASONER_TESTBED, TESTBED, WORDS
from cepo.train.data import DataSplit, load_preferences, load_reasoning
from cepo.train.prompt_length import CheckPrompt
from cepo.train.reasoner_testbed import Question, Task, generate_questions
from cepo.train.reasoner_testbed_models import ReasonerSettings, load_testbed_reasoner, reasoner_fingerprint
from cepo.train.recipe import source_and_options
from cepo.train.testbed_words import WordsJudge, load_words_judge, words_fingerprint, words_settings

CACHE = Path.home() / ".cache" / "cepo"


def load_data(
    kind: str, settings: Mapping[str, Any], *, seed: int, check_prompt: CheckPrompt | None = None
) -> DataSplit:
    """Return train and test rows with the columns prompt (messages) and label or answer.

    Args:
        kind: "judge" or "reasoning".
        settings: `source` (a file, a hub id, "testbed" or "testbed-reasoner") and the loader's options; for a testbed
            count, test_count and cue_agreement, and for the reasoner's also task.
        seed: seed of positions, split and testbed items.
        check_prompt: see `load_preferences`; a testbed's prompts are short.

    Raises:
        ValueError: for an unknown option, or data that cannot be used.
    """
    source, options = source_and_options(settings)
    of_kind = {
        "judge": (TESTBED, _items, load_preferences),
        "reasoning": (REASONER_TESTBED, _questions, load_reasoning),
    }
    own, generate, read = of_kind[kind]
    if source in (TESTBED, REASONER_TESTBED) and source != own:
        raise ValueError(
            f"kind is {kind!r}, but data.source is {source}; expected {'judge' if source == TESTBED else 'reasoning'}"
        )
    load: Callable[..., DataSplit] = generate if source == own else partial(read, check_prompt=check_prompt)
    taker = generate if source == own else read
    check_settings("data", options, taker, but=("source", "seed", "check_prompt"), others=("source",))
    return load(source, seed=seed, **options)


def items_dataset(items: list[testbed.Item]) -> Dataset:
    """Return testbed items as rows for TRL."""
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": item.prompt}], "label": item.label} for item in items]
    )


def questions_dataset(questions: list[Question]) -> Dataset:
    """Return questions of the reasoner's testbed as rows for TRL."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question.prompt}], "answer": question.answer}
            for question in questions
        ]
    )


def load_policy(
    name: str,
    *,
    dtype: str,
    seed: int,
    testbed_judge: Mapping[str, Any],
    trust_remote_code: bool = False,
    cache: Path = CACHE,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) by name; a testbed's is read from the cache, or warmed up and cached.

    Args:
        name: "testbed", "testbed-words", "testbed-reasoner", or a name for `resolve_model`.
        dtype: name of a torch dtype; testbeds are float32.
        seed: seed of the testbed policy's weights and warm-up; testbed-words has a seed of its own.
        testbed_judge: `judge` (see `warm_start`: lazy, hollow, decorative, copied, ...) and `steps` of its warm-up; for
            testbed-words see `WordsJudge`, for testbed-reasoner `ReasonerSettings`.
        trust_remote_code: see `load_model`.
        cache: folder of warmed-up policies.

    Raises:
        ValueError: for settings that do not exist, or a model that cannot be loaded.
    """
    if name == WORDS:
        return load_words_judge(words_settings(testbed_judge), cache=cache)
    if name == REASONER_TESTBED:
        return load_testbed_reasoner(_reasoner(testbed_judge), seed=seed, cache=cache)
    if name != TESTBED:
        return load_model(resolve_model(name), dtype=dtype, trust_remote_code=trust_remote_code)
    return load_testbed_judge(**_testbed_options(testbed_judge), seed=seed, cache=cache)


def policy_fingerprint(name: str, *, seed: int, testbed_judge: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify the weights of a policy, without loading or warming it up.

    Args:
        name: see `load_policy`.
        seed: see `load_policy`.
        testbed_judge: see `load_policy`.
    """
    if name == WORDS:
        check_settings("testbed", testbed_judge, WordsJudge)
        return words_fingerprint(words_settings(testbed_judge))
    if name == REASONER_TESTBED:
        return reasoner_fingerprint(_reasoner(testbed_judge), seed=seed)
    if name == TESTBED:
        return testbed_fingerprint(**_testbed_options(testbed_judge), seed=seed)
    return model_fingerprint(resolve_model(name))


def load_testbed_judge(
    judge: testbed_judges.JudgeKind,
    *,
    steps: int,
    seed: int,
    cache: Path = CACHE,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a testbed judge, from the cache or warmed up now and cached.

    The folder is named after `testbed_fingerprint`, so that a judge of an older version of the world is never used.

    Args:
        judge: the kind of judge, see `cepo.train.testbed_judges.warm_start`.
        steps: steps of its warm-up.
        seed: seed of its weights and warm-up.
        cache: folder of warmed-up judges.
        progress: called with the step and its loss.
    """
    folder = cache / f"testbed-{testbed_fingerprint(judge, steps=steps, seed=seed)}"
    tokenizer = testbed.build_tokenizer()
    if not folder.is_dir():
        model = testbed_model.build_model(tokenizer, seed=seed)
        testbed_judges.warm_start(model, tokenizer, judge=judge, steps=steps, seed=seed, progress=progress)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            os.replace(unfinished, folder)
        except OSError:  # another run put the same judge there first
            shutil.rmtree(unfinished)
    return load_model(resolve_model(str(folder)))


def testbed_fingerprint(judge: testbed_judges.JudgeKind, *, steps: int, seed: int) -> str:
    """Return 16 hexadecimal digits that identify a warmed-up judge: its world's source, format and settings."""
    sources = [fingerprint(Path(str(module.__file__))) for module in (testbed, testbed_judges, testbed_model)]
    return content_hash(sources, write_judgement("", "", (0, 0)), judge, steps, seed)


def _items(source: str, *, seed: int, count: int = 512, test_count: int = 128, cue_agreement: float = 0.9) -> DataSplit:
    """Return the judge's testbed."""
    train = testbed.generate_items(count, seed=seed + 1, cue_agreement=cue_agreement)
    test = testbed.generate_items(test_count, seed=seed + 2, cue_agreement=cue_agreement)
    return DataSplit(items_dataset(train), items_dataset(test), ())


def _questions(
    source: str,
    *,
    seed: int,
    count: int = 512,
    test_count: int = 128,
    cue_agreement: float = 0.9,
    task: Task = "chain_sum",
) -> DataSplit:
    """Return the reasoner's testbed."""
    train = generate_questions(count, seed=seed + 1, cue_agreement=cue_agreement, task=task)
    test = generate_questions(test_count, seed=seed + 2, cue_agreement=cue_agreement, task=task)
    return DataSplit(questions_dataset(train), questions_dataset(test), ())


def _reasoner(given: Mapping[str, Any]) -> ReasonerSettings:
    check_names("testbed", given, ReasonerSettings.__dataclass_fields__)
    return ReasonerSettings(**given)


def _testbed_options(given: Mapping[str, Any]) -> dict[str, Any]:
    check_settings("testbed", given, load_testbed_judge, but=("seed", "cache", "progress"))
    return {"judge": "lazy", "steps": 300, **given}
