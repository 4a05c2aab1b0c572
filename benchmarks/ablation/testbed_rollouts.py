"""Write rollouts of the testbed's lazy judge, and the judge itself; takes seconds on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cepo.files import make_folder, replacing, write_jsonl
from cepo.train import testbed, testbed_judges
from cepo.train.policy import load_testbed_judge

_ITEMS_SEED = 11  # no judge was warmed up with it


def write_testbed_rollouts(
    folder: Path,
    *,
    prompts: int = 32,
    completions: int = 8,
    max_new_tokens: int = 48,
) -> tuple[Path, Path]:
    """Sample groups of completions from the lazy judge at temperature 1, and write them with the judge.

    Rows hold the sampled token ids with the end of sequence, and a task reward of 1 if the verdict is right, else 0.

    Args:
        folder: folder for `judge/` (model and tokenizer) and `rollouts.jsonl`.
        prompts: number of groups, at least 1.
        completions: completions of each prompt, at least 1.
        max_new_tokens: largest number of tokens of a completion, at least 1.

    Returns:
        The judge's folder and the file of rollouts, for --model and --input.

    Raises:
        ValueError: for a number out of range.
    """
    if completions < 1 or max_new_tokens < 1:
        raise ValueError(f"completions is {completions}, max_new_tokens {max_new_tokens}; expected at least 1 each")
    items = testbed.generate_items(prompts, seed=_ITEMS_SEED, cue_agreement=0.9)
    model, tokenizer = load_testbed_judge("lazy", steps=300, seed=0)
    rows: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
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
    make_folder(folder)
    with replacing(folder / "judge") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    write_jsonl(folder / "rollouts.jsonl", rows)
    return folder / "judge", folder / "rollouts.jsonl"
