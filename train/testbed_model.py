"""A testbed's model: built untrained, fitted on completions, and sampled.

All but `build_model` take any causal model whose tokenizer has a chat template, pretrained ones too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cepo.files import replacing

_STATE_EVERY = 50  # steps; what a killed call does again at most


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Build an untrained Qwen3-shaped model of about half a million float32 parameters, in eval mode.

    Args:
        tokenizer: The world's tokenizer; gives the vocabulary and the special ids.
        seed: The same seed gives the same weights; the global random state is left as it was.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        # Near 1/sqrt(128). From the usual 0.02, made for wider models, judges don't learn to look words up in time.
        initializer_range=0.09,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    given: Sequence[str] | None = None,
    batch_size: int = 32,
    learning_rate: float = 2.5e-3,
    gain_rate: float = 10.0,
    autocast: bool = False,
    state: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a testbed's model on completions, each seen once, in order.

    Args:
        model: Trained in place and left in eval mode.
        tokenizer: The model's tokenizer.
        prompts: Contents of the user messages.
        completions: One per prompt, without the eos token.
        given: For each completion, the prefix of it that is not taught: no loss on its tokens. It is encoded apart
            from what follows, as `generate` encodes prefixes. None for none.
        batch_size: Samples per step; what is left over after whole batches is not seen.
        learning_rate: Peak of AdamW's schedule, above 0: linear over a tenth of the steps, then cosine to zero.
        gain_rate: Learning rate of the gains of norms, in units of `learning_rate`, above 0. Ten suits an untrained
            model, one a pretrained model, whose gains are right already.
        autocast: Run forward and backward passes in bfloat16; weights and optimiser keep the model's dtype.
        state: File that keeps weights, optimiser and losses every 50 steps. A call that finds it goes on from there, to
            the same weights as a call that was never killed; name it after all that decides them. None keeps nothing.
        progress: Called after every step with the number of steps done and the loss.

    Returns:
        The loss of every step: mean negative log-likelihood, in nats, over taught completion tokens and eos.
    """
    steps = len(prompts) // batch_size
    prompt_ids = _encode_prompts(tokenizer, prompts)
    openings = [""] * len(prompts) if given is None else list(given)
    cut = [
        text.removeprefix(opening) + tokenizer.eos_token for text, opening in zip(completions, openings, strict=True)
    ]
    given_ids, taught_ids = _encode(tokenizer, openings), _encode(tokenizer, cut)
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    # The gains of norms set how sharp attention and logits are. At the matrices' rate they would hardly move in so few
    # steps, and a soft head samples stray tokens.
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "lr": gain_rate * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / steps, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
    )
    losses: list[float] = []
    if state is not None and state.is_file():
        kept = torch.load(state, map_location=model.device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        losses = kept["losses"]
    model.train()
    for step in range(len(losses), steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        contexts = [prompt + opening for prompt, opening in zip(prompt_ids[batch], given_ids[batch], strict=True)]
        pairs = list(zip(contexts, taught_ids[batch], strict=True))
        ids_BT = _pad([context + taught for context, taught in pairs], tokenizer.pad_token_id, "right")
        labels_BT = _pad([[-100] * len(context) + taught for context, taught in pairs], -100, "right")
        # No attention mask: padding lies at the right, where a causal model never looks.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids_BT.to(model.device), labels=labels_BT.to(model.device), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if state is not None and len(losses) % _STATE_EVERY == 0:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(state) as unfinished:
                torch.save({**kept, "schedule": schedule.state_dict(), "losses": losses}, unfinished)
        if progress is not None:
            progress(step + 1, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    prefixes: Sequence[str] | None = None,
    max_new_tokens: int = 48,
) -> list[str]:
    """Complete the contents of user messages; see `cepo.train.testbed_judges.judge_items`."""
    if temperature < 0.0 or batch_size < 1 or max_new_tokens < 1:
        came = f"temperature is {temperature}, batch_size {batch_size}, max_new_tokens {max_new_tokens}"
        raise ValueError(f"{came}; expected at least 0, 1 and 1")
    openings = [""] * len(prompts) if prefixes is None else list(prefixes)
    if len(openings) != len(prompts):
        raise ValueError(f"prefixes holds {len(openings)} texts for {len(prompts)} prompts; expected one per prompt")
    if not prompts:
        return []
    opened = zip(_encode_prompts(tokenizer, prompts), _encode(tokenizer, openings), strict=True)
    contexts = [prompt + opening for prompt, opening in opened]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        # Truncation off, which is generate's default: what is sampled is the policy itself.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # The end that the judge was taught, which its generation config may not name.
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    texts: list[str] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for start in range(0, len(contexts), batch_size):
            rows = contexts[start : start + batch_size]
            ids_BT = _pad(rows, tokenizer.pad_token_id, "left").to(model.device)
            mask_BT = _pad([[1] * len(row) for row in rows], 0, "left").to(model.device)
            output_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, **sampling)
            texts += tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
    return [opening + text for opening, text in zip(openings, texts, strict=True)]


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, texts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False).input_ids  # the template has its own


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)
