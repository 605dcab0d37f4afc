"""The calculator's arithmetic, and what it refuses; its process in the sandbox is tested with the shop."""

from __future__ import annotations

import random

import pytest

from envs.shop.calc import Refused, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17*72-12", 1212),
        ("2000 - 17*72", 776),
        ("-(3+4)*2", -14),
        (" 7 ", 7),
        ("((1))", 1),
        ("--3", 3),
        ("999999*999999", 999998000001),
    ],
)
def test_arithmetic(expression: str, value: int) -> None:
    assert calculate(expression) == value


def test_it_agrees_with_python_on_random_expressions() -> None:
    source = random.Random(7)
    for _ in range(500):
        numbers = [str(source.randrange(1, 99)) for _ in range(5)]
        signs = [source.choice("+-*") for _ in range(4)]
        expression = numbers[0] + "".join(sign + number for sign, number in zip(signs, numbers[1:], strict=True))
        assert calculate(expression) == eval(expression, {"__builtins__": {}})


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "9**9**9",
        "2**3",
        "4/2",
        "4//2",
        "7%3",
        "1.5",
        "1e9",
        "0x10",
        "1_0",
        "007",
        "+",
        "1+",
        "(1",
        "1)",
        "()",
        "1(2)",
        "(1)(2)",
        "1 2",
        "+5",
        "a",
        "a+1",
        "True",
        "__import__('os')",
        "exit()",
        "print(1)",
        "(lambda:1)()",
        "[1]",
        "(1,2)",
        "1;2",
        "1\n2",
        "1\x00",
        "1,2",
        "x:=1",
        "1<2",
        "1 if 1 else 2",
        "'1'",
        "١٢+1",
        "\uff11\uff12",
        "²",
        "9" * 13,
        "9999999*9999999",
        "9" * 40 + "*" + "9" * 20,
        "1+" * 32 + "1",
        "(" * 33,
        "-" * 64 + "1",
        "(" * 31 + "1" + ")" * 33,
    ],
)
def test_everything_else_is_refused(expression: str) -> None:
    with pytest.raises(Refused):
        calculate(expression)
