"""Episodes with thinking budgets for unit tests, and what they left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.renderer import Renderer
from actors.rollout import run_episode
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from envs.interface import Action, Environment
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_renderer, make_ticket

RENDERER = make_renderer()
TAGGED = make_renderer("<think>", "</think>")
SHORT = {"stop_phrase": " Stop."}
STOP = " Stop.</think>\n\n"
CLOSED = "<think>\n\n</think>\n\n"


class Played:
    """An episode of the word environment, and what it left."""

    def __init__(self, renderer: Renderer = RENDERER, thinking: dict[str, Any] | None = None) -> None:
        self.renderer = renderer
        self.thinking = ThinkingSection.model_validate(SHORT | (thinking or {}))
        self.environment: Environment = WordEnvironment()
        self.actions: list[Action] = []
        self.max_model_len = 1000

    async def run(self, script: Sequence[str], budget: int | None, **ticket: Any) -> Played:
        self.engine = ScriptedEngine(self.renderer, list(script))
        if isinstance(self.environment, WordEnvironment):
            self.environment.on_step = self.seen
        self.trajectory = await run_episode(
            make_ticket(thinking_budget=budget, **ticket),
            self.environment,
            self.engine,
            self.renderer,
            actor_id="a",
            max_model_len=self.max_model_len,
            thinking=self.thinking,
        )
        pack_trajectories((self.trajectory,))  # raises unless the wire carries it
        return self

    async def seen(self, action: Action) -> None:
        self.actions.append(action)
        self.engine.version = self.engine.version._replace(version=self.engine.version.version + 1)

    @property
    def head(self) -> Any:
        return self.trajectory.head

    @property
    def account(self) -> tuple[int, int, int]:
        """Thinking, overrun, forced stops."""
        return self.head.num_thinking_tokens, self.head.num_overrun_tokens, self.head.num_forced_stops

    def parts(self) -> list[tuple[bool, str]]:
        """The trace in runs of equal mask, as text."""
        segment = self.trajectory.segments[0]
        cuts = np.flatnonzero(np.diff(segment.loss_mask_T.astype(int))) + 1
        ids, masks = np.split(segment.token_ids_T, cuts), np.split(segment.loss_mask_T, cuts)
        return [(bool(mask[0]), self.renderer.decode(part.tolist())) for part, mask in zip(ids, masks, strict=True)]

    def tokens(self, *texts: str) -> int:
        return sum(len(self.renderer.tag(text)) for text in texts)
