"""Small bugs for a Python file: where one may go in and what the text becomes. Pure; runs nothing and chooses nothing.

A mutation replaces one piece of the text by another, as a slip of the hand would: the rest of the file, comments
included, stays as its authors wrote it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "is not": "is",
    "is": "is not",
    "not in": "in",
    "in": "not in",
}
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "%")}
TWINS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "lower": "upper",
    "upper": "lower",
    "startswith": "endswith",
    "endswith": "startswith",
    "lstrip": "rstrip",
    "rstrip": "lstrip",
    "find": "rfind",
    "rfind": "find",
    "split": "rsplit",
    "partition": "rpartition",
    "append": "extend",
    "keys": "values",
    "ljust": "rjust",
    "rjust": "ljust",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Mutation:
    """One bug: `text[start:end]`, in characters, becomes `new`. kind: what went wrong; function: in which one."""

    kind: str
    function: str
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """The file with the bug in it."""
        return text[: self.start] + self.new + text[self.end :]


class _Text:
    """A file's text with the characters' places of its syntax tree's nodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines = text.splitlines(keepends=True)
        self._begin = [0]
        for line in self._lines:
            self._begin.append(self._begin[-1] + len(line))

    def _place(self, line: int, column: int) -> int:
        """Columns of a syntax tree count bytes."""
        return self._begin[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def start(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        return self._place(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._place(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.expr | ast.stmt) -> str:
        return self.text[self.start(node) : self.end(node)]

    def whole_lines(self, node: ast.stmt) -> tuple[int, int]:
        """The lines that a statement takes, the last line's end included."""
        assert node.end_lineno is not None
        return self._begin[node.lineno - 1], self._begin[node.end_lineno]

    def between(self, left: ast.expr, right: ast.expr, word: str) -> tuple[int, int] | None:
        """Where an operator stands between two expressions; None where brackets or comments make that unclear."""
        start, end = self.end(left), self.start(right)
        gap = self.text[start:end]
        if gap.count(word) != 1 or "#" in gap:
            return None
        start += gap.index(word)
        return start, start + len(word)


def mutations(text: str) -> Iterator[Mutation]:
    """All that this module knows to do to a file, in the order of the file. Raises SyntaxError for a broken one."""
    source = _Text(text)
    for name, function in _functions(ast.parse(text), ""):
        names = sorted(_local_names(function))
        for node in _own_nodes(function):
            for kind, (start, end), new in _at(source, function, node, names):
                yield Mutation(kind, name, start, end, new)


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """The functions of the file with their qualified names; those within functions belong to the outer one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif not isinstance(node, ast.expr):
            yield from _functions(node, prefix)


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    """What a function does, without its decorators, annotations and docstring."""
    waiting: list[ast.AST] = [function.args, *function.body]
    while waiting:
        node = waiting.pop(0)
        yield node
        waiting[:0] = [
            child
            for name, value in ast.iter_fields(node)
            if name not in ("annotation", "returns", "decorator_list")
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST)
        ]


def _local_names(function: Function) -> set[str]:
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    arguments = {arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
    return stored | arguments - {"self", "cls"}


Found = Iterator[tuple[str, tuple[int, int], str]]


def _at(source: _Text, function: Function, node: ast.AST, names: Sequence[str]) -> Found:
    """The bugs that may go in at one node."""
    if isinstance(node, ast.expr):
        yield from _in_expression(source, node, names)
    match node:
        case ast.arguments():
            yield from _defaults(source, node)
        case ast.If():
            yield from _branched(source, node)
        case ast.Return(value=ast.expr() as value) if node is function.body[-1]:
            yield "missing return", (source.start(node), source.start(value)), ""
        case ast.Break():
            yield "loop", (source.start(node), source.end(node)), "continue"
        case ast.Continue():
            yield "loop", (source.start(node), source.end(node)), "break"
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield "dropped statement", (source.start(node), source.end(node)), "pass"


def _in_expression(source: _Text, node: ast.expr, names: Sequence[str]) -> Found:
    match node:
        case ast.Compare():
            yield from _compared(source, node)
        case ast.BoolOp(values=[first, second, *_], op=op):
            word, other = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
            if place := source.between(first, second, word):
                yield "condition", place, other
        case ast.BinOp(left=left, right=right, op=op) if type(op) in OPERATORS:
            word, other = OPERATORS[type(op)]
            if not _is_text(left) and not _is_text(right) and (place := source.between(left, right, word)):
                yield "operator", place, other
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            span = source.start(node), source.end(node)
            yield "off by one", span, str(value + 1)
            if value > 0:
                yield "off by one", span, str(value - 1)
        case ast.Name(id=name, ctx=ast.Load()) if name in names and len(names) > 1:
            yield "wrong variable", (source.start(node), source.end(node)), names[names.index(name) - 1]
        case ast.Call():
            yield from _called(source, node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


_WORDS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


def _compared(source: _Text, node: ast.Compare) -> Found:
    word = _WORDS[type(node.ops[0])]
    if place := source.between(node.left, node.comparators[0], word):
        yield "comparison", place, COMPARISONS[word]


def _called(source: _Text, node: ast.Call) -> Found:
    plain = [each for each in node.args if not isinstance(each, ast.Starred)]
    if len(plain) == len(node.args) >= 2 and source.of(node.args[0]) != source.of(node.args[1]):
        first, second = node.args[:2]
        between = source.text[source.end(first) : source.start(second)]
        if "#" not in between:
            span = source.start(first), source.end(second)
            yield "swapped arguments", span, source.of(second) + between + source.of(first)
    if isinstance(node.func, ast.Name) and node.func.id in TWINS:
        yield "wrong function", (source.start(node.func), source.end(node.func)), TWINS[node.func.id]
    if isinstance(node.func, ast.Attribute) and node.func.attr in TWINS:
        end = source.end(node.func)
        yield "wrong function", (end - len(node.func.attr), end), TWINS[node.func.attr]


def _defaults(source: _Text, node: ast.arguments) -> Found:
    for default in (*node.defaults, *(each for each in node.kw_defaults if each is not None)):
        if isinstance(default, ast.Constant) and isinstance(default.value, bool):
            yield "wrong default", (source.start(default), source.end(default)), str(not default.value)


def _branched(source: _Text, node: ast.If) -> Found:
    test = node.test
    span = source.start(test), source.end(test)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield "condition", span, source.of(test.operand)
    elif isinstance(test, ast.Name | ast.Call | ast.Attribute):
        yield "condition", span, f"not {source.of(test)}"
    start, end = source.whole_lines(node)
    if not node.orelse and source.text[start:].lstrip(" \t").startswith("if "):
        indent = source.text[start : source.start(node)]
        yield "dropped branch", (start, end), f"{indent}pass\n" if _is_alone(source, node) else ""


def _is_alone(source: _Text, node: ast.If) -> bool:
    """Whether taking the statement away might leave an empty block: neither a line before nor after has its indent."""
    start, end = source.whole_lines(node)
    indent = len(source.text[start : source.start(node)])
    before = source.text[:start].rstrip("\n").rpartition("\n")[2]
    after = source.text[end:].lstrip("\n").partition("\n")[0]
    return all(len(line) - len(line.lstrip()) != indent or not line.strip() for line in (before, after))
