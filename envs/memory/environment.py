"""Memory as an environment: a turn without a call ends a session and clears the context; only the memory stays.

The context is cleared by the observation's `history`, so whoever plays the episode forgets; the episode itself never
shows an earlier session again. Graded on the exact answer of the last session.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import field
from msgspec.structs import replace

from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Episode,
    Message,
    Observation,
    Reward,
    SnapshotError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.memory.tales import KINDS, tale
from envs.scripted import Script, ScriptedPolicy
from envs.snapshots import Count, State
from envs.tools import ToolEpisode, ToolError, ToolSet
from envs.tools.memory import MEMORY_TOOLS, Memory

RULES = (
    "You are told things over several sessions. After each session, which you end with a turn without a tool call, "
    "everything is forgotten but what you stored with the memory tools, which hold {capacity} characters. The last "
    "session asks about what holds on its day; answer it with <answer>...</answer>, several values in the order asked, "
    "separated by a comma and a space."
)
ANSWER = re.compile(r"<answer>([^<>\n]{1,100})</answer>")
TOOLS = ToolSet(*MEMORY_TOOLS)

FACT = re.compile(
    r"(?:Correction: )?(?:(?P<name>\w+)'s (?P<thing>[\w ]+)|The (?P<thing2>[\w ]+) of (?P<name2>\w+)) "
    r"is (?P<value>\w+)(?:, not \w+)?"
)
EXPIRING = re.compile(
    r"Until day (?P<day>\d+) (?P<name>\w+)'s (?P<thing>[\w ]+) is (?P<old>\w+); from day \d+ on it is (?P<value>\w+)"
)


def parse_answer(text: str | None) -> str | None:
    """What stands in the text's one `<answer>...</answer>`; None for anything else."""
    if text is None or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = ANSWER.search(text)
    return match[1] if match else None


class MemoryState(State, kw_only=True):
    """Beside the counts: which session it is, and what is remembered."""

    session: Count = 0
    entries: dict[str, str] = field(default_factory=dict)


class MemoryEpisode(ToolEpisode):
    """All sessions of one task."""

    state_type = MemoryState

    def __init__(self, task: Task, capacity: int) -> None:
        super().__init__(task, TOOLS)
        self.memory = Memory(capacity)
        self._session = 0

    async def step(self, action: Action) -> Observation:
        """Answer calls; a turn without any ends the session. Raises EnvironmentFailureError after the final answer."""
        sessions: Sequence[str] = self.task.secret["sessions"]
        ends = action.malformed is None and not action.tool_calls
        if not ends or self._session == len(sessions) - 1:
            return await super().step(action)
        if self.final_text is not None:
            raise EnvironmentFailureError("the episode is over: it had its final answer already")
        self._session += 1
        return Observation((Message("user", sessions[self._session]),), history=self.task.prompt[:1])

    def state(self) -> State:
        """See ToolEpisode."""
        return replace(super().state(), session=self._session, entries=self.memory.entries)

    def set_state(self, state: MemoryState) -> None:
        """See ToolEpisode. What is remembered is stored anew, so that nothing is that could not have been."""
        super().set_state(state)
        if state.session >= len(self.task.secret["sessions"]):
            raise SnapshotError(f"it is in session {state.session}, and there are fewer")
        self._session = state.session
        try:
            for key, text in state.entries.items():
                self.memory.write(key, text)
        except ToolError as error:
            raise SnapshotError(f"its memory cannot be: {error}") from error

    async def grade(self) -> Reward:
        """1 for exactly the values that hold, else 0. last_session: whether it was reached."""
        correct = float(parse_answer(self.final_text) == self.task.secret["answer"])
        reached = float(self._session == len(self.task.secret["sessions"]) - 1)
        return Reward(correct, {"correct": correct, "last_session": reached})


class MemoryReference(ScriptedPolicy):
    """Stores every fact under its subject, with its expiry, and looks the asked ones up. Keeps nothing itself."""

    def script(self, prompt: str) -> Script[str]:
        """One round for each session; `session` is all that the next round knows of the last."""
        session = prompt.splitlines()[-1]
        while "What is" not in session:
            for sentence in re.split(r"(?<=\.) ", session):
                plain, expiring = FACT.fullmatch(sentence[:-1]), EXPIRING.fullmatch(sentence[:-1])
                if plain:
                    key = f"{plain['name'] or plain['name2']} {plain['thing'] or plain['thing2']}"
                    yield ToolCall("memory_write", {"key": key, "text": plain["value"]})
                elif expiring:
                    text = f"{expiring['old']} {expiring['day']} {expiring['value']}"
                    yield ToolCall("memory_write", {"key": f"{expiring['name']} {expiring['thing']}", "text": text})
            session = yield "Noted."
        day = int(session.split(", day ")[1].split(".")[0])
        values = []
        for name, thing in re.findall(r"What is (\w+)'s ([\w ]+) today\?", session):
            found = yield ToolCall("memory_search", {"query": f"{name} {thing}"})
            (text,) = [line.split(": ")[1] for line in found.splitlines() if line.startswith(f"{name} {thing}: ")]
            first, *rest = text.split()
            values.append(rest[1] if rest and day > int(rest[0]) else first)
        return f"<answer>{', '.join(values)}</answer>"


class MemoryEnvironment(Environment):
    """Facts told, corrected and expiring over several sessions, with the context cleared in between.

    kinds: names of the kinds of questions, all by default, from easy to hard: told, corrected, expired, several.
    capacity: characters that the memory holds. Raises ValueError.
    """

    name = "memory"
    max_turns = 40
    snapshots = True

    def __init__(self, kinds: Sequence[str] | None = None, capacity: int = 700) -> None:
        known = {kind.name: kind for kind in KINDS}
        wanted = tuple(known) if kinds is None else tuple(kinds)
        if not wanted or not set(wanted) <= set(known):
            raise ValueError(f"kinds is {list(wanted)}; choose one or more of {', '.join(known)}")
        self._kinds = tuple(known[each] for each in wanted)
        Memory(capacity)
        self._capacity = capacity

    @property
    def tools(self) -> Sequence[Tool]:
        """`memory_write`, `memory_search`, `memory_list` and `memory_delete`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"memory has the splits train and heldout from index 0, not {split!r} {index}")
        found = tale(self._kinds, split, index)
        prompt = (Message("system", RULES.format(capacity=self._capacity)), Message("user", found.sessions[0]))
        return Task(
            self.name, split, index, found.kind.name, prompt, {"sessions": found.sessions, "answer": found.answer}
        )

    def episode(self, task: Task) -> MemoryEpisode:
        """A fresh attempt."""
        return MemoryEpisode(task, self._capacity)

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        return self.episode(task).restored(snapshot)

    def reference(self, task: Task) -> MemoryReference:
        """Solves the task through the tools."""
        return MemoryReference()
