"""Reward models: models whose forward pass gives one number for a text, read at the text's last token.

There are two forms. A *Bradley-Terry* model is a sequence classifier with one output, the reward of a response. A
*pairwise* model is a causal language model that is shown two responses; its number is the logit of "A" minus that of
"B".

transformers finds the last token by its id: where padding and end of turn share an id it reads the wrong token, and
with embeddings as input yet another. Here the attention mask alone says where a text ends.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cepo.jacobian.loading import (
    ModelSource,
    load_adapter,
    load_model,
    load_tokenizer,
    loading,
    read_config,
    read_weights,
)
from cepo.jacobian.reward_form import Form

VERDICTS = ("A", "B")
HEAD = "score"
"""Name of a classifier's head; an adapter saves all of its weights."""
_IGNORED = ("labels", "return_dict")  # PEFT passes them on; no loss is computed, and the output is always a dataclass


def load_reward_model(
    source: ModelSource,
    form: Form,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) of a reward model; pass the model to `read_last_token` next.

    Args:
        source: from `resolve_model`: a causal language model, which for Bradley-Terry is given a new head, a sequence
            classifier with one output, or an adapter of either with its head.
        form: "bradley-terry" or "pairwise".
        dtype: see `load_model`.
        device: see `load_model`.
        seed: seed of a new head.
        trust_remote_code: see `load_model`.

    Raises:
        ValueError: for a model that cannot be loaded, has more than one output, or is not of that form.
    """
    model, tokenizer = _load(source, form, dtype, seed, trust_remote_code)
    return model.to(device).eval(), tokenizer


def new_head(causal_lm: Any, *, seed: int) -> Any:
    """Return a sequence classifier with one output that shares the layers of a causal language model.

    Args:
        causal_lm: a Hugging Face model for which transformers has a sequence classifier with a linear head.
        seed: seed of the head's weights, normal with standard deviation `initializer_range` of the model's config.

    Raises:
        ValueError: if transformers has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        head = getattr(model, HEAD)
        setattr(model, model.base_model_prefix, getattr(causal_lm, causal_lm.base_model_prefix))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"model is a {type(causal_lm).__name__}, which cannot be made a reward model: {error}"
        ) from error
    weight = causal_lm.get_input_embeddings().weight
    fresh = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    nn.init.normal_(
        fresh.weight,
        std=getattr(config.get_text_config(), "initializer_range", 0.02),
        generator=torch.Generator().manual_seed(seed),
    )
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    setattr(model, HEAD, fresh.to(device=weight.device, dtype=weight.dtype))
    unset = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unset:
        raise ValueError(f"model is a {type(causal_lm).__name__}, whose classifier has other weights too: {unset[0]}")
    model.name_or_path = causal_lm.name_or_path
    return model.eval()


