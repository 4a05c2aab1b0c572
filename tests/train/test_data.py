"""The data sets: broken lines, leaks, positions, the hub's shapes, and real files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cepo.files import read_jsonl
from cepo.train.data import DataSplit, load_preferences, load_reasoning
from cepo.train.prompts import judge_prompt, reasoning_prompt
from cepo.train.rows import number_text
from tests.paths import DATA


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, *, prompts: int | None = None) -> list[dict[str, Any]]:
    """Make distinct pairs, over fewer prompts if asked."""
    return [
        {"id": f"row {i}", "prompt": f"prompt {i % (prompts or count)}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]


def by_id(loaded: DataSplit) -> dict[str, tuple[str, dict[str, Any]]]:
    """Say for each row on which side it is and what it holds."""
    sides = {"train": loaded.train, "test": loaded.test}
    return {row["id"]: (name, row) for name, side in sides.items() for row in side}


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Make a conversation."""
    return [{"role": role, "content": content} for role, content in turns]


def test_broken_lines_are_reported_and_lose_no_other_row(tmp_path: Path) -> None:
    """Protects the good rows of a damaged file, and the numbers of the damaged lines."""
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"first": 1}\r',
        b"",
        b'{"broken": ',
        b'{"latin": "\xe9"}',
        b"[1, 2]",
        b"null",
        b'{"number": NaN}',
        b"[" * 100_000,
        b'{"long": ' + b"9" * 5_000 + b"}",
        '{"separator": "a\u2028b"}'.encode(),
        b'{"last": 2}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows, problems = read_jsonl(path)
    assert [number for number, _ in rows] == [1, 7, 10, 11]
    assert rows[0] == (1, {"first": 1})
    assert rows[2] == (10, {"separator": "a\u2028b"})
    reasons = dict(problems)
    assert list(reasons) == [3, 4, 5, 6, 8, 9]
    assert reasons[3] == "not JSON at character 11: Expecting value"
    assert reasons[4] == "not UTF-8 at byte 12 of the line"
    assert reasons[5] == "holds a list; expected a JSON object"
    assert reasons[6] == "holds nothing; expected a JSON object"
    assert reasons[8].startswith("JSON that can't be held")
    assert reasons[9].startswith("JSON that can't be held")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Protects the first mistake that users make."""
    for load in (read_jsonl, load_preferences, load_reasoning):
        with pytest.raises(ValueError, match="no-such.jsonl (does not exist|is not a file); expected"):
            load(tmp_path / "no-such.jsonl")


def test_a_preference_becomes_a_judges_prompt(tmp_path: Path) -> None:
    """Protects the columns that the rewards and the trainer read."""
    loaded = load_preferences(write_lines(tmp_path / "rows.jsonl", pairs(40)), test_fraction=0.0)
    assert len(loaded.train) == 40
    assert (len(loaded.test), loaded.skipped) == (0, ())
    assert loaded.test.column_names == loaded.train.column_names
    for i, row in enumerate(loaded.train):
        chosen, rejected = (row["response_a"], row["response_b"])[:: 1 if row["label"] == "A" else -1]
        assert (row["id"], row["query"], chosen, rejected) == (f"row {i}", f"prompt {i}", f"good {i}", f"bad {i}")
        assert row["prompt"] == judge_prompt(row["query"], row["response_a"], row["response_b"])
    assert 8 < list(loaded.train["label"]).count("A") < 32


def test_a_question_becomes_a_reasoners_prompt(tmp_path: Path) -> None:
    """Protects the columns that the rewards read, and numbers as answers."""
    rows: list[dict[str, Any]] = [
        {"question": "q1", "answer": "yes"},
        {"question": "q2", "answer": 18.0},
        {"question": "q3", "answer": 10**30},
        {"question": "q4", "answer": True},
        {"question": "q5", "answer": float("nan")},
        {"question": "q6", "answer": 10**400},  # larger than any float
        {"question": "q7", "answer": 1234567890123456.0},
        {"question": "q8", "answer": 0.00000015},
    ]
    loaded = load_reasoning(write_lines(tmp_path / "rows.jsonl", rows), test_fraction=0.0)
    plain = [str(10**400), "1234567890123456", "0.00000015"]
    assert loaded.train["answer"][:] == ["yes", "18", str(10**30), *plain]
    assert loaded.train[0]["prompt"] == reasoning_prompt("q1")
    assert len(set(loaded.train["id"])) == 6
    assert loaded.skipped == (
        (4, "column 'answer' holds true or false, not text"),
        (5, "column 'answer' is missing; the row holds no known form (question, answer (empty))"),
    )


def test_a_number_of_single_precision_is_the_answer_that_was_meant(tmp_path: Path) -> None:
    """Protects right answers of tables in float32, whose 0.1 became 0.100000001490116, so that 0.1 earned 0."""
    meant = ["0.1", "18.75", "-3.14", "123456.7", "0.00015"]
    path = tmp_path / "rows.parquet"
    answers = pyarrow.array([float(text) for text in meant], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"question": [f"q{text}" for text in meant], "answer": answers}), path)
    assert load_reasoning(path, test_fraction=0.0).train["answer"][:] == meant
    double = {0.1: "0.1", 0.1 + 2**-40: "0.10000000000091", 2.5e-45: f"0.{44 * chr(48)}25"}
    assert {value: number_text(value) for value in double} == double


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    """Protects the test set from leaks: case and white space make no new prompt."""
    rows = pairs(300, prompts=30)
    for i, row in enumerate(rows):
        row["prompt"] = (row["prompt"].upper(), f"  {row['prompt']}\n", row["prompt"].replace(" ", " \t "))[i % 3]
    loaded = load_preferences(write_lines(tmp_path / "rows.jsonl", rows), test_fraction=0.4)
    train, test = ({" ".join(query.lower().split()) for query in side["query"]} for side in (loaded.train, loaded.test))
    assert len(train) + len(test) == 30
    assert not train & test
    assert 5 < len(test) < 20


def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Protects positions and sides from the order of the rows, from the limit and from broken lines."""
    rows = pairs(60)
    reference = by_id(load_preferences(write_lines(tmp_path / "rows.jsonl", rows), test_fraction=0.3))
    assert {side for side, _ in reference.values()} == {"train", "test"}
    shuffled = by_id(load_preferences(write_lines(tmp_path / "reversed.jsonl", rows[::-1]), test_fraction=0.3))
    assert shuffled == reference
    limited = by_id(load_preferences(tmp_path / "rows.jsonl", test_fraction=0.3, limit=7))
    assert limited == {f"row {i}": reference[f"row {i}"] for i in range(7)}
    reseeded = by_id(load_preferences(tmp_path / "rows.jsonl", test_fraction=0.3, seed=1))
    assert any(reseeded[name][1]["label"] != row["label"] for name, (_, row) in reference.items())
    assert any(reseeded[name][0] != side for name, (side, _) in reference.items())


