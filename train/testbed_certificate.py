"""The certificate of a testbed judge: what interventions say of its ability, and of its disease."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from cepo.train.testbed import Item, draw_swaps, winner_under, with_criterion
from cepo.train.testbed_judges import JudgeKind, certify, judge_items
from cepo.train.testbed_modes import completion_mode

ABLE = 0.9
"""The least share of forms, quotes and verdicts that a judge must have right where it is able."""
TURNED = 0.2
"""The largest share of its greedy verdicts that swapped criteria may turn in a judge with a disease."""
ALTERNATIVE = 0.1
"""The least share of a hollow judge's verdicts, at temperature 1, that follow what it quotes, and that do not."""


def examine(model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, seed: int) -> dict[str, float]:
    """Force another criterion on a judge, let it write on, and see what each stage follows.

    Args:
        model: The judge.
        tokenizer: Its tokenizer.
        items: Items to intervene on; some must allow a swap to an aspect with the other winner.
        seed: Of the aspects swapped in and of the sampling.

    Returns:
        well_formed: fraction of the judge's own completions, at temperature 1, whose mode is not "other".
        turned: greedy, the fraction of verdicts that the swapped criterion alone turns (flips of `certify`).
        quoting: fraction of completions after a swapped criterion, at temperature 1, that are not of mode "length".
        quotes_swap: of those, the fraction that quotes both responses' words for the swapped-in aspect.
        follows_swap: of those in turn, where length prefers the other response, the fraction whose verdict is the
            swapped-in aspect's winner; 0 where there are none.
        items_swap, items_quoting, items_apart: number of completions that the last three were measured on.

    Raises:
        ValueError: As `certify`.
    """
    turned = certify(model, tokenizer, items, seed=seed)["flips"]
    own = judge_items(model, tokenizer, items, temperature=1.0, seed=seed)
    swaps = draw_swaps(items, seed=seed)["differs"]
    swapped = [item for item, _, _ in swaps]
    prefixes = [with_criterion(*swap) for swap in swaps]
    texts = judge_items(model, tokenizer, swapped, temperature=1.0, seed=seed + 1, prefixes=prefixes)
    modes = [completion_mode(item, text) for item, text in zip(swapped, texts, strict=True)]
    quoting = [mode for mode in modes if mode != "length"]
    # Where length and the aspect agree, a verdict does not tell which of them it follows.
    apart = Counter(
        mode for mode, (item, aspect, _) in zip(modes, swaps, strict=True) if winner_under(item, aspect) != item.longer
    )
    right = apart["evidence"] + apart["hollow"]
    return {
        "well_formed": _share([completion_mode(item, text) != "other" for item, text in zip(items, own, strict=True)]),
        "turned": turned,
        "quoting": len(quoting) / len(modes),
        "quotes_swap": _share([mode in ("evidence", "hollow") for mode in quoting]),
        "follows_swap": apart["evidence"] / right if right else 0.0,
        "items_swap": float(len(modes)),
        "items_quoting": float(len(quoting)),
        "items_apart": float(right),
    }


def uncertified(judge: JudgeKind, found: Mapping[str, float]) -> str | None:
    """Return why interventions do not certify a judge to be what it was taught, or None where they do.

    Every judge must write the form, and quote what the criterion names, whichever one is forced on it. An able judge's
    verdict must then follow, greedy answers too. One with a disease must not be turned in its greedy answers, and must
    sometimes, at temperature 1, do what training is to raise: a hollow judge follow what it quotes, the others quote.

    Args:
        judge: What was taught: able, lazy, hollow, decorative or copied.
        found: What `examine` returned.
    """
    wanted = {"well_formed": (ABLE, 1.0), "quotes_swap": (ABLE, 1.0), "follows_swap": (ABLE, 1.0)}
    wanted["turned"] = (ABLE, 1.0) if judge == "able" else (0.0, TURNED)
    if judge == "hollow":
        wanted["follows_swap"] = (ALTERNATIVE, 1.0 - ALTERNATIVE)
    elif judge != "able":
        wanted["quoting"] = (ALTERNATIVE, 1.0)
    missed = [
        f"{name} is {found[name]:.2f}, expected {least:g} to {most:g}"
        for name, (least, most) in wanted.items()
        if not least <= found[name] <= most
    ]
    return f"the {judge} judge is not certified: {'; '.join(missed)}" if missed else None


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds) if holds else 0.0
