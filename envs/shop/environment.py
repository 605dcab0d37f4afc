"""The shop: find out a hidden price with one tool, calculate with another, answer with an integer.

The tools are processes in a sandbox that holds the price list and never the answer; the grader is here, in the parent.
The actor's renderer writes and parses the tool calls' text; nothing here knows of tokens.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Episode,
    Message,
    ReferencePolicy,
    Reward,
    SandboxError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.sandbox import AnySandbox, Limits, SandboxPool, check_walled
from envs.shop.kinds import KINDS, Kind
from envs.shop.problems import problem
from envs.tools import ToolEpisode, ToolError, ToolSet, ToolTimeoutError

LIMITS = Limits(processes=8, memory_bytes=128 << 20, work_bytes=1 << 20, tmp_bytes=1 << 20, output_bytes=4096)
CALC = "/opt/shop/calc.py"
PRICE = "/opt/shop/price.awk"
PRICE_LIST = "prices.tsv"
PRICE_PROGRAM = r"""
BEGIN { FS = "\t"; wanted = ENVIRON["ITEM"] }
$1 == wanted { print $2; found = 1; exit }
END { if (!found) { print "error: no such item"; exit 1 } }
"""
MAX_ARGUMENT = 64

PERFECT = "perfect"
CARELESS = "careless"
"""Half of the demonstrations use the tools well and calculate wrongly, as records of people at work do. Imitating them
teaches the form and leaves the substance to reinforcement learning."""

ANSWER = re.compile(r"<answer>(-?[0-9]{1,12})</answer>", re.ASCII)


async def price(shop: ShopEpisode, item: Annotated[str, "one item, singular"]) -> str:
    """The price of one item in coins."""
    return await shop.run(f"ITEM={_argument(item)} exec awk -f {PRICE} {PRICE_LIST}")


async def calc(shop: ShopEpisode, expression: Annotated[str, "integers, + - * and parentheses"]) -> str:
    """The value of an expression."""
    return await shop.run(f"exec python3 -I -S {CALC} {_argument(expression)}")


TOOLS = ToolSet(price, calc)


def _argument(text: str) -> str:
    """A tool's argument, safe to put into a shell command."""
    if len(text) > MAX_ARGUMENT or not text.isprintable():
        raise ToolError("bad argument")
    return shlex.quote(text.strip())


def parse_answer(text: str | None) -> int | None:
    """The integer of the one `<answer>INTEGER</answer>` in the text; None for anything else."""
    if text is None or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = ANSWER.search(text)
    return int(match[1]) if match else None


class ShopEpisode(ToolEpisode):
    """One customer's question. Its sandbox holds the price list and nothing else, so a snapshot needs none of it."""

    def __init__(self, task: Task, pool: SandboxPool, tool_timeout_s: float) -> None:
        super().__init__(task, TOOLS)
        self._pool = pool
        self._tool_timeout_s = tool_timeout_s
        self._sandbox: AnySandbox | None = None
        self._closed = False

    async def start(self) -> Sequence[Message]:
        """Put the price list into a fresh sandbox. Raises SandboxError."""
        await self._open()
        return self.task.prompt

    async def _open(self) -> AnySandbox:
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        self._sandbox = sandbox = await self._pool.acquire()
        price_list = "".join(f"{item}\t{coins}\n" for item, coins in self.task.secret["prices"].items())
        await sandbox.write(PRICE_LIST, price_list.encode())
        return sandbox

    async def run(self, command: str) -> str:
        """Run one tool's process and return what it printed. Raises ToolError for its complaint or its time limit."""
        sandbox = self._sandbox or await self._open()
        try:
            result = await sandbox.exec(command, timeout_s=self._tool_timeout_s)
        except asyncio.CancelledError:
            self._sandbox = None  # it died with the command that was given up
            await asyncio.shield(sandbox.close())
            raise
        if result.exit_code is None:
            # The sandbox died with the command; the next call gets a fresh one, with the same price list.
            self._sandbox = None
            await sandbox.close()
            raise ToolTimeoutError("timed out") if result.timed_out else ToolError("too much output")
        text = result.stdout.decode(errors="replace").strip()
        if not result.ok:
            if not text.startswith("error: "):
                complaint = result.stderr.decode(errors="replace").strip()
                raise EnvironmentFailureError(f"a shop tool exited with {result.exit_code}: {complaint[:300]}")
            raise ToolError(text.removeprefix("error: "))
        return text

    async def grade(self) -> Reward:
        """1 for the exact integer in the final answer, else 0."""
        correct = float(parse_answer(self.final_text) == self.task.secret["answer"])
        return Reward(correct, {"correct": correct})

    async def close(self) -> None:
        """Kill the sandbox."""
        self._closed = True
        if self._sandbox is not None:
            await self._sandbox.close()


