"""Sandboxes that are pods, by an API server of the tests (fake_cluster.py): what their users see, what may go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from envs.interface import ErgonEnvError, SandboxError
from envs.play import play
from envs.registry import create_environment
from envs.sandbox import Limits, PodSandbox, SandboxPool, configure_pods, create_sandbox
from envs.sandbox.pods import pod_settings
from tests.integration.envs.fake_cluster import FakeCluster, cluster_of_pods
from tests.integration.envs.support import processes_with, unique_marker

# The agent, as a command finds it: a Python that is not PID 1.
AGENT = (
    "for each in /proc/[0-9]*; do case $(cat $each/cmdline | tr '\\0' ' ') in "
    "*ERGON_AGEN[T]*) echo ${each#/proc/};; esac; done"
)


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with cluster_of_pods(run="a run", actor="host-0") as made:
        yield made


@pytest_asyncio.fixture
async def sandbox(cluster: FakeCluster) -> AsyncIterator[PodSandbox]:
    async with await PodSandbox.create({"hello.txt": b"hello", "/opt/tool": b"echo tool"}) as made:
        yield made


async def eventually(true: Any) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def test_commands_have_statuses_streams_and_nothing_of_each_other(sandbox: PodSandbox) -> None:
    result = await sandbox.exec("printf out; printf err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out", b"err")
    assert not result.truncated
    assert not result.timed_out
    assert (await sandbox.exec("x=1; cd /tmp; echo kept > /workspace/kept")).ok
    assert (await sandbox.exec('pwd; cat kept; echo "x=$x"')).stdout == b"/workspace\nkept\nx=\n"
    assert (await sandbox.exec("cat <<'END'\nit's \"two\"\n\n  lines\nEND\n")).stdout == b'it\'s "two"\n\n  lines\n'
    assert (await sandbox.exec("cat; echo end", timeout_s=10)).stdout == b"end\n"
    assert (await sandbox.exec("kill -9 $$")).exit_code == 137
    results = await asyncio.gather(*(sandbox.exec(f"echo {number}") for number in range(20)))
    assert [result.stdout for result in results] == [b"%d\n" % number for number in range(20)]
    listed = (await sandbox.exec("env | sort; id -u; cat /proc/1/environ")).stdout.decode()
    assert "KUBERNETES" not in listed
    assert "ERGON" not in listed


async def test_files_survive_a_round_trip_and_tools_cannot_be_changed(sandbox: PodSandbox) -> None:
    for data in (b"", b"plain", b"\0\xff" * 50_000, b"x" * 3_000_000):
        await sandbox.write("deep/er/file 'x'", data)
        assert await sandbox.read("/workspace/deep/er/file 'x'", 3_000_000) == data
    assert await sandbox.read("hello.txt") == b"hello"
    assert not (await sandbox.exec("echo changed > /opt/tool || chmod 777 /opt/tool || rm -f /opt/tool")).ok
    assert (await sandbox.exec("sh /opt/tool")).stdout == b"tool\n"
    assert not (await sandbox.exec("touch /usr/x /new /etc/x")).ok
    with pytest.raises(OSError, match="larger than 3 bytes"):
        await sandbox.read("hello.txt", max_bytes=3)
    with pytest.raises(OSError, match="No such file"):
        await sandbox.read("missing")
    with pytest.raises(ValueError, match="no file path"):
        await sandbox.write("../x", b"")
    with pytest.raises(ValueError, match="image has its own files at /usr/bin/env"):
        await PodSandbox.create({"/usr/bin/env": b""})


async def test_a_link_or_a_pipe_in_place_of_a_file_reaches_nothing_else(sandbox: PodSandbox) -> None:
    secret = Path("/var/tmp/ergon-test-secret")
    secret.write_bytes(b"of the host")
    try:
        await sandbox.exec(f"ln -s {secret} link; ln -s /etc/hostname away; mkfifo pipe")
        with pytest.raises(OSError, match="No such file"):
            await sandbox.read("link")
        with pytest.raises(OSError, match=r"Read-only|Permission|No such"):
            await sandbox.write("away", b"changed")
        assert secret.read_bytes() == b"of the host"
    finally:
        secret.unlink()
    result = await sandbox.exec("head -c 10 pipe", timeout_s=0.3)
    assert result.timed_out


async def test_long_output_is_cut_and_a_flood_ends_the_sandbox(sandbox: PodSandbox) -> None:
    result = await sandbox.exec("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; exit 3", output_bytes=1000)
    assert (len(result.stdout), len(result.stderr), result.truncated, result.exit_code) == (1000, 1000, True, 3)
    result = await sandbox.exec("yes", timeout_s=60)
    assert (result.exit_code, result.truncated, result.timed_out) == (None, True, False)
    assert not sandbox.alive
    with pytest.raises(SandboxError, match="flooded"):
        await sandbox.exec("echo")


async def test_a_timeout_kills_everything_and_gives_what_there_was(cluster: FakeCluster, sandbox: PodSandbox) -> None:
    marker = unique_marker()
    result = await sandbox.exec(f"echo begun; setsid sleep {marker} & sleep {marker}", timeout_s=0.5)
    assert (result.exit_code, result.timed_out, result.stdout) == (None, True, b"begun\n")
    await eventually(lambda: processes_with(marker) == [])
    with pytest.raises(SandboxError, match="time limit"):
        await sandbox.exec("echo")
    await sandbox.close()
    assert cluster.pods == {}


async def test_an_abandoned_command_deletes_the_pod(cluster: FakeCluster, sandbox: PodSandbox) -> None:
    marker = unique_marker()
    running = asyncio.create_task(sandbox.exec(f"sleep {marker}"))
    await eventually(lambda: processes_with(marker))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: cluster.pods == {})
    await eventually(lambda: processes_with(marker) == [])


async def test_limits_of_processes_memory_and_files_hold(cluster: FakeCluster) -> None:
    limits = Limits(processes=6, memory_bytes=128 << 20, file_bytes=1 << 20, work_bytes=2 << 20)
    async with await PodSandbox.create(limits=limits) as made:
        assert b"Cannot fork" in (await made.exec("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 9 & done")).stderr
        await made.kill_all()
        assert not (await made.exec("head -c 3000000 /dev/zero > big")).ok
        assert not (await made.exec("python3 -I -S -c 'bytearray(200 << 20)'")).ok
        for number in range(3):
            await made.exec(f"head -c 1000000 /dev/zero > full{number}")
        with pytest.raises(OSError, match="No space left"):
            await made.write("one/more", b"x" * 500_000)


async def test_the_session_is_closed_to_what_runs_beside_it(sandbox: PodSandbox) -> None:
    found = (await sandbox.exec(AGENT)).stdout.split()
    assert len(found) == 1
    for pid in (b"1", *found):
        for name in ("mem", "environ", "fd/1", "fd/0"):
            tried = await sandbox.exec(f"cat /proc/{pid.decode()}/{name} || echo forged > /proc/{pid.decode()}/{name}")
            assert not tried.ok, name
            assert b"denied" in tried.stderr
    await sandbox.exec("for name in KILL INT TERM STOP CHLD HUP; do kill -$name 1; done; sleep 0.1")
    assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_a_command_that_kills_its_session_is_killed_and_the_sandbox_goes_on(sandbox: PodSandbox) -> None:
    await sandbox.write("kept", b"kept")
    result = await sandbox.exec("kill -9 -1; echo not reached")
    assert (result.exit_code, result.stdout, result.timed_out) == (137, b"", False)
    assert sandbox.alive
    assert (await sandbox.exec("cat kept")).stdout == b"kept"
    result = await sandbox.exec(f"kill -9 $({AGENT}); sleep 9")
    assert result.exit_code == 137
    assert (await sandbox.shell("echo shell")).output == b"shell\n"


async def test_a_session_that_was_stopped_is_replaced(sandbox: PodSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = unique_marker()
    await sandbox.shell(f"sleep {marker} &")
    await sandbox.exec(f"sleep {marker} & (sleep 0.2; kill -STOP $({AGENT})) >/dev/null 2>&1 &")
    await asyncio.sleep(0.4)  # what is stopped says nothing, so there is nothing to wait for
    monkeypatch.setattr("envs.sandbox.pods.sandbox.KILL_S", 0.3)
    await sandbox.kill_all()
    await eventually(lambda: processes_with(marker) == [])
    assert (await sandbox.exec("echo fine")).stdout == b"fine\n"
    monkeypatch.setattr("envs.sandbox.pods.sandbox.PATIENCE_S", 0.3)
    result = await sandbox.exec(f"kill -STOP $({AGENT}); sleep 9", timeout_s=0.3)
    assert (result.timed_out, result.exit_code) == (True, None)


async def test_a_broken_connection_is_an_infrastructure_failure(cluster: FakeCluster, sandbox: PodSandbox) -> None:
    running = asyncio.create_task(sandbox.exec("sleep 60", timeout_s=90))
    await eventually(lambda: sandbox._lock.locked())
    cluster.cut()
    with pytest.raises(SandboxError, match="dead: its connection"):
        await running
    assert not sandbox.alive


async def test_a_pod_that_ends_says_why(cluster: FakeCluster) -> None:
    configure_pods(dataclasses.replace(pod_settings(), life_s=1))
    async with await PodSandbox.create() as made:
        with pytest.raises(SandboxError, match="DeadlineExceeded"):
            await made.exec("sleep 60", timeout_s=90)


async def test_a_pod_without_its_actor_ends_by_itself(cluster: FakeCluster) -> None:
    configure_pods(dataclasses.replace(pod_settings(), orphan_s=2.0))
    async with await PodSandbox.create() as made:
        await made.exec("setsid sleep 60 &")
        cluster.cut()
        await eventually(lambda: cluster.pods[made.name].manifest["status"]["phase"] == "Succeeded")


async def test_a_restarted_actor_removes_what_it_left_and_nobody_else_s(cluster: FakeCluster) -> None:
    mine = pod_settings()
    left = await PodSandbox.create()
    configure_pods(dataclasses.replace(mine, actor="host-1", process="another"))
    other = await PodSandbox.create()
    configure_pods(dataclasses.replace(mine, process="restarted"))
    async with await PodSandbox.create() as made:
        assert set(cluster.pods) == {other.name, made.name}
    await left.close()
    await other.close()
    assert cluster.pods == {}


async def test_a_pool_keeps_pods_ready_and_hands_each_out_once(cluster: FakeCluster) -> None:
    async with SandboxPool(3, {"x": b"content", "/opt/a/b": b"tool"}, backend="pod") as pool:
        await pool.prepare()
        assert len(cluster.created) == 3
        cluster.num_busy = 1000  # no answer is needed to hand one out
        taken = await pool.acquire()
        assert await taken.read("x") == b"content"
        cluster.num_busy = 0
        await eventually(lambda: pool.num_ready == 3)
        await taken.write("more", b"content too")
        copy = await pool.restore(await taken.snapshot())
        assert await copy.read("more") == b"content too"
        assert (await copy.exec("cat /opt/a/b")).stdout == b"tool"
        other = await pool.acquire()
        assert not (await other.exec("cat more")).ok
        for each in (taken, copy, other):
            await each.close()
        await eventually(lambda: pool.num_ready == 3)
        worn = pool._ready[0]
        assert isinstance(worn, PodSandbox)
        worn._life._born -= 3600
        async with await pool.acquire() as fresh:
            assert fresh is not worn
    assert cluster.pods == {}


async def test_a_fork_has_the_files_of_a_pod(sandbox: PodSandbox) -> None:
    await sandbox.exec("mkdir -p a; echo x > a/b; chmod 640 a/b; ln -s /etc/passwd link")
    async with await sandbox.fork() as fork:
        assert (await fork.exec("cat a/b; readlink link; stat -c %a a/b")).stdout == b"x\n/etc/passwd\n640\n"


NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": "x"}}
WAITING = {"containerStatuses": [{"name": "sandbox", "state": NO_IMAGE}]}
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    ],
}
NO_PYTHON = {"terminated": {"reason": "StartError", "exitCode": 128, "message": "exec: no such file or directory"}}
STARTED_BADLY = {"phase": "Failed", "containerStatuses": [{"name": "sandbox", "state": NO_PYTHON}]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"denied": {("create", "pods")}}, r"create pods in the namespace 'ergon-sandboxes'.*sandboxes\.actors=true"),
        ({"denied": {("list", "pods")}}, r"list pods in the namespace 'ergon-sandboxes'.*sandboxes\.actors=true"),
        ({"denied": {("watch", "pods")}}, r"watch pods in the namespace 'ergon-sandboxes'.*sandboxes\.actors=true"),
        ({"denied": {("get", "pods/exec")}}, r"get or create pods/exec in the namespace.*sandboxes\.actors=true"),
        ({"namespaces": set()}, r"no such namespace; set sandboxes\.create=true"),
        ({"quota": 0}, r"quota is used up; raise sandboxes\.maxPods"),
        ({"stuck": UNSCHEDULABLE}, r"not ready within 0\.5 s: no node can take it \(Unschedulable: 0/3 nodes"),
        ({"stuck": WAITING}, "does not start: ImagePullBackOff: x"),
        ({"stuck": STARTED_BADLY}, r"StartError \(exit code 128\): .*deploy/images/sandbox\.Dockerfile"),
        ({"num_busy": 1000}, r"HTTP 503\): the server is busy"),
    ],
)
async def test_what_the_cluster_refuses_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("envs.sandbox.pods.cluster.RETRY_S", 0.01)
    async with cluster_of_pods(run="a run", actor="host-0", start_timeout_s=0.5) as cluster:
        for name, value in change.items():
            setattr(cluster, name, value)
        with pytest.raises(SandboxError, match=sentence):
            await PodSandbox.create()


async def test_a_busy_server_is_asked_again_and_makes_one_pod(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envs.sandbox.pods.cluster.RETRY_S", 0.01)
    async with await PodSandbox.create():
        cluster.num_busy = 2
        async with await PodSandbox.create() as made:
            assert (await made.exec("echo fine")).stdout == b"fine\n"
        assert len(cluster.created) == 2


async def test_without_a_cluster_a_pod_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ErgonEnvError, match=r"finds no cluster .*set KUBECONFIG"):
        await create_sandbox("pod")
    environment = create_environment("terminal", {"sandbox": "pod"})
    with pytest.raises(ErgonEnvError, match="finds no cluster"):
        await environment.prepare()
    async with cluster_of_pods() as gone:
        config = Path(os.environ["KUBECONFIG"]).read_text()
        await gone.stop()
        (tmp_path / "gone").write_text(config)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "gone"))
        with pytest.raises(SandboxError, match="cannot be reached"):
            await create_sandbox("pod")


async def test_backends_are_not_mixed_up() -> None:
    with pytest.raises(ErgonEnvError, match="'pod' hides nothing"):
        await create_sandbox("pod", hidden=["/usr/lib"])
    for name in ("terminal", "code", "shop"):
        with pytest.raises(ErgonEnvError, match="'trusted' has no walls"):
            create_environment(name, {"sandbox": "trusted"})
    with pytest.raises(ErgonEnvError, match="has no option 'sandbox'"):
        create_environment("repo", {"sandbox": "pod"})


@pytest.mark.parametrize("name", ["terminal", "code", "shop"])
async def test_environments_are_solved_in_pods(cluster: FakeCluster, name: str) -> None:
    environment = create_environment(name, {"sandbox": "pod", "warm_sandboxes": 2})
    try:
        await environment.prepare()
        for index in range(3):
            task = environment.task("train", index)
            played = await play(environment, task, environment.reference(task))
            assert played.reward.total == 1.0, task.kind
    finally:
        await environment.close()
    assert cluster.pods == {}
