"""What became of the work: the issued set against the learner's audit, its last checkpoint and the broker's store; and
what was handed over against what was gone on with and trained on (`handovers.py`).

Three witnesses that do not know of each other, and the actors' journal. Reads files after every process has ended;
never speaks to one.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from broker.process.settings import Settings
from broker.store.datafile import FILE_NAME, LIB_VERSION
from broker.store.rows import STATES, decode_ticket
from learner.checkpoint import CheckpointStore
from tests.chaos.handovers import judge_handovers
from tests.chaos.scripted_actor import VIOLATIONS
from tests.chaos.scripted_learner import AUDIT, CHAIN, CHECKPOINTS, chained

LIVE = "live"  # of a ticket that has not ended


@dataclass(slots=True)
class Verdict:
    """Counts of tickets, and every problem as a sentence. `handed_over`: partials that the broker answered for;
    `continued`: tickets trained on whose episode went on from one."""

    issued: int
    trained: int
    lost: int
    duplicated: int
    handed_over: int = 0
    continued: int = 0
    problems: list[str] = field(default_factory=list)


def issued_ids(settings: Settings) -> list[str]:
    """The ids of the run's fixed amount of work."""
    learner = settings.learner
    num_groups = learner.num_steps * learner.groups_per_step
    return [f"{settings.run.name}/train/{g}/{i}" for g in range(num_groups) for i in range(learner.group_size)]


def judge(settings: Settings) -> Verdict:
    """Compare everything with everything. `lost` counts a ticket that any witness misses, `duplicated` every extra
    line of the audit."""
    run_dir = settings.run_dir
    issued = issued_ids(settings)
    lines = _audit(run_dir / AUDIT)
    ids = Counter(ticket_id for ticket_id, _ in lines)
    states = store_states(run_dir / "broker" / FILE_NAME)
    missing = [key for key in issued if key not in ids or states.get(key) != "acked"]
    verdict = Verdict(len(issued), len(ids), len(missing), ids.total() - len(ids))
    say = verdict.problems.append
    if missing:
        say(f"lost: {[(key, ids[key], states.get(key)) for key in missing[:5]]}")
    if verdict.duplicated:
        say(f"twice: {[key for key, num in ids.items() if num > 1][:5]}")
    if strangers := (ids.keys() | states.keys()) - set(issued):
        say(f"never issued: {sorted(strangers)[:5]}")
    chain = ""
    for _, batch in itertools.groupby(lines, key=lambda line: line[1]):
        chain = chained(chain, [ticket_id for ticket_id, _ in batch])
    found = _newest_chain(run_dir)
    if chain != found:
        say(f"the last checkpoint's chain is {found}, the audit's {chain}")
    handovers = judge_handovers(run_dir, ids)
    verdict.handed_over, verdict.continued = handovers.kept, handovers.continued
    verdict.problems += handovers.problems
    violations = run_dir / VIOLATIONS
    if violations.exists():
        say(f"violations: {violations.read_text().splitlines()[:3]}")
    return verdict


def _audit(path: Path) -> list[tuple[str, int]]:
    """(ticket id, step) of every line."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["ticket_id"], int(record["step"])) for record in records]


def store_states(path: Path) -> dict[str, str]:
    """The state of every ticket that the broker's store knows, read from the file itself."""
    if not path.exists():
        return {}
    with (
        lmdb.Environment(
            str(path), subdir=False, readonly=True, lock=False, max_dbs=16, lib_version=LIB_VERSION
        ) as store,
        store.begin() as transaction,
    ):
        live = transaction.cursor(store.open_db(b"tickets", transaction, create=False))
        ended = transaction.cursor(store.open_db(b"ended", transaction, create=False))
        states = {decode_ticket(packed).ticket_id: LIVE for packed in live.iternext(keys=False)}
        return states | {key.decode(): STATES[row[0]].value for key, row in ended.iternext()}


def _newest_chain(run_dir: Path) -> str | None:
    checkpoint = CheckpointStore(run_dir / CHECKPOINTS, 1).newest()
    if checkpoint is None or checkpoint.engine_directory is None:
        return None
    return str(json.loads((checkpoint.engine_directory / CHAIN).read_text())["chain"])