class ShopReference(ReferencePolicy):
    """Asks the price, calculates, answers with what the calculator said. Knows the formula, not the price."""

    def __init__(self, item: str, formula: str) -> None:
        self._item = item
        self._formula = formula

    def act(self, messages: Sequence[Message]) -> Action:
        """The next of three turns, by the number of observations so far."""
        observed = [message.content for message in messages if message.role == "tool"]
        if not observed:
            return Action("", (ToolCall("price", {"item": self._item}),))
        if len(observed) == 1:
            return Action("", (ToolCall("calc", {"expression": self._formula.format(p=observed[0])}),))
        return Action(f"<answer>{observed[-1]}</answer>")


class ShopEnvironment(Environment):
    """Word problems whose price is hidden behind a tool.

    kinds: names of the kinds of problems to ask, all by default. warm_sandboxes: how many are kept ready, so that an
    episode need not wait for its own. tool_timeout_s: wall-clock seconds of one tool call. demonstrations: `perfect` or
    `careless`, what a warm start imitates. sandbox: the backend, `bubblewrap` or `pod`. Raises ValueError.
    """

    name = "shop"
    snapshots = True

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        warm_sandboxes: int = 4,
        tool_timeout_s: float = 10.0,
        demonstrations: str = PERFECT,
        sandbox: str = "bubblewrap",
    ) -> None:
        self._kinds = _chosen(kinds)
        if demonstrations not in (PERFECT, CARELESS):
            raise ValueError(f"demonstrations is {demonstrations!r}; choose {PERFECT} or {CARELESS}")
        self._demonstrations = demonstrations
        if tool_timeout_s <= 0:
            raise ValueError(f"tool_timeout_s is {tool_timeout_s}; it must be greater than 0")
        self._tool_timeout_s = tool_timeout_s
        calculator = Path(__file__).with_name("calc.py").read_bytes()
        backend = check_walled(sandbox)
        self._pool = SandboxPool(warm_sandboxes, {CALC: calculator, PRICE: PRICE_PROGRAM.encode()}, LIMITS, backend)

    @property
    def tools(self) -> Sequence[Tool]:
        """`price` and `calc`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The problem of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"the shop has the splits train and heldout from index 0, not {split!r} {index}")
        found = problem(self._kinds, split, index)
        prompt = (Message("user", found.question),)
        secret = {
            "answer": found.answer,
            "prices": found.prices,
            "item": found.item,
            "formula": found.formula,
            "slips": found.slips,
        }
        return Task(self.name, split, index, found.kind.name, prompt, secret)

    def episode(self, task: Task) -> ShopEpisode:
        """A fresh attempt."""
        return ShopEpisode(task, self._pool, self._tool_timeout_s)

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        return self.episode(task).restored(snapshot)

    def reference(self, task: Task) -> ReferencePolicy:
        """Solves the task through the tools."""
        return ShopReference(task.secret["item"], task.secret["formula"])

    def demonstrator(self, task: Task) -> ReferencePolicy:
        """The reference, or a clerk who calculates every other block of tasks wrongly (see CARELESS)."""
        if self._demonstrations == PERFECT:
            return self.reference(task)
        # Kinds take turns, so a block of len(kinds) tasks has one of each: right and wrong, and both ways of being
        # wrong, are spread evenly over the kinds.
        block, kind = divmod(task.index, len(self._kinds))
        if block % 2 == 0:
            return self.reference(task)
        slips = task.secret["slips"]
        return ShopReference(task.secret["item"], slips[(block // 2 + kind) % len(slips)])

    async def prepare(self) -> None:
        """Fill the pool of sandboxes and try the tools' programs. Raises SandboxError with the command to type."""
        await self._pool.prepare()
        async with await self._pool.acquire() as sandbox:
            tried = await sandbox.exec(f"python3 -I -S {CALC} 6*7 && awk 'BEGIN {{ print 42 }}'")
        if tried.stdout != b"42\n42\n":
            complaint = " ".join(tried.stderr.decode(errors="replace").split())
            raise SandboxError(
                f"the shop's tools need python3 and awk in /usr/bin or /usr/local/bin ({complaint[:200]}): "
                "type `apt-get install python3-minimal mawk`"
            )

    async def close(self) -> None:
        """Close the pool of sandboxes."""
        await self._pool.close()


def _chosen(names: Sequence[str] | None) -> tuple[Kind, ...]:
    known = {kind.name: kind for kind in KINDS}
    wanted = tuple(known) if names is None else tuple(names)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(known):
        raise ValueError(f"kinds is {list(wanted)}; choose one or more, each once, of {', '.join(known)}")
    return tuple(known[name] for name in wanted)
