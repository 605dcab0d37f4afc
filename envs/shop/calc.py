"""The calculator: runs inside the sandbox as `python3 -I -S calc.py EXPRESSION`, prints an integer or `error: ...`.

Integers, + - * and parentheses, nothing else. The expression is parsed, never evaluated as Python: a tree of three node
types is walked, so there is nothing to call and nothing to look up. Its length bounds its depth and its numbers.
"""

import _ast  # the parser's node types without the `ast` module, whose import would double the start-up time
import sys

MAX_LENGTH = 64
MAX_RESULT = 10**12
ALLOWED = frozenset("0123456789+-*() ")


class Refused(Exception):  # noqa: N818  it is an answer, not a failure
    """The expression is not one for this calculator."""


def evaluate(node: _ast.AST) -> int:
    """The value of a parsed expression. Raises Refused."""
    if isinstance(node, _ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, _ast.UnaryOp) and isinstance(node.op, _ast.USub):
        return -evaluate(node.operand)
    if isinstance(node, _ast.BinOp):
        left, right = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, _ast.Add):
            return left + right
        if isinstance(node.op, _ast.Sub):
            return left - right
        if isinstance(node.op, _ast.Mult):
            return left * right
    raise Refused("only integers, + - * and parentheses")


def calculate(expression: str) -> int:
    """The value of an expression. Raises Refused."""
    if len(expression) > MAX_LENGTH:
        raise Refused("expression too long")
    if not ALLOWED.issuperset(expression):
        raise Refused("only integers, + - * and parentheses")
    try:
        tree = compile(expression.strip(), "", "eval", 0x400)  # 0x400: ast.PyCF_ONLY_AST
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Refused("not an expression") from None
    if not isinstance(tree, _ast.Expression):
        raise Refused("not an expression")
    result = evaluate(tree.body)
    if abs(result) > MAX_RESULT:
        raise Refused("result too large")
    return result


def main(arguments: list[str]) -> int:
    """Print the result of the one argument."""
    try:
        sys.stdout.write(f"{calculate(' '.join(arguments))}\n")
    except Refused as refused:
        sys.stdout.write(f"error: {refused}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