def read_last_token(model: Any, verdict_ids: tuple[int, int] | None = None) -> Any:
    """Make a model's forward pass return one number per text, and return the model.

    The number is read at the last token in the attention mask, whatever its id and on whichever side the padding is;
    position ids count the mask's tokens. The forward pass takes `input_ids` or `inputs_embeds` and returns `logits`
    (B, 1).

    Args:
        model: a sequence classifier with one output, or a causal language model, PEFT-wrapped or not; changed in place.
        verdict_ids: ids of the two verdicts of a causal language model; None for a classifier.

    Raises:
        ValueError: for a classifier with more outputs, or without a linear head named `score`; for an encoder-decoder.
    """
    wrapped, model = model, model.get_base_model() if hasattr(model, "get_base_model") else model
    if verdict_ids is None:
        outputs = getattr(model.config, "num_labels", None)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"model is a {type(model).__name__}, an encoder-decoder; expected a decoder-only model")
        if outputs != 1 or not hasattr(model, HEAD):
            raise ValueError(
                f"model is a {type(model).__name__} with {outputs} outputs; expected a sequence classifier with one, "
                f"computed by a layer named {HEAD}"
            )
        read = _read_head
    else:
        model.config.num_labels = 1  # TRL's RewardTrainer requires it
        read = partial(_read_verdict, verdict_ids=verdict_ids)
    layers = getattr(model, model.base_model_prefix)
    takes = frozenset(inspect.signature(type(layers).forward).parameters)

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds is given; expected one of them")
        mask_BT = given.new_ones(given.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask.long()
        if "position_ids" in takes and options.get("position_ids") is None:
            options["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        last_B = (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(-1)
        options = {name: value for name, value in options.items() if value is not None and name not in _IGNORED}
        options |= {"input_ids": input_ids, "attention_mask": mask_BT, "inputs_embeds": inputs_embeds}
        return SequenceClassifierOutputWithPast(logits=read(self, last_B, options))

    model.forward = types.MethodType(forward, model)
    return wrapped


def rewards(model: Any, texts: Sequence[Sequence[int]], *, batch_size: int = 64) -> list[float]:
    """Return the number that a model gives each text.

    Args:
        model: from `read_last_token`, in eval mode.
        texts: token ids of each, without padding. Equal texts are run once, and texts of similar length together.
        batch_size: texts per forward pass, at least 1.
    """
    device = model.get_input_embeddings().weight.device
    different = sorted({tuple(text) for text in texts}, key=lambda text: (len(text), text))
    found: dict[tuple[int, ...], float] = {}
    for start in range(0, len(different), batch_size):
        batch = different[start : start + batch_size]
        ids_BT, mask_BT = as_batch(batch)
        with torch.no_grad():
            output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
        found |= zip(batch, output.logits[:, 0].tolist(), strict=True)
    return [found[tuple(text)] for text in texts]


def as_batch(texts: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both (B, T) int64; padding has id 0, as a token of the text may have."""
    tensors = [torch.tensor(list(ids), dtype=torch.long) for ids in texts]
    ids_BT = pad_sequence(tensors, batch_first=True, padding_side=side)
    mask_BT = pad_sequence([torch.ones_like(ids) for ids in tensors], batch_first=True, padding_side=side)
    return ids_BT, mask_BT


def verdict_ids(tokenizer: Any, prompt: str) -> tuple[int, int]:
    """Return the ids of the tokens A and B after a prompt.

    Raises:
        ValueError: if either is not a single token there.
    """
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = []
    for verdict in VERDICTS:
        after = tokenizer(prompt + verdict, add_special_tokens=False)["input_ids"]
        if after[: len(before)] != before or len(after) != len(before) + 1:
            raise ValueError(f"the verdict {verdict!r} is not one token after the prompt, which ends {prompt[-20:]!r}")
        found.append(int(after[-1]))
    return found[0], found[1]


def is_classifier(source: ModelSource) -> bool:
    """Return whether a model is a sequence classifier, or an adapter of one, according to its config.

    Raises:
        ValueError: if the config cannot be read.
    """
    if source.base is not None:
        settings = read_config(Path(source.location) / "adapter_config.json")
        return bool(settings.get("task_type") == "SEQ_CLS")
    if source.gguf_file:
        return False
    from transformers import PretrainedConfig

    with loading("reward model", source):
        config, _ = PretrainedConfig.get_config_dict(source.location)
    return any("SequenceClassification" in name for name in config.get("architectures") or ())


def _load(source: ModelSource, form: Form, dtype: str, seed: int, trust_remote_code: bool) -> tuple[Any, Any]:
    if source.base is not None:
        base, _ = _load(source.base, form, dtype, seed, trust_remote_code)
        model = load_adapter(source, base, trust_remote_code=trust_remote_code)
        return model, load_tokenizer(source, trust_remote_code=trust_remote_code)
    if is_classifier(source):
        if form == "pairwise":
            raise ValueError(f"model {source.name!r} is a sequence classifier; expected a causal LM for form pairwise")
        return _load_classifier(source, dtype, trust_remote_code)
    model, tokenizer = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    return (new_head(model, seed=seed) if form == "bradley-terry" else model), tokenizer


def _load_classifier(source: ModelSource, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    with loading("reward model", source):
        model = read_weights(
            AutoModelForSequenceClassification, source, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model, load_tokenizer(source, trust_remote_code=trust_remote_code)


def _read_head(model: Any, last_B: Tensor, options: dict[str, Any]) -> Tensor:
    hidden_BTD = getattr(model, model.base_model_prefix)(**options).last_hidden_state
    reward_B1: Tensor = getattr(model, HEAD)(hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
    return reward_B1


def _read_verdict(model: Any, last_B: Tensor, options: dict[str, Any], *, verdict_ids: tuple[int, int]) -> Tensor:
    columns, place_B = torch.unique(last_B, return_inverse=True)
    logits_BNV = type(model).forward(model, logits_to_keep=columns, **options).logits
    logits_BV = logits_BNV[torch.arange(len(last_B), device=last_B.device), place_B]
    difference_B: Tensor = logits_BV[:, verdict_ids[0]] - logits_BV[:, verdict_ids[1]]
    return difference_B.unsqueeze(-1)
