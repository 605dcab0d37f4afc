"""The shop's problems: deterministic, distinct, disjoint between splits, balanced, true to their formulas."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections import Counter

import pytest

from envs.interface import Split
from envs.shop import ShopEnvironment
from envs.shop.calc import calculate
from envs.shop.kinds import ITEMS, KINDS, NAMES
from envs.shop.problems import SLOT, Problem, _decode, _shuffled, num_problems, num_slots, problem


def problems(split: Split, num: int) -> list[Problem]:
    return [problem(KINDS, split, index) for index in range(num)]


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return problems("train", 10_000)


@pytest.fixture(scope="module")
def heldout() -> list[Problem]:
    return problems("heldout", 2_000)


def test_indices_never_share_a_problem_nor_do_splits(train: list[Problem], heldout: list[Problem]) -> None:
    contents = [each.content for each in (*train, *heldout)]
    assert len(set(contents)) == len(contents)


def test_a_problem_belongs_to_its_split_by_content_alone(train: list[Problem], heldout: list[Problem]) -> None:
    assert {each.split for each in train} == {"train"}
    assert {each.split for each in heldout} == {"heldout"}


def test_there_are_problems_enough_in_every_kind() -> None:
    for kind in KINDS:
        assert num_slots(kind) * len(KINDS) >= 20_000, kind.name
        assert num_slots(kind) * SLOT <= num_problems(kind)


def test_kinds_take_turns_and_everything_occurs(train: list[Problem]) -> None:
    assert [each.kind.name for each in train[:8]] == [kind.name for kind in KINDS] * 2
    for table, seen in ((NAMES, {each.name for each in train}), (ITEMS, {each.item for each in train})):
        assert seen == set(table)
    for kind in KINDS:
        for key, values in kind.numbers.items():
            counts = Counter(each.numbers[key] for each in train if each.kind is kind)
            assert set(counts) == set(values), (kind.name, key)
            # No value is preferred: within five standard deviations of its share.
            share = len(train) / len(KINDS) / len(values)
            assert max(abs(count - share) for count in counts.values()) < 5 * math.sqrt(share) + 1, (kind.name, key)


def test_the_shuffle_is_a_permutation() -> None:
    for size in (1, 2, 3, 1000, 4097):
        assert sorted(_shuffled("key", position, size) for position in range(size)) == list(range(size))


def test_counts_and_problems_are_one_to_one() -> None:
    kind = KINDS[0]
    seen = {_decode(kind, count).content for count in range(0, num_problems(kind), 37)}
    assert len(seen) == len(range(0, num_problems(kind), 37))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_answers_are_positive_and_formulas_say_the_same(kind: object) -> None:
    chosen = next(each for each in KINDS if each is kind)
    keys = list(chosen.numbers)
    corners = itertools.product(*((min(values), max(values)) for values in chosen.numbers.values()))
    for corner in corners:
        numbers = dict(zip(keys, corner, strict=True))
        answer = chosen.answer(numbers)
        assert 0 < answer < 10_000
        shown = chosen.shown(numbers) | {"p": numbers["p"]}
        assert calculate(chosen.formula.format(**shown)) == answer


def test_every_problem_reads_and_computes(train: list[Problem]) -> None:
    for each in train[:2000]:
        assert calculate(each.formula.format(p=each.numbers["p"])) == each.answer
        assert each.question.startswith(each.name)
        assert ITEMS[each.item] in each.question
        assert each.prices[each.item] == each.numbers["p"]
        assert set(each.prices) == set(ITEMS)
        assert "{" not in each.question


def test_the_question_says_all_numbers_but_the_price() -> None:
    for kind in KINDS:
        needed = set(re.findall(r"{(\w+)}", kind.formula))
        assert needed >= {"p", "a"}
        assert set(re.findall(r"{(\w+)}", kind.question)) == needed - {"p"} | {"name", "items"}


def test_slips_are_wrong_and_use_the_same_numbers(train: list[Problem]) -> None:
    for each in train[:2000]:
        results = [calculate(slip.format(p=each.numbers["p"])) for slip in each.slips]
        assert each.answer not in results, each.content
        assert len(set(results)) == len(results)


def test_indices_beyond_the_last_begin_again() -> None:
    environment = ShopEnvironment(kinds=["discount"])
    round_trip = num_slots(KINDS[0])
    first, again = environment.task("train", 5), environment.task("train", 5 + round_trip)
    assert (first.prompt, first.secret) == (again.prompt, again.secret)


def test_tasks_are_the_same_in_another_process() -> None:
    program = """
from envs.shop import ShopEnvironment
shop = ShopEnvironment()
for split in ("train", "heldout"):
    for index in (0, 1, 2, 3, 77, 9999, 123456789):
        task = shop.task(split, index)
        print(task, sorted(task.secret.items()))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 14


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1)])
def test_tasks_that_do_not_exist_are_refused(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="train and heldout from index 0"):
        ShopEnvironment().task(split, index)  # type: ignore[arg-type]
