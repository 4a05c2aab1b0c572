"""Judgements generated with vLLM on this machine, where it is installed."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cepo.eval.judges.encoding import PromptEncoder, TextReader
from cepo.eval.judges.settings import (
    FORCED_TOKENS,
    Judgement,
    JudgeSettings,
    Messages,
    OnDone,
    row_seed,
)
from cepo.jacobian.loading import ModelSource, load_tokenizer
from cepo.jacobian.reading.judge import SCORES_CLOSING, forced_opening, read_scores

_CHUNK = 256  # prompts after which judgements are handed over; vLLM batches within
_TOP = 20  # tokens whose log-probabilities are asked for, vLLM's own default limit


class VllmJudge:
    """Owns a vLLM engine.

    Args:
        source: a folder, an adapter folder (a LoRA on its base model), or a hub id.
        settings: how to generate.
    """

    def __init__(self, source: ModelSource, settings: JudgeSettings) -> None:
        # Imported by name: vLLM is no requirement, and nothing of it is known to a checker where it is missing.
        vllm = importlib.import_module("vllm")
        tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
        self.prompts = PromptEncoder(tokenizer, settings)
        self.texts = TextReader(tokenizer, self.prompts.opened)
        self._settings, self._tokenizer = settings, tokenizer
        options: dict[str, Any] = {}
        self._request: dict[str, Any] = {}
        location = source.location
        if source.base is not None:
            location, options["enable_lora"] = source.base.location, True
            self._request["lora_request"] = importlib.import_module("vllm.lora.request").LoRARequest(
                "adapter", 1, source.location
            )
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=location,
            dtype=settings.dtype,
            seed=settings.seed,
            trust_remote_code=settings.trust_remote_code,
            enable_prefix_caching=True,
            **options,
        )

    def judge(self, prompts: Sequence[Messages], on_done: OnDone | None = None) -> list[Judgement]:
        """Return one judgement a prompt, in their order."""
        judgements: list[Judgement] = []
        for start in range(0, len(prompts), _CHUNK):
            for judgement in self._judge_chunk(prompts[start : start + _CHUNK]):
                if on_done is not None:
                    on_done(len(judgements), judgement)
                judgements.append(judgement)
        return judgements

    def _judge_chunk(self, prompts: Sequence[Messages]) -> list[Judgement]:
        started = time.perf_counter()
        encoded: dict[int, list[int]] = {}
        found: dict[int, Judgement] = {}
        for row, messages in enumerate(prompts):
            ids = self.prompts.encode(messages)
            if isinstance(ids, str):
                found[row] = Judgement("", error=ids)
            else:
                encoded[row] = ids
        rows, ids_rows = list(encoded), list(encoded.values())
        seeds = [row_seed(self._settings.seed, prompts[row]) for row in rows]
        for row, output in zip(rows, self._generate(ids_rows, seeds, self._settings.max_new_tokens), strict=True):
            token_ids = tuple(output.token_ids)
            pieces = self.texts.pieces(token_ids)
            soft = self.texts.expected(pieces, self._likely(output.logprobs))
            found[row] = Judgement(self.texts.text(token_ids), token_ids, soft, len(token_ids))
        if self._settings.force_format:
            unread = [place for place, row in enumerate(rows) if read_scores(found[row].text) is None]
            self._force(unread, rows, ids_rows, seeds, found)
        seconds = (time.perf_counter() - started) / len(prompts)
        return [Judgement(**{**found[row].__dict__, "seconds": seconds}) for row in range(len(prompts))]

    def _force(
        self,
        places: Sequence[int],
        rows: Sequence[int],
        ids_rows: Sequence[Sequence[int]],
        seeds: Sequence[int],
        found: dict[int, Judgement],
    ) -> None:
        befores = []
        for place in places:
            draft = found[rows[place]]
            opening = self._tokenizer(forced_opening(draft.text), add_special_tokens=False)["input_ids"]
            written = [token for token, piece in zip(*self._with_pieces(draft), strict=True) if piece]
            befores.append([*written, *opening])
        whole = [[*ids_rows[place], *before] for place, before in zip(places, befores, strict=True)]
        seeds = [seeds[place] + 1 for place in places]
        outputs = self._generate(whole, seeds, FORCED_TOKENS, allowed_token_ids=self.texts.score_ids)
        for place, before, output in zip(places, befores, outputs, strict=True):
            pieces = self.texts.pieces(output.token_ids)
            count = next((at + 1 for at, piece in enumerate(pieces) if b"}" in piece), len(pieces))
            token_ids = (*before, *output.token_ids[:count])
            closed = [*self.texts.pieces(token_ids), SCORES_CLOSING.encode()]
            likely, shift = self._likely(output.logprobs), len(before)
            soft = self.texts.expected(closed, lambda at, likely=likely, shift=shift: likely(at - shift))  # type: ignore[misc]
            tokens = found[rows[place]].tokens + count
            found[rows[place]] = Judgement(self.texts.text_of(closed), token_ids, soft, tokens, forced=True)

    def _with_pieces(self, draft: Judgement) -> tuple[Sequence[int], list[bytes]]:
        """Return the ids of a draft and their bytes, of which the end of the turn has none."""
        token_ids = draft.token_ids or ()
        return token_ids, self.texts.pieces(token_ids)

    def _generate(
        self, ids_rows: Sequence[Sequence[int]], seeds: Sequence[int], budget: int, **options: Any
    ) -> list[Any]:
        if not ids_rows:
            return []
        prompts = [{"prompt_token_ids": list(ids)} for ids in ids_rows]
        sampling = [
            self._sampling(
                temperature=self._settings.temperature, max_tokens=budget, seed=seed, logprobs=_TOP, **options
            )
            for seed in seeds
        ]
        results = self._engine.generate(prompts, sampling, use_tqdm=False, **self._request)
        return [result.outputs[0] for result in results]

    def _likely(self, logprobs: Sequence[Mapping[int, Any]] | None) -> Callable[[int], Mapping[bytes, float]]:
        def likely(at: int) -> Mapping[bytes, float]:
            if logprobs is None or not 0 <= at < len(logprobs):
                return {}
            ids = list(logprobs[at])
            values = (math.exp(logprobs[at][token].logprob) for token in ids)
            return dict(zip(self.texts.pieces(ids), values, strict=True))

        return likely
