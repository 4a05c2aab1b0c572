"""Links: which span's score is differentiated with respect to which other span, and by which function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

Effect = Literal["direct", "total", "residual"]
TargetFunction = Literal["log_likelihood", "log_odds", "expected_score", "margin"]
NUMERIC_FUNCTIONS: tuple[str, ...] = ("expected_score", "margin")


@dataclass(frozen=True)
class Link:
    """d(target function of the target span) / d(embeddings of the source span).

    Attributes:
        name: as the user wrote it, e.g. "Z->Y" or "criteria->analysis:total@log_odds".
        source: span name.
        target: span name.
        effect: "total" blocks nothing; "direct" lets no cotangent through the mediator; "residual" regresses the
            mediated component out of the total (what the reference implementation of CE-PO does).
        mediator: names of the spans whose positions "direct" blocks.
        function: the target function, see `cepo.jacobian.targets`.
    """

    name: str
    source: str
    target: str
    effect: Effect
    mediator: tuple[str, ...]
    function: TargetFunction


@dataclass(frozen=True)
class Chain:
    """What a weight applies to: one link, or consecutive links.

    Attributes:
        name: as the user wrote it, e.g. "criteria->analysis->scores".
        links: its links in order, each with a name of its own, e.g. "criteria->analysis".
    """

    name: str
    links: tuple[Link, ...]


def parse_chain(
    text: str,
    *,
    names: tuple[str, ...],
    roles: Mapping[str, str],
    chain: str,
    default_function: str = "log_likelihood",
) -> Chain:
    """Parse a link, a chain "A->B->C[@FUNCTION]", or "chain", which stands for the layout's own chain.

    A->B->C are the links A->B and B->C, each a total effect. A numeric function applies to links that end in the
    scores; the others use log_likelihood.

    Args:
        text: the chain, or a link as `parse_link` takes it.
        names: span names in their order within a rollout.
        roles: the span names that Z, X and Y stand for.
        chain: the layout's own chain.
        default_function: see `parse_link`.

    Raises:
        ValueError: for a chain that names an effect, and as `parse_link`.
    """
    body, at, function = text.partition("@")
    spans = (chain if body.strip() == "chain" else body).split("->")
    if len(spans) < 3:
        return Chain(text, (parse_link(text, names=names, roles=roles, default_function=default_function),))
    if ":" in body:
        raise ValueError(f"link {text!r} is a chain with an effect; expected SPAN->SPAN->SPAN, whose links are total")
    links = [
        parse_link(
            f"{source}->{target}:total", names=names, roles=roles, default_function=function if at else default_function
        )
        for source, target in pairwise([span.strip() for span in spans])
    ]
    named = [
        f"{link.source}->{link.target}{f'@{link.function}' if at and link.function == function else ''}"
        for link in links
    ]
    return Chain(text, tuple(replace(link, name=name) for link, name in zip(links, named, strict=True)))


def parse_link(
    text: str, *, names: tuple[str, ...], roles: Mapping[str, str], default_function: str = "log_likelihood"
) -> Link:
    """Parse "SOURCE->TARGET[:EFFECT][@FUNCTION]".

    SOURCE and TARGET are span names or the roles Z, X, Y. EFFECT is direct, total or residual; "Z->Y" without one is
    direct (the paths through X are blocked), every other link is total. The mediator of a direct effect is X where X
    lies strictly between source and target, else all named spans strictly between them. FUNCTION overrides
    `default_function`. A numeric default (expected_score, margin) applies only to links that end in the scores; the
    others use log_likelihood.

    Args:
        text: the link, e.g. "X->Y", "criteria->analysis", "Z->Y:total", "X->Y@margin".
        names: span names in their order within a rollout.
        roles: the span names that Z, X and Y stand for.
        default_function: one of log_likelihood, log_odds, expected_score, margin.

    Raises:
        ValueError: for an unknown span, effect or function; for a source that does not come before its target (by
            causality its Jacobian is zero); for a numeric function on a span without scores.
    """
    functions = get_args(TargetFunction)
    if default_function not in functions:
        raise ValueError(f"target is {default_function!r}; expected one of {', '.join(functions)}")
    body, at, function_text = text.partition("@")
    body, colon, effect_text = body.partition(":")
    ends = [part.strip() for part in body.split("->")]
    known = f"the spans are {', '.join(names)} ({', '.join(f'{k} = {v}' for k, v in roles.items())})"
    if len(ends) != 2:
        raise ValueError(
            f"link {text!r} is not of the form SOURCE->TARGET[:EFFECT][@FUNCTION], such as 'X->Y'; {known}"
        )
    source, target = (roles.get(end, end) for end in ends)
    for written, name in zip(ends, (source, target), strict=True):
        if name not in names:
            raise ValueError(f"link {text!r} names the unknown span {written!r}; {known}")
    first, last = names.index(source), names.index(target)
    if first >= last:
        raise ValueError(
            f"link {text!r} has its source at or after its target, so its Jacobian is zero by causality; "
            f"the order is {' -> '.join(names)}"
        )
    effect = effect_text.strip() or ("direct" if (source, target) == (roles.get("Z"), roles.get("Y")) else "total")
    if (colon and not effect_text.strip()) or effect not in get_args(Effect):
        raise ValueError(f"link {text!r} asks for the effect {effect_text!r}; expected direct, total or residual")
    between = names[first + 1 : last]
    mediator = (roles["X"],) if roles.get("X") in between else between
    if effect != "total" and not mediator:
        raise ValueError(f"link {text!r} asks for the {effect} effect, but no span lies between source and target")
    function = function_text.strip() or default_function
    if (at and not function_text.strip()) or function not in functions:
        raise ValueError(
            f"link {text!r} asks for the function {function_text!r}; expected one of {', '.join(functions)}"
        )
    if function in NUMERIC_FUNCTIONS and target != "scores":
        if at:
            raise ValueError(f"link {text!r} asks for {function}, which only a link that ends in 'scores' has; {known}")
        function = "log_likelihood"
    return Link(text, source, target, effect, mediator if effect != "total" else (), function)  # type: ignore[arg-type]
