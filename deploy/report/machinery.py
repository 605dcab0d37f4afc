"""The sections of a report on how the run ran: staleness, throughput, outcomes, ledger, weight channel. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from deploy.report.charts import Axis, Line, number
from deploy.report.content import Cell, Section, Table, bar_figure, line_figure, of_steps, percent, seconds, size
from deploy.report.run import Record, Run

_STEP = "reinforcement-learning step"
_NO_COUNTS = (
    "What the processes counted is not in this folder: `ergon run` of this release writes it to `processes.json`; on "
    "Kubernetes, Prometheus has it."
)
_NO_STEP = "No step of reinforcement learning has been taken yet."


def staleness(run: Run) -> Section:
    """How many versions lay between sampling and training."""
    section = Section("staleness", "Staleness")
    if not run.steps:
        section.sentences.append(_NO_STEP)
        return section
    bound = run.settings.learner.max_staleness
    masked = sum(step["stale_tokens"] for step in run.steps)
    section.sentences.append(
        f"Versions between the policy that sampled a token and the one that was trained; {bound} at most "
        f"(`learner.max_staleness`). {number(masked)} tokens were older and were masked."
    )
    drawn = [Line(name, of_steps(run.steps, f"staleness_{key}")) for key, name in (("mean", "mean"), ("max", "oldest"))]
    up = Axis("versions", (0.0, float(bound)))
    section.figures.append(line_figure("staleness by step", drawn, Axis(_STEP), up))
    tokens: Counter[int] = Counter()
    for step in run.steps:
        tokens.update({int(versions): count for versions, count in step.get("staleness_tokens", {}).items()})
    if tokens:
        rows = [
            (f"{versions} version{'s' * (versions != 1)}", (float(tokens[versions]),))
            for versions in range(max(tokens) + 1)
        ]
        section.figures.append(bar_figure("trained tokens by staleness", rows, ("tokens",)))
    else:
        section.sentences.append("How many tokens had which staleness was not recorded by the release that ran it.")
    return section


def throughput(run: Run) -> Section:
    """Rates by step, and where the learner's time went."""
    section = Section("throughput", "Throughput")
    rates = list(_rates(run.steps))
    if not rates:
        section.sentences.append("Rates are between steps, and there were none yet.")
        return section
    tokens = [
        Line("sampled, of the episodes consumed", [(x, sampled) for x, sampled, _, _ in rates]),
        Line("trained", [(x, trained) for x, _, trained, _ in rates]),
    ]
    section.figures.append(line_figure("tokens a second", tokens, Axis(_STEP), Axis("tokens/s", (0.0, 0.0))))
    episodes = [Line("trajectories", [(x, of) for x, _, _, of in rates])]
    up = Axis("trajectories/s", (0.0, 0.0))
    section.figures.append(line_figure("trajectories a second", episodes, Axis(_STEP), up))
    spent: Counter[str] = Counter()
    for step in run.steps:
        spent.update(step["seconds"])
    total = sum(spent.values())
    rows = [(f"{name}, {percent(value / total)}", (value,)) for name, value in spent.items()] if total else []
    note = "Of the learner's loop; while it waits, actors sample, and while it trains they do so as well."
    section.figures.append(bar_figure("where the learner's time went", rows, ("seconds",), " s", note))
    return section


def outcomes(run: Run) -> Section:
    """How episodes ended, by environment, and what became of them."""
    section = Section("outcomes", "Outcomes")
    rows: list[tuple[Cell, ...]] = []
    for title, records in (("training", run.steps + run.others), ("held out", list(run.evaluations.values()))):
        for env, counts in _summed(records).items():
            rows += [
                (title, env, outcome, count, percent(count / sum(counts.values()))) for outcome, count in counts.items()
            ]
    if rows:
        section.tables.append(Table(("episodes", "environment", "outcome", "number", "share"), rows, "by outcome"))
    else:
        section.sentences.append("No episode was recorded with its outcome.")
    if run.audit:
        reasons = [(reason.replace("_", " "), fate, count) for (fate, reason), count in sorted(run.audit.items())]
        section.tables.append(Table(("what became of it", "fate", "number"), reasons, "training trajectories by fate"))
    if not run.totals:
        section.sentences.append(f"Infrastructure failures are no results, so the learner is not told. {_NO_COUNTS}")
        return section
    causes = run.by_label("ergon_actor_infra_failures_total", "cause")
    timeouts = run.by_label("ergon_actor_timeouts_total", "what")
    section.sentences.append(
        f"Infrastructure failures, which are tried again: {_listed(causes)}. Time limits reached: {_listed(timeouts)}."
    )
    return section


