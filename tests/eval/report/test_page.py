"""The HTML pages: a model's text stays text, pages are self-contained and well-formed, and no half file remains."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cepo.eval.report.figures import curves, forest, grid, history, picture
from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.statistics import Estimate

SCRIPT = "</div></title></style><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Read a page strictly: tags must balance. Keeps the texts, the marks and the attributes.

    Attributes:
        texts: for each element of class "text" its characters, tags left out.
        words: all characters of the page outside style.
        marks: for each mark inside a text its attributes and characters.
        folded: for each of those texts whether the element around it is folded.
        tags: every tag that was opened.
        attributes: every (tag, name, value).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.words = ""
        self.marks: list[tuple[dict[str, str | None], str]] = []
        self.folded: list[bool] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_bytes().decode("utf-8"))
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute of {tag} stands twice"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if values.get("class") == "text":
            self.folded.append("open" not in self._open[-1][1])
            self.texts.append("")
        elif tag == "mark" and self._in_text():
            self.marks.append((values, ""))
        if tag not in VOID:
            self._open.append((tag, values))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Pass over an element that closes itself."""
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element, which must be this one."""
        assert self._open, f"{tag} was never opened"
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        """Keep characters."""
        tag = self._open[-1][0] if self._open else ""
        self.words += data if tag != "style" else ""
        if self._in_text():
            self.texts[-1] += data
            if tag == "mark":
                self.marks[-1] = (self.marks[-1][0], self.marks[-1][1] + data)

    def _in_text(self) -> bool:
        return any(values.get("class") == "text" for _, values in self._open)


def heat_map(title: str = "row 0", **changes: object) -> HeatMap:
    """Make a map of 4 prompt and 6 completion tokens, one link out of the completion and one out of the prompt."""
    tokens = ("Judge", " these", " two", ".\n", " Clarity", " matters", ".", " 9", ",", " 6")
    content: dict[str, object] = {
        "title": title,
        "tokens": tokens,
        "prompt_tokens": 4,
        "links": {"X->Y": {4: 0.5, 5: 2.0}, "Z->Y": {1: 0.25, 2: 0.0}},
        "targets": {"X->Y": (7, 9), "Z->Y": (7, 9)},
        "facts": {"reward": "0.71"},
    }
    return HeatMap(**(content | changes))  # type: ignore[arg-type]


def score_page(folder: Path, *maps: HeatMap, title: str = "Scores", notes: tuple[str, ...] = ()) -> Page:
    """Write and read a page of heat maps, as `cepo score` does."""
    path = folder / "score.html"
    summary = {"rollouts": str(len(maps))}
    write_report(path, title=title, summary=summary, notes=notes, heat_maps={"Rollouts": maps})
    return Page(path)


def demo_page(
    folder: Path,
    figures: dict[str, Figure] | None = None,
    tables: dict[str, tuple[list[str], list[list[str]]]] | None = None,
    maps: dict[str, list[HeatMap]] | None = None,
) -> Page:
    """Write and read a page of figures, tables and heat maps, as `cepo demo` does."""
    path = folder / "demo.html"
    write_report(path, title="Demo", summary={"seed": "0"}, figures=figures, tables=tables, heat_maps=maps)
    return Page(path)


def test_markup_from_a_model_stays_text(tmp_path: Path) -> None:
    """Protects readers from scripts: no text of ours or a model's becomes an element, wherever it stands."""
    hostile = heat_map(
        SCRIPT,
        tokens=(SCRIPT, '" onmouseover="x', SCRIPT),
        prompt_tokens=1,
        links={SCRIPT: {1: 1.0}, "X->Y": {0: 1.0}},
        targets={SCRIPT: (2,)},
        facts={SCRIPT: SCRIPT},
        malformed=SCRIPT,
    )
    figures = {SCRIPT: history({SCRIPT: [(0.0, 0.0), (1.0, 1.0)]})}
    pages = [
        score_page(tmp_path, hostile, *[heat_map()] * 5, title=SCRIPT, notes=(SCRIPT,)),
        demo_page(tmp_path, figures, {SCRIPT: ([SCRIPT], [[SCRIPT]])}, {SCRIPT: [hostile]}),
    ]
    for page in pages:
        assert "script" not in page.tags
        sources = [str(value) for tag, name, value in page.attributes if tag == "img" and name == "src"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert page.words.count("<script>alert('x')</script>") >= 9


def test_tokens_stand_whole_and_in_order(tmp_path: Path) -> None:
    """Protects the text: prompt and completion of every link read exactly as they were sampled."""
    tokens = ("\n <b>", "&amp;", "  x\t", "\n\n", "é", "", "🙂 y", "\r\n", " end \n")
    page = score_page(tmp_path, heat_map(tokens=tokens, prompt_tokens=3, links={"X->Y": {4: 1.0, 5: 2.0}}, targets={}))
    assert page.texts == ["".join(tokens[:3]), "".join(tokens[3:])]
    assert [text for _, text in page.marks] == ["é", ""]


def test_colour_is_linear_and_never_alone(tmp_path: Path) -> None:
    """Protects the meaning of the colour: in proportion to the norm, with the number in a tooltip."""
    page = score_page(tmp_path, heat_map())
    found = [(text, values["class"], values["title"]) for values, text in page.marks]
    assert found == [
        (" Clarity", "h5", "norm 0.500, 25% of the largest, token 4"),
        (" matters", "h20", "norm 2.000, 100% of the largest, token 5"),
        (" 9", "target", "target of the link"),
        (" 6", "target", "target of the link"),
        (" these", "h20", "norm 0.250, 100% of the largest, token 1"),
        (" two", "h0", "norm 0, 0% of the largest, token 2"),
        (" 9", "target", "target of the link"),
        (" 6", "target", "target of the link"),
    ]


def test_attributions_have_a_sign_and_say_what_they_add_up_to(tmp_path: Path) -> None:
    """Protects the meaning of an attribution: a colour for each sign, both on one scale, sums and parts in words."""
    parts = ((SCRIPT, 2.0, 0.8), ("matters.", -0.5, None))
    attribution = Attribution({4: 2.0, 5: -0.5, 6: 0.0}, delta=2.5, path_sum=1.5, parts=parts)
    page = score_page(tmp_path, heat_map(links={}, attributions={"X->Y": attribution}, targets={"X->Y": (7,)}))
    assert [(text, values["class"], values["title"]) for values, text in page.marks] == [
        (" Clarity", "h20", "+2.000 nats, 100% of the largest, token 4"),
        (" matters", "c5", "-0.500 nats, 25% of the largest, token 5"),
        (".", "h0", "+0 nats, 0% of the largest, token 6"),
        (" 9", "target", "target of the link"),
    ]
    words = " ".join(page.words.split())
    assert "The tokens add up to +1.500 nats; the exact effect is +2.500 nats." in words
    assert f"{SCRIPT} +2.000 +80% matters. -0.500" in words
    assert "An attribution shows" in words
    assert "A heat map shows" not in words
    assert page.texts == ["".join(heat_map().tokens[:4]), "".join(heat_map().tokens[4:])]


@pytest.mark.parametrize(
    ("delta", "path_sum", "told"),
    [
        (2.5, 1.5, None),
        (1.65e-2, -3.3e-3, "needs more nodes along the path (--nodes)"),
        (-1.0, math.nan, "this attribution is not reliable"),
        (1.65e-4, 1.6e-4, "The effect is below 0.001 nats"),
    ],
)
def test_shares_of_an_effect_that_the_path_misses_or_that_is_none_are_not_shown(
    delta: float, path_sum: float, told: str | None, tmp_path: Path
) -> None:
    """Protects readers from "171% of the effect", where the path's error is larger than the effect."""
    attribution = Attribution({4: 2.0}, delta=delta, path_sum=path_sum, parts=(("Clarity", 2.0, 1.71),))
    page = score_page(tmp_path, heat_map(links={}, attributions={"X->Y": attribution}, targets={}))
    words = " ".join(page.words.split())
    assert ("+171%" in words) == ("share of the effect" in words) == (told is None)
    assert told is None or told in words


def test_a_table_of_links_stands_below_the_facts(tmp_path: Path) -> None:
    """Protects the way from a chain of 0 to the link that is weak."""
    measures = (
        ["link", "S", "effect, nats"],
        [["criteria->analysis", "0.900", "+2.914"], ["analysis->scores", "0", "-0.2"]],
    )
    page = score_page(tmp_path, heat_map(links={}, targets={}, measures=measures))
    words = " ".join(page.words.split())
    assert "reward0.71 Links of row 0 link S effect, nats criteria->analysis 0.900 +2.914 analysis->scores" in words


def test_the_prompt_is_folded_unless_it_holds_the_source(tmp_path: Path) -> None:
    """Protects readability: the prompt is open for Z->Y and folded for X->Y, the completion is always open."""
    assert score_page(tmp_path, heat_map()).folded == [True, False, False, False]


def test_broken_text_is_replaced(tmp_path: Path) -> None:
    """Protects the writing: lone surrogates and NUL are replaced, right-to-left text is isolated."""
    tokens = ("a\x00", "\udfffb", "\u202eשלום", "\x1b[31m")
    broken = heat_map("\ud800", tokens=tokens, prompt_tokens=1, links={}, targets={})
    page = score_page(tmp_path, broken, heat_map("مرحبا", malformed="no \ud83d tag"), title="t\x00")
    assert page.texts[:2] == ["a\ufffd", "\ufffdb\u202eשלום\ufffd[31m"]
    assert "no \ufffd tag" in page.words
    assert ("div", "dir", "auto") in page.attributes
    assert "bdi" in page.tags


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    """Protects privacy: no address outside the page, and a policy that would block one."""
    demo_page(
        tmp_path, {"reward": history({"a": [(0.0, 0.0), (1.0, 1.0)]})}, {"t": (["a"], [["b"]])}, {"s": [heat_map()]}
    )
    score_page(tmp_path, heat_map())
    for path in tmp_path.glob("*.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(""", text)
        assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
        assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_malformed_rollouts_are_counted_with_their_reason(tmp_path: Path) -> None:
    """Protects honesty: malformed rollouts are counted, listed by reason, linked, and their text is still shown."""
    plain: dict[str, object] = {"links": {}, "targets": {}}
    maps = [
        heat_map(f"row {i}", malformed="no scores" if i % 2 else None, **(plain if i % 2 else {})) for i in range(7)
    ]
    page = score_page(tmp_path, *maps)
    assert "Malformed: 3 of 7." in page.words
    assert page.words.count("no scores") == 1 + 3
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = [value for _, name, value in page.attributes if name == "href"]
    assert len(links) == 3 + 7
    assert {str(link).removeprefix("#") for link in links} == targets
    assert page.texts.count("".join(maps[0].tokens[4:])) == 4 * 2 + 3


def test_empty_reports_are_whole_pages(tmp_path: Path) -> None:
    """Protects the edge: no heat maps, no curves, no tables, no tokens, no source."""
    assert "There is none." in score_page(tmp_path).words
    assert demo_page(tmp_path, {"p": history({}), "q": history({"c": []})}, {"t": (["a"], [])}, {"s": []}).texts == []
    assert score_page(tmp_path, heat_map(tokens=(), prompt_tokens=0, links={}, targets={})).texts == []
    assert "no norm above 0" in score_page(tmp_path, heat_map(links={"X->Y": {}}, targets={})).words


def test_histories_break_where_there_is_no_number() -> None:
    """Protects the plot: NaN and infinities are gaps, not zeros, and do not spread into the mean beside them."""
    values = (0.1, math.nan, 0.3, math.inf, -math.inf, 0.5, 0.5)
    figure = history({"reward": list(enumerate(values)), "none": [(0.0, math.nan)]})
    raw, smooth, *none = figure.axes[0].lines
    finite = [math.isfinite(value) for value in values]
    for line in (raw, smooth):
        shown = [float(value) for value in line.get_ydata()]  # type: ignore[union-attr]
        assert [value for value, sound in zip(shown, finite, strict=True) if sound] == [0.1, 0.3, 0.5, 0.5]
        assert not any(math.isfinite(value) for value, sound in zip(shown, finite, strict=True) if not sound)
    assert all(math.isnan(float(line.get_ydata()[0])) for line in none)  # type: ignore[index, arg-type]
    picture(figure)


def test_histories_are_smoothed_over_a_tenth() -> None:
    """Protects the strong line: of 40 values, the mean of the five around each; fewer at the ends."""
    figure = history({"a": [(float(step), float(step == 20)) for step in range(40)]})
    smooth = [float(value) for value in figure.axes[0].lines[1].get_ydata()]  # type: ignore[union-attr]
    assert smooth[17:24] == pytest.approx([0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.0])


@pytest.mark.parametrize(("unit", "told"), [("nats", "other prompts' rollouts"), ("reward", "the edited response")])
def test_the_legend_explains_what_is_on_the_page_alone(unit: str, told: str, tmp_path: Path) -> None:
    """Protects readers of a judge's page from a paragraph about reward models, and the other way round."""
    attribution = Attribution({4: 2.0}, delta=2.5, path_sum=1.5, unit=unit)
    page = score_page(tmp_path, heat_map(links={}, attributions={"X->Y": attribution}, targets={}))
    words = " ".join(page.words.split())
    assert told in words
    for other in {"other prompts' rollouts", "the edited response"} - {told}:
        assert other not in words
    assert "L2 norm" not in words


def test_names_from_data_are_no_formulas() -> None:
    """Protects a finished evaluation: a subset called "$\\frac $" is drawn as it is and does not stop the page."""
    name, one = "cost $\\frac $", Estimate(0.5, 0.4, 0.6, 9)
    figures = [
        forest([(name, one)], axis=name),
        curves({name: [(1.0, one)]}, across=name, up=name),
        history({name: [(0.0, 1.0)]}, across=name),
        grid([[1.0]], [name], [name], label=name),
    ]
    for figure in figures:
        assert picture(figure).startswith("data:image/svg+xml;base64,")


def test_a_norm_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    """Protects the scale: NaN and infinite norms get no colour, a tooltip, and leave the other tokens' scale alone."""
    page = score_page(tmp_path, heat_map(links={"X->Y": {4: math.nan, 5: math.inf, 6: 3.0}}, targets={}))
    assert [values["class"] for values, _ in page.marks] == ["h0", "h0", "h20"]
    assert str(page.marks[0][0]["title"]).startswith("norm none")


def test_the_page_takes_its_place_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects an older page: one that fails half-way leaves it as it was, and no draft beside it."""
    score_page(tmp_path / "new folder", heat_map())
    path = tmp_path / "new folder" / "score.html"
    before = path.read_bytes()
    monkeypatch.setattr("cepo.eval.report.page.link_view", lambda heat_map, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_page(tmp_path / "new folder", heat_map())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_long_reports_stay_small(tmp_path: Path) -> None:
    """Protects browsers: tokens that are neither source nor target cost their text alone."""
    tokens = tuple(f" w{i % 10}" for i in range(2000))
    score_page(
        tmp_path, *[heat_map(f"row {i}", tokens=tokens, links={"X->Y": {9: 1.0}}, targets={}) for i in range(50)]
    )
    assert (tmp_path / "score.html").stat().st_size < 50 * (6000 + 2000) + 20_000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt_tokens": 11}, "prompt_tokens is 11; expected 0 to 10"),
        ({"links": {"X->Y": {10: 1.0}}, "targets": {}}, "position 10; expected 0 to 9"),
        ({"targets": {"X->Y": (-1,)}}, "position -1"),
        ({"targets": {"A->B": (1,)}}, r"targets names \['A->B'\]"),
        ({"attributions": {"X->Y": Attribution({10: 0.5}, 1.0, 1.0)}}, "position 10; expected 0 to 9"),
        ({"links": {"X->Y": {1: -0.5}}, "targets": {}}, "norm -0.5; expected norms >= 0"),
    ],
)
def test_a_heat_map_refuses_what_it_cannot_show(changes: dict[str, object], match: str) -> None:
    """Protects callers: positions outside the text and negative norms are named."""
    with pytest.raises(ValueError, match=match):
        heat_map(**changes)  # type: ignore[arg-type]


def test_tables_refuse_what_does_not_fit(tmp_path: Path) -> None:
    """Protects callers: ragged tables are named, before anything is written."""
    with pytest.raises(ValueError, match="expected 2 cells"):
        demo_page(tmp_path, tables={"t": (["a", "b"], [["c"]])})
    assert not list(tmp_path.iterdir())
