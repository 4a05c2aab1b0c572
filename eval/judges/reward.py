"""A reward model as a judge: one number for each text that it reads, kept in the journal of judgements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cepo.eval.judges.journal import Collected, JudgeTask, collect_judgements
from cepo.eval.judges.settings import Messages, Progress
from cepo.files import Row, content_hash
from cepo.jacobian.loading import check_device, model_fingerprint, resolve_model

if TYPE_CHECKING:
    from cepo.train.pair_encoding import Shown
    from cepo.train.reward_scores import RewardModel

_CHUNK = 8  # batches between two writes to the journal

Text: TypeAlias = tuple[Mapping[str, Any], Messages]
"""Facts for the record of a text, such as its subset, and what the model reads, see `Shown.messages`."""


@dataclass(frozen=True)
class RewardSettings:
    """Which reward model, and how it runs.

    Attributes:
        model: see `RewardModel.open`.
        seed: of whatever a command draws.
        dtype: dtype of the weights.
        device: where to run.
        batch_size: texts per forward pass, at least 1.
        trust_remote_code: whether code from a hub repository may run.
    """

    model: str
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 16
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    def __str__(self) -> str:
        return f"{self.model} (reward model)"

    @property
    def shown(self) -> Shown:
        """What the model is shown of a pair; ValueError for a model that is not a reward model."""
        from cepo.train.reward_scores import find_reward_model

        return find_reward_model(self.model)[1]

    def require_rewards(self, command: str) -> Shown:
        """Return what the model is shown; ValueError for a pairwise one, which gives a response alone no reward."""
        if self.shown.form == "pairwise":
            raise ValueError(
                f"reward model is {self.model!r}, which compares two responses; {command} needs one that gives each "
                "response a reward (form bradley-terry)"
            )
        return self.shown

    def open(self) -> RewardModel:
        """Load the model."""
        from cepo.train.reward_scores import RewardModel

        run = {name: getattr(self, name) for name in ("dtype", "device", "batch_size", "trust_remote_code")}
        return RewardModel.open(self.model, **run)

    def decisive(self) -> Row:
        """Return what decides a reward, the weights by their content."""
        weights = model_fingerprint(resolve_model(self.model))
        return {"dtype": self.dtype, "reward_model": asdict(self.shown), "weights": weights}


@dataclass(frozen=True)
class Reward:
    """The number of one text.

    Attributes:
        number: the reward of a response; of a pairwise model the logit of A minus that of B. None where there is none.
        error: why there is none, or None.
    """

    number: float | None
    error: str | None = None
    tokens: int = 0

    def record(self) -> Row:
        """Return what a line of judgements.jsonl says of it."""
        return {"reward": self.number, "error": self.error}


@dataclass(frozen=True)
class Rewards:
    """The numbers of all texts of a run.

    Attributes:
        shown: what the model is shown of a pair.
        collected: their records, by the hash of what the model read.
    """

    shown: Shown
    collected: Collected

    def number(self, messages: Messages) -> float:
        """Return the number of a text; NaN where there is none."""
        record = self.collected.records[content_hash(messages)]
        return float("nan") if record["error"] else float(record["reward"])

    def difference(self, prompt: str, chosen: str, rejected: str) -> float:
        """Return D of a pair, chosen minus rejected; NaN where a text of it has no number."""
        numbers = [self.number(messages) for messages in self.shown.pair_messages(prompt, chosen, rejected)]
        return self.shown.differences(numbers)[0]


def collect_rewards(
    settings: RewardSettings, texts: Iterable[Text], output: Path, command: str, *, progress: Progress | None = None
) -> Rewards:
    """Give every text its number, each text once; resume a killed run.

    Args:
        settings: which model.
        texts: what to score; of equal ones the first one's facts are kept.
        output: folder of judgements.jsonl. A record holds key and prompt (hash of what was read), the facts, `text`
            (the last message: the response, or a pairwise model's question), reward and error.
        command: what writes the output.
        progress: called after each text.

    Raises:
        ValueError: for settings that cannot be used, or a folder with results of other settings.
    """
    check_device(settings.device)
    shown = settings.shown
    tasks: dict[str, JudgeTask] = {}
    for facts, messages in texts:
        key = content_hash(messages)
        tasks.setdefault(key, JudgeTask(key, messages, {**facts, "text": messages[-1]["content"]}))
    decisive = {"command": command, "seed": settings.seed, **settings.decisive()}
    collected = collect_judgements(
        list(tasks.values()),
        output,
        decisive,
        lambda: _RewardJudge(settings.open(), _CHUNK * settings.batch_size),
        progress=progress,
    )
    return Rewards(shown, collected)


class _RewardJudge:
    """Answers texts with their numbers, a chunk at a time."""

    def __init__(self, model: RewardModel, chunk: int) -> None:
        self._model, self._chunk = model, chunk

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Reward]]:
        for start in range(0, len(prompts), self._chunk):
            found = self._model.numbers(prompts[start : start + self._chunk])
            for place, number in enumerate(found.values_N.tolist()):
                reason = found.left_out.get(place)
                yield start + place, Reward(None if reason else number, reason)