def ledger(run: Run) -> Section:
    """Issued, delivered, trained, lost, twice."""
    section = Section("ledger", "Ledger")
    counts: Mapping[str, int] = run.summary.get("trajectories", {})
    if counts:
        rows: Sequence[tuple[Cell, ...]] = [(name, value) for name, value in counts.items()]
        said = "the run's own summary: training tickets; lost and duplicated must be 0"
    else:
        trained = sum(count for (fate, _), count in run.audit.items() if fate == "trained")
        consumed = sum(run.audit.values())
        rows = [("trained", trained), ("masked", consumed - trained), ("duplicated", run.num_repeated)]
        section.sentences.append(
            "What was issued, delivered and lost is known at the end of a run; until then `ergon broker inspect` asks "
            "the broker. So far, of the audit:"
        )
        said = "training tickets consumed so far"
    section.tables.append(Table(("tickets", "number"), rows, said))
    if leases := run.by_label("ergon_broker_leases_total", "event"):
        section.sentences.append(f"Leases: {_listed(leases)}.")
    if results := run.by_label("ergon_broker_results_total", "status"):
        section.sentences.append(f"Results as the broker took them: {_listed(results)}.")
    return section


def weight_channel(run: Run) -> Section:
    """Bytes and pauses of new weights."""
    section = Section("weights", "Weight channel")
    versions = run.total("ergon_actor_adopt_pause_seconds_count")
    if not run.totals or versions is None:
        section.sentences.append(_NO_COUNTS)
        return section
    fetched = run.by_label("ergon_weights_fetched_bytes_total", "kind")
    section.facts += [
        ("versions adopted, all actors", number(versions)),
        ("bytes fetched", ", ".join(f"{size(value)} in {kind}s" for kind, value in fetched.items()) or "none"),
    ]
    for name, title in (("adopt_pause", "pause of sampling"), ("adopt", "from the fetch until it is served")):
        count = run.total(f"ergon_actor_{name}_seconds_count")
        spent = run.total(f"ergon_actor_{name}_seconds_sum")
        if count and spent is not None:
            section.facts.append((f"{title}, mean", seconds(spent / count)))
    pauses = [(f"up to {bound} s", (value,)) for bound, value in _buckets(run, "ergon_actor_adopt_pause_seconds")]
    if pauses:
        section.figures.append(bar_figure("pauses of sampling, by their length", pauses, ("adoptions",)))
    return section


def _rates(steps: Sequence[Record]) -> Iterator[tuple[float, float, float, float]]:
    """(step, sampled tokens/s, trained tokens/s, trajectories/s) over the wall clock since the step before."""
    for before, step in itertools.pairwise(steps):
        span_s = step["time"] - before["time"]
        if span_s > 0 and step["lineage"] == before["lineage"]:
            counts = step["tokens_sampled"], step["num_trained_tokens"], step["trajectories"]
            sampled, trained, episodes = (count / span_s for count in counts)
            yield step["step"], sampled, trained, episodes


def _summed(records: Sequence[Record]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for record in records:
        for env, counts in record.get("outcomes", {}).items():
            found.setdefault(env, Counter()).update(counts)
    return found


def _buckets(run: Run, metric: str) -> Iterator[tuple[str, float]]:
    """(upper bound, number) of the buckets of a histogram that are not empty."""
    below = 0.0
    bounds = run.by_label(f"{metric}_bucket", "le")
    for bound in sorted(bounds, key=float):
        if bounds[bound] > below:
            yield ("∞" if bound == "+Inf" else bound), bounds[bound] - below
        below = max(below, bounds[bound])


def _listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in counts.items() if value) or "none"
