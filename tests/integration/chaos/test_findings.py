"""What the kill matrix found, each as small as it can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from broker.ledger.events import JournalTickets
from broker.store.journal import Journal
from broker.store.room import RESERVE_NAME
from tests.unit.broker.samples import make_ticket

ROOT = Path(__file__).parents[3]
OPEN_WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from broker.store.journal import Journal

resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file takes a byte
journal = Journal(Path(sys.argv[1]), "run")
print(len(list(journal.live())), journal.reserved)
"""


def test_a_broker_killed_on_a_full_disk_starts_again_on_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    journal.apply(JournalTickets(((1, make_ticket("t1")),)))
    journal.commit()
    journal.close()
    (tmp_path / RESERVE_NAME).unlink()
    command = [sys.executable, "-c", OPEN_WITHOUT_ROOM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "False"]
