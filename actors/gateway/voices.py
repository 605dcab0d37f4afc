"""Who speaks for the policy: the engine, or in reference episodes the environment's reference policy.

Says one reply at a time as a Sample. Keeps no record and knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.engine import Engine, EngineDeadError, FinishReason, Sample
from actors.gateway.chat_format import FORMAT, written
from actors.gateway.conversation import ChatMessage
from actors.renderer import REFERENCE_VERSION, Renderer
from actors.sampler import ABORT_RETRY_S, InfraFailureError
from broker.protocol.trajectory import Sampling, VersionRun
from envs.interface import EnvironmentFailureError, ReferencePolicy, Tool


@dataclass(frozen=True, slots=True)
class Ask:
    """One reply that is wanted. `opening`: what the turn begins with already, at the end of the prompt, as text."""

    prompt_ids: Sequence[int]
    messages: Sequence[ChatMessage]
    tools: Sequence[Tool]
    opening: str
    max_tokens: int
    request_id: str


class Voice(Protocol):
    """Says the next reply of a conversation."""

    async def say(self, ask: Ask, cut: asyncio.Event) -> Sample:
        """At most `ask.max_tokens` tokens after the prompt; once `cut` is set, those it has, with finish "abort".

        Raises what makes the whole episode void: InfraFailureError, EngineDeadError, EnvironmentFailureError.
        """
        ...


class EngineVoice:
    """The policy itself."""

    def __init__(self, engine: Engine, sampling: Sampling, stop_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._sampling = sampling
        self._stop = stop_token_ids

    async def say(self, ask: Ask, cut: asyncio.Event) -> Sample:
        """See Voice."""
        request = asyncio.ensure_future(
            self._engine.generate(ask.prompt_ids, self._sampling, ask.max_tokens, self._stop, ask.request_id)
        )
        cutting = asyncio.ensure_future(cut.wait())
        try:
            await asyncio.wait({request, cutting}, return_when=asyncio.FIRST_COMPLETED)
            aborted = not request.done()
            while not request.done():
                # Repeated, because an engine ignores the id of a request that has not reached it yet.
                await self._engine.abort(ask.request_id)
                await asyncio.wait({request}, timeout=ABORT_RETRY_S)
            sample = request.result()
        except EngineDeadError:
            raise
        except Exception as error:
            raise InfraFailureError(f"engine: {type(error).__name__}: {error}", "engine") from error
        finally:
            request.cancel()
            cutting.cancel()
        if sample.finish == "abort" and not aborted:
            raise InfraFailureError(f"the engine aborted request {ask.request_id}", "engine")
        return sample


class ReferenceVoice:
    """A policy that is written, not learnt; its turns are tokenised as sampled ones are cut, and bear no version."""

    def __init__(self, policy: ReferencePolicy, renderer: Renderer) -> None:
        self._policy = policy
        self._renderer = renderer

    async def say(self, ask: Ask, cut: asyncio.Event) -> Sample:
        """See Voice. Raises EnvironmentFailureError where the reference policy cannot answer this conversation."""
        try:
            action = self._policy.act(tuple(written(message, ask.tools) for message in ask.messages))
            text = FORMAT.write(action, ask.tools)
        except Exception as error:
            raise EnvironmentFailureError(f"the reference policy failed: {type(error).__name__}: {error}") from error
        if not text.startswith(ask.opening):
            raise EnvironmentFailureError(f"the program wants a call, and the reference policy says {text!r:.200}")
        ids = self._renderer.turn(text.removeprefix(ask.opening))
        kept = ids[: ask.max_tokens]
        runs = (VersionRun(*REFERENCE_VERSION, len(kept)),)
        finish: FinishReason = "stop" if len(kept) == len(ids) else "length"
        return Sample(np.asarray(kept, np.int32), np.zeros(len(kept), np.float32), runs, finish)
