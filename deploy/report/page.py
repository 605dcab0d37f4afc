"""The report as one HTML page, and how a trajectory is shown on it and in `ergon view`.

What policies, tools and pages wrote is hostile: Jinja escapes all of it, no page has a script, and the policy for its
contents allows none, nor anything from elsewhere. Owns the file that is written; the run's other files are only read.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from broker.process.lifecycle import ErgonError
from broker.protocol.kept import Kept
from deploy.report import machinery, sections
from deploy.report.charts import NUM_STYLES, number
from deploy.report.content import Section, seconds
from deploy.report.kept import Filter, Index, Row
from deploy.report.run import Run, read_run
from deploy.report.transcripts import Message, Transcriber

logger = logging.getLogger(__name__)

REPORT: Final = "report.html"
MAX_TOKENS: Final = 2000  # of a trajectory whose tokens are listed one by one in a report
STYLE: Final = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
_HASH: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; img-src data:; base-uri 'none'; form-action 'self'"
)


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "seconds": seconds, "moment": _moment, "drawn": Markup, "prose": _prose}
    made.globals |= {"style": Markup(STYLE), "policy": CONTENT_POLICY, "num_styles": NUM_STYLES}
    return made


def _prose(sentence: str) -> Markup:
    """A sentence in which `this` is code."""
    parts = sentence.split("`")
    marked = [Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)]
    return Markup("").join(marked)


def _moment(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix))


@dataclass(frozen=True, slots=True)
class Shown:
    """A trajectory as the templates show it. why: what it is an example of. problem: why its messages cannot be shown.

    listed: whether its tokens are listed one by one.
    """

    kept: Kept
    segments: list[list[Message]]
    why: str = ""
    problem: str = ""
    listed: bool = True


class Pages:
    """Renders pages of one run."""

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber
        self._environment = _environment()

    def render(self, template: str, **values: Any) -> str:
        """A template's page."""
        return self._environment.get_template(template).render(**values)

    def shown(self, kept: Kept, why: str = "", max_tokens: int | None = None) -> Shown:
        """A trajectory with its messages, or why they cannot be shown."""
        num_tokens = sum(segment.token_ids_T.size for segment in kept.trajectory.segments)
        try:
            segments = self._transcriber.read(kept.trajectory)
        except ErgonError as error:
            return Shown(kept, [], why, str(error))
        return Shown(kept, segments, why, "", max_tokens is None or num_tokens <= max_tokens)

    def report(self, run: Run, index: Index) -> str:
        """The whole report."""
        index.refresh()
        picked = [self.shown(kept, why, MAX_TOKENS) for why, kept in pick(index)]
        return self.render(
            "report.html",
            run=run,
            sections=all_sections(run),
            trajectories=picked,
            num_kept=index.count(),
            num_damaged=index.num_damaged,
            made_at=time.time(),
        )


def all_sections(run: Run) -> list[Section]:
    """The report's sections, in their order, but for the trajectories."""
    makers = (
        sections.what_it_was,
        sections.held_out,
        sections.training_reward,
        sections.losses,
        machinery.staleness,
        machinery.throughput,
        machinery.outcomes,
        sections.budgets,
        machinery.ledger,
        machinery.weight_channel,
    )
    return [maker(run) for maker in makers]


def pick(index: Index) -> Iterator[tuple[str, Kept]]:
    """Examples, each once: the newest evaluation's best, median and worst, or of training where nothing was evaluated;
    one that new weights met in its middle, one whose thinking was stopped, a demonstration, one of each outcome."""
    taken: set[str] = set()
    chosen = _newest(index)
    count = index.count(chosen)
    wanted: list[tuple[str, list[Row]]] = [
        (why, index.page(chosen, "reward", place, 1))
        for why, place in (
            ("the highest reward", 0),
            ("the median reward", count // 2),
            ("the lowest reward", count - 1),
        )
        if count
    ]
    wanted.append(("new weights in its middle", index.examples("versions > 1")))
    wanted.append(("its thinking was stopped by the actor", index.examples("forced > 0")))
    wanted.append(("a demonstration", index.page(Filter(mode="reference"), "finished_at", 0, 1)))
    for outcome in index.choices()["outcome"]:
        wanted.append((f"outcome {outcome}", index.page(Filter(outcome=outcome), "finished_at", 0, 1)))
    for why, rows in wanted:
        for row in rows:
            kept = None if row["ticket_id"] in taken else index.load(row["ticket_id"])
            if kept is not None:
                taken.add(row["ticket_id"])
                yield why, kept


def _newest(index: Index) -> Filter:
    evaluated = index.page(Filter(mode="eval"), "finished_at", 0, 1)
    if evaluated:
        return Filter(mode="eval", evaluation=evaluated[0]["evaluation"])
    return Filter(mode="train")


def make_report(place: Path, model: Path | None) -> tuple[Run, str]:
    """A run, and the page about it. model: where the tokenizer is, if not at the run's model.path.

    Raises ErgonError where there is no run.
    """
    run = read_run(place)
    index = Index(run.directory)
    try:
        with Transcriber(run.config, model) as transcriber:
            return run, Pages(transcriber).report(run, index)
    finally:
        index.close()


def write_report(place: Path, output: Path | None, model: Path | None) -> str:
    """Write a run's report to a file, in the run's folder where none is given; a sentence about it.

    Raises ErgonError where there is no run, or the file cannot be written.
    """
    run, text = make_report(place, model)
    target = output or run.directory / REPORT
    draft = target.with_name(target.name + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise ErgonError(f"{target} cannot be written ({error.strerror}); name another place with --output") from error
    return f"{target}: {target.stat().st_size / 1e6:.1f} MB, for any browser"
