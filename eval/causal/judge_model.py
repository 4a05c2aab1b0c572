"""A judge to experiment on: its distribution at the scores, what it writes, and the criteria that it samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms

EXTRA_TOKENS = 16
"""Tokens by which a continuation may exceed twice the original's length."""


@dataclass(frozen=True)
class JudgeModel:
    """A judge to experiment on.

    Attributes:
        model: causal language model in eval mode.
        reader: reads its rollouts; its layout is a JudgeLayout.
        pieces: the bytes of its tokens.
        tokens_at_once: largest number of tokens in a batch, padding included.
    """

    model: Any
    reader: SpanReader
    pieces: TokenBytes
    tokens_at_once: int = 16384

    @property
    def layout(self) -> JudgeLayout:
        """The layout with its tags."""
        assert isinstance(self.reader.layout, JudgeLayout)
        return self.reader.layout


@dataclass(frozen=True)
class Verdict:
    """A judge's answer at its two scores.

    Attributes:
        digits: for each score, the probabilities of the tokens that can be its first digit, normalised over them.
        margin: expected score of A minus that of B, see `cepo.jacobian.targets`.
        winner: by the most likely digits; None for a tie.
        log_likelihood: of the sampled score tokens, in nats.
    """

    digits: tuple[Mapping[int, float], ...]
    margin: float
    winner: Literal["A", "B"] | None
    log_likelihood: float


@torch.no_grad()
def read_verdicts(rollouts: Sequence[Rollout], judge: JudgeModel, *, masked: bool = False) -> list[Verdict]:
    """Return the judge's verdict at the scores of each rollout, with everything else as written.

    Args:
        rollouts: well-formed judgements.
        judge: the judge.
        masked: whether the criteria's positions are hidden from all tokens.
    """
    found: list[Verdict] = []
    keeps_rows = "logits_to_keep" in inspect.signature(judge.model.forward).parameters
    for batch in _batches(rollouts, judge, [len(rollout.token_ids) for rollout in rollouts]):
        lengths = [rollout.spans["scores"].positions[-1] + 1 for rollout in batch]
        ids_BT = _padded([rollout.token_ids[:length] for rollout, length in zip(batch, lengths, strict=True)], 0)
        # Padding is on the right, where a causal model never looks, and needs no mask.
        options: dict[str, Any] = {"attention_mask": _open_keys(batch, ids_BT.shape[1])} if masked else {}
        columns = sorted({at - 1 for rollout in batch for at in rollout.spans["scores"].positions})
        if keeps_rows:
            options["logits_to_keep"] = torch.tensor(columns)
        options = {name: value.to(judge.model.device) for name, value in options.items()}
        logits_BPV = judge.model(input_ids=ids_BT.to(judge.model.device), use_cache=False, **options).logits
        if not keeps_rows:
            logits_BPV = logits_BPV[:, columns]
        place = {column + 1: index for index, column in enumerate(columns)}
        for row, rollout in enumerate(batch):
            logits_of = {at: logits_BPV[row, place[at]] for at in rollout.spans["scores"].positions}
            found.append(_verdict(rollout, logits_of))
    return found


def sample_criteria(
    rollouts: Sequence[Rollout], judge: JudgeModel, *, count: int, seed: int
) -> list[list[tuple[int, ...] | None]]:
    """Return criteria that the judge itself samples for each rollout's prompt, at temperature 1.

    The context is the rollout up to its first criteria token, so the opening tag is forced and a thought is kept.
    Sampling stops at the closing tag. Whitespace around the criteria is left out.

    Args:
        rollouts: well-formed judgements.
        judge: the judge.
        count: number of samples per rollout.
        seed: of the sampling.

    Returns:
        `count` samples per rollout; None for one that is empty or does not close its tag within twice the original
        length.
    """
    closing = f"</{judge.layout.criteria_tag}>".encode()
    contexts, limits = [], []
    for rollout in rollouts:
        span = rollout.spans["criteria"]
        contexts += [rollout.token_ids[: span.positions[0]]] * count
        limits += [2 * len(span.positions) + EXTRA_TOKENS] * count
    written = generate(contexts, judge, limits=limits, stop=closing, temperature=1.0, seed=seed)
    found = [_before(judge, ids, closing) for ids in written]
    return [found[start : start + count] for start in range(0, len(found), count)]


