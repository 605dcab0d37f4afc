"""The verdict finds what is lost, doubled, strange or contradicted; each witness by itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from broker.process.settings import LearnerSection, RunSection, Settings
from learner.checkpoint import CheckpointStore
from tests.chaos.scripted_actor import report_violation
from tests.chaos.scripted_learner import AUDIT, CHAIN, CHECKPOINTS, chained
from tests.chaos.verdict import issued_ids, judge


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run of eight tickets."""
    return Settings(
        run=RunSection(name="r", directory=tmp_path),
        learner=LearnerSection(num_steps=2, groups_per_step=2, group_size=2),
    )


def write(settings: Settings, batches: Sequence[Sequence[str]], acked: Sequence[str]) -> None:
    """What a run leaves that trained on these batches and whose broker holds these tickets as acked."""
    lines = [{"ticket_id": key, "step": n} for n, batch in enumerate(batches, 1) for key in batch]
    (settings.run_dir / "broker").mkdir(parents=True)
    (settings.run_dir / AUDIT).write_text("".join(json.dumps(line) + "\n" for line in lines))
    chain = ""
    for batch in batches:
        chain = chained(chain, list(batch))
    save_chain(settings, chain)
    with sqlite3.connect(settings.run_dir / "broker" / "journal.db") as database:
        database.execute("CREATE TABLE tickets (ticket_id TEXT, state TEXT)")
        database.executemany("INSERT INTO tickets VALUES (?, 'acked')", [(key,) for key in acked])
    database.close()


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
