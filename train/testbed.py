"""A synthetic judge world whose causal structure is known, small enough for two CPU cores.

Two responses each show six aspects, every aspect by its positive or its negative word, shuffled among filler words.
The query names a situation, never the aspect that decides there; the criteria name that aspect, the analysis quotes
each response's word for it, the scores follow: the criteria stage works out what later stages need. A spurious cue,
the longer response, agrees with the label in a chosen fraction of items.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.judge import CRITERIA, SECTIONS, write_judgement, write_section
from cepo.jacobian.reading.thought import read_section

Winner = Literal["A", "B"]

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
CRITERION = "judge by {} of the answer"
_NAMES_ASPECT = re.compile(CRITERION.format(f"({'|'.join(ASPECTS)})"))
_FILLERS = ("so", "well", "then", "here", "also", "just", "maybe", "indeed")
# Number of filler words in the shorter and the longer response, inclusive; a gap makes the cue easy, as cues are.
_SHORT, _LONG = (0, 1), (3, 4)
# Scores of the winner, of the loser, and of both in a tie, inclusive.
_WINNER_SCORE, _LOSER_SCORE, _TIE_SCORE = (7, 9), (1, 4), (5, 6)

_PAD, _EOS, _UNK = "<|pad|>", "<|end|>", "<|unk|>"
_ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
_TAGS = tuple(f"<{slash}{name}>" for name in SECTIONS for slash in ("", "/"))
_PIECE = r"</?[a-z_]+>|\\boxed\{|, |\}|\n|:| ?[A-Za-z]+|[0-9]"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Item:
    """One judging task with its gold answer.

    Attributes:
        prompt: Content of the user message: the query and both responses, one per line.
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
        return write_judgement(self.criteria, self.analysis, self.scores)

    @property
    def longer(self) -> Winner:
        """Return which response has more words."""
        words_a, words_b = _read_responses(self)
        return "A" if len(words_a) > len(words_b) else "B"

    @property
    def cue_agrees(self) -> bool:
        """Tell whether the longer response is the better one."""
        return self.longer == self.label


def generate_items(count: int, *, seed: int, cue_agreement: float) -> list[Item]:
    """Draw items in which the longer response is the better one in a fixed fraction.

    Args:
        count: Number of items, at least 1.
        seed: The same seed gives the same items.
        cue_agreement: Fraction of items whose longer response wins, in [0, 1]; exact, up to rounding to whole items.

    Returns:
        The items; those in which the cue agrees stand at random places.

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
    word_a, word_b = shown_words(item, aspect)
    if word_a == word_b:
        return None
    return "A" if word_a == ASPECTS[aspect][0] else "B"


def with_criterion(item: Item, aspect: str, completion: str | None = None) -> str:
    """Open a completion with criteria that name another of `ASPECTS`, for on-policy interventions.

    Args:
        item: The item.
        aspect: The aspect to name.
        completion: A judgement of the item whose own criteria are changed; one whose criteria name no aspect in the
            world's sentence, or None, stands for the gold answer.

    Returns:
        The criteria block, from its opening to its closing tag, with only the aspect's name changed.

    Raises:
        ValueError: If the aspect is unknown.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected one of {', '.join(ASPECTS)}")
    criteria = item.criteria
    if completion is not None and named_aspect(completion) is not None:
        criteria = (read_section(completion, CRITERIA) or "").strip("\n")
    return write_section(CRITERIA, _NAMES_ASPECT.sub(write_criteria(aspect), criteria, count=1))


Swap = tuple[Item, str, str | None]
"""An item, the aspect to force on it, and the completion whose criteria are changed, see `with_criterion`."""


def draw_swaps(
    items: Sequence[Item], *, seed: int, completions: Sequence[str] | None = None
) -> dict[Literal["differs", "same"], list[Swap]]:
    """Draw for each item an aspect with the other winner (differs), and one with the same winner (same).

    Args:
        items: Items to intervene on; each is used where another aspect allows the swap.
        seed: Draws the aspects.
        completions: The judge's own, one per item, or None.

    Raises:
        ValueError: If no item allows one of the two swaps, or completions and items differ in number.
    """
    if completions is not None and len(completions) != len(items):
        raise ValueError(f"completions holds {len(completions)} texts for {len(items)} items; expected one each")
    rng = np.random.default_rng(seed)
    swaps: dict[Literal["differs", "same"], list[Swap]] = {"differs": [], "same": []}
    written: Sequence[str | None] = completions or [None] * len(items)
    for item, completion in zip(items, written, strict=True):
        winners = {aspect: winner_under(item, aspect) for aspect in ASPECTS if aspect != item.aspect}
        wanted = {"differs": other_response(item.label), "same": item.label}
        for kind, drawn in swaps.items():
            suited = [aspect for aspect, winner in winners.items() if winner == wanted[kind]]
            if suited:
                drawn.append((item, suited[rng.integers(len(suited))], completion))
    if not all(swaps.values()):
        raise ValueError(f"items holds {len(items)} items; expected some that allow a swap to either winner")
    return swaps


