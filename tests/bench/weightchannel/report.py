"""The figures of `make bench-weights` as a Markdown report and as one line of JSON. Computes; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.weightchannel.codec import Codec, Packed, Shared
from tests.bench.weightchannel.crowd import Crowd
from tests.bench.weightchannel.projection import projection_table
from tests.bench.weightchannel.step import Pause, Step
from tests.bench.weightchannel.travel import GIGABIT, LOOPBACK, SLOW, Travel

RATES = (1e-6, 1e-5)
MANY = 64
RELAYS_OF_THE_TARGET = 1
TARGETS = {  # key: (what is asked for, whether it is a minimum)
    "bytes_ratio_1e-6": (200.0, True),
    "bytes_ratio_1e-5": (80.0, True),
    "codec_vs_gloo": (0.15, False),
    "speedup_1gbit": (20.0, True),
    "pause_ms": (250.0, False),
    "publish_fraction_of_step": (0.05, False),
    "publisher_cost_64": (1.2, False),
}


@dataclass(slots=True)
class Results:
    """What a run has measured; empty or None for what it has not."""

    codecs: dict[tuple[float, bool], Codec] = field(default_factory=dict)  # (learning rate, settled)
    packed: Packed | None = None
    shared: dict[str, Shared] = field(default_factory=dict)
    travels: list[Travel] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)
    step: Step | None = None
    pause: Pause | None = None
    notes: list[str] = field(default_factory=list)

    def travel(self, name: str) -> Travel | None:
        """That of one link."""
        return next((travel for travel in self.travels if travel.way.name == name), None)

    def crowd(self, relays: int, actors: int) -> Crowd | None:
        """One cell."""
        return next((crowd for crowd in self.crowds if (crowd.relays, crowd.actors) == (relays, actors)), None)


def summary(results: Results) -> dict[str, float | None]:
    """The last line; null for what was not measured. `codec_vs_gloo` is that of the learning rate that costs more."""
    loopback, gigabit, slow = (results.travel(way.name) for way in (LOOPBACK, GIGABIT, SLOW))
    slowest = max((codec.seconds for (_, settled), codec in results.codecs.items() if not settled), default=None)
    one, many = (results.crowd(RELAYS_OF_THE_TARGET, num) for num in (1, MANY))
    snapshot_mb = next((codec.snapshot_bytes / 1e6 for codec in results.codecs.values()), None)
    figures = {
        **{f"bytes_ratio_{rate:.0e}".replace("e-0", "e-"): _ratio(results, rate) for rate in RATES},
        "codec_vs_gloo": slowest / loopback.gloo_s if slowest and loopback and loopback.gloo_measured else None,
        "speedup_1gbit": gigabit.speedup if gigabit else None,
        "speedup_100mbit": slow.speedup if slow else None,
        "pause_ms": results.pause.median_ms if results.pause else None,
        "publish_fraction_of_step": results.step.fraction if results.step else None,
        "publisher_cost_64": many.cpu_s / one.cpu_s if one and many else None,
        "extra_memory_mb": max(loopback.learner_mb, loopback.actor_mb) if loopback and snapshot_mb else None,
    }
    return {key: None if value is None else round(value, 3) for key, value in figures.items()}


def markdown(results: Results, conditions: str) -> str:
    """The report."""
    parts = [
        f"## Weight channel benchmark\n\n{conditions}",
        _targets(results),
        _codec_table(results),
        _whole_table(results),
        _travel_table(results),
        _phase_table(results),
        _crowd_table(results),
        _step_and_pause(results),
        *(projection_table(rate, codec) for (rate, settled), codec in results.codecs.items() if not settled),
        "\n".join(f"- {note}" for note in results.notes),
    ]
    return "\n\n".join(filter(None, parts))


def _ratio(results: Results, rate: float) -> float | None:
    codec = results.codecs.get((rate, False))
    return codec.ratio if codec else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _targets(results: Results) -> str:
    """What was asked for, and by how much it was missed."""
    figures, lines = summary(results), []
    for key, (target, minimum) in TARGETS.items():
        value = figures[key]
        if value is None:
            lines.append(f"- {key}: not measured in this run")
            continue
        met = value >= target if minimum else value <= target
        asked = f"{'at least' if minimum else 'at most'} {target:g}"
        lines.append(f"- {key}: {value:g}, {asked} is asked for: {'met' if met else 'MISSED'}")
    codec, extra = next(iter(results.codecs.values()), None), figures["extra_memory_mb"]
    if codec is not None and extra is not None:
        share = extra * 1e6 / codec.snapshot_bytes
        verdict = "met" if share <= 1 else f"MISSED by {share - 1:.0%}"
        lines.append(f"- extra_memory_mb: {extra:g}, {share:.2f} bf16 copies of the model, one is asked for: {verdict}")
    return "\n".join(lines)


def _codec_table(results: Results) -> str:
    head = ["learning rate", "changed", "delta bytes", "snapshot / delta", "zstd-1 of it / delta"]
    head += ["diff + encode ms (CPU)", "of it to read both ms", "decode + apply ms (CPU)", "total hash ms"]
    rows = []
    for (rate, settled), codec in results.codecs.items():
        packed = f"{results.packed.num_bytes / codec.delta_bytes:.0f}×" if results.packed else ""
        row = [f"{rate:.0e}{', settled' if settled else ''}", f"{codec.changed_fraction:.2%}"]
        row += [f"{codec.delta_bytes:,}", f"{codec.ratio:.1f}×", packed]
        row += [f"{1000 * codec.encode.seconds:.0f} ({1000 * codec.encode.cpu_s:.0f})"]
        row += [f"{1000 * codec.scan.seconds:.0f}"]
        row += [f"{1000 * codec.decode_apply.seconds:.0f} ({1000 * codec.decode_apply.cpu_s:.0f})"]
        rows.append([*row, f"{1000 * codec.total_hash.seconds:.0f}"])
    return _table(head, rows) if rows else ""


def _whole_table(results: Results) -> str:
    rows = []
    if results.packed is not None:
        pack, unpack = results.packed.pack.seconds, results.packed.unpack.seconds
        rows.append([f"zstd-1, {results.packed.num_bytes / 1e6:,.0f} MB", f"{pack:.2f}", f"{unpack:.2f}"])
    rows += [
        [f"safetensors in {place}, page cache warm", f"{shared.write_s:.2f} (fsync)", f"{shared.read_s:.2f}"]
        for place, shared in results.shared.items()
    ]
    return _table(("the whole snapshot", "write s", "read s"), rows) if rows else ""


def _travel_table(results: Results) -> str:
    head = ["link", "delta, publish() to verified s", "publish s (CPU)", "fetch + apply + verify s (CPU)"]
    head += ["snapshot, same channel s", "gloo s", "bare socket s", "gloo / delta", "MB more: learner, actor", "load"]
    rows = []
    for travel in results.travels:
        rows.append(
            [
                travel.way.name,
                f"{travel.delta_s:.3f}",
                f"{travel.publish_s:.3f} ({travel.publish_cpu_s:.3f})",
                f"{travel.fetch_s:.3f} ({travel.fetch_cpu_s:.3f})",
                f"{travel.full_s:.2f}",
                f"{travel.gloo_s:.3f}{'' if travel.gloo_measured else ' (bytes / bandwidth)'}",
                "" if travel.plain_s is None else f"{travel.plain_s:.2f}",
                f"{travel.speedup:.1f}×",
                f"{travel.learner_mb:.0f}, {travel.actor_mb:.0f}",
                travel.load.removeprefix("load "),
            ]
        )
    return _table(head, rows) if rows else ""


def _phase_table(results: Results) -> str:
    """Where the time of a delta goes."""
    head = ["link", "diff + encode ms", "hash + switch ms", "announcement or push under way ms", "chunks asked for ms"]
    head += ["decode + apply + verify ms", "rest ms"]
    rows = []
    for way in results.travels:
        rest_s = way.delta_s - way.publish_s - way.wire_s - way.transfer_s - way.apply_s
        parts = (way.diff_s, way.publish_s - way.diff_s, way.wire_s, way.transfer_s, way.apply_s, rest_s)
        rows.append([way.way.name, *(f"{1000 * part:.0f}" for part in parts)])
    return _table(head, rows) if rows else ""


def _crowd_table(results: Results) -> str:
    head = ["relays", "actors", "publisher's CPU ms: publish()", "serving", "over one actor", "MB served", "over one"]
    head += ["until the last has it s", "load"]
    rows = []
    for crowd in results.crowds:
        one = results.crowd(crowd.relays, 1)
        cpu = f"{crowd.cpu_s / one.cpu_s:.2f}×" if one else ""
        sent = f"{crowd.served_bytes / one.served_bytes:.2f}×" if one and one.served_bytes else ""
        rows.append(
            [
                str(crowd.relays),
                str(crowd.actors),
                f"{1000 * crowd.publish_cpu_s:.0f}",
                f"{1000 * crowd.serve_cpu_s:.0f}",
                cpu,
                f"{crowd.served_bytes / 1e6:.1f}",
                sent,
                f"{crowd.last_s:.2f}",
                crowd.load.removeprefix("load "),
            ]
        )
    return _table(head, rows) if rows else ""


def _step_and_pause(results: Results) -> str:
    lines = []
    if (step := results.step) is not None:
        lines.append(
            f"A step of the quick start ({step.num_sequences} sequences, {step.num_tokens:,} tokens, learning rate "
            f"{step.learning_rate:g}): {step.step_s:.1f} s; publishing its version, {step.changed_fraction:.1%} of "
            f"which changed: {step.publish_s:.3f} s, {step.fraction:.1%} of the step."
        )
    if (pause := results.pause) is not None:
        listed = ", ".join(f"{ms:.0f}" for ms in pause.pauses_ms)
        lines.append(
            f"Pause of sampling with {pause.in_flight} requests in flight, mode {pause.mode}: median "
            f"{pause.median_ms:.0f} ms of {listed}; an adoption as a whole {pause.adopt_s:.2f} s."
        )
    return "\n\n".join(lines)
