"""A real Chromium: what a policy does reaches the site, what a page tries reaches nothing, and nothing hangs long."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from envs.browser import BrowserEnvironment, cdp, chromium
from envs.browser import page as page_module
from envs.browser.pool import BrowserPool
from envs.browser.web import Response, redirect
from envs.interface import EnvironmentFailureError, SandboxError
from envs.play import play
from envs.sandbox import bubblewrap
from tests.integration.envs.browser_scene import WrittenSite, listener, written

pytestmark = pytest.mark.asyncio(loop_scope="module")
LINK = b'<a href="/two">two</a>'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[BrowserPool]:
    """One Chromium for all tests that leave it alive."""
    running = BrowserPool(2, 16, WrittenSite.origin)
    await running.prepare()
    yield running
    await running.close()


def command(pid: int) -> bytes:
    """A process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def processes(pool: BrowserPool) -> list[int]:
    """Ids of all processes of a pool's Chromium."""
    assert pool.chromium is not None
    found, waiting = [], [pool.chromium.pid]
    while waiting:
        found.append(pid := waiting.pop())
        for task in Path(f"/proc/{pid}/task").iterdir():
            waiting += map(int, (task / "children").read_text().split())
    return found


async def test_links_forms_cookies_and_history(pool: BrowserPool) -> None:
    def landed(request: object) -> Response:
        return Response(repr((request.form, request.cookies)).encode())  # type: ignore[attr-defined]

    form = b"""<form method=post action=/sent><label>Name <input name=name></label>
      <select name=size aria-label=Size><option>small<option>large</select><input type=checkbox name=box aria-label=Box>
      <input type=date name=day aria-label=Day><textarea name=text aria-label=Text>old</textarea>
      <button>Send</button></form>"""
    first = Response(LINK, headers={"Set-Cookie": "c=1; Path=/"})
    pages = {"index": first, "two": form, "sent": lambda _: redirect("/landed"), "landed": landed}
    async with written(pool, **pages) as episode:
        assert "address: /two" in await episode.do("click", ref=episode.ref("two"))
        await episode.do("type", ref=episode.ref("Name"), text='Zoë "x"')
        await episode.do("select", ref=episode.ref("Size"), option="large")
        await episode.do("click", ref=episode.ref("Box"))
        await episode.do("type", ref=episode.ref("Day"), text="2031-02-03")
        shown = await episode.do("type", ref=episode.ref("Text"), text="new\nlines")
        for part in ('textbox "Name" = "Zoë \\"x\\""', '= "large"', "checked", "2031-02-03", "new lines"):
            assert part in shown
        assert "address: /landed" in await episode.do("click", ref=episode.ref("Send"))
        (sent,) = [request for request in episode.written.asked if request.path == "/sent"]
        wanted = {"name": 'Zoë "x"', "size": "large", "box": "on", "day": "2031-02-03", "text": "new\r\nlines"}
        assert (sent.method, sent.form, sent.cookies) == ("POST", wanted, {"c": "1"})
        assert "address: /two" in await episode.do("back")
        assert "address: /\n" in await episode.do("back")
        assert await episode.do("back") == "error: there is no page before this one"


async def test_what_cannot_be_done_is_said(pool: BrowserPool) -> None:
    page = b"""<input aria-label=A readonly><input aria-label=B disabled><select aria-label=C><option>x</select>
      <button style="position:absolute;width:0;height:0;border:0;padding:0;overflow:hidden">D</button>
      <a href=/two>E</a>"""
    async with written(pool, index=page) as episode:
        refs = {name: episode.ref(name) for name in "ABCDE"}
        for call, said in (
            (("type", refs["A"], "text"), "is readonly"),
            (("type", refs["B"], "text"), "is disabled"),
            (("type", refs["E"], "text"), "is no field to type into"),
            (("select", refs["C"], "option"), "has no option 'zzz'"),
            (("select", refs["A"], "option"), "is no selection"),
        ):
            name, ref, argument = call
            answer = await episode.do(name, ref=ref, **{argument: "zzz"})
            assert answer.startswith("error: the "), answer
            assert said in answer
        assert "cannot be seen" in await episode.do("click", ref=refs["D"])
        assert "has no element 99; numbers go from 1 to 5" in await episode.do("click", ref=99)
        assert await episode.do("read", part=2) == "error: the page has the parts 1 to 1"
        assert (await episode.do("press", key="F12")).startswith("error: press: key")


