"""The page of `cepo score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable
from cepo.eval.score.scorer import Scoring
from cepo.fusion.requests import Against

_AGAINST: dict[Against, str] = {
    "donors": "led to another verdict",
    "same verdict": "all led to the same verdict",
    "permuted": "its own tokens in other orders",
    "same": "all say the same as the row",
    "immovable": "none of its tokens can be exchanged",
    "nothing": "no other prompt has content for it",
}
_WITHOUT_ATTRIBUTION = (
    "The effect was computed without its path, so it is not spread over tokens. For signed heat maps, and a table of "
    "what each criterion did, score with --also path (or --score path)."
)


def write_page(
    path: Path,
    scoring: Scoring,
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[tuple[Sequence[str], int]],
    *,
    source: str,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page: of each row its scores, a table of its links, and its heat maps.

    Args:
        path: the page's file.
        scoring: how the rows were scored.
        records: of the rows.
        texts: the token texts of each row's rollout, and the number of its prompt tokens.
        source: the input, as it was named.
        warnings: paragraphs below the summary.
    """
    maps = []
    for record, (tokens, prompt_tokens) in zip(records, texts, strict=True):
        links = record["links"]
        maps.append(
            HeatMap(
                title=str(record["id"]),
                tokens=tuple(tokens),
                prompt_tokens=prompt_tokens,
                links={
                    name: dict(zip(link["source_positions"], link["row_norms"], strict=True))
                    for name, link in links.items()
                    if "row_norms" in link
                },
                attributions={name: _attribution(link) for name, link in links.items() if "attribution" in link},
                targets={
                    name: tuple(link["target_positions"])
                    for name, link in links.items()
                    if "row_norms" in link or "attribution" in link
                },
                facts=_facts(record),
                measures=_links_table(record),
                malformed=None if record["broken"] else record["malformed"],
            )
        )
    config = scoring.config
    rank = f"rank = {config.rank}" if config.energy is None else f"energy = {config.energy}"
    summary = {
        "model": scoring.model,
        "input": source,
        "links": ", ".join(f"{name} (weight {weight:g})" for name, weight in config.links.items()),
        "score": config.score,
        "hardening": f"K = {config.counterfactuals}, {rank}" if config.counterfactuals else "none (K = 0)",
    }
    if config.reads_effects:
        nodes = f", {config.nodes} nodes along the path to each" if config.reads_paths else ""
        summary["donors"] = f"K = {config.donors}{nodes}"
    notes = [*warnings, *([_WITHOUT_ATTRIBUTION] if config.reads_effects and not config.reads_paths else [])]
    write_report(path, title="cepo score", summary=summary, notes=notes, heat_maps={"Rollouts": maps})


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what the page shows of a row in a word each."""
    if record["broken"]:
        return {"not scored": record["malformed"]}
    return {
        "reward": digits(record["reward"]),
        **{f"S {name}": digits(value) for name, value in record["S"].items()},
        **({} if record["order_leak"] is None else {"order leak": f"{digits(record['order_leak'])} nats"}),
    }


def _links_table(record: Mapping[str, Any]) -> PageTable | None:
    """Return S of each link and, where it was compared with donors, its effect and what it was compared with."""
    links = record["links"]
    if not links:
        return None
    rows = [[name, digits(link["S"])] for name, link in links.items()]
    if all(link["against"] is None for link in links.values()):
        return ["link", "S"], rows
    for row, link in zip(rows, links.values(), strict=True):
        row.append("" if link["delta"] is None else digits(link["delta"], sign="+"))
        row += [str(link["donors"]), _AGAINST[link["against"]]]
    return ["link", "S", "effect, nats", "donors", "what they are"], rows


def _attribution(link: Mapping[str, Any]) -> Attribution:
    return Attribution(
        nats=dict(zip(link["source_positions"], link["attribution"], strict=True)),
        delta=link["delta"],
        path_sum=link["path_sum"],
        parts=tuple((one["text"], one["nats"], one["share"]) for one in link["criteria"]),
    )
