"""Scenes of whole episodes: what a real engine was asked and answered, and the trajectories that were made of it.

Part of `engine_session.py`, whose process plays them. The model's weights are random, so its turns are noise that ends
at one of many tokens; the environment answers whatever they say.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY
from tokenizers import Tokenizer

from actors.engine import Sample
from actors.formats.chatml import END
from actors.formats.chatml_json import ChatMlJson
from actors.renderer import Renderer
from actors.rollout import run_episode
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket, Trajectory
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
)
from tests.integration.actors.adoption_session import AdoptionSession
from tests.integration.actors.engine_session import dump
from tests.unit.actors.conversations import TOOLS, Maker, make_renderer, make_tokenizer

NUM_EPISODES = 8
NUM_TURNS = 6
THINKING_BUDGET = 16
EDITED_EVERY = 3
LIMITS = Sampling(temperature=0.8, max_turn_tokens=500, max_episode_tokens=50_000, max_turns=1000)
QUESTION = (Message("system", "Be brief."), Message("user", "Eva buys 17 plates. What is the bill?"))
ANSWER = (Message("tool", "72 <|im_end|>"), Message("tool", "coins"))
NOTE = Tool("note", "Write something down.", {"type": "object", "properties": {"text": {"type": "string"}}})


class Chatty(ChatMlJson):
    """A format whose turns end at one of many tokens, so that a policy of noise comes to an end soon."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.stop = (END, *sorted(set(tokenizer.get_vocab()) - added)[3::20])


class Talk(Environment):
    """Answers every turn, edits the history now and then, and ends when it may."""

    name = "talk"
    max_turns = LIMITS.max_turns
    tools = (NOTE,)

    def __init__(self, may_end: asyncio.Event, waits_at: int) -> None:
        self.may_end, self.waits_at = may_end, waits_at
        self.observations: list[Observation] = []
        self.two_turns = asyncio.Event()

    def task(self, split: Split, index: int) -> Task:
        return Task(self.name, split, index, "", QUESTION)

    def episode(self, task: Task) -> Episode:
        return Talking(self)

    def reference(self, task: Task) -> ReferencePolicy:
        raise NotImplementedError


class Talking(Episode):
    def __init__(self, environment: Talk) -> None:
        self._env = environment

    async def start(self) -> Sequence[Message]:
        return QUESTION

    async def step(self, action: Action) -> Observation:
        seen = self._env.observations
        number = len(seen) + 1
        if number == 2:
            self._env.two_turns.set()
        if number == self._env.waits_at:
            await self._env.may_end.wait()
        done = number >= NUM_TURNS and self._env.may_end.is_set()
        history = (*QUESTION, Message("assistant", f"{number} turns.")) if number % EDITED_EVERY == 0 else None
        seen.append(Observation(ANSWER, done, history))
        return seen[-1]

    async def grade(self) -> Reward:
        return Reward(1.0)

    async def close(self) -> None:
        pass


class Watched:
    """The engine, with everything that one episode asked of it and was answered."""

    def __init__(self, engine: Any, before: Any = None) -> None:
        self._engine, self._count = engine, before
        self.turns: list[dict[str, Any]] = []

    @property
    def policy_version(self) -> PolicyVersion:
        return self._engine.policy_version  # type: ignore[no-any-return]

    async def generate(self, prompt_ids: Sequence[int], *rest: Any) -> Sample:
        prompt = list(prompt_ids)
        before = prefix_cache()
        sample = await self._engine.generate(prompt_ids, *rest)
        self.turns.append(dump(prompt, sample))
        if self._count is not None:
            self.turns[-1]["cache"] = await self._count(before, len(prompt))
        return sample

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)


def prefix_cache() -> dict[str, float]:
    """vLLM's counters: tokens that were looked up in the prefix cache, and those that were found."""
    found = {"queries": 0.0, "hits": 0.0}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            for name in found:
                if sample.name == f"vllm:prefix_cache_{name}_total":
                    found[name] += sample.value
    return found


async def counted(before: dict[str, float], num_prompt: int) -> dict[str, float]:
    """What the counters grew by, once the engine has told its frontend of this prompt."""
    while True:
        grown = {name: value - before[name] for name, value in prefix_cache().items()}
        if grown["queries"] >= num_prompt:
            return grown
        await asyncio.sleep(0.001)