@pytest.mark.parametrize(("test_fraction", "sizes"), [(0.0, (20, 0)), (1.0, (0, 20))])
def test_the_fraction_reaches_both_ends(tmp_path: Path, test_fraction: float, sizes: tuple[int, int]) -> None:
    """Protects evaluation on all rows and training on all rows."""
    loaded = load_preferences(write_lines(tmp_path / "rows.jsonl", pairs(20)), test_fraction=test_fraction)
    assert (len(loaded.train), len(loaded.test)) == sizes


def test_unusable_rows_are_skipped_with_their_reason(tmp_path: Path) -> None:
    """Protects the good rows, and says what was wrong with each of the others."""
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows: list[dict[str, Any]] = [
        good,
        {**good, "chosen": None},
        {**good, "chosen": "r"},
        {**good, "rejected": " "},
        {**good, "prompt": "\ud800"},
        {"prompt": "p", "chosen": "c"},
        {**good, "chosen": ["c", "d"]},
        {**good, "chosen": messages(("user", "p"))},
        {**good, "id": "\ud800", "chosen": "other"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    loaded = load_preferences(path, test_fraction=0.0)
    assert len(loaded.train) == 2
    assert loaded.skipped == (
        (2, "column 'chosen' is missing; the row holds no known form (prompt, rejected, chosen (empty))"),
        (3, "columns 'chosen' and 'rejected' are the same"),
        (4, "column 'rejected' is blank"),
        (5, "column 'prompt' holds a lone surrogate; expected valid Unicode text"),
        (6, "column 'rejected' is missing; the row holds no known form (prompt, chosen)"),
        (7, "holds 2 chosen and 1 rejected responses; expected one of each"),
        (8, "column 'chosen' holds no message by the assistant"),
        (10, "not JSON at character 2: Expecting property name enclosed in double quotes"),
    )


def test_a_missing_column_names_itself_the_file_and_the_columns(tmp_path: Path) -> None:
    """Protects the second mistake that users make; renaming mends it."""
    rows = [{"instruction": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"rows.jsonl .*'prompt' is missing; .* a preference.*\(3x\).* found: instruction, chosen, rejected; if "
        r"they have other names here: --set data.columns='{prompt: NAME}'$",
    ):
        load_preferences(path)
    assert len(load_preferences(path, columns={"prompt": "instruction"}, test_fraction=0.0).train) == 3
    with pytest.raises(ValueError, match="'question' is missing.*'{question: NAME, answer: NAME}'"):
        load_reasoning(path)
    with pytest.raises(ValueError, match="found: instruction, chosen, rejected$"):  # the mapping is known, and wrong
        load_preferences(path, columns={"prompt": "query"})


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "it is empty; columns found: none"), (b"{\n{\n", r"Expecting .* \(2x\)")]
)
def test_a_file_without_a_usable_row_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    """Protects against training on nothing."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl holds no usable row: .*{reason}"):
        load_preferences(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_fraction": 1.5}, "test_fraction is 1.5"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"limit": 0}, "limit is 0"),
        ({"columns": {"label": "x"}}, "columns renames label; expected only prompt, chosen, rejected"),
        ({"split": "train"}, "split is 'train', but data"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    """Protects the rule that bad input is named before work starts."""
    with pytest.raises(ValueError, match=message):
        load_preferences(write_lines(tmp_path / "rows.jsonl", pairs(3)), **arguments)


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    """A CPU trains on short prompts only; the whole prompt counts, and nothing vanishes unseen."""
    path = write_lines(tmp_path / "q.jsonl", [{"question": "q" * n, "answer": "1"} for n in (1, 50)])
    whole = len(load_reasoning(path, test_fraction=0.0).train[0]["prompt"][0]["content"])
    split = load_reasoning(path, test_fraction=0.0, max_characters=whole)
    assert [len(row["question"]) for row in split.train] == [1]
    assert split.skipped == ((2, f"the prompt has over {whole} characters"),)
    with pytest.raises(ValueError, match="max_characters is 0"):
        load_reasoning(path, max_characters=0)


def test_conversations_are_reduced_to_a_query_and_two_responses(tmp_path: Path) -> None:
    """Protects the shapes in which the hub publishes preferences."""
    single = {
        "chosen": messages(("user", "q"), ("assistant", "good")),
        "rejected": messages(("user", "q"), ("assistant", "bad")),
    }
    several = {
        name: messages(("user", "hi"), ("assistant", "hello"), ("user", "q"), ("assistant", text))
        for name, text in (("chosen", "good"), ("rejected", "bad"))
    }
    explicit = {
        "prompt": messages(("user", "q")),
        "chosen": messages(("assistant", "good")),
        "rejected": messages(("assistant", "bad")),
    }
    different = {**single, "rejected": messages(("user", "other"), ("assistant", "bad"))}
    path = write_lines(tmp_path / "rows.jsonl", [single, several, explicit, different])
    loaded = load_preferences(path, test_fraction=0.0)
    assert loaded.train["query"][:] == ["q", "User: hi\n\nAssistant: hello\n\nUser: q", "q"]
    assert all({row["response_a"], row["response_b"]} == {"good", "bad"} for row in loaded.train)
    assert loaded.skipped == ((4, "columns 'chosen' and 'rejected' answer different conversations"),)


def test_a_hub_data_set_is_loaded_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the call to the hub, which no test may make, and that its rows are treated like a file's."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 4"}, {"question": "", "answer": "5"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_reasoning("openai/gsm8k:main", test_fraction=0.0)
    load_reasoning("owner/name", split="validation")
    assert calls == [("openai/gsm8k", "main", "train"), ("owner/name", None, "validation")]
    assert loaded.train["answer"][:] == ["#### 4"]
    assert loaded.skipped == ((2, "column 'question' is blank"),)


def test_a_source_that_is_neither_file_nor_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users from the hub client's own errors."""

    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="owner/nmae is neither a file nor a data set that can be loaded"):
        load_preferences("owner/nmae")


@pytest.mark.parametrize("name", ["rmb_helpful_dev", "llmbar", "humanevalpack", "math_prm", "xstest_pairs"])
def test_real_preferences_load_whole_and_do_not_leak(name: str) -> None:
    """Protects the loader on real files: every row is used, positions are balanced, no prompt is on both sides."""
    path = DATA / "pref" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data set is not here: {path.name}")
    loaded = load_preferences(path, test_fraction=0.2)
    rows, problems = read_jsonl(path)
    assert (problems, loaded.skipped) == ([], ())
    labels = [*loaded.train["label"], *loaded.test["label"]]
    assert len(labels) == len(rows)
    assert abs(labels.count("A") / len(labels) - 0.5) < 0.1
    assert not {" ".join(text.split()) for text in loaded.train["query"]} & {
        " ".join(text.split()) for text in loaded.test["query"]
    }


@pytest.mark.parametrize("name", ["math_hard", "gsm8k_test", "casehold"])
def test_real_questions_load_whole(name: str) -> None:
    """Protects the loader on real files."""
    path = DATA / "reason" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data set is not here: {path.name}")
    loaded = load_reasoning(path, limit=200)
    assert len(loaded.train) + len(loaded.test) == 200
    assert loaded.skipped == ()
