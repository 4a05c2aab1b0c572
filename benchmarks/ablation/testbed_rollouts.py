"""Rollouts of the embedded testbed's judge in a file, with the judge in a folder: real ones, in seconds on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from cepo.train import testbed, testbed_judges
from cepo.train.policy import load_testbed_judge


def write_testbed_rollouts(
    folder: Path,
    *,
    prompts: int = 32,
    completions: int = 8,
    judge: testbed_judges.Judge = "lazy",
    steps: int = 300,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> tuple[Path, Path]:
    """Sample groups of completions from a testbed judge at temperature 1, and write them with the judge.

    Rows hold the sampled ids themselves, end of sequence kept, and whether the verdict is right as the task reward.

    Args:
        folder: where `judge/` (model and tokenizer) and `rollouts.jsonl` go.
        prompts: number of groups, at least 1.
        completions: completions of each prompt, at least 1.
        judge: which judge, see `cepo.train.testbed_judges.warm_start`; from the cache or warmed up now.
        steps: of its warm-up.
        seed: of weights, items and sampling.
        max_new_tokens: most tokens of a completion.

    Returns:
        The judge's folder and the file, for --model and --input.

    Raises:
        ValueError: for a number out of range or an unknown judge.
    """
    if completions < 1 or max_new_tokens < 1:
        raise ValueError(f"completions is {completions}, max_new_tokens {max_new_tokens}; expected at least 1 each")
    items = testbed.generate_items(prompts, seed=seed + 11, cue_agreement=0.9)
    model, tokenizer = load_testbed_judge(judge, steps=steps, seed=seed)
    rows: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for number, item in enumerate(items):
            messages = [{"role": "user", "content": item.prompt}]
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            sampled_BT = model.generate(
                **{name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")},
                max_new_tokens=max_new_tokens,
                num_return_sequences=completions,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            length = encoded["input_ids"].shape[1]
            for place, ids in enumerate(sampled_BT[:, length:].tolist()):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                rows.append(
                    {
                        "id": f"{number}-{place}",
                        "prompt_ids": encoded["input_ids"][0].tolist(),
                        "completion_ids": ids[:end],
                        "task_reward": testbed_judges.accuracy([text], [item]),
                    }
                )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    unfinished = folder / "rollouts.jsonl.tmp"
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, folder / "rollouts.jsonl")
    return folder / "judge", folder / "rollouts.jsonl"
