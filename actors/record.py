"""What an episode has produced so far: its token traces and its conversation. Owns how a trajectory grows.

Tokens are only ever appended. Where the conversation is replaced a new segment begins, and the old one stays as it was
sampled. Renders, samples and judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.engine import Sample
from broker.protocol.trajectory import Segment, VersionRun
from envs.interface import Message


@dataclass(slots=True)
class Record:
    """One episode's. `ids`, `mask`, `logprobs` and `runs` are of the segment that grows; counts are of all segments.

    messages: the conversation as it stands, which is what a reference policy is shown.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    runs: list[VersionRun] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    ended: list[Segment] = field(default_factory=list)
    num_sampled: int = 0
    num_turns: int = 0
    num_tool_calls: int = 0
    num_malformed: int = 0
    model_s: float = 0.0
    tool_s: float = 0.0

    def begin(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Begin a segment: a conversation of its own. One in which nothing was sampled yet is not kept."""
        if self.runs:
            self.ended.append(self._segment())
        self.ids, self.mask, self.logprobs, self.runs, self.messages = [], [], [], [], []
        self.add_context(ids, messages)

    def add_context(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Append tokens that nobody sampled, and the messages that they say."""
        self.ids += ids
        self.mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.messages += messages

    def add_sample(self, sample: Sample) -> None:
        """Append what the engine sampled, exactly as it did."""
        ids = sample.token_ids_N.tolist()
        self.ids += ids
        self.mask += [True] * len(ids)
        self.logprobs += sample.logprobs_N.tolist()
        self.num_sampled += len(ids)
        for run in sample.version_runs:
            if self.runs and self.runs[-1][:2] == run[:2]:
                run = run._replace(num_tokens=run.num_tokens + self.runs.pop().num_tokens)
            self.runs.append(run)

    def segments(self) -> tuple[Segment, ...]:
        """The trajectory's segments, at least one; the last is the one that grows, unless nothing was sampled in it."""
        return (*self.ended, self._segment()) if self.runs or not self.ended else tuple(self.ended)

    def all_segments(self) -> tuple[Segment, ...]:
        """Those of an unfinished episode: the last is the one that grows, whatever is in it."""
        return (*self.ended, self._segment())

    def take_up(self, segments: Sequence[Segment]) -> None:
        """Of a fresh record: go on after these segments of an unfinished episode. What their messages were is not
        known, and nobody but a reference policy asks."""
        *ended, last = segments
        self.ended = ended
        self.ids, self.mask = last.token_ids_T.tolist(), last.loss_mask_T.tolist()
        self.logprobs, self.runs = last.logprobs_T.tolist(), list(last.version_runs)
        self.num_sampled = sum(segment.num_sampled for segment in segments)

    def _segment(self) -> Segment:
        return Segment(
            np.asarray(self.ids, np.int32),
            np.asarray(self.mask, np.bool_),
            np.asarray(self.logprobs, np.float32),
            tuple(self.runs),
        )
