"""Judgements generated with vLLM on this machine, if it is installed."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cepo.eval.judges.encoding import FORCED_TOKENS, Likely, PromptEncoder, TextReader
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages, row_seed
from cepo.jacobian.loading import ModelSource, load_tokenizer

_CHUNK = 256  # prompts per call, after which judgements are yielded; vLLM batches within
_TOP = 20  # alternatives per token, vLLM's default limit


class VllmJudge:
    """A judge that generates with a vLLM engine.

    Args:
        source: a folder, an adapter folder (LoRA on its base model), or a hub id.
        settings: how to generate.
    """

    def __init__(self, source: ModelSource, settings: JudgeSettings) -> None:
        # Imported by name, since vLLM is optional and type checkers may not find it.
        vllm = importlib.import_module("vllm")
        tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
        self.prompts = PromptEncoder(tokenizer, settings)
        self.texts = TextReader(tokenizer, self.prompts.opened, settings.verdicts)
        self._settings = settings
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

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of each prompt and its judgement, in order."""
        for start in range(0, len(prompts), _CHUNK):
            yield from enumerate(self._judge_chunk(prompts[start : start + _CHUNK]), start)

    def _judge_chunk(self, prompts: Sequence[Messages]) -> list[Judgement]:
        started = time.perf_counter()
        encoded, found = self.prompts.encode_all(prompts)
        seeds = {row: row_seed(self._settings.seed, prompts[row]) for row in encoded}
        most = self._settings.max_new_tokens
        for row, output in self._generate(encoded, seeds, most).items():
            found[row] = self.texts.judgement(output.token_ids, self._likely(output.logprobs), most)
        if self._settings.force_format:
            self._force(encoded, seeds, found)
        seconds = (time.perf_counter() - started) / len(prompts)
        return [replace(found[row], seconds=seconds) for row in range(len(prompts))]

    def _force(
        self, encoded: Mapping[int, Sequence[int]], seeds: Mapping[int, int], found: dict[int, Judgement]
    ) -> None:
        """Replace judgements without a verdict by ones with forced scores."""
        before: dict[int, list[int]] = {}
        for row in encoded:
            if found[row].scores is None:
                token_ids = found[row].token_ids or ()
                written = [token for token, piece in zip(token_ids, self.texts.pieces(token_ids), strict=True) if piece]
                before[row] = [*written, *self.texts.opening_ids(found[row].text)]
        whole = {row: [*encoded[row], *ids] for row, ids in before.items()}
        seeds = {row: seeds[row] + 1 for row in before}
        outputs = self._generate(whole, seeds, FORCED_TOKENS, allowed_token_ids=self.texts.score_ids)
        for row, output in outputs.items():
            likely = self._likely(output.logprobs)
            found[row] = self.texts.forced_judgement(found[row], before[row], output.token_ids, likely)

    def _generate(
        self, encoded: Mapping[int, Sequence[int]], seeds: Mapping[int, int], budget: int, **options: Any
    ) -> dict[int, Any]:
        """Return vLLM's output by row."""
        if not encoded:
            return {}
        prompts = [{"prompt_token_ids": list(ids)} for ids in encoded.values()]
        sampling = [
            self._sampling(
                temperature=self._settings.temperature, max_tokens=budget, seed=seeds[row], logprobs=_TOP, **options
            )
            for row in encoded
        ]
        results = self._engine.generate(prompts, sampling, use_tqdm=False, **self._request)
        return {row: result.outputs[0] for row, result in zip(encoded, results, strict=True)}

    def _likely(self, logprobs: Sequence[Mapping[int, Any]] | None) -> Likely:
        def likely(at: int) -> Mapping[bytes, float]:
            if logprobs is None or not 0 <= at < len(logprobs):
                return {}
            ids = list(logprobs[at])
            values = (math.exp(logprobs[at][token].logprob) for token in ids)
            return dict(zip(self.texts.pieces(ids), values, strict=True))

        return likely
