"""The careless clerk: half right, half wrong, evenly over the kinds; the reference stays perfect."""

from collections import Counter

from envs.shop.environment import ShopEnvironment
from envs.shop.kinds import KINDS

NUM = 16 * len(KINDS)


def formulas(environment: ShopEnvironment) -> list[tuple[str, bool]]:
    """Kind, and whether the demonstrator would calculate the right formula, for the first tasks."""
    found = []
    for index in range(NUM):
        task = environment.task("train", index)
        shown, right = environment.demonstrator(task), environment.reference(task)
        found.append((task.kind, vars(shown)["_formula"] == vars(right)["_formula"]))
    return found


def test_demonstrations_are_perfect_unless_asked_otherwise() -> None:
    assert all(right for _, right in formulas(ShopEnvironment()))


def test_a_careless_clerk_is_wrong_in_half_of_every_kind() -> None:
    counts = Counter(formulas(ShopEnvironment(demonstrations="careless")))
    assert counts == {(kind.name, right): NUM // len(KINDS) // 2 for kind in KINDS for right in (True, False)}


def test_both_ways_of_being_wrong_are_shown_for_every_kind() -> None:
    environment = ShopEnvironment(demonstrations="careless")
    seen = set()
    for index in range(NUM):
        task = environment.task("train", index)
        formula = vars(environment.demonstrator(task))["_formula"]
        if formula in task.secret["slips"]:
            seen.add((task.kind, task.secret["slips"].index(formula)))
    assert seen == {(kind.name, way) for kind in KINDS for way in (0, 1)}