async def test_a_click_meets_its_element_where_others_cover_it(pool: BrowserPool) -> None:
    """Two buttons, one over the middle of the other; one that is turned; a field beneath its label."""
    page = b"""<style>button { position: absolute; width: 80px; height: 60px }</style>
      <button style="left:10px; top:10px" onclick="said.textContent += ' lower'">lower</button>
      <button style="left:30px; top:20px" onclick="said.textContent += ' upper'">upper</button>
      <button style="left:300px; top:99px; rotate: 30deg" onclick="said.textContent += ' turned'">turned</button>
      <label style="position:absolute; left:200px; top:300px; width:90px; height:30px; z-index:1" for=box></label>
      <input id=box type=checkbox aria-label=Box style="position:absolute; left:220px; top:305px"
        onclick="said.textContent += ' box'"><p id=said>said:</p>"""
    async with written(pool, index=page) as episode:
        for name in ("lower", "upper", "turned", "Box"):
            shown = await episode.do("click", ref=episode.ref(name))
        assert "said: lower upper turned box" in shown


async def test_scripts_and_requests_of_a_page_are_waited_for(pool: BrowserPool) -> None:
    page = b"""<button onclick="fetch('/one').then(r => r.text()).then(t => fetch('/two' + t)).then(r => r.text())
      .then(t => document.body.append(t))">go</button>"""
    async with written(pool, index=page, one=b"?x", two=b"all there") as episode:
        assert "all there" in await episode.do("click", ref=1)


ADDRESSES = (
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1:PORT/",
    "http://localhost:PORT/",
    "http://[::1]:PORT/",
    "https://example.com/",
    "http://written.test:PORT/",
    "http://written.test@127.0.0.1:PORT/",
    "ftp://127.0.0.1:PORT/",
    "file:///etc/passwd",
    "chrome://version",
    "chrome://crash",
    "view-source:http://written.test/",
    "devtools://devtools/bundled/inspector.html",
    "about:version",
    "data:text/html,<h1>elsewhere</h1>",
)


async def test_no_link_and_no_script_leads_anywhere_else(pool: BrowserPool) -> None:
    async with listener() as (port, arrived):
        for address in (each.replace("PORT", str(port)) for each in ADDRESSES):
            links = (
                f'<a href="{address}">a</a><button onclick="location.href = this.value" value="{address}">b</button>'
            )
            page = f"<p>home</p>{links}"
            async with written(pool, index=page.encode()) as episode:
                for name in "ab":
                    shown = await episode.do("click", ref=episode.ref(name))
                    at_home = "address: /\n" in shown and "home" in shown
                    assert at_home or shown == "page: \naddress: about:blank#blocked\n\n", (address, shown)
                    if not at_home:
                        await episode.do("open", path="/")
                assert (await episode.do("open", path=address)).startswith("error: a path of this site")
        assert arrived == []


@pytest.mark.parametrize("path", ["//127.0.0.1/", "/\\127.0.0.1/", "", "javascript:alert(1)", "/a\nb", "/" + "x" * 600])
async def test_open_takes_paths_of_the_site_only(pool: BrowserPool, path: str) -> None:
    async with written(pool, index=b"home") as episode:
        assert (await episode.do("open", path=path)).startswith("error: a path")
        assert len(episode.written.asked) == 1


async def test_no_request_of_any_kind_leaves_the_page_s_own_site(pool: BrowserPool) -> None:
    tries = """
      const said = [];
      const url = 'http://127.0.0.1:PORT/';
      const fail = name => () => said.push(name);
      const all = [
        fetch(url).catch(fail('fetch')), fetch('http://169.254.169.254/').catch(fail('metadata')),
        fetch('file:///etc/passwd').catch(fail('file')),
        new Promise(r => { const i = new Image(); i.onerror = r; i.src = url }).then(fail('image')),
        new Promise(r => { const s = new WebSocket('ws://127.0.0.1:PORT/'); s.onerror = r }).then(fail('socket')),
        new Promise(r => { const s = new EventSource(url); s.onerror = () => { s.close(); r() } }).then(fail('events')),
        new Promise(r => { const w = new Worker(URL.createObjectURL(new Blob(
          ["fetch('" + url + "').catch(() => postMessage(1))"]))); w.onmessage = r }).then(fail('worker')),
      ];
      navigator.sendBeacon(url, 'x');
      const peer = new RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:PORT'}]});
      peer.createDataChannel('x'); peer.createOffer().then(offer => peer.setLocalDescription(offer));
      const frame = document.createElement('iframe'); frame.src = url; document.body.append(frame);
      const link = document.createElement('link'); link.rel = 'preconnect'; link.href = url; document.head.append(link);
      Promise.all(all).then(() => document.body.append('refused ' + said.sort().join(' ')));
    """
    async with listener() as (port, arrived):
        page = b"<button onclick=\"import('/go.js')\">go</button>"
        script = Response(tries.replace("PORT", str(port)).encode(), kind="text/javascript")
        async with written(pool, index=page, **{"go.js": script}) as episode:
            shown = await episode.do("click", ref=1)
            for _ in range(20):
                if "refused" in shown:
                    break
                shown = await episode.do("read")
            assert "refused events fetch file image metadata socket worker" in shown
        assert arrived == []


