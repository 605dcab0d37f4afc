"""How one reply is sampled: by the engine, or in reference episodes by the environment's reference policy.

Both keep to the limits and the thinking of the call, for which they have the sampler that ordinary episodes have. Keeps
no record and knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from actors.engine import Engine, Sample
from actors.gateway.chat_format import Interpreter
from actors.gateway.conversation import ChatMessage, Utterance
from actors.renderer import Renderer
from actors.sampler import Sampler
from broker.process.thinking_settings import Budget
from broker.protocol.trajectory import Ticket, VersionRun
from envs.interface import EnvironmentFailureError, Message, ReferencePolicy, Tool


@dataclass(frozen=True, slots=True)
class Ask:
    """One reply that is wanted: the `number`-th of its episode. opening: the text that its turn begins with.
    max_tokens: that may be sampled. most_thinking: of those while thinking, None for any number that the ticket
    allows."""

    prompt_ids: Sequence[int]
    messages: Sequence[ChatMessage]
    tools: Sequence[Tool]
    opening: str
    max_tokens: int
    number: int
    most_thinking: Budget = None


@dataclass(slots=True)
class _Trace:
    """The sampler's trace of one call: the prompt, and the turn that grows after it."""

    ids: list[int]
    num_turns: int  # names its requests
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    runs: list[VersionRun] = field(default_factory=list)
    num_sampled: int = 0
    model_s: float = 0.0

    def add_context(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """See Trace."""
        self.ids += ids
        self.mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def add_sample(self, sample: Sample) -> None:
        """See Trace."""
        ids = sample.token_ids_N.tolist()
        self.ids += ids
        self.mask += [True] * len(ids)
        self.logprobs += sample.logprobs_N.tolist()
        self.runs += sample.version_runs
        self.num_sampled += len(ids)


class Voice:
    """Speaks for the policy in one episode; `reference` where it is a reference policy that does."""

    def __init__(
        self,
        ticket: Ticket,
        engine: Engine,
        renderer: Renderer,
        interpreter: Interpreter,
        max_model_len: int,
        reference: ReferencePolicy | None = None,
    ) -> None:
        self._ticket = ticket
        self._engine = engine
        self._renderer = renderer
        self._interpreter = interpreter
        self._max_model_len = max_model_len
        self._reference = reference

    async def say(self, ask: Ask, cut: asyncio.Event) -> Utterance | None:
        """The turn after the prompt; once `cut` is set, what there is of it, with finish "abort". None where the engine
        has no room for a token of it.

        Raises what makes the whole episode void: InfraFailureError, EngineDeadError, EnvironmentFailureError.
        """
        sampling = msgspec.structs.replace(
            self._ticket.sampling, max_turn_tokens=ask.max_tokens, max_episode_tokens=ask.max_tokens
        )
        ticket = msgspec.structs.replace(self._ticket, sampling=sampling)
        settings = self._interpreter.thinking.settings
        ends = (ticket, self._engine, self._renderer, settings, self._max_model_len)
        sampler = Sampler(*ends, deadline=float("inf"), cut=cut)
        trace = _Trace(list(ask.prompt_ids), ask.number)
        opening = self._renderer.voice(ask.opening) if ask.opening else []
        text = None if self._reference is None else self._act(self._reference, ask)
        turn = await sampler.turn(trace, text, opening=opening, most=ask.most_thinking)
        if turn is None:
            return None
        ids = trace.ids[len(ask.prompt_ids) :]
        return Utterance(
            np.asarray(ids, np.int32),
            np.asarray(trace.mask, np.bool_),
            np.asarray(trace.logprobs, np.float32),
            tuple(trace.runs),
            turn.finish,
            len(ids) - len(turn.ids),
            turn.began_open,
            sampler.account.num_forced_stops,
        )

    def _act(self, reference: ReferencePolicy, ask: Ask) -> str:
        try:
            written = tuple(self._interpreter.written(message, ask.tools) for message in ask.messages)
            return self._interpreter.acted(reference.act(written), ask.tools, ask.opening)
        except Exception as error:
            raise EnvironmentFailureError(f"the reference policy failed: {type(error).__name__}: {error}") from error
