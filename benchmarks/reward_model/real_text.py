"""The experiment on reward models with real text: a stock closing line is the cue, and rules make the pairs.

The closing line ends the chosen response in most training pairs, and the rejected one in the rest. The evaluation asks
whether a reward model still prefers the better response when the line ends the worse one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import cepo
from cepo.counterfactual.text.kinds import BY_RULE
from cepo.counterfactual.text.pairs import Pair, Source
from cepo.counterfactual.text.synthesise import synthesise
from cepo.files import fingerprint, make_folder, replacing, write_jsonl
from cepo.jacobian.layers import keep_first_layers
from cepo.jacobian.loading import load_model, model_fingerprint, resolve_model
from cepo.train.recipe import read_recipe, read_yaml
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_data import load_pairs
from cepo.train.reward_scores import RewardModel

TRAINING = Path(cepo.__file__).parent / "train" / "recipes" / "reward-model-smollm2-cpu.yaml"
COLUMNS = {
    "right_cue": "right with the cue right",
    "flipped": "right with the cue flipped",
    "no_cue": "right without it",
    "cue_effect": "reward of the cue",
    "relevance": "above another prompt's",
}
OF_A_FILE = {
    "accuracy": "right",
    "where_longer": "where chosen is longer",
    "where_shorter": "where shorter",
    "longest": "longest wins",
}
_ITEMS_SEED = 0  # every model is measured on the same pairs


@dataclass(frozen=True)
class RealText:
    """See `World`; an arm changes the `kinds` of pairs, from `BY_RULE`.

    Attributes:
        layers: number of first layers of the training recipe's model that become the reward model.
        train: file of the training preferences.
        dev: file of preferences of the same kind, measured with the cue and without it.
        others: files of other preferences, measured as they are.
        closing: the closing line that is the cue.
        agreement: share of the training pairs whose chosen response has the cue, in [0, 1].
        max_characters: largest length of a training prompt and its longer response together, in characters.
        data: folder of the files.
    """

    layers: int
    train: str
    dev: str
    others: Sequence[str]
    closing: str
    agreement: float
    max_characters: int
    data: Path | None = None

    @property
    def columns(self) -> Sequence[Mapping[str, str]]:
        """Titles of the measures with the cue, and of those of each file as it is."""
        names = [Path(file).stem for file in (self.dev, *self.others)]
        return [COLUMNS, *({f"{name}/{part}": f"{name}: {of}" for part, of in OF_A_FILE.items()} for name in names)]

    def settings(self) -> dict[str, Any]:
        """Return what decides a row: recipe, world, and hashes of data and weights.

        Raises:
            ValueError: for missing data.
        """
        files = {name: self.file(name) for name in (self.train, self.dev, *self.others)}
        recipe = read_yaml(TRAINING.read_text())
        return {
            "training": recipe,
            "text": {**asdict(self), "data": {name: fingerprint(path) for name, path in files.items()}},
            "weights": model_fingerprint(resolve_model(recipe["model"])),
        }

    def training(self, folder: Path, changes: Mapping[str, Any], seed: int, steps: int | None) -> RewardModelConfig:
        """Return the training configuration of a run; its pairs are written to `folder`, its base model next to it."""
        make_folder(folder)
        pairs = folder / "pairs.jsonl"
        write_jsonl(pairs, (pair.row() for pair in make_text_pairs(self, changes["kinds"], seed=seed)))
        name = read_yaml(TRAINING.read_text())["model"]
        overrides: dict[str, Any] = {
            "model": str(first_layers(name, self.layers, folder.parent / "base")),
            "output": str(folder),
            "seed": seed,
            "data": {"source": str(pairs), "test_fraction": 0.0},
        }
        overrides |= {} if steps is None else {"reward.max_steps": steps}
        return read_recipe(RewardModelConfig, TRAINING, overrides)

    def measure(self, model: RewardModel, *, seed: int, items: int) -> Mapping[str, float | None]:
        """Return the measures of a reward model, on the same pairs for every model and seed.

        For the dev file: `no_cue`, `right_cue` and `flipped`, the accuracies if the closing line ends neither response,
        the chosen one, or the rejected one; `cue_effect`, the mean change of the reward when the line is appended to a
        chosen response; `relevance`, how often the chosen response has a higher reward than that of another prompt. For
        every file as it is: the accuracy, the accuracies where the chosen response is longer or shorter (None without
        such pairs), and the accuracy of always preferring the longer response, with equal lengths as half.
        """
        dev = _drawn(self.file(self.dev), items)
        other = [next(peer for peer in dev[at:] + dev if peer.prompt != dev[at].prompt) for at in range(len(dev))]
        with_line = [[with_closing(one, self.closing, side) for one in dev] for side in ("chosen", "rejected")]
        responses = {
            "chosen": [one.chosen for one in dev],
            "rejected": [one.rejected for one in dev],
            "cued": [one.chosen for one in with_line[0]],
            "cued rejected": [one.rejected for one in with_line[1]],
            "of another": [peer.chosen for peer in other],
        }
        prompts = [one.prompt for one in dev]
        reward = {name: model.rewards(prompts, texts).values_N for name, texts in responses.items()}
        found: dict[str, float | None] = {
            "right_cue": _share(reward["cued"] > reward["rejected"]),
            "flipped": _share(reward["chosen"] > reward["cued rejected"]),
            "no_cue": _share(reward["chosen"] > reward["rejected"]),
            "cue_effect": float(np.mean(reward["cued"] - reward["chosen"])),
            "relevance": _share(reward["chosen"] > reward["of another"]),
        }
        found |= _by_length(dev, reward["chosen"] - reward["rejected"], self.dev)
        for name in self.others:
            drawn = _drawn(self.file(name), items)
            texts = [[getattr(one, side) for one in drawn] for side in ("prompt", "chosen", "rejected")]
            found |= _by_length(drawn, model.differences(*texts).values_N, name)
        return found

    def file(self, name: str) -> Path:
        """Return the path of a file of preferences; ValueError if it is missing."""
        path = (self.data or Path()) / name
        if self.data is None or not path.is_file():
            raise ValueError(f"data is {str(self.data)!r}, without {name}; expected the folder that holds it")
        return path


def make_text_pairs(world: RealText, kinds: Sequence[str], *, seed: int) -> list[Pair]:
    """Return the pairs that rules make of the training file's short preferences with the cue added.

    Raises:
        ValueError: for an unknown kind, or missing data.
    """
    unknown = [kind for kind in kinds if kind not in BY_RULE]
    if unknown:
        raise ValueError(f"kinds holds {', '.join(unknown)}; expected some of {', '.join(BY_RULE)}")
    sources = [one for one in _read(world.file(world.train)) if _size(one) <= world.max_characters]
    against = round((1.0 - world.agreement) * len(sources))
    wrong = set(np.random.default_rng(seed).permutation(len(sources))[:against].tolist())
    sides = ["rejected" if place in wrong else "chosen" for place in range(len(sources))]
    cued = [with_closing(source, world.closing, side) for source, side in zip(sources, sides, strict=True)]
    return list(synthesise(cued, {kind: BY_RULE[kind] for kind in kinds}, seed=seed))


def with_closing(source: Source, closing: str, side: str) -> Source:
    """Return the preference with a line appended to the response of one side, "chosen" or "rejected"."""
    return replace(source, **{side: f"{getattr(source, side)}\n\n{closing}"})


def first_layers(model: str, count: int, folder: Path) -> Path:
    """Return the folder of a causal language model cut to its first layers, creating it if needed."""
    if not folder.is_dir():
        loaded, tokenizer = load_model(resolve_model(model))
        keep_first_layers(loaded, count)
        with replacing(folder) as unfinished:
            loaded.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return folder


def _by_length(pairs: Sequence[Source], difference_N: np.ndarray, file: str) -> dict[str, float | None]:
    name = Path(file).stem
    excess_N = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    right_N = difference_N > 0
    return {
        f"{name}/accuracy": _share(right_N),
        f"{name}/where_longer": _share(right_N[excess_N > 0]),
        f"{name}/where_shorter": _share(right_N[excess_N < 0]),
        f"{name}/longest": mean([1.0 if excess > 0 else 0.5 * (excess == 0) for excess in excess_N]),
        f"{name}/pairs": float(len(pairs)),
    }


def _share(right_N: np.ndarray) -> float | None:
    return float(right_N.mean()) if len(right_N) else None


def _drawn(file: Path, items: int) -> list[Source]:
    found = _read(file)
    return random.Random(_ITEMS_SEED).sample(found, min(items, len(found)))


def _read(file: Path) -> list[Source]:
    pairs = load_pairs({"source": str(file), "test_fraction": 0.0}, seed=0).train
    return [Source(pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def _size(source: Source) -> int:
    return len(source.prompt) + max(len(source.chosen), len(source.rejected))
