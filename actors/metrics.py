"""The actor's own metrics, all in one place. vLLM's (`vllm:...`) are in the same registry and are served with them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from broker.process.thinking_settings import adherence, budget_bucket
from broker.protocol.trajectory import Trajectory

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

episodes = Counter("ergon_actor_episodes", "Episodes run to their end", ["env", "mode", "outcome"])
sends = Counter("ergon_actor_sends", "Trajectories handed to the broker, by its answer", ["status"])
releases = Counter("ergon_actor_releases", "Leases given back without a trajectory", ["reason"])
handovers = Counter(
    "ergon_actor_handovers",
    "Unfinished episodes of an actor that drains: handed_over, refused (no room at the broker), unwanted (the lease "
    "had run out), failed (nothing was sampled yet, or its state could not be said); and of one that goes on with "
    "them: resumed, and stale or unreadable, which begin anew",
    ["result"],
)
handover_bytes = Counter("ergon_actor_handover_bytes", "Bytes of the unfinished episodes handed over")
handover_tokens = Counter("ergon_actor_handover_tokens", "Sampled tokens in the unfinished episodes handed over")
CAUSES = ("sandbox", "engine", "gateway", "actor")
infra_failures = Counter(
    "ergon_actor_infra_failures",
    "Episodes that could not be run through no fault of policy or environment, by what failed: a sandbox, the engine, "
    "the gateway, or something else of the actor; their tickets are tried again",
    ["env", "cause"],
)
withdrawn_episodes = Counter("ergon_actor_withdrawn_episodes", "Episodes stopped because their result was not wanted")
tokens_sampled = Counter("ergon_actor_tokens_sampled", "Tokens sampled by the policy", ["mode"])
turns = Counter("ergon_actor_turns", "Turns completed", ["env", "mode"])
tool_calls = Counter("ergon_actor_tool_calls", "Tool calls made", ["env", "mode"])
timeouts = Counter(
    "ergon_actor_timeouts",
    "Tool calls answered with a time-out, and episodes ended by a turn's limit or by their deadline",
    ["env", "mode", "what"],
)
abandoned_tools = Gauge(
    "ergon_actor_abandoned_tools", "Tools whose time is up and that cannot be ended: threads, and what ignores its end"
)
loop_lag_seconds = Gauge(
    "ergon_actor_loop_lag_seconds", "By how much the event loop was late when it was last looked at"
)
thinking_tokens = Counter("ergon_actor_thinking_tokens", "Tokens sampled while thinking", ["mode", "budget"])
thinking_episodes = Counter(
    "ergon_actor_thinking_episodes",
    "Episodes by their thinking budget and how they kept it: kept, over (a soft one) or forced (stopped by the actor)",
    ["mode", "budget", "adherence"],
)
malformed_turns = Counter("ergon_actor_malformed_turns", "Turns whose tool calls could not be parsed", ["env", "mode"])
episode_seconds = Histogram("ergon_actor_episode_seconds", "Length of an episode", ["env", "mode"], buckets=SECONDS)
model_seconds = Histogram("ergon_actor_model_seconds", "Sampling in one episode", ["env", "mode"], buckets=SECONDS)
tool_seconds = Histogram(
    "ergon_actor_tool_seconds", "Environment (tools, grading) in one episode", ["env", "mode"], buckets=SECONDS
)
running_episodes = Gauge("ergon_actor_running_episodes", "Episodes being run")
admitted_episodes = Gauge("ergon_actor_admitted_episodes", "Episodes that may run at once, by the load of the engine")
waiting_for_version = Gauge("ergon_actor_waiting_for_version", "Leased tickets that wait for a newer policy version")
engine_restarts = Counter("ergon_actor_engine_restarts", "Engines that died, by what followed", ["result"])
for _result in ("restarted", "given_up"):
    engine_restarts.labels(_result)  # 0 is shown: of a series that begins with 1, Prometheus sees no increase
engine_restart_seconds = Histogram(
    "ergon_actor_engine_restart_seconds",
    "From an engine's death until another one is there, which then adopts a version",
    buckets=SECONDS,
)
policy_lineage = Gauge("ergon_actor_policy_lineage", "Lineage of the policy version being served")
policy_version = Gauge("ergon_actor_policy_version", "Policy version being served")
adoptions = Counter("ergon_actor_adoptions", "Attempts to adopt a policy version, by result", ["result"])
adopt_seconds = Histogram(
    "ergon_actor_adopt_seconds", "From the start of the fetch until the version is served", buckets=SECONDS
)
adopt_pause_seconds = Histogram(
    "ergon_actor_adopt_pause_seconds", "Pause of sampling for one adoption", buckets=SECONDS
)
adopt_phase_seconds = Histogram(
    "ergon_actor_adopt_phase_seconds",
    "One phase of an adoption, sampling going on: fetch, prepare, drain (no turn starts), release",
    ["phase"],
    buckets=SECONDS,
)
adopt_reloads = Counter(
    "ergon_actor_adopt_reloads", "Switches that failed, so that sampling paused until the whole model was reloaded"
)

gateway_requests = Counter("ergon_actor_gateway_requests", "Requests of programs, by HTTP status", ["route", "status"])
gateway_refused = Counter(
    "ergon_actor_gateway_refused", "Requests of programs answered with an error, by its code", ["code"]
)
gateway_overridden = Counter(
    "ergon_actor_gateway_overridden", "Calls that wanted another sampling parameter than the run's", ["parameter"]
)
gateway_segments = Histogram(
    "ergon_actor_gateway_segments", "Segments of one program's episode", ["env"], buckets=(1, 2, 4, 8, 16, 32, 64)
)
gateway_discarded_tokens = Counter(
    "ergon_actor_gateway_discarded_tokens", "Tokens sampled beyond a stop text, which are no part of the episode"
)


def expect(environments: Iterable[str]) -> None:
    """Show 0 for what may fail in these environments, as for engines."""
    for env in environments:
        for cause in CAUSES:
            infra_failures.labels(env, cause)


def observe_episode(trajectory: Trajectory) -> None:
    """Count what an episode was."""
    head = trajectory.head
    env, mode = head.ticket.task.env, head.ticket.mode.value
    episodes.labels(env, mode, head.outcome.value).inc()
    tokens_sampled.labels(mode).inc(trajectory.num_sampled)
    turns.labels(env, mode).inc(head.num_turns)
    tool_calls.labels(env, mode).inc(head.num_tool_calls)
    malformed_turns.labels(env, mode).inc(head.num_malformed)
    budget = budget_bucket(head.ticket.thinking_budget)
    thinking_tokens.labels(mode, budget).inc(head.num_thinking_tokens)
    thinking_episodes.labels(mode, budget, adherence(head)).inc()
    episode_seconds.labels(env, mode).observe(head.timings_s["total"])
    model_seconds.labels(env, mode).observe(head.timings_s["model"])
    tool_seconds.labels(env, mode).observe(head.timings_s["tool"])
