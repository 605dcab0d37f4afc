"""The report and the view of a real run in a real headless Chromium: complete, quiet, and nothing hostile runs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.renderer import Renderer
from broker.protocol.trajectory import (
    Mode,
    Outcome,
    PolicyVersion,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)
from deploy.report.kept import Filter, Index
from deploy.report.view import ViewServer
from envs.interface import Message
from learner.kept import Keeper
from tests.integration.deploy.looked_at import Forwarded, looking
from tests.integration.deploy.runs import WholeRun
from tests.ports import free_ports

pytestmark = pytest.mark.timeout(480)

SCRIPT = "<script>document.title='owned'</script><img src=/x onerror=\"document.title='owned'\"></pre></style>"


def hostile(model: Path) -> Trajectory:
    """What a policy and a page could write, in the tokens of the run's own model."""
    renderer = Renderer.load(model)
    segment = renderer.render_reference([Message("user", SCRIPT), Message("assistant", SCRIPT)])
    middle = segment.num_sampled // 2
    runs = (VersionRun(1, 3, middle), VersionRun(1, 4, segment.num_sampled - middle))
    head = TrajectoryHead(
        ticket=Ticket(
            ticket_id="tiny/hostile",
            group_id="tiny/hostile",
            group_size=1,
            task=TaskRef(env=SCRIPT, split="train", index=0),
            mode=Mode.TRAIN,
        ),
        kind=SCRIPT,
        outcome=Outcome.EXPLOIT,
        reward=-1.0,
        num_turns=1,
        actor_id="actor-0",
        finished_at=time.time(),
    )
    return Trajectory(head, (Segment(segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T, runs),))


@pytest.fixture(scope="module")
def looked_at(whole_run: WholeRun) -> Iterator[tuple[WholeRun, int]]:
    """The run, with one hostile trajectory more, and the port of a view of it."""
    keeper = Keeper(whole_run.directory, 64 << 20, lambda: (12, PolicyVersion(2, 12)))
    keeper.keep(hostile(whole_run.directory.parent.parent / "model"), "screened")
    keeper.close()
    with ViewServer(whole_run.directory, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield whole_run, server.server_address[1]
        server.shutdown()


def test_every_trajectory_that_was_consumed_is_kept(looked_at: tuple[WholeRun, int]) -> None:
    run, _ = looked_at
    audit = [json.loads(line) for line in (run.directory / "trained.jsonl").read_text().splitlines()]
    index = Index(run.directory)
    index.refresh()
    rows = index.page(Filter(mode="train"), "finished_at", 0, 10_000)
    kept = {row["ticket_id"]: (row["fate"], row["step"], row["reward"]) for row in rows if row["env"] != SCRIPT}
    assert kept == {line["ticket_id"]: (line["reason"], line["step"], line["reward"]) for line in audit}
    modes = Counter(row["mode"] for row in index.page(Filter(), "finished_at", 0, 10_000))
    assert modes["eval"] == 3 * 2 * 16
    assert modes["reference"] == 32
    assert index.num_damaged == 0
    index.close()


async def test_the_report_is_complete_and_nothing_in_it_runs(looked_at: tuple[WholeRun, int], tmp_path: Path) -> None:
    run, port = looked_at
    target = tmp_path / "report.html"
    command = [sys.executable, "-m", "deploy", "report", str(run.directory), "--output", str(target)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(target) in done.stdout
    async with looking(Forwarded(port, {"/page.html": target})) as tab:
        await tab.go("/page.html")
        assert await tab.find("document.title") == "Ergon: tiny"
        headings = await tab.find("[...document.querySelectorAll('h2')].map(each => each.textContent)")
        assert headings == [
            "What the run was",
            "Held-out reward",
            "Training reward",
            "Loss and health",
            "Staleness",
            "Throughput",
            "Outcomes",
            "Thinking budgets",
            "Ledger",
            "Weight channel",
            "Trajectories",
        ]
        text = await tab.find("document.body.innerText")
        for part in ("learner processes", "pause of sampling, mean", "The run is finished", "sampled by version"):
            assert part in text
        assert await tab.find("document.querySelectorAll('figure svg.chart').length") > 12
        assert await tab.find("document.querySelectorAll('script, img').length") == 0
        assert SCRIPT in await tab.find("document.body.textContent")
        sizes = await tab.find("[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().height)")
        assert min(sizes) > 30
        wide = await tab.find("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0
        await tab.picture(tmp_path / "phone.png", 390, 844, dark=True, mobile=True)
        wide = await tab.find("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "it can be read on a phone without moving it sideways"
        assert (tmp_path / "phone.png").read_bytes()[:4] == b"\x89PNG"
        colour = await tab.find("getComputedStyle(document.body).backgroundColor")
        assert colour == "rgb(21, 24, 27)"
        assert tab.said == []
        assert await tab.find("document.title") == "Ergon: tiny"


async def test_the_view_filters_and_nothing_in_it_runs(looked_at: tuple[WholeRun, int], tmp_path: Path) -> None:
    _, port = looked_at
    async with looking(Forwarded(port)) as tab:
        await tab.go("/")
        status = "document.querySelector('[role=status]').textContent"
        everything = await tab.find(status)
        assert "page 1 of " in everything
        await tab.find("document.querySelector('select[name=outcome]').value = 'exploit'")
        await tab.click("form.filters button")
        assert (await tab.find(status)).startswith("1 of ")
        assert await tab.find("document.querySelector('select[name=outcome]').value") == "exploit"
        await tab.click("tbody a")
        assert SCRIPT in await tab.find("document.body.textContent")
        assert "version 1.4 from here" in await tab.find("document.body.innerText")
        assert await tab.find("document.querySelectorAll('script, img').length") == 0
        assert await tab.find("document.title") == "tiny/hostile"
        await tab.picture(tmp_path / "trajectory.png", 1000, 800)
        await tab.go("/?text=onerror%3D&mode=train")
        assert (await tab.find(status)).startswith("1 of ")
        await tab.go("/?mode=eval&evaluation=after%2Fgreedy&sort=reward")
        assert (await tab.find(status)).startswith("16 of ")
        rewards = await tab.find("[...document.querySelectorAll('tbody tr')].map(r => +r.children[5].textContent)")
        assert rewards == sorted(rewards, reverse=True)
        assert tab.said == []


def test_the_commands_serve_until_they_are_told_to_stop_and_refuse_what_is_no_run(
    looked_at: tuple[WholeRun, int], tmp_path: Path
) -> None:
    run, taken = looked_at
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deploy", "view", str(run.directory), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"page=http://127.0.0.1:{port}/" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    for arguments, expected in (
        (["view", str(run.directory), "--port", str(taken)], "choose another --port"),
        (["view", str(tmp_path)], "is no run's folder"),
        (["report", str(tmp_path / "none")], "does not exist; name a run's folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "deploy", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_report_without_the_tokenizer_says_so_and_how_to_give_it(
    looked_at: tuple[WholeRun, int], tmp_path: Path
) -> None:
    run, _ = looked_at
    config = tmp_path / "elsewhere.toml"
    model = run.directory.parent.parent / "model"
    config.write_text((run.directory / "config.toml").read_text().replace(str(model), str(tmp_path / "gone")))
    command = [sys.executable, "-m", "deploy", "report", str(config), "--output", "-"]
    without = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "tokenizer.json cannot be read" in without
    assert "--model DIRECTORY" in without
    assert "held-out reward" in without
    given = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True, timeout=60, check=True)
    assert "yes or no?" in given.stdout
    assert "--model DIRECTORY" not in given.stdout
