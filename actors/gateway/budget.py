"""How much one episode may still sample: the ticket's turns and tokens, and the engine's context. Samples nothing.

Calls may run in parallel, so each reserves what it may use at most; one that would have to be cut only because of
what others have reserved waits until they are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from actors.gateway.errors import ApiError
from broker.protocol.trajectory import Outcome, Sampling


class Budget:
    """Of one episode. `outcome`: how the episode was truncated, None while it was not."""

    def __init__(self, sampling: Sampling, max_model_len: int) -> None:
        self.outcome: Outcome | None = None
        self.num_turns = 0
        self.num_sampled = 0
        self._sampling = sampling
        self._max_model_len = max_model_len
        self._num_reserved = 0  # tokens
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, num_replies: int, max_tokens: int | None, num_prompt_tokens: int) -> AsyncIterator[int]:
        """Room for that many replies, in tokens of each; call `spend` inside for what became of it.

        Raises ApiError, and notes the outcome, where nothing is left.
        """
        if self.num_turns + num_replies > self._sampling.max_turns:
            raise self.over(Outcome.TRUNCATED_TURNS, "max_turns", f"the {self._sampling.max_turns} turns")
        most = min(self._sampling.max_turn_tokens, self._max_model_len - num_prompt_tokens)
        if most <= 0:
            raise self.context_full(num_prompt_tokens)
        wanted = most if max_tokens is None else min(most, max_tokens)
        self.num_turns += num_replies
        try:
            room = await self._room(num_replies, wanted)
        except BaseException:
            self.num_turns -= num_replies
            raise
        self._num_reserved += num_replies * room
        try:
            yield room
        finally:
            self._num_reserved -= num_replies * room
            self._freed.set()
            self._freed = asyncio.Event()

    def spend(self, num_sampled: int, *, cut: bool) -> None:
        """Count a reply's tokens. cut: it was cut at its room, and the run has made that smaller than asked for."""
        self.num_sampled += num_sampled
        if cut:
            self.outcome = self.outcome or Outcome.TRUNCATED_TOKENS

    def context_full(self, num_prompt_tokens: int, num_reserved: int = 0) -> ApiError:
        """The error for a prompt that leaves no room; so many replies were reserved for it, and are not given."""
        self.num_turns -= num_reserved
        return self.over(
            Outcome.TRUNCATED_TOKENS,
            "context_length_exceeded",
            f"the context: its prompt has {num_prompt_tokens} tokens, prompt and reply may have "
            f"{self._max_model_len}, which are all",
        )

    async def _room(self, num_replies: int, wanted: int) -> int:
        while True:
            free = self._sampling.max_episode_tokens - self.num_sampled - self._num_reserved
            if free >= num_replies * wanted or not self._num_reserved:
                break
            await self._freed.wait()
        room = min(wanted, free // num_replies)
        if room <= 0:
            limit = f"the {self._sampling.max_episode_tokens} tokens"
            raise self.over(Outcome.TRUNCATED_TOKENS, "max_episode_tokens", limit)
        return room

    def over(self, outcome: Outcome, code: str, limit: str) -> ApiError:
        """The error for a call beyond a limit; the outcome is noted, unless there is one already."""
        self.outcome = self.outcome or outcome
        return ApiError(400, f"the episode has used up {limit} that the run allows; let the program end", code=code)