async def test_chromium_has_no_network_no_privileges_and_no_files(pool: BrowserPool) -> None:
    async with written(pool, index=b"home"):
        inner = [pid for pid in processes(pool) if b"--type=" in command(pid)]
        assert any(b"--type=renderer" in command(pid) for pid in inner)
        own_network = Path("/proc/self/ns/net").readlink()
        for pid in inner:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            # What starts the pages' processes has capabilities in a namespace of its own, which is Chromium's sandbox.
            assert int(status["CapEff"], 16) == 0 or b"--type=zygote" in command(pid)
            assert status["Uid"].split()[0] == str(bubblewrap.SANDBOX_ID if os.geteuid() == 0 else os.getuid())
            assert Path(f"/proc/{pid}/ns/net").readlink() != own_network
            interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
            assert [line.split(":")[0].strip() for line in interfaces] in ([], ["lo"])
            if b"--type=renderer" in command(pid):
                assert status["Seccomp"].strip() == "2"
        options = b"".join(map(command, inner))
        assert b"--no-sandbox" not in options
        assert b"remote-debugging-port" not in options


async def test_two_episodes_share_nothing(pool: BrowserPool) -> None:
    page = b"""<p id=out></p><script>
      out.textContent = 'kept ' + [localStorage.x, document.cookie, history.length > 2].join();
      localStorage.x = 'mine'; document.cookie = 'y=mine';</script>"""
    async with written(pool, index=page) as first, written(pool, index=page) as second:
        assert "kept ,,false" in await first.do("read")
        assert "kept ,,false" in await second.do("read")
        assert "kept mine,y=mine" in await first.do("open", path="/")
    async with written(pool, index=page) as third:
        assert "kept ,,false" in await third.do("read")


async def test_windows_dialogs_and_downloads(pool: BrowserPool) -> None:
    page = b"""<button onclick="alert('hello'); out.textContent = [confirm('sure?'), prompt('who?')] + '-'; print()">
      dialogs</button>
      <button onclick="out.textContent = String(window.open('/two'))">window</button>
      <a href=/two target=_blank>blank</a>
      <a href=/file>download</a><p id=out></p>"""
    stored = Response(b"x" * 1000, kind="application/octet-stream", headers={"Content-Disposition": "attachment"})
    async with written(pool, index=page, two=b"two", file=stored) as episode:
        shown = await episode.do("click", ref=episode.ref("dialogs"))
        assert '[the page showed the alert "hello"]' in shown
        assert '[the page showed the confirm "sure?", which was answered with no]' in shown
        assert "false,-" in shown
        assert "null" in await episode.do("click", ref=episode.ref("window"))
        for name in ("blank", "download"):
            assert "address: /\n" in await episode.do("click", ref=episode.ref(name))
        assert pool.chromium is not None
        targets = await pool.chromium.connection.send("Target.getTargets")
        context = episode.page._context
        assert len([each for each in targets["targetInfos"] if each.get("browserContextId") == context]) == 1


HANGING = {
    "a loop": "for (;;) {}",
    "dialogs without end": "for (;;) alert(1)",
    "a regular expression": "/^(a+)+$/.test('a'.repeat(60) + 'b')",
}


@pytest.mark.parametrize("script", HANGING.values(), ids=HANGING)
async def test_a_page_that_hangs_is_closed_and_the_episode_goes_on(pool: BrowserPool, script: str) -> None:
    page = f'<button onclick="{script}">hang</button>'.encode()
    async with written(pool, index=page, two=b"two") as episode:
        answer = await episode.do("click", 1.0, ref=1)
        assert answer == "error: the page did not answer within 1 s and was closed; go on with open"
        assert "has no element 1; it has none" in await episode.do("click", ref=1)
        assert "two" in await episode.do("open", path="/two")
        assert episode.num_tool_timeouts == 1


async def test_a_page_that_hangs_from_the_start_does_not_keep_its_episode(pool: BrowserPool) -> None:
    with pytest.raises(SandboxError, match="first page could not be shown"):
        async with written(pool, 1.0, index=b"<script>for (;;) {}</script>"):
            pass


async def test_a_page_that_never_rests_is_shown_as_it_is(pool: BrowserPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "SETTLE_LIMIT_S", 0.5)
    restless = b"""<p>here</p><script>const again = () => fetch('/two').then(again); again();
      setInterval(() => history.replaceState(0, '', '?' + Math.random()), 5)</script>"""
    async with written(pool, index=restless, two=b"x") as episode:
        assert "here" in await episode.do("read")


