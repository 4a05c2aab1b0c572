"""Protects preference data of every shape: rows become items, and broken rows say why."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from cepo.eval.judges.journal import collect_judgements
from cepo.eval.rewardbench.items import HUB_NAMES, judge_tasks, load_items, read_item
from tests.eval.rewardbench.rule import SCORES, Rule, row, shown
from tests.jsonl import write_jsonl
from tests.paths import DATA

PAIRS = DATA / "pref"


def test_a_row_of_rewardbench_becomes_an_item_of_one_pair() -> None:
    item = read_item(row(4, subset="hep-go", chosen_model="x", rejected_model="y"), "line 1")
    assert (item.name, item.subset, item.prompt, item.chosen, item.rejected) == (
        "4",
        "hep-go",
        "query 4",
        ("good",),
        ("bad",),
    )
    assert item.pairs == ((0, 0),)


def test_a_row_of_rewardbench_2_compares_every_chosen_with_every_rejected() -> None:
    four = read_item(
        {"id": "7", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}, "line 1"
    )
    assert four.pairs == ((0, 0), (0, 1), (0, 2))
    assert len(judge_tasks([four])) == 6
    ties = read_item(
        {
            "id": "tied:1",
            "prompt": "q",
            "chosen": ["a", "b"],
            "rejected": ["c", "d"],
            "subset": "Ties",
            "num_correct": 2,
        },
        "line 1",
    )
    assert ties.pairs == ((0, 0), (0, 1), (1, 0), (1, 1))


def test_messages_are_read_as_conversations() -> None:
    turns = [{"role": "user", "content": "why?"}]
    item = read_item(
        {
            "chosen": [*turns, {"role": "assistant", "content": "because"}],
            "rejected": [*turns, {"role": "assistant", "content": "no"}],
        },
        "line 1",
    )
    assert (item.prompt, item.chosen, item.rejected, item.subset) == ("why?", ("because",), ("no",), "all")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' holds a number"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is blank"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "both chosen and rejected"),
        ({"prompt": "q", "chosen": ["a", " "], "rejected": "b"}, "blank"),
        ({"prompt": "q", "chosen": ["a"], "rejected": []}, "'rejected'"),
        ({"prompt": "q", "chosen": "a\ud800", "rejected": "b"}, "surrogate"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": 3}, "'subset' holds a number"),
    ],
)
def test_a_row_that_is_no_preference_says_why(broken: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_item(broken, "line 1")


def test_a_row_without_an_id_is_named_by_its_line_and_keeps_its_judgements_where_it_moves(tmp_path: Path) -> None:
    """Records had an empty id, and pages were titled with hashes."""
    first, second = ({name: value for name, value in row(number).items() if name != "id"} for number in (0, 1))
    before, _ = load_items(write_jsonl(tmp_path / "before.jsonl", [first, {**second, "id": ""}]))
    after, _ = load_items(write_jsonl(tmp_path / "after.jsonl", [row(2), first, second]))
    assert [item.name for item in before] == ["line 1", "line 2"]
    assert [item.name for item in after] == ["2", "line 2", "line 3"]
    assert [item.key for item in before] == [item.key for item in after[1:]]
    assert judge_tasks(after[1:])[0].facts["id"] == "line 2"
    folder, output = tmp_path / "out", []
    for items in (before, after[1:]):
        judged = collect_judgements(
            judge_tasks(items), folder, {"command": "eval"}, lambda: Rule(lambda *_: SCORES.format(8, 2))
        )
        output.append({record["id"] for record in judged.records.values()})
    assert output == [{"line 1", "line 2"}, {"line 2", "line 3"}]
    assert judged.resumed == 4


def test_broken_lines_are_told_by_number_and_the_rest_is_loaded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(0), "{not json", row(1, rejected="good"), row(2)])
    items, problems = load_items(path)
    assert [item.name for item in items] == ["0", "2"]
    assert [number for number, _ in problems] == [2, 3]


def test_rows_of_the_same_content_are_all_kept(tmp_path: Path) -> None:
    items, _ = load_items(write_jsonl(tmp_path / "in.jsonl", [row(0), row(0), row(1)]))
    assert len({item.key for item in items}) == 3
    assert items[1].key == items[0].key + "#2"


def test_a_draw_is_seeded_keeps_the_order_and_grows_without_changing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(number) for number in range(40)])
    few = [item.key for item in load_items(path, limit=5)[0]]
    more = [item.key for item in load_items(path, limit=20)[0]]
    whole = [item.key for item in load_items(path)[0]]
    other = [item.key for item in load_items(path, limit=5, seed=1)[0]]
    assert set(few) < set(more) < set(whole)
    assert few == [key for key in whole if key in few]
    assert other != few


def test_subsets_are_chosen_by_name_and_unknown_ones_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(0, subset="x"), row(1, subset="y")])
    assert [item.name for item in load_items(path, subsets=["y"])[0]] == ["1"]
    with pytest.raises(ValueError, match="'z'.*it has x, y"):
        load_items(path, subsets=["z"])


def test_the_benchmarks_are_loaded_from_the_hub_with_their_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        calls.append((name, configuration, split))
        two = name.endswith("2")
        return datasets.Dataset.from_list(
            [row(0, subset="Math" if two else "hep-go") | ({"chosen": ["a"], "rejected": ["b", "c"]} if two else {})]
        )

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [len(load_items(name)[0][0].pairs) for name in HUB_NAMES] == [1, 2]
    load_items("owner/name:part", split="test")
    assert calls == [
        ("allenai/reward-bench", None, "filtered"),
        ("allenai/reward-bench-2", None, "test"),
        ("owner/name", "part", "test"),
    ]


@pytest.mark.parametrize("name", ["llmbar", "rmb_helpful_dev", "humanevalpack", "math_prm", "xstest_pairs"])
def test_real_preference_files_load_whole(name: str) -> None:
    path = PAIRS / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared data")
    items, problems = load_items(path)
    # Two solutions that are the same text are no preference.
    assert all("both chosen and rejected" in reason for _, reason in problems)
    assert len(items) + len(problems) == len(path.read_text(encoding="utf-8").splitlines())


def test_both_orders_are_asked_and_the_better_response_stands_where_the_record_says() -> None:
    asked = judge_tasks([read_item(row(0), "line 1")])
    assert {task.facts["chosen_at"]: shown(task.messages) for task in asked} == {
        "A": ("query 0", "good", "bad"),
        "B": ("query 0", "bad", "good"),
    }
