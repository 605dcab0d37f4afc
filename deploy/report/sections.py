"""The sections of a report on how the policy learnt: what the run was, rewards, losses, budgets. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.report.charts import Axis, Line, number
from deploy.report.content import Figure, Section, Table, line_figure, of_steps, percent, seconds
from deploy.report.run import Record, Run, changed_settings

STYLES = {"sampled": "at the training temperature", "greedy": "greedy"}
_STEP = "reinforcement-learning step"
_CURVES = (
    ("loss", "loss", "loss"),
    ("entropy", "entropy of the policy", "nats a token"),
    ("mismatch_kl", "mismatch: KL of the behaviour to the target policy", "nats a token"),
    ("ess", "effective sample size", "share of the tokens"),
    ("grad_norm", "norm of the gradient, before clipping", "norm"),
    ("clip_fraction", "tokens whose ratio was clipped", "share of the tokens"),
)


def what_it_was(run: Run) -> Section:
    """Model, settings, versions, duration, hardware."""
    section = Section("run", "What the run was")
    settings, last = run.settings, run.last
    done = bool(run.summary)
    section.sentences.append(_state(run))
    began = run.began[-1] if run.began else None
    section.facts += [
        ("model", Path(settings.model.path).name),
        ("environments", ", ".join(environment.name for environment in settings.environments)),
        ("algorithm", f"{settings.learner.loss.kind}, {settings.learner.group_size} episodes a group"),
        ("steps", f"{last['step']} of {settings.learner.num_steps}, after {len(run.warm_start)} supervised ones"),
        ("policy version", str(last["version"])),
        ("seed", str(settings.run.seed)),
    ]
    if run.first_at is not None:
        section.facts.append(("began", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.first_at))))
        wall_s = run.summary["wall_s"] if done else last["time"] - run.first_at
        section.facts.append(("duration", seconds(wall_s)))
    if began is not None:
        gpus = ", ".join(began["gpus"]) or "none"
        section.facts += [
            (
                "learner's machine",
                f"{began['cpu']}, {began['cores']} cores, {began['memory_mb'] / 1024:.0f} GiB memory",
            ),
            ("its GPUs", gpus),
            ("versions", ", ".join(f"{name} {version}" for name, version in began["versions"].items())),
            ("system", f"Python {began['python']}, {began['system']}"),
        ]
        section.facts.append(("learner processes", str(len(run.began))))
    restarts = {name: count for name, count in run.summary.get("restarts", {}).items() if count}
    if done:
        section.facts.append(("restarts", ", ".join(f"{name} {count}" for name, count in restarts.items()) or "none"))
    changed = [(key, _short(value), _short(default)) for key, value, default in changed_settings(settings)]
    section.tables.append(Table(("setting", "value", "default"), changed, "settings that are not the defaults"))
    return section


def held_out(run: Run) -> Section:
    """Held-out reward by step, by environment and by kind."""
    section = Section("held-out", "Held-out reward")
    if not run.evaluations:
        section.sentences.append("No evaluation is complete; `eval.tasks` and `eval.every` say when there is one.")
        return section
    if not any(f"{style}_ci95" in each for each in run.evaluations.values() for style in STYLES):
        section.sentences.append("The evaluations were recorded by a release that recorded no intervals.")
    if interval := run.summary.get("ci95"):
        low, high = (100 * end for end in interval)
        gain = f"What reinforcement learning gained: {low:.0f} to {high:.0f} points of reward"
        section.sentences.append(f"{gain} (95 % bootstrap interval, paired by task, at the training temperature).")
    names = dict(_places(run))
    across = Axis(f"{_STEP} (0: after the warm start)", names=names)
    records = {x: run.evaluations[each["evaluation"]] for x, each in _at(run)}
    drawn = [_evaluated(said, records, style, f"{style}_ci95") for style, said in STYLES.items()]
    note = "Lines up and down are 95 % intervals of the mean over tasks (Wilson's where rewards are 0 or 1)."
    section.figures.append(line_figure("held-out reward", drawn, across, Axis("reward", (0.0, 1.0)), note))
    for by, title in (("env", "environment"), ("kind", "kind of task")):
        of_last = next(reversed(run.evaluations.values())).get(f"sampled_by_{by}", {})
        if len(of_last) > 1:
            drawn = [_evaluated(name, records, f"sampled_by_{by}", f"sampled_by_{by}_ci95") for name in of_last]
            title = f"held-out reward by {title}, at the training temperature"
            section.figures.append(line_figure(title, drawn, across, Axis("reward", (0.0, 1.0))))
    return section


def training_reward(run: Run) -> Section:
    """Rewards of the episodes that were trained on."""
    section = Section("reward", "Training reward")
    if not run.steps:
        section.sentences.append("No step of reinforcement learning has been taken yet.")
        return section
    across, up = Axis(_STEP), Axis("reward", (0.0, 1.0))
    mean = Line("all episodes", of_steps(run.steps, "reward_mean"))
    note = (
        "Mean of the episodes that a step consumed, those without a gradient included; tasks differ from step to step."
    )
    section.figures.append(line_figure("training reward", [mean], across, up, note))
    for key, title, inner in (("by_env", "environment", "reward"), ("reward_by_kind", "kind of task", "")):
        names = sorted({name for step in run.steps for name in step.get(key, {})})
        if len(names) > 1:
            drawn = [Line(name, list(_nested(run.steps, key, name, inner))) for name in names]
            section.figures.append(line_figure(f"training reward by {title}", drawn, across, up))
    return section


def losses(run: Run) -> Section:
    """Loss, KL, entropy, effective sample size; what was refused."""
    section = Section("loss", "Loss and health")
    if run.warm_start:
        points = [(record["number"], record["nll"]) for record in run.warm_start]
        across = Axis("supervised step of the warm start")
        section.figures.append(line_figure("warm start", [Line("loss", points)], across, Axis("nats a token")))
    if run.steps:
        for key, title, unit in _CURVES:
            if points := of_steps(run.steps, key):
                section.figures.append(line_figure(title, [Line(title, points)], Axis(_STEP), Axis(unit)))
    else:
        section.sentences.append("No step of reinforcement learning has been taken yet.")
    kinds = [record["event"] for record in run.others]
    alarms = [record for record in run.others if record["event"] == "alarm" and record["raised"]]
    section.sentences.append(
        f"{kinds.count('skipped')} batches had no gradient, {kinds.count('refused')} were refused and are in "
        f"`quarantine`, {len(alarms)} alarms were raised."
    )
    if alarms:
        rows = [(each["step"], each["kind"], each["value"], each["threshold"]) for each in alarms]
        section.tables.append(Table(("step", "alarm", "value", "threshold"), rows, "alarms"))
    return section


def budgets(run: Run) -> Section:
    """Held-out reward against thinking budget, and what training's budgets did."""
    section = Section("budgets", "Thinking budgets")
    curves = {name: record["sampled_curve"] for name, record in run.evaluations.items() if record.get("sampled_curve")}
    if curves:
        section.figures += list(_budget_figures(_first_and_last(curves), run.settings.thinking.per))
    else:
        section.sentences.append("Evaluations went through no budgets (`eval.budgets`), so there is no curve.")
    names = list(dict.fromkeys(name for step in run.steps for name in step.get("thinking", {})))
    if names and names != ["unlimited"]:
        rows = [(name, *_of_bucket(run.steps, name)) for name in names]
        header = ("budget", "episodes", "reward", "thinking tokens", "kept it", "stopped by the actor")
        section.tables.append(Table(header, rows, "budgets in training, mean over all steps"))
    else:
        section.sentences.append("Training had no budget but the unlimited one (`thinking.budgets`).")
    return section


