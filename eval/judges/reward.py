"""A reward model as a judge: one number per text, kept in the journal of judgements."""

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

_CHUNK = 8  # batches between writes to the journal

Text: TypeAlias = tuple[Mapping[str, Any], Messages]
"""Facts for the record of a text, such as its subset, and the messages that the model reads, see `Shown.messages`."""


@dataclass(frozen=True)
class RewardSettings:
    """The reward model, and how it runs.

    Attributes:
        model: see `RewardModel.open`.
        seed: seed of the command's random draws.
        dtype: dtype of the weights.
        device: device to run on.
        batch_size: texts per forward pass, at least 1.
        trust_remote_code: whether code from a hub repository may run.

    Raises:
        ValueError: for a batch size below 1.
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
        """What the model is shown of a pair; raises ValueError for a model that is not a reward model."""
        from cepo.train.reward_scores import find_reward_model

        return find_reward_model(self.model)[1]

    def require_rewards(self, command: str) -> Shown:
        """Return what the model is shown; raise ValueError for a pairwise model, which cannot score one response."""
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
        """Return what determines a reward, with the weights by their content."""
        weights = model_fingerprint(resolve_model(self.model))
        return {"dtype": self.dtype, "reward_model": asdict(self.shown), "weights": weights}


@dataclass(frozen=True)
class Reward:
    """The number of one text.

    Attributes:
        number: the reward of a response; for a pairwise model, the logit of A minus that of B. None if there is none.
        error: why there is none, or None.
        tokens: number of generated tokens, 0.
    """

    number: float | None
    error: str | None = None
    tokens: int = 0

    def record(self) -> Row:
        """Return its fields in judgements.jsonl."""
        return {"reward": self.number, "error": self.error}


@dataclass(frozen=True)
class Rewards:
    """The numbers of all texts of a run.

    Attributes:
        shown: what the model is shown of a pair.
        collected: their records, by the hash of the messages.
    """

    shown: Shown
    collected: Collected

    def number(self, messages: Messages) -> float:
        """Return the number of a text; NaN if there is none."""
        record = self.collected.records[content_hash(messages)]
        return float("nan") if record["error"] else float(record["reward"])

    def difference(self, prompt: str, chosen: str, rejected: str) -> float:
        """Return D of a pair, chosen minus rejected; NaN if one of its texts has no number."""
        numbers = [self.number(messages) for messages in self.shown.pair_messages(prompt, chosen, rejected)]
        return self.shown.differences(numbers)[0]


def collect_rewards(
    settings: RewardSettings, texts: Iterable[Text], output: Path, command: str, *, progress: Progress | None = None
) -> Rewards:
    """Score every text once; resume a killed run.

    Args:
        settings: the model and how it runs.
        texts: what to score; for equal texts, the facts of the first are kept.
        output: folder of judgements.jsonl. A record holds key and prompt (hash of the messages), the facts, `text`
            (the last message: the response, or a pairwise model's question), reward and error.
        command: name of the command that writes the output.
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
    """Scores texts, one chunk at a time."""

    def __init__(self, model: RewardModel, chunk: int) -> None:
        self._model, self._chunk = model, chunk

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Reward]]:
        for start in range(0, len(prompts), self._chunk):
            found = self._model.numbers(prompts[start : start + self._chunk])
            for place, number in enumerate(found.values_N.tolist()):
                reason = found.left_out.get(place)
                yield start + place, Reward(None if reason else number, reason)
