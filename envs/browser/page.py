"""One page in a browser context of its own: its requests go to its episode's site, and nowhere else.

Owns the context, its one tab, and the question whether a page has come to rest. What is done on a page is in acting.py,
how it is shown in snapshot.py, who answers its requests in traffic.py. Scripts of ours run in an isolated world, where
a page's own scripts can neither see nor change them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from envs.browser.cdp import CdpError, Connection
from envs.browser.rest import Rest
from envs.browser.snapshot import Snapshot, plain, snapshot
from envs.browser.traffic import Traffic
from envs.browser.web import EmptySite, Site
from envs.interface import EnvironmentFailureError, SandboxError

OPEN_LIMIT_S: Final = 60.0
CLOSE_LIMIT_S: Final = 30.0
SETTLE_LIMIT_S: Final = 5.0  # a page that has loaded and never comes to rest is shown as it is then
MAX_NOTES: Final = 5
MAX_NOTE: Final = 300
MAX_NODES: Final = 20_000
MAX_CHARACTERS: Final = 2_000_000
WARM_TARGET: Final = "/-"  # no page's own, or going to it would count as the same page again
WORLD: Final = "ergon"
# Two turns of the page's own scripts, then its size: a huge page is not asked for its tree.
_TURNS = """new Promise(done => setTimeout(() => setTimeout(() => done([
  document.getElementsByTagName('*').length, document.documentElement?.textContent.length ?? 0]), 0), 0))"""


class PageGoneError(Exception):
    """The tab has crashed."""


class Page:
    """One tab. Belongs to one event loop; close it always.

    notes: what happened beside the page since it was last asked: dialogs, addresses that were refused.
    """

    def __init__(self, connection: Connection, context: str) -> None:
        self.notes: list[str] = []
        self._connection = connection
        self._context = context
        self._traffic = Traffic(self.post, self._note)
        self._closed = False
        self._forget_tab()

    def _forget_tab(self) -> None:
        self._target = self._session = ""
        self._world: int | None = None
        self._crashed = False
        self._url = "about:blank"
        self._rest = Rest("")
        self._size = (0, 0)  # elements, characters

    @classmethod
    async def create(cls, connection: Connection) -> Page:
        """An empty tab in a fresh context. Raises SandboxError."""
        context = ""
        try:
            made = await connection.send("Target.createBrowserContext", disposeOnDetach=True)
            context = made["browserContextId"]
            await connection.send("Browser.setDownloadBehavior", behavior="deny", browserContextId=context)
            page = cls(connection, context)
            await page._open_tab()
        except BaseException as error:
            if context:
                connection.post("Target.disposeBrowserContext", browserContextId=context)
            if isinstance(error, CdpError | PageGoneError | TimeoutError):
                raise SandboxError(f"Chromium could not make a page ({type(error).__name__}: {error})") from error
            raise
        return page

    async def _open_tab(self) -> None:
        made = await self._connection.send("Target.createTarget", url="about:blank", browserContextId=self._context)
        self._target = made["targetId"]
        self._rest = Rest(self._target)
        found = await self._connection.send("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = found["sessionId"]
        self._connection.listen(self._session, self._on_event)
        async with asyncio.timeout(OPEN_LIMIT_S):
            await asyncio.gather(
                self.post("Page.enable"),
                self.post("Network.enable", maxTotalBufferSize=0, maxResourceBufferSize=0),
                self.post("Inspector.enable"),
                self.post("DOM.enable"),
                self.post("Accessibility.enable"),
                self.post("Fetch.enable", patterns=[{"urlPattern": "*"}]),
                self.post("Emulation.setFocusEmulationEnabled", enabled=True),
            )
        await self.evaluate("0")

    @property
    def alive(self) -> bool:
        """Whether its Chromium is there, and it was not closed."""
        return not self._closed and not self._connection.closed.is_set()

    @property
    def address(self) -> str:
        """Path and query on the site; the whole URL elsewhere."""
        origin = self._traffic.site.origin if self._traffic.site else ""
        return self._url.removeprefix(origin) if origin and self._url.startswith(f"{origin}/") else self._url

    def serve(self, site: Site) -> None:
        """From now on this site answers the page's requests."""
        self._traffic.site = site

    def post(self, method: str, **parameters: Any) -> asyncio.Future[Any]:
        """A command to the tab."""
        return self._connection.post(method, self._session, **parameters)

    async def send(self, method: str, **parameters: Any) -> Any:
        """A command to the tab, and its answer. Raises CdpError, PageGoneError, SandboxError."""
        if self._crashed:
            raise PageGoneError
        return await self.post(method, **parameters)

    async def warm(self, origin: str) -> None:
        """Show an empty document of this origin, so that the first page finds its process. Raises SandboxError."""
        self._traffic.site = EmptySite(origin)
        try:
            async with asyncio.timeout(OPEN_LIMIT_S):
                await self.goto(WARM_TARGET)
                await self.settle()
                await self.look()
                await self.send("Page.resetNavigationHistory")
        except (CdpError, PageGoneError, TimeoutError) as error:
            raise SandboxError(f"Chromium could not make a page ({type(error).__name__}: {error})") from error

    async def goto(self, target: str) -> None:
        """Go to a path of the site. Raises CdpError where the browser does not."""
        assert self._traffic.site is not None
        found = await self.send("Page.navigate", url=f"{self._traffic.site.origin}{target}")
        reason = found.get("errorText", "")
        if reason and reason != "net::ERR_ABORTED":
            raise CdpError(reason)

    async def back(self) -> bool:
        """Go to the page before this one; False where there is none."""
        history = await self.send("Page.getNavigationHistory")
        index = history["currentIndex"]
        if index <= 1:  # 0 is the empty page that every tab begins with
            return False
        await self.send("Page.navigateToHistoryEntry", entryId=history["entries"][index - 1]["id"])
        return True

    async def evaluate(self, expression: str, world: str = WORLD) -> Any:
        """The value of an expression, a promise's too. world: the page's own where it is empty. Raises CdpError."""
        parameters: dict[str, Any] = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        if world:
            parameters["contextId"] = await self._own_world()
        found = await self.send("Runtime.evaluate", **parameters)
        if "exceptionDetails" in found:
            raise CdpError(str(found["exceptionDetails"].get("text", "")))
        return found["result"].get("value")

    async def call(self, node: int, function: str, *arguments: Any) -> Any:
        """The value of a function that is called on a node (`this`), in our own world. Raises CdpError."""
        made = await self.send("DOM.resolveNode", backendNodeId=node, executionContextId=await self._own_world())
        found = await self.send(
            "Runtime.callFunctionOn",
            functionDeclaration=function,
            objectId=made["object"]["objectId"],
            arguments=[{"value": argument} for argument in arguments],
            returnByValue=True,
            awaitPromise=True,
        )
        if "exceptionDetails" in found:
            raise CdpError(str(found["exceptionDetails"].get("text", "")))
        return found["result"].get("value")

    async def _own_world(self) -> int:
        if self._world is None:
            found = await self.send("Page.createIsolatedWorld", frameId=self._target, worldName=WORLD)
            self._world = found["executionContextId"]
        return self._world

    async def settle(self) -> None:
        """Wait until the page has loaded, has no request under way, and its scripts have had their turn.

        Raises EnvironmentFailureError where the site broke, PageGoneError, SandboxError.
        """
        deadline = asyncio.get_running_loop().time() + SETTLE_LIMIT_S
        before = -1
        while before != self._rest.activity and asyncio.get_running_loop().time() < deadline:
            await self._rest.wait(deadline, lambda: self.alive and not self._crashed)
            before = self._rest.activity
            try:
                self._size = await self.evaluate(_TURNS)
            except CdpError:  # the page went away under it
                self._world = None
                before = -1
        failure = self._traffic.failure
        if failure is not None:
            raise EnvironmentFailureError(f"the site broke: {failure!r}") from failure

    async def look(self, number_texts: bool = False) -> Snapshot:
        """The page as it is after it has settled. Raises CdpError, PageGoneError, SandboxError."""
        num_nodes, num_characters = self._size
        if num_nodes > MAX_NODES or num_characters > MAX_CHARACTERS:
            lines = ("the page is too large to be shown",)
            return Snapshot("", self.address, lines, {})
        tree = await self.send("Accessibility.getFullAXTree")
        nodes = tree["nodes"]
        title = nodes[0].get("name", {}).get("value", "") if nodes else ""
        return snapshot(nodes, title, self.address, number_texts)

    async def renew(self) -> None:
        """A fresh tab in the same context, in place of one that crashed or hangs. Raises SandboxError."""
        self._connection.forget(self._session)
        self.post("Runtime.terminateExecution")
        self._connection.give_up(self._session, PageGoneError())
        old = self._target
        self._forget_tab()
        try:
            self._connection.post("Target.closeTarget", targetId=old)
            await self._open_tab()
        except (CdpError, PageGoneError, TimeoutError) as error:
            raise SandboxError(f"Chromium could not replace a page ({type(error).__name__}: {error})") from error

    async def close(self) -> None:
        """End the tab and forget the context with all it stored. Raises SandboxError where Chromium does not."""
        if self._closed:
            return
        self._closed = True
        self._connection.forget(self._session)
        if self._connection.closed.is_set():
            return
        self.post("Runtime.terminateExecution")
        try:
            await self._connection.send(
                "Target.disposeBrowserContext", browserContextId=self._context, limit_s=CLOSE_LIMIT_S
            )
        except (CdpError, TimeoutError) as error:
            raise SandboxError(f"Chromium does not close a page ({type(error).__name__}: {error})") from error

    def _note(self, text: str) -> None:
        text = plain(text, MAX_NOTE)
        if text not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def _on_event(self, method: str, event: Mapping[str, Any]) -> None:
        handler = _HANDLERS.get(method)
        if handler is not None:
            handler(self, event)
        self._rest.take(method, event)

    def _on_request(self, event: Mapping[str, Any]) -> None:
        self._traffic.answer(event, self._target)

    def _on_navigation(self, event: Mapping[str, Any]) -> None:
        frame = event["frame"]
        if frame["id"] == self._target:
            self._url = frame.get("url", "") + frame.get("urlFragment", "")
            self._world = None

    def _on_fragment(self, event: Mapping[str, Any]) -> None:
        if event["frameId"] == self._target:
            self._url = event["url"]

    def _on_dialog(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        accept = kind in ("alert", "beforeunload")
        if kind != "beforeunload":
            said = "" if accept else ", which was answered with no"
            self._note(f'the page showed the {kind} "{event.get("message", "")[:200]}"{said}')
        self.post("Page.handleJavaScriptDialog", accept=accept)

    def _on_crash(self, _event: Mapping[str, Any]) -> None:
        self._crashed = True
        self._connection.give_up(self._session, PageGoneError())


_HANDLERS = {
    "Fetch.requestPaused": Page._on_request,
    "Page.frameNavigated": Page._on_navigation,
    "Page.navigatedWithinDocument": Page._on_fragment,
    "Page.javascriptDialogOpening": Page._on_dialog,
    "Inspector.targetCrashed": Page._on_crash,
    "Inspector.detached": Page._on_crash,
}
