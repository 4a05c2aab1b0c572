"""Judgements generated with transformers, in batches that share the keys and values of the instructions.

Nothing is run twice: the probabilities of numbers are kept during generation, so that expected scores need no second
pass, and a forced verdict continues from the cache of the text before it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

from cepo.eval.judges.encoding import FORCED_TOKENS, PromptEncoder, TextReader
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages, row_seed
from cepo.jacobian.positions import position_limit
from cepo.jacobian.reading.thought import THOUGHT
from cepo.train.prompt_length import why_too_long

_WORTH_SHARING = 16  # least tokens of a common prefix


class TransformersJudge:
    """A judge that generates with a transformers model.

    Args:
        model: any causal language model that generates.
        tokenizer: its tokenizer.
        settings: how to generate.

    Raises:
        ValueError: for a tokenizer without a chat template unless `settings.raw` is set.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: JudgeSettings) -> None:
        self.prompts = PromptEncoder(tokenizer, settings)
        self.texts = TextReader(tokenizer, self.prompts.opened, settings.verdicts)
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._ends = _end_ids(model, tokenizer)
        self._pad = next(
            (token for token in (tokenizer.pad_token_id, *sorted(self._ends)) if token is not None and token >= 0), 0
        )
        self._context = position_limit(model.config)
        self._room = settings.max_new_tokens  # most tokens after a prompt, including a forced verdict
        if settings.force_format:
            self._room += len(self.texts.opening_ids(f"<{THOUGHT}>")) + FORCED_TOKENS

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of each prompt and its judgement; prompts of similar length are generated together."""
        encoded, failed = self.prompts.encode_all(prompts)
        for row in list(encoded):
            if reason := why_too_long(len(encoded[row]), self._room, self._context):
                failed[row] = Judgement("", error=reason)
                del encoded[row]
        yield from failed.items()
        prefix = _common_prefix(list(encoded.values()))
        cache = self._shared_cache(prefix) if len(prefix) >= _WORTH_SHARING else None
        # The longest first, so that a batch that does not fit in memory fails at once.
        runnable = sorted(encoded, key=lambda row: -len(encoded[row]))
        for start in range(0, len(runnable), self._settings.batch_size):
            rows = runnable[start : start + self._settings.batch_size]
            ids_rows = [encoded[row] for row in rows]
            seeds = [row_seed(self._settings.seed, prompts[row]) for row in rows]
            yield from zip(rows, self._judge_batch(ids_rows, seeds, len(prefix), cache), strict=True)

    def _judge_batch(
        self, ids_rows: list[list[int]], seeds: list[int], shared: int, cache: DynamicCache | None
    ) -> list[Judgement]:
        """Generate for prompts whose first `shared` tokens are in the cache; out of memory halves the batch."""
        started = time.perf_counter()
        try:
            drafts = self._write(ids_rows, seeds, shared, cache)
        except torch.OutOfMemoryError:
            if len(ids_rows) == 1:
                raise
            half = len(ids_rows) // 2
            return self._judge_batch(ids_rows[:half], seeds[:half], shared, cache) + self._judge_batch(
                ids_rows[half:], seeds[half:], shared, cache
            )
        seconds = (time.perf_counter() - started) / len(ids_rows)
        return [replace(draft, seconds=seconds) for draft in drafts]

    def _write(
        self, ids_rows: list[list[int]], seeds: list[int], shared: int, cache: DynamicCache | None
    ) -> list[Judgement]:
        shared = shared if cache is not None else 0
        padded = [_padded(ids, max(map(len, ids_rows)), shared, self._pad) for ids in ids_rows]
        ids_BT, mask_BT = (torch.tensor([row[part] for row in padded]) for part in (0, 1))
        batch_cache = None
        if cache is not None:
            batch_cache = copy.deepcopy(cache)
            batch_cache.batch_repeat_interleave(len(ids_rows))
        sequences_BT, probabilities, left = self._generate(ids_BT, mask_BT, batch_cache, seeds)
        drafts = [
            self.texts.judgement(
                self._cut(sequences_BT[row, ids_BT.shape[1] :].tolist()),
                self.texts.likely_numbers(probabilities[:, row]),
                self._settings.max_new_tokens,
            )
            for row in range(len(ids_rows))
        ]
        unread = [draft.scores is None for draft in drafts]
        if not self._settings.force_format or not any(unread):
            return drafts
        forced = self._force(ids_rows, drafts, sequences_BT, mask_BT, left, seeds)
        return [after if missing else draft for draft, after, missing in zip(drafts, forced, unread, strict=True)]

    def _generate(
        self, ids_BT: Tensor, mask_BT: Tensor, cache: Any, seeds: list[int], *, forced: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sequences (B, T + new), the probabilities of the numbers (new, B, N), and the cache."""
        device, width = self._model.device, ids_BT.shape[1]
        allowed = self.texts.forced_ids if forced else None
        watcher = _Watcher(self.texts.number_ids, allowed, self._settings.temperature, seeds, width)
        stop = _StopWhere(self.texts.is_boxed if forced else self.texts.is_judged, width)
        config = GenerationConfig(
            max_new_tokens=FORCED_TOKENS if forced else self._settings.max_new_tokens,
            do_sample=False,  # `_Watcher` adds noise that makes the greedy choice a sample, independent for each row
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._pad,
            return_dict_in_generate=True,
        )
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([watcher]),
                stopping_criteria=StoppingCriteriaList([stop]),
                past_key_values=cache,
            )
        return out.sequences.cpu(), torch.stack(watcher.steps).cpu(), getattr(out, "past_key_values", None)

    def _cut(self, token_ids: list[int]) -> list[int]:
        """Drop the padding that `generate` appends to rows that end before others, and text after the verdict."""
        length = next((at + 1 for at, token in enumerate(token_ids) if token in self._ends), len(token_ids))
        return token_ids[: min(length, self.texts.verdict_length(token_ids[:length]) or length)]

    def _force(
        self,
        ids_rows: list[list[int]],
        drafts: list[Judgement],
        sequences_BT: Tensor,
        mask_BT: Tensor,
        cache: Any,
        seeds: list[int],
    ) -> list[Judgement]:
        """Append the opening of the scores to every row and continue generating, from the cache if it can be masked."""
        written = [_without_end(draft.token_ids or (), self._ends) for draft in drafts]
        openings = [self.texts.opening_ids(draft.text) for draft in drafts]
        befores = [[*ids, *opening] for ids, opening in zip(written, openings, strict=True)]
        if cache is not None and _is_plain(cache):
            total, width = sequences_BT.shape[1], mask_BT.shape[1]
            ids_BT = torch.full((len(ids_rows), total + max(map(len, openings))), self._pad)
            mask = torch.zeros_like(ids_BT)
            ids_BT[:, :total], mask[:, :width] = sequences_BT, mask_BT
            for row, opening in enumerate(openings):
                mask[row, width : width + len(written[row])] = 1
                ids_BT[row, -len(opening) :] = torch.tensor(opening)
                mask[row, -len(opening) :] = 1
        else:
            cache = None
            whole = [[*ids, *before] for ids, before in zip(ids_rows, befores, strict=True)]
            padded = [_padded(ids, max(map(len, whole)), 0, self._pad) for ids in whole]
            ids_BT, mask = (torch.tensor([row[part] for row in padded]) for part in (0, 1))
        sequences, probabilities, _ = self._generate(ids_BT, mask, cache, [seed + 1 for seed in seeds], forced=True)
        return [
            self.texts.forced_judgement(
                drafts[row],
                befores[row],
                self._cut(sequences[row, ids_BT.shape[1] :].tolist()),
                self.texts.likely_numbers(probabilities[:, row]),
            )
            for row in range(len(ids_rows))
        ]

    def _shared_cache(self, prefix: list[int]) -> DynamicCache | None:
        """Run the common prefix once; None for models whose caches hold more than keys and values per token."""
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        if not _is_plain(cache):
            return None
        with torch.no_grad():
            self._model(
                input_ids=torch.tensor([prefix], device=self._model.device),
                past_key_values=cache,
                use_cache=True,
            )
        return cache if cache.get_seq_length() == len(prefix) else None


