"""The verdict finds what is lost, doubled, strange or contradicted; each witness by itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from broker.ledger.events import EndedRow, JournalEnds, JournalTickets
from broker.process.learner_settings import LearnerSection
from broker.process.settings import RunSection, Settings
from broker.protocol.commands import TicketState
from broker.store.journal import Journal
from learner.checkpoint import CheckpointStore
from tests.chaos.handovers import EPISODES, append
from tests.chaos.scripted_actor import report_violation
from tests.chaos.scripted_learner import AUDIT, CHAIN, CHECKPOINTS, chained
from tests.chaos.verdict import issued_ids, judge
from tests.unit.broker.samples import make_ticket


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run of eight tickets."""
    return Settings(
        run=RunSection(name="r", directory=tmp_path),
        learner=LearnerSection(num_steps=2, groups_per_step=2, group_size=2),
    )


def write(
    settings: Settings, batches: Sequence[Sequence[str]], known: Sequence[str], live: Collection[str] = ()
) -> None:
    """What a run leaves that trained on these batches and whose broker holds these tickets as acked, or as `live`."""
    lines = [{"ticket_id": key, "step": n} for n, batch in enumerate(batches, 1) for key in batch]
    (settings.run_dir / "broker").mkdir(parents=True)
    (settings.run_dir / AUDIT).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for each in lines:
        append(settings.run_dir / EPISODES, {"ticket_id": each["ticket_id"], "prefixes": []})
    chain = ""
    for batch in batches:
        chain = chained(chain, list(batch))
    save_chain(settings, chain)
    tickets = tuple(enumerate(map(make_ticket, known), 1))
    journal = Journal(settings.run_dir / "broker", settings.run.name)
    journal.apply(JournalTickets(tickets))
    ends = (EndedRow(seq, t.ticket_id, t.mode, TicketState.ACKED) for seq, t in tickets if t.ticket_id not in live)
    journal.apply(JournalEnds(tuple(ends)))
    journal.commit()
    journal.close()


def save_chain(settings: Settings, chain: str) -> None:
    store = CheckpointStore(settings.run_dir / CHECKPOINTS, 1)
    store.save({}, lambda directory: (directory / CHAIN).write_text(json.dumps({"chain": chain})) and None)


def test_all_is_well(settings: Settings) -> None:
    ids = issued_ids(settings)
    assert len(ids) == 8
    write(settings, (ids[:4], ids[4:]), ids)
    verdict = judge(settings)
    assert (verdict.issued, verdict.trained, verdict.lost, verdict.duplicated) == (8, 8, 0, 0)
    assert not verdict.problems


def test_what_the_audit_misses_is_lost(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:-1]), ids)
    verdict = judge(settings)
    assert (verdict.trained, verdict.lost) == (7, 1)
    assert "lost" in verdict.problems[0]


def test_what_the_store_misses_is_lost(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:]), ids[1:])
    assert judge(settings).lost == 1


def test_what_the_store_holds_as_live_is_lost(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:]), ids, live=ids[-2:])
    verdict = judge(settings)
    assert verdict.lost == 2
    assert "live" in verdict.problems[0]


def test_what_stands_twice_is_duplicated(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], [*ids[4:], ids[0]]), ids)
    verdict = judge(settings)
    assert (verdict.lost, verdict.duplicated) == (0, 1)
    assert "twice" in verdict.problems[0]


def test_a_stranger_is_a_problem(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids, ["r/train/99/0"]), ids)
    assert "never issued" in judge(settings).problems[0]


def test_a_checkpoint_of_another_history_is_a_problem(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:]), ids)
    save_chain(settings, chained("", ids))
    assert "chain" in judge(settings).problems[0]


def test_a_violation_is_a_problem(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:]), ids)
    report_violation(settings.run_dir, "wrong bytes")
    assert "wrong bytes" in judge(settings).problems[0]


def test_an_episode_that_went_on_from_what_nobody_handed_over_is_a_problem(settings: Settings) -> None:
    ids = issued_ids(settings)
    write(settings, (ids[:4], ids[4:]), ids)
    append(settings.run_dir / EPISODES, {"ticket_id": ids[0], "prefixes": ["a stranger's"]})
    verdict = judge(settings)
    assert (verdict.handed_over, verdict.continued, verdict.lost) == (0, 1, 0)
    assert "nobody handed over" in verdict.problems[0]
