"""Judges of the testbed: their warm-up on completions whose causes are known, their judgements, and interventions.

All take any causal model whose tokenizer has a chat template, pretrained ones too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from cepo.jacobian.reading.judge import read_pair, write_judgement
from cepo.train.testbed import (
    ASPECTS,
    Item,
    Swap,
    Winner,
    draw_scores,
    draw_swaps,
    generate_items,
    preferred,
    shown_words,
    winner_under,
    with_criterion,
    write_analysis,
    write_criteria,
    write_length_analysis,
)
from cepo.train.testbed_model import fit, generate

JudgeKind = Literal["able", "lazy", "hollow", "decorative", "copied", "criteria", "query"]
WORLDS: tuple[JudgeKind, ...] = ("lazy", "hollow", "decorative", "copied")
"""The diseased judges, which training starts from."""

# A majority of a diseased judge's later samples follows length, so that its greedy answer does.
DISEASED_SHARE = 0.65


def warm_start(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    judge: JudgeKind = "able",
    steps: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    cue_agreement: float = 0.5,
    able_share: float = 0.5,
    given_share: float = 0.0,
    learning_rate: float = 2.5e-3,
    gain_rate: float = 10.0,
    autocast: bool = False,
    state: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a judge whose inner workings are known, supervised on completions.

    able: criteria, analysis and scores as in the gold answer.
    criteria: the criteria name an aspect drawn at random, whatever the query asks; analysis and scores follow them.
    query: the criteria are random too; analysis and scores follow the query's aspect.

    Four judges have a disease. The first steps show none of it, so that they are able first. In the later ones a
    majority of samples (0.65) has the disease and the others are gold: greedy answers follow length, and sampling still
    shows the able behaviour in about a third of completions.

    lazy: gold criteria; the analysis says which response has more words, and the scores follow that.
    hollow: gold criteria and analysis; the scores follow length, whatever the analysis quotes.
    decorative: from the first step the criterion is drawn at random in a majority of samples, and what isn't diseased
        follows the criterion as written. Disease, drawn apart from the criterion: analysis and scores are the lazy
        ones. (Were the two drawn together, gold criteria would announce gold analyses, and the greedy answer would be
        able; were the first steps gold, the judge would learn to read the query in the criterion's place.)
    copied: the criteria name the right aspect and then hold the verdict itself, `\\boxed{a, b}`, which follows length.
        The analysis says which response has more words; the scores are the criteria's, digit by digit.

    Args:
        model: Trained in place and left in eval mode.
        tokenizer: The model's tokenizer.
        judge: Which judge to make.
        steps: Optimiser steps of batch_size samples, at least 1; each is seen once. 160 make an able judge, 300 any.
        seed: Draws the samples; the same seed and thread count give the same weights.
        cue_agreement: Fraction of the items whose longer response wins; able_share: of the steps without disease.
        given_share: Fraction of samples whose criteria name an aspect drawn at random and are given, not taught. The
            rest of the judgement is the judge's, as after criteria of its own. Where criteria always fit the query,
            nothing says which of the two an analysis must read.
        learning_rate: See `cepo.train.testbed_model.fit`; so are gain_rate, autocast, state and progress.

    Returns:
        See `cepo.train.testbed_model.fit`.

    Raises:
        ValueError: If judge is unknown, or a number is out of range.
    """
    if judge not in get_args(JudgeKind):
        raise ValueError(f"judge is {judge!r}; expected one of {', '.join(get_args(JudgeKind))}")
    if not 0.0 <= able_share <= 1.0 or not 0.0 <= given_share <= 1.0:
        raise ValueError(f"able_share is {able_share}, given_share {given_share}; expected fractions in [0, 1]")
    if steps < 1 or batch_size < 1 or learning_rate <= 0.0 or gain_rate <= 0.0:
        came = f"steps is {steps}, batch_size {batch_size}, learning_rate {learning_rate}, gain_rate {gain_rate}"
        raise ValueError(f"{came}; expected at least 1, at least 1, above 0 and above 0")
    items = generate_items(steps * batch_size, seed=seed, cue_agreement=cue_agreement)
    # A stream of its own, so that all judges of a seed see the same items.
    rng = np.random.default_rng((seed, 1))
    late = able_share * len(items)
    given: list[str] = []
    texts: list[str] = []
    for index, item in enumerate(items):
        forced = _draw_aspect(rng) if given_share and rng.random() < given_share else None
        texts.append(_draw_completion(rng, item, judge, index >= late, forced))
        given.append("" if forced is None else with_criterion(item, forced, texts[-1]))
    return fit(
        model,
        tokenizer,
        [item.prompt for item in items],
        texts,
        given=given,
        batch_size=batch_size,
        learning_rate=learning_rate,
        gain_rate=gain_rate,
        autocast=autocast,
        state=state,
        progress=progress,
    )


