"""The pool keeps sandboxes ready, hands each out once, and closes what it holds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from envs.interface import SandboxError
from envs.sandbox import SandboxPool
from tests.integration.envs.support import children, kill_from_outside


async def filled(pool: SandboxPool, size: int) -> None:
    async with asyncio.timeout(20):
        while pool.num_ready < size:
            await asyncio.sleep(0.01)


async def test_prepare_fills_and_taking_refills() -> None:
    async with SandboxPool(3, {"x": b"content"}) as pool:
        assert pool.num_ready == 0
        await pool.prepare()
        assert pool.num_ready == 3
        await pool.prepare()
        assert pool.num_ready == 3
        async with await pool.acquire() as sandbox:
            assert await sandbox.read("x") == b"content"
        await filled(pool, 3)


async def test_each_sandbox_is_handed_out_once() -> None:
    async with SandboxPool(2) as pool:
        taken = await asyncio.gather(*(pool.acquire() for _ in range(6)))
        assert len({id(sandbox) for sandbox in taken}) == 6
        results = await asyncio.gather(*(sandbox.exec("ls; touch used") for sandbox in taken))
        assert [result.stdout for result in results] == [b""] * 6
        for sandbox in taken:
            await sandbox.close()


async def test_a_dead_warm_one_is_passed_over() -> None:
    async with SandboxPool(1) as pool:
        await pool.prepare()
        kill_from_outside(pool._ready[0])
        async with await pool.acquire() as sandbox:
            assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_a_pool_of_none_makes_them_on_demand() -> None:
    async with SandboxPool(0) as pool:
        await pool.prepare()
        assert pool.num_ready == 0
        async with await pool.acquire() as sandbox:
            assert sandbox.alive
        assert pool.num_ready == 0


async def test_closing_leaves_no_process_even_while_filling() -> None:
    before = children()
    pool = SandboxPool(6)
    taken = await pool.acquire()
    await asyncio.sleep(0)  # the refill has begun
    await asyncio.gather(pool.close(), pool.close())
    with pytest.raises(SandboxError, match="pool is closed"):
        await pool.acquire()
    assert taken.alive
    await taken.close()
    assert children() == before


async def test_a_machine_without_bubblewrap_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool = SandboxPool(2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        await pool.prepare()
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        await pool.acquire()
    monkeypatch.undo()
    async with await pool.acquire() as sandbox:
        assert sandbox.alive
    await pool.close()


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size -1"):
        SandboxPool(-1)