def _state(run: Run) -> str:
    if run.summary:
        return "The run is finished."
    ago = seconds(max(0.0, time.time() - run.last["time"]))
    phase = run.last.get("detail", run.last["phase"]).replace("_", " ")
    return f"The run is not finished: its last record, {ago} before this page was made, is of the phase “{phase}”."


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _at(run: Run) -> Iterator[tuple[float, Record]]:
    """Where each evaluation stands on the axis of steps; the one before the warm start to the left of it."""
    last = max((record["step"] for record in run.evaluations.values()), default=0)
    for name, record in run.evaluations.items():
        number_of_step = name.removeprefix("step-")
        if name == "before":
            yield (-max(1.0, last / 8) if run.warm_start else 0.0), record
        elif number_of_step != name and number_of_step.isdigit():
            yield float(number_of_step), record
        else:
            yield float(record["step"]), record


def _places(run: Run) -> Iterator[tuple[float, str]]:
    for x, _ in _at(run):
        yield x, "before" if x < 0 else number(x)


def _evaluated(name: str, records: Mapping[float, Record], key: str, interval_key: str) -> Line:
    """A line through evaluations. key: a number's, or with a name of it, of a map of numbers."""
    points, intervals = [], []
    for x, record in sorted(records.items()):
        value, interval = record.get(key), record.get(interval_key)
        if isinstance(value, Mapping):
            value, interval = value.get(name), (interval or {}).get(name)
        if value is not None:
            points.append((x, value))
            intervals += [(x, *interval)] if interval else []
    return Line(name, points, intervals)


def _nested(steps: Sequence[Record], key: str, name: str, inner: str) -> Iterator[tuple[float, float]]:
    for step in steps:
        value = step.get(key, {}).get(name)
        if value is not None:
            yield step["step"], value[inner] if inner else value


def _budget_figures(curves: Mapping[str, Sequence[Record]], per: str) -> Iterator[Figure]:
    order = list(dict.fromkeys(point["budget"] for curve in curves.values() for point in curve))
    across = Axis(f"thinking budget, tokens per {per}", names={float(i): str(each) for i, each in enumerate(order)})
    for key, title, unit in (
        ("reward", "held-out reward against thinking budget", "reward"),
        ("adherence", "episodes that ended thinking by themselves", "share"),
        ("forced", "episodes whose thinking the actor stopped", "share"),
    ):
        drawn = []
        for name, curve in curves.items():
            points = [(float(order.index(point["budget"])), point[key], point["reward_ci95"]) for point in curve]
            intervals = [(x, y - half, y + half) for x, y, half in points] if key == "reward" else []
            drawn.append(Line(name, [(x, y) for x, y, _ in points], intervals))
        yield line_figure(title, drawn, across, Axis(unit, (0.0, 1.0)))


def _first_and_last(curves: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    """Those of before, after the warm start, the newest one during training, and after."""
    during = [name for name in curves if name.startswith("step-")]
    shown = [name for name in curves if name not in during[:-1]]
    return {name: curves[name] for name in shown}


def _of_bucket(steps: Sequence[Record], name: str) -> tuple[float | str, ...]:
    found = [step["thinking"][name] for step in steps if name in step.get("thinking", {})]
    episodes = sum(each["episodes"] for each in found)

    def mean(key: str) -> float:
        return float(sum(each[key] * each["episodes"] for each in found) / max(1, episodes))

    return episodes, mean("reward"), mean("tokens"), percent(mean("adherence")), percent(mean("forced"))