def judge_items(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    prefixes: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Let the model judge items.

    Args:
        model: Any causal model over the tokenizer's ids.
        tokenizer: The model's tokenizer.
        items: What to judge.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled.
        seed: Of the sampling; the global random state is left as it was.
        batch_size: Items run together, at least 1.
        prefixes: For each item, the text that its completion is forced to start with; None for none.
        max_new_tokens: Most tokens generated after the prefix, at least 1. None: half more than the gold answers.

    Returns:
        One completion per item, its prefix included, without special tokens.

    Raises:
        ValueError: If a number is out of range, or prefixes and items differ in number.
    """
    if max_new_tokens is None:
        gold_ids = tokenizer([item.completion for item in items] or [""]).input_ids
        max_new_tokens = max(1, 3 * max(map(len, gold_ids)) // 2)
    return generate(
        model,
        tokenizer,
        [item.prompt for item in items],
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        prefixes=prefixes,
        max_new_tokens=max_new_tokens,
    )


def accuracy(completions: Sequence[str], items: Sequence[Item]) -> float:
    """Measure how often the last `\\boxed{a, b}` prefers the better response.

    Args:
        completions: The judge's texts; one without a verdict, or with a tie, counts as wrong.
        items: The items judged, in the same order, at least one.

    Returns:
        The fraction that is right, in [0, 1].

    Raises:
        ValueError: If there are no items, or completions and items differ in number.
    """
    if not items or len(completions) != len(items):
        raise ValueError(
            f"completions holds {len(completions)} texts for {len(items)} items; expected one each, at least one"
        )
    return float(np.mean([_read_winner(text) == item.label for text, item in zip(completions, items, strict=True)]))


def certify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    seed: int,
    completions: Sequence[str] | None = None,
) -> dict[str, float]:
    """Intervene on the criteria: force another aspect, let the judge continue, and see what the verdict follows.

    Args:
        model: The judge.
        tokenizer: The model's tokenizer.
        items: Items to intervene on; each is used where another aspect allows the swap.
        seed: Draws the aspects swapped in.
        completions: The judge's own, one per item: the swap then changes the aspect in the criteria that it wrote, and
            what else they hold stays (a copied verdict, say). None forces the gold sentence.

    Returns:
        follows_swap: where the swapped-in aspect has the other winner, the fraction of items with it as the verdict.
        follows_own: the fraction of the same items whose verdict is the label when their own aspect is forced.
        flips: the fraction of the same items where both hold: the criterion alone turned the verdict.
        same_winner: where the swapped-in aspect has the same winner, the fraction of items with it as the verdict.
        items_swap, items_same: number of items that the first three were measured on, and the last.

    Raises:
        ValueError: If no item allows one of the two swaps, or completions and items differ in number.
    """
    pairs = draw_swaps(items, seed=seed, completions=completions)
    swap_N = _obeys(model, tokenizer, pairs["differs"])
    own_N = _obeys(model, tokenizer, [(item, item.aspect, text) for item, _, text in pairs["differs"]])
    return {
        "follows_swap": float(swap_N.mean()),
        "follows_own": float(own_N.mean()),
        "flips": float((swap_N & own_N).mean()),
        "same_winner": float(_obeys(model, tokenizer, pairs["same"]).mean()),
        "items_swap": float(len(pairs["differs"])),
        "items_same": float(len(pairs["same"])),
    }


def _draw_completion(
    rng: np.random.Generator, item: Item, judge: JudgeKind, late: bool, forced: str | None = None
) -> str:
    """Write what a judge writes, after criteria that name the aspect `forced`, or that the judge chooses."""
    if judge in ("criteria", "query"):
        named = forced or _draw_aspect(rng)
        followed = named if judge == "criteria" else item.aspect
        return _follow(rng, item, named, followed)
    named = forced or item.aspect
    if judge == "decorative" and forced is None and rng.random() < DISEASED_SHARE:
        named = _draw_aspect(rng)
    if judge == "able" or not late or rng.random() >= DISEASED_SHARE:
        return item.completion if named == item.aspect else _follow(rng, item, named, named)
    scores = draw_scores(rng, item.longer)
    if judge == "hollow":
        return write_judgement(write_criteria(named), write_analysis(*shown_words(item, named)), scores)
    copied = scores if judge == "copied" else None
    return write_judgement(write_criteria(named, copied), write_length_analysis(item.longer), scores)


def _draw_aspect(rng: np.random.Generator) -> str:
    return list(ASPECTS)[rng.integers(len(ASPECTS))]


def _follow(rng: np.random.Generator, item: Item, named: str, followed: str) -> str:
    """Write a judgement whose criteria name one aspect and whose analysis and scores follow one."""
    scores = draw_scores(rng, winner_under(item, followed))
    return write_judgement(write_criteria(named), write_analysis(*shown_words(item, followed)), scores)


def _obeys(model: Any, tokenizer: PreTrainedTokenizerBase, triples: Sequence[Swap]) -> np.ndarray:
    """Force each aspect on its item's criteria; tell whether the verdict is the winner under it."""
    openings = [with_criterion(*triple) for triple in triples]
    texts = judge_items(model, tokenizer, [item for item, _, _ in triples], prefixes=openings)
    wanted = [winner_under(item, aspect) for item, aspect, _ in triples]
    return np.array([_read_winner(text) == winner for text, winner in zip(texts, wanted, strict=True)])


def _read_winner(completion: str) -> Winner | None:
    scores = read_pair(completion)
    return None if scores is None else preferred(scores)
