"""What an environment is: tasks, tools, episodes, rewards. One screen; no I/O, nothing of actors or learners.

An author subclasses `Environment` (procedural tasks, tools) and `Episode` (the single-use act of solving one task). The
policy acts through tools only; a turn without a tool call is its final answer. Grading happens in `Episode.grade`, in
the parent process, from what left the sandbox; what the policy can reach never holds the expected answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "heldout"]
Role = Literal["system", "user", "assistant", "tool"]


class ErgonEnvError(Exception):
    """Base of what environments raise on purpose."""


class UnknownEnvironmentError(ErgonEnvError):
    """No environment of that name; the message lists the known ones."""


class EnvironmentOptionsError(ErgonEnvError):
    """The options given to an environment do not fit it; the message names the option and the allowed ones."""


class EnvironmentFailureError(ErgonEnvError):
    """The environment itself broke (outcome `env_failure`); the policy is not to blame."""


class SandboxError(ErgonEnvError):
    """The sandbox could not be made or died: infrastructure (outcome `infra_failure`), so the ticket is retried."""


class SnapshotError(ErgonEnvError):
    """An episode's state cannot be put into bytes, or these bytes are no state of an episode of this task."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the policy is told of it. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy made."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the policy: its text, the calls parsed from it, and why a call could not be parsed, if so.

    thinking: what it thought beforehand, which is neither an answer nor a call and is not in `text`.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: str | None = None
    thinking: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """What answers a turn. `done` ends the episode. `num_timeouts`: of its calls, those that ran out of time.

    history: where the environment edits the conversation (clears the context, summarises it), what it is from here on,
    the task's first messages included, in place of everything so far; `messages` follow it. The tokens so far are kept
    and trained on as one segment of the trajectory, and the next turn begins another.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    history: tuple[Message, ...] | None = None
    num_timeouts: int = 0


@dataclass(frozen=True, slots=True)
class Reward:
    """The grade: a total and its named components."""

    total: float
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. `kind` is the class it is reported under; `secret` is for the grader only and never reaches the
    sandbox or the policy."""

    env: str
    split: Split
    index: int
    kind: str
    prompt: tuple[Message, ...]
    secret: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Episode(ABC):
    """One attempt at one task; single use. `start`, then `step` until done, then `grade`, then `close`, always."""

    @abstractmethod
    async def start(self) -> Sequence[Message]:
        """Prepare (sandbox, files) and return the first messages, usually the task's prompt."""

    @abstractmethod
    async def step(self, action: Action) -> Observation:
        """Run the action's tool calls, or end the episode. A bad call is an observation, never an exception."""

    @abstractmethod
    async def grade(self) -> Reward:
        """Grade the state reached so far; also called for timeouts and truncations (partial state)."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything; idempotent."""

    async def snapshot(self) -> bytes:
        """Optional, between two turns: the whole state, for `Environment.restore` of any process. Changes nothing.

        Raises SnapshotError where it cannot be said: what only a running process knows, for example.
        """
        raise SnapshotError(f"a {type(self).__name__} cannot say its state")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a program reaches the policy during one episode: a service that speaks OpenAI's HTTP dialects.

    url: its base, as in OPENAI_BASE_URL, on loopback. key: the API key, good for this episode and for nothing else.
    socket: path of a Unix socket with the same service, for a program without network. model: the name it serves.
    deadline: by `time.monotonic`, when the episode must be over. report_url, report_key: where a trusted program may
    POST a reward, and the key for it. reports: what was reported so far, the newest last.
    """

    url: str
    key: str
    socket: str
    model: str
    deadline: float
    report_url: str = ""
    report_key: str = ""
    reports: list[Reward] = field(default_factory=list)


class SelfDrivenEpisode(ABC):
    """One attempt at one task by something that asks the policy when it wants to: a program. Single use.

    `run`, then `grade`, then `close`, always; `grade` also where `run` was cut short.
    """

    @abstractmethod
    async def run(self, endpoint: Endpoint) -> None:
        """Act until the end, and leave nothing running. What the program does wrong is for the grade.

        Raises TimeoutError where `endpoint.deadline`, or a limit of its own, ended it.
        """

    @abstractmethod
    async def grade(self) -> Reward:
        """Grade the state reached."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything; idempotent."""


class Environment(ABC):
    """A family of tasks with tools. Shared by all episodes of a process, so stateless or locked.

    self_driven: its episodes are of the second kind, SelfDrivenEpisode, and need an endpoint. max_turns: how many turns
    an episode may need. An actor allows so many, or the run's `sampling.max_turns` where that is less, and grades the
    episode then as it stands; what else plays an episode allows so many unless told otherwise. snapshots: whether
    `Episode.snapshot` and `restore` are there, so that an actor that is told to stop can hand its episodes over.
    """

    name: str
    self_driven: bool = False
    max_turns: int = 8
    snapshots: bool = False

    @property
    @abstractmethod
    def tools(self) -> Sequence[Tool]:
        """The tools a policy may call."""

    @abstractmethod
    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index, deterministic across processes; splits never share a problem."""

    @abstractmethod
    def episode(self, task: Task) -> Episode | SelfDrivenEpisode:
        """A fresh episode of the task, of the kind that `self_driven` says."""

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """An episode of the task that goes on where the one stood whose state these bytes are, `start` being done: the
        same actions have the same answers and the same grade.

        The bytes come from another machine and may be anything: they are checked in every field, and never unpickled.
        Raises SnapshotError for what is not a state of this task, and SandboxError.
        """
        raise SnapshotError(f"the environment {self.name!r} restores no episodes")

    @abstractmethod
    def reference(self, task: Task) -> ReferencePolicy:
        """A policy that solves the task through the tools; used for tests and certificates."""

    def demonstrator(self, task: Task) -> ReferencePolicy:
        """The policy whose episodes a warm start imitates: the reference, unless the author has more realistic ones."""
        return self.reference(task)

    async def prepare(self) -> None:  # noqa: B027  most environments need nothing
        """Optional, before the first episode: make what episodes will need ahead of time (warm sandboxes).

        Raises SandboxError where the machine cannot run the environment's tools, so that a process can say so at once.
        """

    async def close(self) -> None:  # noqa: B027  most environments hold nothing
        """Release pools."""


class ReferencePolicy(ABC):
    """Acts like a policy, without a model: sees the messages, returns the next action's tool calls or final text."""

    @abstractmethod
    def act(self, messages: Sequence[Message]) -> Action:
        """The next action, given the whole conversation so far (assistant messages included as sent)."""
