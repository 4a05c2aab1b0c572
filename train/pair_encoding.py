"""Encode pairs of responses as token ids, for each form of reward model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from jinja2 import TemplateError

from cepo.files import write_text
from cepo.jacobian.reading.unknown import UnknownTokens
from cepo.jacobian.reward_form import Form

SHOWN_FILE = "reward_model.json"
"""File next to a trained reward model's weights that holds the fields of `Shown`."""
TEMPLATE = (
    "Which of two responses answers the query better? Judge what they say, never their length or tone.\n\n"
    "[Query]\n{prompt}\n[End of query]\n\n[Response A]\n{first}\n[End of response A]\n\n"
    "[Response B]\n{second}\n[End of response B]\n\nAnswer with A or B alone."
)
_FIELDS = ("{prompt}", "{first}", "{second}")
_PROBE = "cepo-response-probe"
# Letters, digits and "_", without kana and Han characters, next to which a word may begin or end.
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]"
_COUNTS: Mapping[Form, str] = {"bradley-terry": "one response", "pairwise": "two responses"}


@dataclass(frozen=True)
class Shown:
    """What a reward model is shown of a pair.

    Attributes:
        form: "bradley-terry", prompt and one response; or "pairwise", prompt and both responses.
        template: the pairwise user message, with {prompt}, {first} and {second}.
        chat_template_kwargs: options of the tokenizer's chat template, such as {enable_thinking: false}.

    Raises:
        ValueError: for an unknown form, or a template that lacks one of the three.
    """

    form: Form = "bradley-terry"
    template: str = TEMPLATE
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}; expected one of {', '.join(get_args(Form))}")
        lacking = [name for name in _FIELDS if name not in self.template]
        if lacking:
            raise ValueError(f"template is {self.template!r}, which lacks {', '.join(lacking)}")

    def messages(self, prompt: str, first: str, second: str | None = None) -> list[dict[str, str]]:
        """Return the messages that the model reads: a conversation that ends with the response, or a pairwise question.

        Args:
            prompt: the prompt.
            first: the response; for pairwise, the one that is shown as A.
            second: for pairwise, the one that is shown as B; else None.

        Raises:
            ValueError: if the number of responses is not the form's.
        """
        if (second is None) != (self.form == "bradley-terry"):
            raise ValueError(f"form is {self.form}, which is shown {_COUNTS[self.form]}")
        if second is None:
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": first}]
        contents = dict(zip(_FIELDS, (prompt, first, second), strict=True))
        text = re.sub("|".join(map(re.escape, _FIELDS)), lambda found: contents[found.group()], self.template)
        return [{"role": "user", "content": text}]

    def pair_messages(self, prompt: str, chosen: str, rejected: str) -> list[list[dict[str, str]]]:
        """Return the messages of the two texts whose numbers are compared.

        Bradley-Terry: prompt and chosen response, prompt and rejected response. Pairwise: both responses with the
        chosen one first, then with the rejected one first.
        """
        if self.form == "bradley-terry":
            return [self.messages(prompt, chosen), self.messages(prompt, rejected)]
        return [self.messages(prompt, chosen, rejected), self.messages(prompt, rejected, chosen)]

    def differences(self, numbers: Sequence[float]) -> list[float]:
        """Return D of each pair, chosen minus rejected; for pairwise, the mean of both orders.

        Args:
            numbers: the model's numbers for the first and the second text of each pair, alternating.
        """
        scale = 1.0 if self.form == "bradley-terry" else 0.5
        return [scale * (first - second) for first, second in zip(numbers[::2], numbers[1::2], strict=True)]

    def write(self, folder: Path) -> None:
        """Write the file that `read_shown` reads."""
        write_text(folder / SHOWN_FILE, json.dumps(asdict(self)) + "\n")


def read_shown(folder: Path) -> Shown:
    """Return what a model in a folder was shown in training; the defaults (Bradley-Terry) without the file."""
    path = folder / SHOWN_FILE
    return Shown(**json.loads(path.read_text())) if path.is_file() else Shown()


