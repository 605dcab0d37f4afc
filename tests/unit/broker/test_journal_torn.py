"""The data file after a crash in the middle of a write, at whatever byte: the state before the commit or after it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from lmdb import verify

from broker.process.lifecycle import ErgonError
from broker.store.database import Tables
from broker.store.datafile import FILE_NAME, NEW_SUFFIX
from broker.store.journal import Journal
from tests.unit.broker.stored import end, issue, load, make_message, put, rows, same

ROOT = Path(__file__).parents[3]
PAGE = 4096
NUM_METAS = 2
ID_BYTES = 200  # so that the tables have more than one page
Dump = dict[str, list[tuple[bytes, bytes]]]


def name(num: int) -> str:
    return f"{num:04}".ljust(ID_BYTES, "-")


class Store:
    """A journal with something in every table, and its file after every commit."""

    def __init__(self, directory: Path, fsync: str = "always") -> None:
        directory.mkdir(exist_ok=True)
        self.path = directory / FILE_NAME
        self._journal = Journal(directory, "run", "always" if fsync == "always" else "interval", keep_ended=30)
        self._num, self._seqs = 0, dict[str, int]()
        self.files: list[bytes] = []
        self.dumps: list[Dump] = []
        for _ in range(8):
            self.commit()

    def commit(self) -> None:
        journal, ids = self._journal, [name(self._num + i) for i in range(10)]
        self._seqs |= zip(ids, put(journal, *ids, message=make_message(*ids, num_tokens=3)), strict=True)
        issue(journal, f"waits-{self._num}")
        journal.lineage(f"session-{self._num}")
        ended = [name(self._num - 10 + i) for i in range(9)] if self._num else []
        end(journal, [self._seqs[key] for key in ended], *ended)
        journal.commit()
        self._num += 10
        self.files.append(self.path.read_bytes())
        self.dumps.append(dict(rows(journal)))

    def close(self) -> None:
        self._journal.close()


def dump(path: Path) -> Dump:
    """What LMDB finds in a file."""
    with (
        lmdb.Environment(
            str(path), subdir=False, readonly=True, lock=False, max_dbs=8, map_size=1 << 30
        ) as environment,
        environment.begin() as transaction,
    ):
        found = {}
        for table in Tables._fields:
            handle = environment.open_db(table.encode(), txn=transaction, create=False)
            found[table] = list(transaction.cursor(db=handle))
        return found


def changed(before: bytes, after: bytes) -> list[int]:
    """The pages that differ, in the order in which LMDB writes them: by number, but the meta pages last."""
    num_pages = len(after) // PAGE
    pages = [n for n in range(num_pages) if before[n * PAGE : (n + 1) * PAGE] != after[n * PAGE : (n + 1) * PAGE]]
    return sorted(pages, key=lambda n: (n < NUM_METAS, n))


def torn(path: Path, before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    """Write every mixture of `before` and `after` that a crash can leave, one byte more each time; page and offset.

    A length at which the next byte is the same in both is left out: the file would be the same.
    """
    path.write_bytes(before)
    with path.open("r+b", buffering=0) as file:
        for page in changed(before, after):
            for at in range(page * PAGE, (page + 1) * PAGE):
                if at >= len(before) or before[at] != after[at]:
                    os.pwrite(file.fileno(), after[at : at + 1], at)
                    yield page, at % PAGE


def test_a_commit_torn_at_any_byte_is_whole_or_was_never_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.close()
    before, after = store.dumps[-2:]
    path = tmp_path / FILE_NAME
    num_before = num_after = 0
    for page, _ in torn(path, *store.files[-2:]):
        found = dump(path)
        if page >= NUM_METAS:
            assert found == before
        num_before += found == before
        num_after += found == after
        assert found in (before, after)
    assert path.read_bytes() == store.files[-1]
    assert found == after
    assert num_before > 5000
    assert 0 < num_after < 20  # the last bytes of the meta page, which say that it is the newer one


def test_a_torn_store_goes_on(tmp_path: Path) -> None:
    """From the journal's side, at the ends of pages and within the meta page: it opens, and takes the next commit."""
    store = Store(tmp_path / "store")
    store.close()
    path = tmp_path / FILE_NAME
    seen, last = set(), -1
    for page, _ in torn(path, *store.files[-2:]):
        if page >= NUM_METAS and page == last:
            continue
        last = page
        torn_file = path.read_bytes()
        again = Journal(tmp_path, "run", keep_ended=30)
        found = dict(rows(again))
        assert found in store.dumps[-2:]
        seen.add(store.dumps.index(found))
        live = [row.ticket.ticket_id for row in again.live()]
        for key in live:
            if again.place(key) is not None:
                first = int(key[:4]) // 10 * 10
                assert same(load(again, key), make_message(*(name(first + i) for i in range(10)), num_tokens=3))
        put(again, "next")
        again.commit()
        again.close()
        assert verify.verify(str(path), subdir=False) == []
        path.write_bytes(torn_file)
    assert len(seen) == 2