def named_aspect(completion: str) -> str | None:
    """Return the aspect that a completion's criteria name first, in the world's sentence, or None."""
    found = _NAMES_ASPECT.search(read_section(completion, CRITERIA) or "")
    return None if found is None else found.group(1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the world's tokenizer, under which every text of the world decodes to itself.

    A word with its leading space is one token; so are tags, digits, `\\boxed{`, `, `, `}`, `:` and the newline. None of
    these is special, so decoding without special tokens keeps them. Token strings are byte-level: joined, they are the
    text's bytes.

    Returns:
        A tokenizer with pad, eos, unk and role tokens, and a chat template.
    """
    return build_word_tokenizer(_list_pieces(), _PIECE)


def build_word_tokenizer(pieces: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token for each piece of text, as `build_tokenizer` describes it.

    Args:
        pieces: Every text that is one token, distinct.
        pattern: Regular expression that cuts a text into pieces.
    """
    specials = (_PAD, _EOS, _UNK, *_ROLES)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    vocabulary = {token: index for index, token in enumerate([*specials, *spelled])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
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


def _draw_item(rng: np.random.Generator, cue_agrees: bool) -> Item:
    aspect = list(ASPECTS)[rng.integers(len(ASPECTS))]
    label: Winner = "A" if rng.random() < 0.5 else "B"
    longer = label if cue_agrees else other_response(label)
    query = rng.choice(_QUERIES).format(rng.choice(ASPECTS[aspect][2]))
    lines = [f"Query: {query}"]
    for response in ("A", "B"):
        # Setting the deciding aspect to a winner and a loser is what redrawing until they differ would give.
        decided = int(response != label)
        words = [pair[decided if name == aspect else rng.integers(2)] for name, pair in ASPECTS.items()]
        words += list(rng.choice(_FILLERS, size=_draw_number(rng, _LONG if response == longer else _SHORT)))
        lines.append(f"Response {response}: {' '.join(rng.permutation(np.array(words)))}")
    criteria = write_criteria(aspect)
    item = Item("\n".join(lines), criteria, analysis="", scores=draw_scores(rng, label), label=label, aspect=aspect)
    return replace(item, analysis=write_analysis(*shown_words(item, aspect)))


def draw_scores(rng: np.random.Generator, winner: Winner | None) -> tuple[int, int]:
    if winner is None:
        tie = _draw_number(rng, _TIE_SCORE)
        return tie, tie
    high, low = _draw_number(rng, _WINNER_SCORE), _draw_number(rng, _LOSER_SCORE)
    return (high, low) if winner == "A" else (low, high)


def _draw_number(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def write_criteria(aspect: str, scores: tuple[int, int] | None = None) -> str:
    """Return the criteria that name an aspect; scores are written below them, as no judge should."""
    return CRITERION.format(aspect) + ("" if scores is None else f"\n\\boxed{{{scores[0]}, {scores[1]}}}")


def write_length_analysis(longer: Winner) -> str:
    return write_analysis("more", "less") if longer == "A" else write_analysis("less", "more")


def write_analysis(word_a: str, word_b: str) -> str:
    return f"A shows {word_a} and B shows {word_b}"


def shown_words(item: Item, aspect: str) -> tuple[str, str]:
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected one of {', '.join(ASPECTS)}")
    positive, negative, _ = ASPECTS[aspect]
    words_a, words_b = _read_responses(item)
    return positive if positive in words_a else negative, positive if positive in words_b else negative


def _read_responses(item: Item) -> list[list[str]]:
    return [line.split() for line in item.prompt.split("\n")[1:]]


def other_response(response: Winner) -> Winner:
    return "B" if response == "A" else "A"


def preferred(scores: tuple[float, float]) -> Winner | None:
    """Return the response with the higher score, or None for a tie."""
    if scores[0] == scores[1]:
        return None
    return "A" if scores[0] > scores[1] else "B"


def _list_pieces() -> list[str]:
    """List every piece of text that is one token, in a fixed order."""
    sentences = [*_QUERIES, CRITERION, write_analysis("more", "less"), *_FILLERS, *ASPECTS]
    for positive, negative, situations in ASPECTS.values():
        sentences += [positive, negative, *situations]
    words = dict.fromkeys(" ".join(sentences).replace("{}", "").split())
    openers = dict.fromkeys(["Query", "Response", "A", CRITERION.split()[0]])
    return [*_TAGS, "\n", ":", "\\boxed{", ", ", "}", *"0123456789", *openers, *(f" {word}" for word in words)]
