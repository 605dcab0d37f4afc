"""The backend `pod` on a real cluster: kubelet, container runtime, admission. Skipped where none is named.

ERGON_PODS_KUBECONFIG: a kubeconfig file. ERGON_PODS_SETTINGS: PodSettings as JSON: `namespace`, `image`, where to run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from envs.play import play
from envs.registry import create_environment
from envs.sandbox import Limits, PodSandbox, PodSettings, SandboxPool, configure_pods
from envs.sandbox.pods import pod_settings
from envs.sandbox.pods.cluster import Cluster

CONFIG, SETTINGS = "ERGON_PODS_KUBECONFIG", "ERGON_PODS_SETTINGS"

pytestmark = pytest.mark.skipif(CONFIG not in os.environ, reason=f"no cluster is named in ${CONFIG}")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> PodSettings:
    monkeypatch.setenv("KUBECONFIG", os.environ[CONFIG])
    given: dict[str, Any] = json.loads(os.environ.get(SETTINGS, "{}"))
    given["tolerations"] = tuple(given.get("tolerations", ()))
    made = PodSettings(**{"run": "test", "actor": "actor-0", **given})
    configure_pods(made)
    return made


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[PodSandbox]:
    async with await PodSandbox.create({"hello.txt": b"hello", "/opt/tool": b"echo tool"}) as made:
        yield made


async def names(settings: PodSettings) -> set[str]:
    """The pods that are there and not on their way out."""
    cluster = await Cluster.acquire(settings)
    try:
        found = (await cluster._list({}))["items"]
        return {pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]}
    finally:
        await cluster.release()


async def test_commands_files_and_the_shell(sandbox: PodSandbox) -> None:
    result = await sandbox.exec("printf out; printf err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out", b"err")
    assert (await sandbox.exec("sh /opt/tool; cat hello.txt")).stdout == b"tool\nhello"
    assert not (await sandbox.exec("echo x > /opt/tool || touch /usr/x /etc/x /new")).ok
    await sandbox.write("a/b", b"\0\xff" * 500_000)
    assert await sandbox.read("a/b", 1_000_000) == b"\0\xff" * 500_000
    assert (await sandbox.shell("cd a; x=1; sleep 60 &")).exit_code == 0
    assert (await sandbox.shell("echo $PWD $x; jobs")).output.startswith(b"/workspace/a 1\n")
    result = await sandbox.shell("sleep 60", timeout_s=0.5)
    assert (result.timed_out, result.restarted, result.exit_code) == (True, False, 130)
    async with await sandbox.fork() as fork:
        assert await fork.read("a/b", 1_000_000) == b"\0\xff" * 500_000


async def test_what_runs_there_has_no_token_and_no_way_to_its_session(sandbox: PodSandbox) -> None:
    assert (await sandbox.exec("id -u")).stdout.strip() not in (b"0", b"")
    assert not (await sandbox.exec("ls /var/run/secrets/kubernetes.io")).ok
    assert b"KUBERNETES" not in (await sandbox.exec("env")).stdout
    for name in ("mem", "environ", "fd/1"):
        assert not (await sandbox.exec(f"cat /proc/1/{name}")).ok
    await sandbox.exec("for name in KILL INT TERM STOP; do kill -$name 1; done")
    assert (await sandbox.exec("kill -9 -1; echo not reached")).exit_code == 137
    assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_limits_hold_and_a_timeout_ends_the_pod(settings: PodSettings) -> None:
    async with await PodSandbox.create(limits=Limits(processes=6, memory_bytes=128 << 20, file_bytes=1 << 20)) as made:
        assert b"fork" in (await made.exec("for i in 1 2 3 4 5 6 7 8 9 10; do sleep 9 & done")).stderr
        await made.kill_all()
        assert not (await made.exec("head -c 3000000 /dev/zero > big")).ok
        assert not (await made.exec("python3 -I -S -c 'bytearray(200 << 20)'")).ok
        result = await made.exec("echo begun; sleep 60", timeout_s=0.5)
        assert (result.timed_out, result.stdout) == (True, b"begun\n")
    assert made.name not in await names(settings)


async def test_a_pool_is_warm_and_the_next_process_removes_what_was_left(settings: PodSettings) -> None:
    async with SandboxPool(3, backend="pod") as pool:
        await pool.prepare()
        taken = await pool.acquire()
        assert (await taken.exec("echo fine")).stdout == b"fine\n"
    left = {taken.name} if isinstance(taken, PodSandbox) else set()
    assert left <= await names(settings)
    configure_pods(dataclasses.replace(pod_settings(), process="restarted"))
    async with await PodSandbox.create() as made:
        assert await names(settings) == {made.name}
    await taken.close()


async def test_the_built_in_environments_are_solved_there() -> None:
    for name in ("terminal", "code", "shop"):
        environment = create_environment(name, {"sandbox": "pod", "warm_sandboxes": 1})
        try:
            await environment.prepare()
            task = environment.task("train", 0)
            played = await play(environment, task, environment.reference(task))
            assert played.reward.total == 1.0, task.kind
        finally:
            await environment.close()
