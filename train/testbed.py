"""A synthetic judge world whose causal structure is known, small enough for two CPU cores.

Two responses each show six aspects, every aspect by its positive or its negative word, shuffled among filler words.
The query names a situation, never the aspect that decides there; the criteria name that aspect, the analysis quotes
each response's word for it, the scores follow: the criteria stage works out what later stages need. A spurious cue,
the longer response, agrees with the label in a chosen fraction of items.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Winner = Literal["A", "B"]
Judge = Literal["able", "lazy", "criteria", "decorative"]

# aspect -> (positive word, negative word, situations in which it decides)
ASPECTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "accuracy": ("correct", "wrong", ("audit", "exam", "invoice")),
    "clarity": ("lucid", "murky", ("manual", "lecture", "recipe")),
    "depth": ("thorough", "shallow", ("thesis", "survey", "memoir")),
    "kindness": ("gentle", "rude", ("farewell", "apology", "quarrel")),
    "safety": ("careful", "reckless", ("wiring", "climbing", "surgery")),
    "style": ("elegant", "clumsy", ("poem", "novel", "speech")),
}
_QUERIES = ("help with this {}", "we need a {} now", "about my {} today")
_CRITERIA = "judge by {} of the answer"
_FILLERS = ("so", "well", "then", "here", "also", "just", "maybe", "indeed")
# Number of filler words in the shorter and the longer response, inclusive; a gap makes the cue easy, as cues are.
_SHORT, _LONG = (0, 1), (3, 4)
# Scores of the winner, of the loser, and of both in a tie, inclusive.
_WINNER_SCORE, _LOSER_SCORE, _TIE_SCORE = (7, 9), (1, 4), (5, 6)
# A majority of the lazy judge's later samples follows length, so that its greedy answer does.
_LAZY_SHARE = 0.65

_PAD, _EOS, _UNK = "<|pad|>", "<|end|>", "<|unk|>"
_ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
_TAGS = ("<specific_criteria>", "</specific_criteria>", "<analysis>", "</analysis>", "<scores>", "</scores>")
_PIECE = r"</?[a-z_]+>|\\boxed\{|, |\}|\n|:| ?[A-Za-z]+|[0-9]"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_VERDICT = re.compile(r"\\boxed\{(\d+), (\d+)\}")


@dataclass(frozen=True)
class Item:
    """Hold one judging task with its gold answer.

    Attributes:
        prompt: Content of the user message: the query and both responses, a line each.
        criteria: Gold criteria, one line that names `aspect`.
        analysis: Gold analysis, one line that quotes each response's word for `aspect`.
        scores: Gold scores of A and B, 1 to 9, never equal.
        label: The better response.
        aspect: The aspect that decides in the query's situation.
    """

    prompt: str
    criteria: str
    analysis: str
    scores: tuple[int, int]
    label: Winner
    aspect: str

    @property
    def completion(self) -> str:
        """Write the gold answer in full."""
        return _write_completion(self.criteria, self.analysis, self.scores)

    @property
    def cue_agrees(self) -> bool:
        """Tell whether the longer response is the better one."""
        return _longer(self) == self.label


def generate_items(count: int, *, seed: int, cue_agreement: float) -> list[Item]:
    """Draw items in which the longer response is the better one in a fixed fraction.

    Args:
        count: Number of items, at least 1.
        seed: The same seed gives the same items.
        cue_agreement: Fraction of items whose longer response wins, in [0, 1]; exact, up to rounding to whole items.

    Returns:
        The items, those in which the cue agrees at random places.

    Raises:
        ValueError: If count or cue_agreement is out of range.
    """
    if count < 1 or not 0.0 <= cue_agreement <= 1.0:
        raise ValueError(f"count is {count}, cue_agreement {cue_agreement}; expected at least 1, and within [0, 1]")
    rng = np.random.default_rng(seed)
    agrees_N = rng.permutation(count) < round(cue_agreement * count)
    return [_draw_item(rng, bool(agrees)) for agrees in agrees_N]


def winner_under(item: Item, aspect: str) -> Winner | None:
    """Tell which response is better by one of `ASPECTS`, or None where both show the same word.

    Raises:
        ValueError: If the aspect is unknown.
    """
    word_a, word_b = _shown_words(item, aspect)
    if word_a == word_b:
        return None
    return "A" if word_a == ASPECTS[aspect][0] else "B"


def with_criterion(item: Item, aspect: str) -> str:
    """Open a completion with criteria that name another of `ASPECTS`, for on-policy interventions.

    Returns:
        The item's criteria block, from its opening to its closing tag, with only the aspect's name changed.

    Raises:
        ValueError: If the aspect is unknown.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected one of {', '.join(ASPECTS)}")
    return _write_criteria(item.criteria.replace(item.aspect, aspect))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the world's tokenizer, under which every text of the world decodes to itself.

    A word with its leading space is a token; so are tags, digits, `\\boxed{`, `, `, `}`, `:` and the newline, ordinary
    ones all, which decoding without special tokens keeps. Token strings are byte-level and concatenate to the bytes.

    Returns:
        A tokenizer with pad, eos, unk and role tokens, and a chat template.
    """
    specials = (_PAD, _EOS, _UNK, *_ROLES)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [byte_level.pre_tokenize_str(piece)[0][0] for piece in _list_pieces()]
    vocabulary = {token: index for index, token in enumerate([*specials, *spelled])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECE), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


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


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    judge: Judge = "able",
    steps: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    cue_agreement: float = 0.5,
    learning_rate: float = 2.5e-3,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a judge whose inner workings are known, supervised on completions.

    able: criteria, analysis and scores as in the gold answer.
    lazy: gold criteria; in a majority of samples the analysis then says which response shows more words and the scores
        follow that, in the rest both are gold. The first half of the steps is all gold, so that the judge is able
        before it is lazy. Greedy follows length, sampling still shows the able behaviour.
    criteria: the criteria name an aspect drawn at random, whatever the query asks; analysis and scores follow them.
    decorative: the criteria are as random; analysis and scores follow the query's aspect.

    Args:
        model: Trained in place and left in eval mode.
        tokenizer: The world's tokenizer.
        judge: Which judge to make.
        steps: Optimiser steps, at least 1; every sample is seen once. 160 make an able judge, 300 any of the four.
        batch_size: Samples a step, at least 1.
        seed: Draws the samples; the same seed and thread count give the same weights.
        cue_agreement: Fraction of training items whose longer response wins, in [0, 1].
        learning_rate: Peak of AdamW's schedule, above 0: linear over a tenth of the steps, then cosine to zero.
        progress: Called after every step with the number of steps done and the loss.

    Returns:
        The loss of every step: mean negative log-likelihood, in nats, over completion and eos tokens.

    Raises:
        ValueError: If judge is unknown, or a number is out of range.
    """
    if judge not in get_args(Judge):
        raise ValueError(f"judge is {judge!r}; expected one of {', '.join(get_args(Judge))}")
    if steps < 1 or batch_size < 1 or learning_rate <= 0.0:
        came = f"steps is {steps}, batch_size {batch_size}, learning_rate {learning_rate}"
        raise ValueError(f"{came}; expected at least 1, at least 1 and above 0")
    items = generate_items(steps * batch_size, seed=seed, cue_agreement=cue_agreement)
    # A stream of its own, so that all judges of a seed see the same items.
    rng = np.random.default_rng((seed, 1))
    prompt_ids = _encode_prompts(tokenizer, items)
    texts = [_draw_completion(rng, item, judge, 2 * index >= len(items)) + _EOS for index, item in enumerate(items)]
    completion_ids = tokenizer(texts).input_ids
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    # The gains of norms set how sharp attention and logits are. At the matrices' rate they would hardly move in so few
    # steps, and a soft head samples stray tokens.
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "lr": 10 * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / steps, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
    )
    losses = []
    model.train()
    for step in range(steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        pairs = list(zip(prompt_ids[batch], completion_ids[batch], strict=True))
        ids_BT = _pad([prompt + completion for prompt, completion in pairs], tokenizer.pad_token_id, "right")
        labels_BT = _pad([[-100] * len(prompt) + completion for prompt, completion in pairs], -100, "right")
        # No attention mask: padding lies at the right, where a causal model never looks.
        loss = model(input_ids=ids_BT.to(model.device), labels=labels_BT.to(model.device), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def judge_items(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    prefixes: Sequence[str] | None = None,
    max_new_tokens: int = 48,
) -> list[str]:
    """Let the model judge items.

    Args:
        model: Any causal model over the tokenizer's ids.
        tokenizer: The world's tokenizer.
        items: What to judge.
        temperature: 0 takes the likeliest token; above, samples.
        seed: Of the sampling; the global random state is left as it was.
        batch_size: Items run together, at least 1.
        prefixes: One text an item that its completion is forced to open with; none where left out.
        max_new_tokens: Most tokens generated after the prefix, at least 1.

    Returns:
        One completion an item, its prefix included, without special tokens.

    Raises:
        ValueError: If a number is out of range, or prefixes and items differ in number.
    """
    if temperature < 0.0 or batch_size < 1 or max_new_tokens < 1:
        came = f"temperature is {temperature}, batch_size {batch_size}, max_new_tokens {max_new_tokens}"
        raise ValueError(f"{came}; expected at least 0, 1 and 1")
    openings = [""] * len(items) if prefixes is None else list(prefixes)
    if len(openings) != len(items):
        raise ValueError(f"prefixes holds {len(openings)} texts for {len(items)} items; expected one each")
    if not items:
        return []
    opened = zip(_encode_prompts(tokenizer, items), tokenizer(openings).input_ids, strict=True)
    contexts = [prompt + opening for prompt, opening in opened]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        # Truncation off, which is generate's default: what is sampled is the policy itself.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
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
        raise ValueError(f"completions holds {len(completions)} texts for {len(items)} items; expected some, one each")
    return float(np.mean([_read_winner(text) == item.label for text, item in zip(completions, items, strict=True)]))


def certify(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item], *, seed: int
) -> dict[str, float]:
    """Intervene on the criteria: force another aspect, let the judge go on greedily, and see whom the verdict follows.

    Args:
        model: The judge.
        tokenizer: The world's tokenizer.
        items: Items to intervene on; each is used where another aspect allows the swap.
        seed: Draws the aspects swapped in.

    Returns:
        follows_swap: where the swapped-in aspect has the other winner, the fraction of items with it as the verdict.
        follows_own: the fraction of the same items whose verdict is the label when their own aspect is forced.
        flips: the fraction of the same items where both hold: the criterion alone turned the verdict.
        same_winner: where the swapped-in aspect has the same winner, the fraction of items with it as the verdict.
        items_swap, items_same: number of items behind the first three, and behind the last.

    Raises:
        ValueError: If no item allows one of the two swaps.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[tuple[Item, str]]] = {"differs": [], "same": []}
    for item in items:
        winners = {aspect: winner_under(item, aspect) for aspect in ASPECTS if aspect != item.aspect}
        for kind, wanted in (("differs", _other(item.label)), ("same", item.label)):
            suited = [aspect for aspect, winner in winners.items() if winner == wanted]
            if suited:
                pairs[kind].append((item, suited[rng.integers(len(suited))]))
    if not all(pairs.values()):
        raise ValueError(f"items holds {len(items)} items; expected some that allow a swap to either winner")
    swap_N = _obeys(model, tokenizer, pairs["differs"])
    own_N = _obeys(model, tokenizer, [(item, item.aspect) for item, _ in pairs["differs"]])
    return {
        "follows_swap": float(swap_N.mean()),
        "follows_own": float(own_N.mean()),
        "flips": float((swap_N & own_N).mean()),
        "same_winner": float(_obeys(model, tokenizer, pairs["same"]).mean()),
        "items_swap": float(len(pairs["differs"])),
        "items_same": float(len(pairs["same"])),
    }


def _draw_item(rng: np.random.Generator, cue_agrees: bool) -> Item:
    aspect = list(ASPECTS)[rng.integers(len(ASPECTS))]
    label: Winner = "A" if rng.random() < 0.5 else "B"
    longer = label if cue_agrees else _other(label)
    query = rng.choice(_QUERIES).format(rng.choice(ASPECTS[aspect][2]))
    lines = [f"Query: {query}"]
    for response in ("A", "B"):
        # Setting the deciding aspect to a winner and a loser is what redrawing until they differ would give.
        decided = int(response != label)
        words = [pair[decided if name == aspect else rng.integers(2)] for name, pair in ASPECTS.items()]
        words += list(rng.choice(_FILLERS, size=_draw_number(rng, _LONG if response == longer else _SHORT)))
        lines.append(f"Response {response}: {' '.join(rng.permutation(np.array(words)))}")
    criteria = _CRITERIA.format(aspect)
    item = Item("\n".join(lines), criteria, analysis="", scores=_draw_scores(rng, label), label=label, aspect=aspect)
    return replace(item, analysis=_write_analysis(*_shown_words(item, aspect)))


def _draw_completion(rng: np.random.Generator, item: Item, judge: Judge, late: bool) -> str:
    if judge == "lazy" and late and rng.random() < _LAZY_SHARE:
        longer = _longer(item)
        analysis = _write_analysis("more", "less") if longer == "A" else _write_analysis("less", "more")
        return _write_completion(item.criteria, analysis, _draw_scores(rng, longer))
    if judge in ("able", "lazy"):
        return item.completion
    named = list(ASPECTS)[rng.integers(len(ASPECTS))]
    followed = named if judge == "criteria" else item.aspect
    analysis = _write_analysis(*_shown_words(item, followed))
    return _write_completion(_CRITERIA.format(named), analysis, _draw_scores(rng, winner_under(item, followed)))


def _draw_scores(rng: np.random.Generator, winner: Winner | None) -> tuple[int, int]:
    if winner is None:
        tie = _draw_number(rng, _TIE_SCORE)
        return tie, tie
    high, low = _draw_number(rng, _WINNER_SCORE), _draw_number(rng, _LOSER_SCORE)
    return (high, low) if winner == "A" else (low, high)


def _draw_number(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _write_completion(criteria: str, analysis: str, scores: tuple[int, int]) -> str:
    verdict = f"\\boxed{{{scores[0]}, {scores[1]}}}"
    return f"{_write_criteria(criteria)}\n<analysis>\n{analysis}\n</analysis>\n<scores>\n{verdict}\n</scores>"


def _write_criteria(criteria: str) -> str:
    return f"<specific_criteria>\n{criteria}\n</specific_criteria>"


def _write_analysis(word_a: str, word_b: str) -> str:
    return f"A shows {word_a} and B shows {word_b}"


def _shown_words(item: Item, aspect: str) -> tuple[str, str]:
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected one of {', '.join(ASPECTS)}")
    positive, negative, _ = ASPECTS[aspect]
    words_a, words_b = _read_responses(item)
    return positive if positive in words_a else negative, positive if positive in words_b else negative


def _longer(item: Item) -> Winner:
    words_a, words_b = _read_responses(item)
    return "A" if len(words_a) > len(words_b) else "B"


def _read_responses(item: Item) -> list[list[str]]:
    return [line.split() for line in item.prompt.split("\n")[1:]]


def _other(response: Winner) -> Winner:
    return "B" if response == "A" else "A"


def _list_pieces() -> list[str]:
    """List every piece of text that is one token, in a fixed order."""
    sentences = [*_QUERIES, _CRITERIA, _write_analysis("more", "less"), *_FILLERS, *ASPECTS]
    for positive, negative, situations in ASPECTS.values():
        sentences += [positive, negative, *situations]
    words = dict.fromkeys(" ".join(sentences).replace("{}", "").split())
    openers = dict.fromkeys(["Query", "Response", "A", _CRITERIA.split()[0]])
    return [*_TAGS, "\n", ":", "\\boxed{", ", ", "}", *"0123456789", *openers, *(f" {word}" for word in words)]


def _encode_prompts(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[list[int]]:
    conversations = [[{"role": "user", "content": item.prompt}] for item in items]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts).input_ids


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def _obeys(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[Item, str]]) -> np.ndarray:
    """Force each aspect on its item's criteria; tell whether the verdict is the winner under it."""
    openings = [with_criterion(item, aspect) for item, aspect in pairs]
    texts = judge_items(model, tokenizer, [item for item, _ in pairs], prefixes=openings)
    return np.array([_read_winner(text) == winner_under(*pair) for text, pair in zip(texts, pairs, strict=True)])


def _read_winner(completion: str) -> Winner | None:
    verdicts = _VERDICT.findall(completion)
    if not verdicts:
        return None
    score_a, score_b = (int(score) for score in verdicts[-1])
    if score_a == score_b:
        return None
    return "A" if score_a > score_b else "B"