def test_with_interval_a_forgotten_last_sync_costs_one_commit_and_no_more(tmp_path: Path) -> None:
    """The meta page of commit N may be missing while pages of N + 1 are on the disk already: then N - 1 is found."""
    store = Store(tmp_path / "store", "interval")
    store.close()
    path = tmp_path / FILE_NAME
    for n in range(2, len(store.files) - 1):
        oldest, middle, newest = store.files[n - 1 : n + 2]
        metas = NUM_METAS * PAGE
        for base, expected in ((oldest[:metas] + middle[metas:], n - 1), (middle, n)):
            data, reached = bytearray(base), set()
            for page in changed(middle, newest):
                if page < NUM_METAS:
                    continue
                span = slice(page * PAGE, (page + 1) * PAGE)
                data[span] = newest[span]
                path.write_bytes(data)
                assert dump(path) == store.dumps[expected]
                reached.add(page)
            assert len(reached) > 5


@pytest.mark.parametrize("at", [NEW_SUFFIX, "store"])
def test_a_crash_in_the_making_or_rewriting_leaves_the_file_before(tmp_path: Path, at: str) -> None:
    """What a crash leaves of it has another name, and is in nobody's way."""
    if at == "store":
        journal = Journal(tmp_path, "run")
        issue(journal, "a")
        journal.commit()
        journal.close()
    (tmp_path / (FILE_NAME + NEW_SUFFIX)).write_bytes(b"half a file")
    for _ in range(2):
        journal = Journal(tmp_path, "run")
        assert [row.ticket.ticket_id for row in journal.live()] == (["a"] if at == "store" else [])
        journal._db.shrink(-1)
        journal.close()


def test_a_file_that_is_cut_is_refused_or_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.close()
    whole, path = store.files[-1], tmp_path / FILE_NAME
    num_refused = 0
    for size in [*range(0, len(whole), PAGE), *range(100, len(whole), 7 * PAGE)]:
        path.write_bytes(whole[:size])
        if size < len(whole) // 2:
            with pytest.raises(
                ErgonError, match=r"cannot be used \(it is cut short.*restore it, or give the run another"
            ):
                Journal(tmp_path, "run", keep_ended=30)
            num_refused += 1
            continue
        with contextlib.suppress(ErgonError):
            again = Journal(tmp_path, "run", keep_ended=30)  # what is missing was free
            assert dict(rows(again)) == store.dumps[-1]
            put(again, "next")
            again.commit()
            again.close()
            assert verify.verify(str(path), subdir=False) == []
    assert num_refused > 10


OVERWRITTEN = """
import os, sys
from pathlib import Path
from broker.process.lifecycle import ErgonError
from broker.store.blobs import DamagedError
from broker.store.journal import Journal
from tests.unit.broker.stored import end, load, put
directory, page_bytes = Path(sys.argv[1]), 4096
path = directory / "journal.mdb"
whole = path.read_bytes()

def use() -> str:
    outcome = "worked"
    try:
        journal = Journal(directory, "run", keep_ended=30)
        live = list(journal.live())
        for row in live:
            try:
                load(journal, row.ticket.ticket_id)
            except DamagedError:
                outcome = "damaged"
        journal.settled_ids([f"{n:04}".ljust(200, "-") for n in range(100)])
        end(journal, [row.seq for row in live], *(row.ticket.ticket_id for row in live))
        put(journal, "next")
        journal.commit()
    except ErgonError as error:
        assert "give the run another name" in str(error), error
        return "refused"
    return outcome

for page in range(len(whole) // page_bytes):
    pattern = (bytes(page_bytes), b"\\xaa" * page_bytes, whole[page_bytes * 2 : page_bytes * 3])[page % 3]
    path.write_bytes(whole[: page * page_bytes] + pattern + whole[(page + 1) * page_bytes :])
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            print(use(), flush=True)
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(0)
    if signal := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(signal)
"""


def test_a_file_with_a_page_of_something_else_is_refused(tmp_path: Path) -> None:
    """No crash writes such a file. LMDB's own assertion may end the process; it reads nothing that is not there."""
    store = Store(tmp_path)
    store.close()
    command = [sys.executable, "-c", OVERWRITTEN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = Counter(done.stdout.split("\n")[:-1])
    assert outcomes.total() == len(store.files[-1]) // PAGE
    assert set(outcomes) <= {"worked", "damaged", "refused", str(-signal.SIGABRT)}
    assert outcomes["refused"] > outcomes["-6"]