class _Watcher(LogitsProcessor):
    """Records the probabilities of numbers at each step, at temperature 1; then samples, restricted to allowed tokens.

    The argmax of the logits over the temperature plus Gumbel noise is a sample from their softmax. Each row has its own
    generator, so that its samples do not depend on other rows.

    Args:
        number_ids: the tokens whose probabilities are recorded.
        allowed: maps the ids that a row has generated to the ids that may follow; an empty result allows all.
        temperature: 0 is greedy.
        seeds: one seed per row.
        width: tokens of the prompts, including padding.
    """

    def __init__(
        self,
        number_ids: Sequence[int],
        allowed: Callable[[Sequence[int]], Sequence[int]] | None,
        temperature: float,
        seeds: Sequence[int],
        width: int,
    ) -> None:
        self.steps: list[Tensor] = []
        self._number_ids, self._allowed, self._temperature, self._width = list(number_ids), allowed, temperature, width
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True)
        self.steps.append((logits_BV[:, self._number_ids] - normaliser_B1).exp())
        if self._temperature:
            width = logits_BV.shape[1]
            noise_BV = torch.stack([torch.empty(width).exponential_(generator=draw) for draw in self._generators])
            logits_BV = logits_BV / self._temperature - noise_BV.log().to(logits_BV)
        if self._allowed is None:
            return logits_BV
        restricted_BV = torch.full_like(logits_BV, -torch.inf)
        for row, written in enumerate(input_ids[:, self._width :].tolist()):
            ids = list(self._allowed(written)) or slice(None)
            restricted_BV[row, ids] = logits_BV[row, ids]
        return restricted_BV


class _StopWhere(StoppingCriteria):
    """Ends a row when the ids that it has generated are complete."""

    def __init__(self, ended: Callable[[Sequence[int]], bool], width: int) -> None:
        self._ended, self._width = ended, width
        self._done: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, written in enumerate(input_ids[:, self._width :].tolist()):
            if row not in self._done and self._ended(written):
                self._done.add(row)
        return torch.tensor([row in self._done for row in range(len(input_ids))], device=input_ids.device)


def _padded(ids: list[int], width: int, shared: int, pad: int) -> tuple[list[int], list[int]]:
    """Return the ids and mask of a prompt that is padded to `width` after its shared prefix."""
    missing = width - len(ids)
    return (
        [*ids[:shared], *[pad] * missing, *ids[shared:]],
        [*[1] * shared, *[0] * missing, *[1] * (len(ids) - shared)],
    )


def _is_plain(cache: Any) -> bool:
    """Tell whether the cache holds only keys and values of every token, so that padding can be masked."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _common_prefix(ids_rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest common prefix that leaves at least one token of each row."""
    if len(ids_rows) < 2:
        return []
    shared = 0
    for tokens in zip(*ids_rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return list(ids_rows[0][: min(shared, min(map(len, ids_rows)) - 1)])


def _without_end(token_ids: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    return tuple(token_ids[:-1]) if token_ids and token_ids[-1] in ends else tuple(token_ids)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    return frozenset(int(token) for token in ids if token is not None)
