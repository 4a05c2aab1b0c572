"""The settings of a `cepo train` run, checked without importing torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cepo.fusion.settings import check_settings
from cepo.jacobian.reading.verdict import STRICT, Verdicts
from cepo.train.recipe import Dtype, source_and_options

# The kind whose output and reference a reward reads; rewards that are not listed read both kinds.
_KINDS = {
    "exact_match": "reasoning",
    "math_verify": "reasoning",
    "bertscore": "reasoning",
    "argmax": "judge",
    "format": "judge",
    "proxy": "judge",
}
TASKS = ("exact_match", "math_verify", "bertscore", "argmax")
PEERS = ("cir", "log_cir", "csr", "necessary")
AUTO = "auto"
TESTBED, WORDS, REASONER_TESTBED = "testbed", "testbed-words", "testbed-reasoner"
TESTBEDS = (TESTBED, WORDS, REASONER_TESTBED)
"""Names of policies that are warmed up on first use and cached."""
_REWARDS = ("format", "causal", "proxy", *PEERS, *TASKS)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: hub id, folder, .gguf file, "smollm2", "testbed", "testbed-words" or "testbed-reasoner".
        kind: "judge" (preference pairs) or "reasoning" (questions with answers).
        data: `source` and the loader's options, see `cepo.train.policy.load_data`.
        rewards: mappings with `name`, `weight` (default 1) and, for causal, CausalReward's settings. There, `task`
            names a task reward to fuse with the links (CE-PO), `preset: paper` takes the paper's values, `guard` is
            that of `JudgeLayout`, and `weight` and `p` may be "auto", see `cepo.train.controller`. Names: format,
            argmax, exact_match, math_verify, bertscore, causal, and rewards to compare it with: proxy, cir, log_cir,
            csr, necessary.
        verdicts: which written forms of a judge's verdict are read, strict or lenient, see `JudgeLayout`.
        causal_loss: fields of `CausalLoss` (weight, links, donors, objective, seed), or None for GRPO's loss alone.
        output: folder of the run: checkpoints, metrics.jsonl, left_out.jsonl, log.txt, settings.json, final/.
        grpo: any field of TRL's GRPOConfig.
        lora: any field of peft's LoraConfig, or None to train all weights.
        dtype: dtype of the weights: float32, bfloat16, float16.
        seed: seed of the data split, the testbed judge (testbed-words has its own), sampling and training.
        threads: CPU threads, or None for torch's choice; tiny models are fastest with one or two.
        testbed: the testbed judge's `judge` and `steps`; for testbed-words, fields of
            `cepo.train.testbed_words.WordsJudge`.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    data: Mapping[str, Any]
    rewards: Sequence[Mapping[str, Any]]
    output: str
    kind: Literal["judge", "reasoning"] = "judge"
    verdicts: Verdicts = STRICT
    causal_loss: Mapping[str, Any] | None = None
    grpo: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    dtype: Dtype = "float32"
    seed: int = 0
    threads: int | None = None
    testbed: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        source_and_options(self.data)
        check_settings("", vars(self), TrainConfig)
        if not self.rewards:
            raise ValueError("rewards is empty; expected a list of mappings such as {name: format}")
        for reward in self.rewards:
            if not isinstance(reward, Mapping) or reward.get("name") not in _REWARDS:
                raise ValueError(f"rewards holds {reward!r}; expected a mapping with a name of {', '.join(_REWARDS)}")
            for name, kind in _KINDS.items():
                if name in (reward["name"], reward.get("task")) and kind != self.kind:
                    raise ValueError(f"reward {name} needs kind: {kind}, but kind is {self.kind}")
        names = [reward["name"] for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"rewards holds {name} {names.count(name)} times, and all would log to the same metrics; "
                    "expected once. A causal reward takes several links, each with its weight"
                )