HUGE = {
    "elements": "document.body.innerHTML = '<p>x'.repeat(30000)",
    "text": "document.body.textContent = 'x y '.repeat(600000)",
    "title": "document.title = 'x'.repeat(5000000)",
    "depth": "let e = document.body; for (let i = 0; i < 3000; i++) e = e.appendChild(document.createElement('p'))",
    "name": "document.querySelector('button').setAttribute('aria-label', 'x'.repeat(5000000))",
}


@pytest.mark.parametrize("script", HUGE.values(), ids=HUGE)
async def test_a_huge_page_is_not_told(pool: BrowserPool, script: str) -> None:
    page = f'<button onclick="{script}">grow</button>'.encode()
    async with written(pool, index=page, two=b"two") as episode:
        assert len(await episode.do("click", ref=1)) < 6000
        assert "two" in await episode.do("open", path="/two")


EATING = {
    "heap": "const a = []; for (;;) a.push(new Array(1000000).fill(a))",
    "buffers": "const a = []; for (;;) a.push(new Float64Array(1 << 20).fill(1))",
}


@pytest.mark.parametrize("script", EATING.values(), ids=EATING)
async def test_a_page_that_eats_memory_is_refused_more_or_crashes_alone(pool: BrowserPool, script: str) -> None:
    page = f'<button onclick="{script}">eat</button>'.encode()
    async with written(pool, index=page, two=b"two") as episode, written(pool, index=b"other") as other:
        answer = await episode.do("click", ref=1)
        assert answer == "error: the page crashed and was closed; go on with open" or '"eat"' in answer
        assert "two" in await episode.do("open", path="/two")
        assert "other" in await other.do("read")
        assert pool.num_starts == 1


async def test_a_site_that_breaks_is_the_environment_s_failure(pool: BrowserPool) -> None:
    def broken(_request: object) -> Response:
        raise KeyError("x")

    async with written(pool, index=LINK, two=broken) as episode:
        with pytest.raises(EnvironmentFailureError, match=r"the site broke: KeyError\('x'\)"):
            await episode.do("click", ref=1)


async def test_a_chromium_that_ends_is_infrastructure_and_started_again() -> None:
    mine = BrowserPool(1, 4, WrittenSite.origin)
    try:
        async with written(mine, index=b"one") as first, written(mine, index=b"two") as second:
            assert mine.chromium is not None
            reading = asyncio.create_task(first.do("click", ref=5))
            browser = next(
                pid
                for pid in processes(mine)
                if b"--remote-debugging-pipe" in Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            os.kill(browser, signal.SIGKILL)
            await reading  # answered without the browser, since there is no element 5
            for episode in (first, second):
                with pytest.raises(SandboxError, match="has ended"):
                    await episode.do("read")
            async with written(mine, index=b"three") as third:
                assert "three" in await third.do("read")
        assert mine.num_starts == 2
    finally:
        await mine.close()
    with pytest.raises(SandboxError, match="closed"):
        await mine.prepare()


async def test_a_chromium_that_hangs_is_ended_and_the_next_episode_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = BrowserPool(0, 4, WrittenSite.origin)
    try:
        async with written(mine, index=b"one") as first:
            hanging = mine.chromium
            assert hanging is not None
            browser = next(pid for pid in processes(mine) if command(pid).startswith(b"/usr/lib/chromium"))
            os.kill(browser, signal.SIGSTOP)
            monkeypatch.setattr(cdp, "COMMAND_LIMIT_S", 0.5)
            monkeypatch.setattr(page_module, "CLOSE_LIMIT_S", 0.5)
            with pytest.raises(SandboxError, match="could not replace a page"):
                await first.do("read", 0.5)
        monkeypatch.undo()
        assert not hanging.alive
        async with written(mine, index=b"two") as second:
            assert "two" in await second.do("read")
    finally:
        await mine.close()


async def test_a_machine_without_chromium_is_told_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chromium, "PROGRAMS", ("no-such-chromium",))
    chromium.find_chromium.cache_clear()
    environment = BrowserEnvironment()
    try:
        with pytest.raises(SandboxError, match="apt-get install chromium-headless-shell"):
            await environment.prepare()
    finally:
        chromium.find_chromium.cache_clear()
        await environment.close()


async def test_the_grade_is_of_the_state_and_the_artifact_is_all_it_needs() -> None:
    environment = BrowserEnvironment(levels=[1])
    try:
        task = environment.task("heldout", 0)
        played = await play(environment, task, environment.reference(task))
        assert (played.reward.total, played.done) == (1.0, True)
        episode = environment.episode(task)
        await episode.start()
        before = await episode.grade()
        await episode.close()
        assert (before.total, before.components["untouched"]) == (0.0, 1.0)
        with pytest.raises(EnvironmentFailureError, match="closed"):
            await episode.grade()
    finally:
        await environment.close()
