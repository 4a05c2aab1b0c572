"""Examples for the page of `cepo eval rewardbench`: randomly drawn items, by how they were judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cepo.eval.judges.journal import Record
from cepo.eval.judges.reward import Rewards
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.rewardbench.items import PreferenceItem
from cepo.eval.rewardbench.metrics import outcome
from cepo.eval.rewardbench.reward_metrics import differences
from cepo.files import content_hash

_SHOWN = 3  # items per kind


def shown_judgements(
    items: Sequence[PreferenceItem], records: Mapping[str, Record], seed: int
) -> dict[str, list[HeatMap]]:
    """Return some judgements in full, drawn at random, by how the item was judged."""
    kinds: dict[str, list[HeatMap]] = {
        name: []
        for name in ("Right in both orders", "Right in one order", "Wrong in both orders", "No verdict", "Not judged")
    }
    for item in _drawn(items, seed):
        found = outcome(item, records, seed=seed)
        shown = found.records[0]
        if any(record["error"] for record in shown):
            kind = "Not judged"
        elif any(record["winner"] is None for record in shown):
            kind = "No verdict"
        else:
            kind = ("Wrong in both orders", "Right in one order", "Right in both orders")[sum(found.right or ())]
        if len(kinds[kind]) < 2 * _SHOWN:
            kinds[kind] += [_shown(item, record) for record in shown]
    return {name: maps for name, maps in kinds.items() if maps}


def shown_rewards(items: Sequence[PreferenceItem], rewards: Rewards, seed: int) -> dict[str, list[HeatMap]]:
    """Return some items in full, drawn at random, by the sign of the smallest D of their pairs."""
    kinds: dict[str, list[HeatMap]] = {name: [] for name in ("Right", "Tie", "Wrong", "Not judged")}
    for item in _drawn(items, seed):
        differences_CR = differences(item, rewards)
        better, worse = np.unravel_index(np.argmin(differences_CR), differences_CR.shape)  # the first NaN, if any
        least = differences_CR[better, worse]
        kind = "Not judged" if np.isnan(least) else ("Tie", "Right", "Wrong")[int(np.sign(least))]
        if len(kinds[kind]) < _SHOWN:
            text = f"[Better response]\n{item.chosen[better]}\n\n[Other response]\n{item.rejected[worse]}\n"
            facts = {"subset": item.subset, "difference of the rewards": digits(least)}
            kinds[kind].append(HeatMap(item.name, (f"{item.prompt}\n\n", text), 1, facts=facts))
    return {name: maps for name, maps in kinds.items() if maps}


def _drawn(items: Sequence[PreferenceItem], seed: int) -> list[PreferenceItem]:
    return sorted(items, key=lambda item: content_hash("show", seed, item.key))


def _shown(item: PreferenceItem, record: Mapping[str, Any]) -> HeatMap:
    first, second = item.chosen[0], item.rejected[0]
    if record["chosen_at"] == "B":
        first, second = second, first
    prompt = f"{item.prompt}\n\n[Response A]\n{first}\n\n[Response B]\n{second}\n\n"
    facts = {
        "subset": item.subset,
        "better": "neither" if item.tie else record["chosen_at"],
        "verdict": record["winner"] or "none",
    }
    if record["scores"]:
        facts["scores"] = ", ".join(f"{score:g}" for score in record["scores"])
    if record["soft"]:
        facts["expected scores"] = ", ".join(f"{score:.2f}" for score in record["soft"])
    if record["forced"]:
        facts["scores forced"] = "yes"
    if record["error"]:
        facts["not judged"] = record["error"]
    name = f"{item.name}, " + ("a tie" if item.tie else f"better response at {record['chosen_at']}")
    return HeatMap(name, (prompt, record["text"]), 1, facts=facts)