class PairEncoder:
    """Turns prompts and responses into token ids, with one beginning-of-text token if the tokenizer has one.

    With a chat template, texts are rendered by it and the tokenizer adds nothing. Without one, prompt and response are
    separated by an empty line and end with the end-of-text token, and the tokenizer adds its special tokens.

    Args:
        tokenizer: the model's tokenizer.
        shown: what the model is shown.
        max_length: most tokens of a text; None for no limit.

    Raises:
        ValueError: for a pairwise form whose verdicts are not one token each.
    """

    def __init__(self, tokenizer: Any, shown: Shown, *, max_length: int | None = None) -> None:
        self._tokenizer, self.shown, self._max_length = tokenizer, shown, max_length
        self._unknown = UnknownTokens(tokenizer)
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.verdict_ids = None
        if shown.form == "pairwise":
            from cepo.jacobian.reward_model import verdict_ids  # imports torch, which `Shown` does not wait for

            self.verdict_ids = verdict_ids(tokenizer, self._text(shown.messages("?", "?", "?")))

    def encode(self, prompt: str, chosen: str, rejected: str) -> tuple[list[int], list[int]]:
        """Return the ids of the two texts of a pair, see `Shown.pair_messages`.

        Raises:
            ValueError: with the reason why the pair cannot be used: a text is too long, or both are equal.
        """
        first, second = map(self.ids, self.shown.pair_messages(prompt, chosen, rejected))
        if first == second:
            raise ValueError("equal after encoding: both responses have the same tokens")
        return first, second

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of messages from `Shown.messages`.

        Raises:
            ValueError: with the reason why the text cannot be used: it is too long, or the chat template refuses it.
        """
        ids = list(self._tokenizer(self._text(messages), add_special_tokens=not self._has_template)["input_ids"])
        ids = self._with_one_beginning(ids)
        if self._max_length is not None and len(ids) > self._max_length:
            raise ValueError(f"too long: {len(ids)} tokens, over max_length {self._max_length}")
        self._unknown.check(ids)
        return ids

    def encode_response(
        self, prompt: str, response: str, words: Sequence[str] = ()
    ) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of a prompt and a response for a Bradley-Terry model, and positions in the response.

        Args:
            prompt: the prompt.
            response: the response.
            words: texts to find in the response, as whole words: not inside a longer word or number ("4" is in "4km",
                not in "14"). Scripts that are written without spaces have no such bounds.

        Returns:
            The ids, the positions of the response's tokens, and among them those that hold part of a word.

        Raises:
            ValueError: for a text that is too long, a tokenizer without offsets, or a template that changes responses.
        """
        messages = self.shown.messages(prompt, response)
        ids, text, response = self.ids(messages), self._text(messages), response.strip()
        after = self._text(self.shown.messages(prompt, _PROBE)).rpartition(_PROBE)[2]
        start = text.removesuffix(after).rfind(response)  # what closes the response may hold it: "d" and <|im_end|>
        if start < 0 or not self._tokenizer.is_fast:
            raise ValueError(
                "the tokens of the response cannot be found; a fast tokenizer and a plain template show them"
            )
        encoded = self._tokenizer(text, add_special_tokens=not self._has_template, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
        said = "|".join(map(_whole, words))
        found = [match.span() for match in re.finditer(said, response)] if words else []
        spans = [(start, start + len(response)), *((start + first, start + last) for first, last in found)]
        of_response, *of_words = (_tokens_of(text, offsets, *span) for span in spans)
        return ids, of_response, sorted({place for places in of_words for place in places})

    def _with_one_beginning(self, ids: list[int]) -> list[int]:
        """Return the ids with only one of the beginning-of-text tokens that they start with."""
        beginning, extra = self._tokenizer.bos_token_id, 0
        while beginning is not None and ids[extra : extra + 2] == [beginning] * 2:
            extra += 1
        return ids[extra:]

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        answered = messages[-1]["role"] == "assistant"
        if not self._has_template:
            contents = [message["content"] for message in messages]
            ending = self._tokenizer.eos_token or ""
            return "\n\n".join(contents).removesuffix(ending) + ending if answered else f"{contents[0]}\n"
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not answered, **self.shown.chat_template_kwargs
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return text


def _whole(word: str) -> str:
    """Return a pattern of a text that is not inside a longer word or number."""
    before, after = (
        r"\d" if edge.isdecimal() else _WORD if re.match(_WORD, edge) else None for edge in (word[0], word[-1])
    )
    return (f"(?<!{before})" if before else "") + re.escape(word) + (f"(?!{after})" if after else "")


def _tokens_of(text: str, offsets: Sequence[tuple[int, int]], first: int, last: int) -> list[int]:
    """Return the positions of the tokens that hold a part of text[first:last].

    Outer white space of the stretch counts only in tokens that are wholly inside it: where "\\nNext" follows "end.", a
    token ".\\n" belongs to the text before it, and a token "\\n" to the stretch.
    """
    said = text[first:last]
    inner_first, inner_last = last - len(said.lstrip()), first + len(said.rstrip())
    return [
        place
        for place, (left, right) in enumerate(offsets)
        if max(left, inner_first) < min(right, inner_last) or first <= left < right <= last
    ]
