"""TextArena games as an environment: one tool, `act`, says the player's move in the game's own words.

The games run in a process of their own, by a Python that has the package, each episode in a fork. Knows no particular
game. A game of two or more needs an opponent for the other players.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from envs.adapters.gymnasium import Solver, solver_of
from envs.adapters.process import ForeignProcess, ForeignSession
from envs.adapters.seeds import seed_of
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    ErgonEnvError,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
)
from envs.tools import ToolEpisode, ToolError, ToolSet

MAX_MOVE = 4000
MAX_SHOWN = 8000


async def act(episode: GameEpisode, move: Annotated[str, "the move, as the game wants it to be written"]) -> str:
    """Say your move."""
    return await episode.take(move)


TOOLS = ToolSet(act)


class GameEpisode(ToolEpisode):
    """One game, as player 0. A turn without a call gives up."""

    def __init__(
        self, task: Task, process: ForeignProcess, opponent: Callable[[str], str] | None, solved_at: float | None
    ) -> None:
        super().__init__(task, TOOLS)
        self._process = process
        self._opponent = opponent
        self._solved_at = solved_at
        self._session: ForeignSession | None = None
        self._over: Mapping[str, Any] | None = None
        self._closed = False

    async def start(self) -> Sequence[Message]:
        """Begin the game with the task's seed. Raises SandboxError, EnvironmentFailureError."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        self._session = await self._process.session()
        shown = await self._until_own_turn({"seed": self.task.secret["seed"]})
        first = self.task.prompt[0]
        return (Message(first.role, f"{first.content}\n\n{shown}"),)

    async def take(self, move: str) -> str:
        """Make a move, and the opponents' after it. Raises ToolError for one that cannot be said."""
        if self._over is not None:
            raise ToolError("the game is over")
        if len(move) > MAX_MOVE:
            raise ToolError(f"a move has at most {MAX_MOVE} characters")
        return await self._until_own_turn({"move": move})

    async def _until_own_turn(self, request: Mapping[str, Any]) -> str:
        assert self._session is not None
        texts: list[str] = []
        while True:
            answer = await self._session.ask(request)
            player, seen = answer.get("player"), str(answer.get("seen", ""))
            if answer.get("done") is True:
                self._over = answer
                texts += [seen] if player == 0 and seen else []
                return "\n".join([*texts, f"The game is over. {answer.get('reason', '')}".strip()])[-MAX_SHOWN:]
            if player == 0:
                return "\n".join([*texts, seen])[-MAX_SHOWN:] or "[nothing new]"
            if self._opponent is None:
                raise EnvironmentFailureError("it is another player's turn, and the environment has no opponent")
            request = {"move": self._opponent(seen)[:MAX_MOVE]}

    async def step(self, action: Action) -> Observation:
        """As any tool episode, but the game's end ends it too."""
        if self._session is None:
            raise EnvironmentFailureError("the episode was not started")
        observation = await super().step(action)
        return Observation(observation.messages, observation.done or self._over is not None)

    async def grade(self) -> Reward:
        """What the game pays player 0, nothing before its end; with `solved_at`, 1 for as much and 0 for less."""
        paid = _number(self._over.get("rewards"), "0") if self._over is not None else 0.0
        ended = float(self._over is not None)
        total = paid if self._solved_at is None else float(ended and paid >= self._solved_at)
        return Reward(total, {"paid": paid, "ended": ended})

    async def close(self) -> None:
        """End the game's process; idempotent."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _number(rewards: Any, player: str) -> float:
    """What a player was paid. Raises EnvironmentFailureError for what is no number."""
    value = rewards.get(player) if isinstance(rewards, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EnvironmentFailureError(f"the game paid {value!r}, which is no number")
    return float(value)


class TextArenaEnvironment(Environment):
    """A game of TextArena.

    id: its id, for example GuessTheNumber-v0. options: what the game is made with besides. python: the interpreter that
    has the package. num_players: with more than one, `opponent` plays the others, `module:function` from what a player
    has seen since its last move to its move. goal: what the policy is told first. solved_at: what the game must pay to
    count as solved, reward 1 instead of what it pays. solver: `module:function`, from a message's text to a move, for
    the reference policy. Raises EnvironmentOptionsError and ValueError.
    """

    name = "textarena"

    def __init__(
        self,
        id: str,  # noqa: A002  TextArena's own word
        options: Mapping[str, Any] | None = None,
        python: str | None = None,
        num_players: int = 1,
        opponent: str | None = None,
        goal: str = "Play this game and win it.",
        solved_at: float | None = None,
        solver: str | None = None,
        max_turns: int = 100,
        timeout_s: float = 30.0,
    ) -> None:
        if num_players < 1 or (num_players > 1) != (opponent is not None):
            raise EnvironmentOptionsError(
                f"num_players is {num_players} and opponent is {opponent!r}: a game of more than one player needs an "
                "opponent, `module:function`, and only that"
            )
        self._id = id
        self._goal = goal
        self._solved_at = solved_at
        self._opponent = solver_of(opponent) if opponent else None
        self._solver = solver_of(solver) if solver else None
        self.max_turns = max_turns
        made = {"id": id, "options": dict(options or {}), "num_players": num_players}
        self._process = ForeignProcess(python, "games", "textarena", made, timeout_s)

    @property
    def tools(self) -> Sequence[Tool]:
        """`act`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The seed of this split and index: even ones train, odd ones are held out. Raises ValueError."""
        seed = seed_of(self._id, split, index)
        return Task(self.name, split, index, self._id, (Message("user", self._goal),), {"seed": seed})

    def episode(self, task: Task) -> GameEpisode:
        """A fresh game."""
        return GameEpisode(task, self._process, self._opponent, self._solved_at)

    def reference(self, task: Task) -> ReferencePolicy:
        """The solver's policy. Raises ErgonEnvError without a solver."""
        if self._solver is None:
            raise ErgonEnvError(f"{self._id} has no reference policy: give the option solver, `module:function`")
        return Solver(self._solver, "act", "move")

    async def prepare(self) -> None:
        """Start the process. Raises EnvironmentOptionsError where the game cannot be loaded."""
        await self._process.start()

    async def close(self) -> None:
        """End the process."""
        await self._process.close()