class EpisodeSession(AdoptionSession):
    async def episodes(self) -> dict[str, Any]:
        """Several at once, with an update while turns are in flight; none ends before it was adopted."""
        before = await self.start_serving()
        adopted = asyncio.Event()
        # Every other one waits for the update before its last turn, the rest samples on.
        talks = [Talk(adopted, waits_at=NUM_TURNS - 1 if number % 2 else 0) for number in range(NUM_EPISODES)]
        playing = [asyncio.create_task(self.talk(talk)) for talk in talks]
        await talks[0].two_turns.wait()
        await self.adopt(self.lineage, 2)
        adopted.set()
        return {"before": before, "after": self.engine.policy_version, "episodes": await asyncio.gather(*playing)}

    async def prefix_caching(self) -> dict[str, Any]:
        """One alone, so that what the counters grow by in a turn is that turn's."""
        ended = asyncio.Event()
        ended.set()
        block_size = int(self.engine._llm.vllm_config.cache_config.block_size)
        return {"block_size": block_size, **await self.talk(Talk(ended, waits_at=0), counted)}

    async def programs_that_think(self) -> dict[str, Any]:
        """Programs behind the gateway in a format of JSON calls, whose tickets have thinking budgets."""
        from tests.integration.gateway.scene import think

        await self.adopt(41, 1)
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        return await think(self.engine, Renderer(tokenizer, chat_format=ChatMlJson()), THINKING_BUDGET)

    async def parsers(self) -> dict[str, Any]:
        """Calls as the formats write them, and as the tool parsers of vLLM's server read them."""
        from transformers import PreTrainedTokenizerFast
        from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
        from vllm.tool_parsers.llama_tool_parser import Llama3JsonToolParser

        seen = {}
        for name, parser in (("qwen3", Hermes2ProToolParser), ("llama3", Llama3JsonToolParser)):
            reads = parser(PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(name)))
            renderer, maker = make_renderer(name), Maker(name, random.Random(9))
            actions = [maker.action(thinks=False) for _ in range(100)]
            actions += [Action("", tuple(maker.call() for _ in range(3))) for _ in range(20)]
            seen[name] = [
                {
                    "written": [[call.name, dict(call.arguments)] for call in action.tool_calls],
                    "read": [
                        [call.function.name, json.loads(call.function.arguments)]
                        for call in reads.extract_tool_calls(renderer.write(action, TOOLS), None).tool_calls
                    ],
                }
                for action in actions
            ]
        return seen

    async def talk(self, environment: Talk, count: Any = None) -> dict[str, Any]:
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        renderer = Renderer(tokenizer, chat_format=Chatty(tokenizer))
        engine = Watched(self.engine, count)
        self.count += 1
        task = TaskRef(env="talk", split="train", index=self.count)
        ticket = Ticket(
            ticket_id=f"talk{self.count}", group_id="g", group_size=1, task=task, mode=Mode.TRAIN, sampling=LIMITS
        )
        trajectory = await run_episode(ticket, environment, engine, renderer, actor_id="a", max_model_len=1024)  # type: ignore[arg-type]
        return {
            "turns": engine.turns,
            "opening": renderer.open(QUESTION, environment.tools),
            "appended": [self.rendered(renderer, observation) for observation in environment.observations],
            **self.made(trajectory),
        }

    @staticmethod
    def rendered(renderer: Renderer, observation: Observation) -> dict[str, Any]:
        if observation.history is None:
            return {"edited": False, "ids": renderer.observe(observation.messages)}
        return {"edited": True, "ids": renderer.open((*observation.history, *observation.messages), (NOTE,))}

    @staticmethod
    def made(trajectory: Trajectory) -> dict[str, Any]:
        segments = [
            {
                "ids": segment.token_ids_T.tolist(),
                "mask": segment.loss_mask_T.tolist(),
                "logprobs": segment.logprobs_T.tolist(),
                "runs": [list(run) for run in segment.version_runs],
            }
            for segment in trajectory.segments
        ]
        return {"outcome": trajectory.head.outcome.value, "segments": segments}
