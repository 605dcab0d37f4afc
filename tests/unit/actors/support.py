"""Fakes of the actor's neighbours for unit tests: a small tokenizer, a scripted engine, a small environment."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.engine import EngineDeadError, EngineLoad, Sample
from actors.renderer import Renderer
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket, VersionRun
from envs.interface import (
    Action,
    Environment,
    Episode,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
    ToolCall,
)

CORPUS = [
    "Eva buys 17 plates. What is the bill?",
    "<tool>price plate</tool> the answer is 1212",
    "user assistant tool system",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return str(bpe.to_str())


def make_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(_tokenizer_json())


def make_renderer(*tags: str) -> Renderer:
    """A renderer, to whose tokenizer each of the tags is one token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    return Renderer(tokenizer)


LOOKUP = Tool("look", "Look a word up.", {"type": "object", "properties": {"word": {"type": "string"}}})
ADD = Tool(
    "add",
    "Add two numbers.",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
)


class ScriptedEngine:
    """Answers each turn with the next scripted text (tokenised by the renderer), or raises what stands there instead.

    A text ends with <|im_end|>. One that is longer than allowed, or holds another stop token, is cut, and goes on with
    the next request where that continues it. A text that ends with "..." is cut there (length); "<hang>" samples its
    first token and then waits for an abort.
    """

    def __init__(self, renderer: Renderer, script: Sequence[str | Exception]) -> None:
        self._renderer = renderer
        self._script = list(script)
        self.version = PolicyVersion(1, 4)
        self.dead: EngineDeadError | None = None
        self.prompts: list[list[int]] = []
        self.max_tokens: list[int] = []
        self.priorities: list[int] = []
        self.busy = EngineLoad()
        self.adopted: list[PolicyVersion] = []
        self.adopted_bytes: list[bytes] = []
        self.adopt_error: Exception | None = None
        self.adopt_errors: list[Exception] = []  # one for each attempt, before `adopt_error` counts
        self.digests: list[str] = []
        self.adopt_gate = asyncio.Event()
        self.adopt_gate.set()
        self._aborts: dict[str, asyncio.Event] = {}
        self.hanging = asyncio.Event()
        self._rest: list[int] = []
        self._continued: list[int] = []
        self.cancelled = 0

    @property
    def policy_version(self) -> PolicyVersion:
        return self.version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        self.prompts.append(list(prompt_ids))
        self.priorities.append(priority)
        self.max_tokens.append(max_tokens)
        rest, self._rest = self._rest, []
        await asyncio.sleep(0)
        if rest and list(prompt_ids) == self._continued:
            return self._cut(rest, "stop", max_tokens, stop_token_ids)
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        if step.startswith("<hang>"):
            return await self._hang(request_id, step)
        texts = re.split("(<think>|</think>)", step.removesuffix("..."))  # tags are tokens where the tokenizer has them
        ids = [token for text in texts[:-1] for token in self._renderer.tag(text)] + self._renderer.turn(texts[-1])
        finish: Any = "stop"
        if step.endswith("..."):
            ids, finish = ids[:-1], "length"
        return self._cut(ids, finish, max_tokens, stop_token_ids)

    def _cut(self, ids: list[int], finish: Any, max_tokens: int, stop_token_ids: Sequence[int]) -> Sample:
        end = next((i + 1 for i, token in enumerate(ids) if token in stop_token_ids), len(ids))
        kept, self._rest = ids[: min(end, max_tokens)], ids[min(end, max_tokens) :]
        if self._rest:
            finish = "stop" if end <= max_tokens else "length"
        self._continued = [*self.prompts[-1], *kept]
        return self._sample(kept, finish)

    async def _hang(self, request_id: str, step: str) -> Sample:
        event = self._aborts[request_id] = asyncio.Event()
        self.hanging.set()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self._sample(self._renderer.turn("partial")[:1], "abort")

    def _sample(self, ids: list[int], finish: Any) -> Sample:
        runs = (VersionRun(*self.version, len(ids)),)
        return Sample(np.array(ids, np.int32), np.linspace(-1, -2, len(ids), dtype=np.float32), runs, finish)

    async def abort(self, request_id: str) -> None:
        if request_id in self._aborts:
            self._aborts[request_id].set()

    def load(self) -> EngineLoad:
        return self.busy

    def check(self) -> None:
        if self.dead is not None:
            raise self.dead

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        read = weights.read_bytes()
        if self.adopt_errors:
            raise self.adopt_errors.pop(0)
        if self.adopt_error is not None:
            raise self.adopt_error
        self.digests.append(digest)
        await self.adopt_gate.wait()
        assert weights.read_bytes() == read  # nobody writes it meanwhile
        self.adopted_bytes.append(read)
        self.version = version
        self.adopted.append(version)
        return 0.01

    async def close(self) -> None:
        pass


class WordEnvironment(Environment):
    """Look the word up, then answer with it. Hooks let a test break any step."""

    name = "words"
    max_turns = 10_000

    def __init__(self) -> None:
        self.on_start: Callable[[], Awaitable[None]] | None = None
        self.on_step: Callable[[Action], Awaitable[Observation | None]] | None = None
        self.on_grade: Callable[[], Awaitable[Reward | None]] | None = None
        self.on_task: Callable[[], None] | None = None
        self.closed = 0
        self.opened = 0

    @property
    def tools(self) -> Sequence[Tool]:
        return (LOOKUP, ADD)

    def task(self, split: Split, index: int) -> Task:
        if self.on_task:
            self.on_task()
        return Task("words", split, index, "plain", (Message("user", f"Say word {index}."),), {"answer": f"w{index}"})

    def episode(self, task: Task) -> Episode:
        return WordEpisode(self, task)

    def reference(self, task: Task) -> ReferencePolicy:
        return WordReference(task)


class WordEpisode(Episode):
    def __init__(self, environment: WordEnvironment, task: Task) -> None:
        self._env = environment
        self._task = task
        self._answer = ""
        self._looked = False

    async def start(self) -> Sequence[Message]:
        self._env.opened += 1
        if self._env.on_start:
            await self._env.on_start()
        return self._task.prompt

    async def step(self, action: Action) -> Observation:
        assert action.malformed is None
        if self._env.on_step and (observation := await self._env.on_step(action)) is not None:
            return observation
        if not action.tool_calls:
            self._answer = action.text
            return Observation(done=True)
        self._looked = True
        return Observation(tuple(Message("tool", self._task.secret["answer"]) for _ in action.tool_calls))

    async def grade(self) -> Reward:
        if self._env.on_grade and (reward := await self._env.on_grade()) is not None:
            return reward
        right, looked = float(self._answer == self._task.secret["answer"]), float(self._looked)
        return Reward(right + 0.1 * looked, {"right": right, "looked": looked})

    async def close(self) -> None:
        self._env.closed += 1


class WordReference(ReferencePolicy):
    def __init__(self, task: Task) -> None:
        self._task = task

    def act(self, messages: Sequence[Message]) -> Action:
        if messages[-1].role == "tool":
            return Action(messages[-1].content)
        return Action("", (ToolCall("look", {"word": str(self._task.index)}),))


def make_ticket(ticket_id: str = "t1", mode: Mode = Mode.TRAIN, **changes: Any) -> Ticket:
    sampling = Sampling(
        **{"max_turn_tokens": 60, "max_episode_tokens": 200, "max_turns": 4} | changes.pop("sampling", {})
    )
    task = changes.pop("task", TaskRef(env="words", split="train", index=3))
    return Ticket(ticket_id=ticket_id, group_id="g", group_size=1, task=task, mode=mode, sampling=sampling, **changes)