@torch.no_grad()
def generate(
    contexts: Sequence[Sequence[int]],
    judge: JudgeModel,
    *,
    limits: Sequence[int],
    stop: bytes,
    temperature: float,
    seed: int,
    hidden: Sequence[Sequence[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Return what the judge writes after each context, up to its end of sequence or the token that completes `stop`.

    Args:
        contexts: token ids.
        judge: the judge.
        limits: largest number of tokens to write after each context; a batch runs to the largest of its rows.
        stop: text to stop at.
        temperature: 0 for greedy decoding; above 0, sampling without truncation.
        seed: of the sampling; the global random state does not change.
        hidden: positions of each context that are hidden from all tokens.
    """
    tokenizer, device = judge.reader.tokenizer, judge.model.device
    ends = judge.model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    written: list[tuple[int, ...]] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        rows = list(zip(contexts, limits, hidden or [()] * len(contexts), strict=True))
        for batch in _batches(rows, judge, [len(context) + limit for context, limit, _ in rows]):
            ids_BT = _padded([context for context, _, _ in batch], pad, side="left")
            width = ids_BT.shape[1]
            mask_BT = _padded([[1] * len(context) for context, _, _ in batch], 0, side="left")
            # Given, because generate would number the tokens as if the hidden ones did not exist.
            positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
            for row, (context, _, closed) in enumerate(batch):
                mask_BT[row, [width - len(context) + at for at in closed]] = 0
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0.0:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            output_BT = judge.model.generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                position_ids=positions_BT.to(device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(limit for _, limit, _ in batch),
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=pad,
                    **sampling,
                ),
                stopping_criteria=StoppingCriteriaList([_Written(judge.pieces, width, stop)]),
            )
            written += [_cut(judge, row, stop, ends) for row in output_BT[:, width:].tolist()]
    return written


def _verdict(rollout: Rollout, logits_of: Mapping[int, Tensor]) -> Verdict:
    """Read the verdict off the logits (V,) that predict the token at each position."""
    digits, values = [], []
    for number in rollout.numbers:
        chances = [
            torch.softmax(logits_of[digit.position][[t for t, _ in digit.candidates]].double(), 0) for digit in number
        ]
        digits.append({token: float(p) for (token, _), p in zip(number[0].candidates, chances[0], strict=True)})
        values.append(
            sum(
                digit.place * digit.candidates[int(chance_N.argmax())][1]
                for digit, chance_N in zip(number, chances, strict=True)
            )
        )
    scores = {}
    for target in ("margin", "log_likelihood"):
        terms = target_terms(rollout, "scores", target)
        scores[target] = float(sum_of_terms(torch.stack([logits_of[term.position] for term in terms]), terms))
    winner: Literal["A", "B"] | None = None if values[0] == values[1] else "A" if values[0] > values[1] else "B"
    return Verdict(tuple(digits), scores["margin"], winner, scores["log_likelihood"])


class _Written(StoppingCriteria):
    """Stops a row once its new text contains a given text."""

    def __init__(self, pieces: TokenBytes, start: int, text: bytes) -> None:
        self._pieces, self._start, self._text = pieces, start, text

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        # A token holds at least one byte, so the last len(text) tokens hold the text when it has just been completed.
        tail = input_ids[:, max(self._start, input_ids.shape[1] - len(self._text)) :].tolist()
        return torch.tensor([self._text in b"".join(self._pieces.of(row)) for row in tail], device=input_ids.device)


def _cut(judge: JudgeModel, ids: Sequence[int], stop: bytes, ends: set[int]) -> tuple[int, ...]:
    """Drop everything after the stop text or the end of sequence."""
    text = b""
    for count, (token, piece) in enumerate(zip(ids, judge.pieces.of(list(ids)), strict=True), start=1):
        text += piece
        if token in ends or stop in text:
            return tuple(ids[:count])
    return tuple(ids)


def _before(judge: JudgeModel, ids: Sequence[int], closing: bytes) -> tuple[int, ...] | None:
    """Return the tokens wholly before the closing tag, without whitespace at the end; None without a tag."""
    pieces = judge.pieces.of(list(ids))
    end = b"".join(pieces).find(closing)
    kept: list[tuple[int, bytes]] = []
    for token, piece in zip(ids, pieces, strict=True):
        if sum(len(before) for _, before in kept) + len(piece) > end:
            break
        kept.append((token, piece))
    while kept and not kept[-1][1].strip():
        kept.pop()
    return tuple(token for token, _ in kept) if kept and end >= 0 else None


def _open_keys(rollouts: Sequence[Rollout], tokens: int) -> Tensor:
    """Return the (B, T) mask that is 0 at the criteria's positions."""
    mask_BT = torch.ones(len(rollouts), tokens, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        mask_BT[row, list(rollout.spans["criteria"].positions)] = 0
    return mask_BT


def _batches(rows: Sequence[Any], judge: JudgeModel, lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Yield batches of rows within the judge's `tokens_at_once`, at least one row each."""
    start = 0
    while start < len(rows):
        end, longest = start, 0
        while end < len(rows) and (
            end == start or max(longest, lengths[end]) * (end + 1 - start) <= judge.tokens_at_once
        ):
            longest = max(longest, lengths[end])
            end += 1
        yield list(rows[start:end])
        start = end


def _padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
