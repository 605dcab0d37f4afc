"""`ergon view` over HTTP: the list with filters and pages, a trajectory, what is hostile, what cannot be."""

from __future__ import annotations

import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from broker.protocol.trajectory import Outcome
from deploy.report import view as view_module
from deploy.report.view import ViewServer, address
from tests.unit.deploy.recorded import HOSTILE, HereTranscriber, episode, keep, make_run, make_settings, record
from tests.unit.deploy.test_report import Elements


class Site:
    """A view of a made run."""

    def __init__(self, settings: Settings, server: ViewServer) -> None:
        self.settings, self._port = settings, server.server_address[1]

    def get(self, path: str, **query: str) -> tuple[int, str, dict[str, str]]:
        url = f"http://127.0.0.1:{self._port}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                return reply.status, reply.read().decode(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), dict(error.headers)

    def page(self, path: str = "/", **query: str) -> Elements:
        status, text, _ = self.get(path, **query)
        assert status == 200, text
        return Elements(text)

    def listed(self, **query: str) -> list[str]:
        """The tickets of a list's page."""
        links = [str(a["href"]) for a in self.page(**query).named("a")]
        asked = [urllib.parse.urlsplit(link) for link in links if link.startswith("/trajectory")]
        return [dict(urllib.parse.parse_qsl(each.query))["id"] for each in asked]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    settings = make_settings(tmp_path)
    directory = make_run(settings, [record("phase", 0, 1.0, detail="training")])
    hostile = episode(120, (HOSTILE, HOSTILE), env="web", kind="<b>", outcome=Outcome.EXPLOIT, reward=-1.0)
    keep(settings, [*(episode(n, (f"question {n}?", "said")) for n in range(120)), hostile])
    monkeypatch.setattr(view_module, "FOLLOW_S", 0.05)
    monkeypatch.setattr(view_module, "Transcriber", lambda *_: HereTranscriber(settings))
    with ViewServer(directory, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(settings, server)
        server.shutdown()


def test_the_list_is_paged_sorted_and_filtered(site: Site) -> None:
    first = site.listed()
    assert len(first) == 50
    assert first[0] == "made/train/60/120"
    assert site.listed(page="3") == [f"made/train/{n // 2}/{n}" for n in range(20, -1, -1)]
    assert site.listed(page="99") == site.listed(page="3")
    assert site.listed(sort="reward", up="1")[0] == "made/train/60/120"
    assert site.listed(outcome="exploit") == site.listed(env="web") == site.listed(reward_to="0") == first[:1]
    assert site.listed(group="made/train/7") == ["made/train/7/15", "made/train/7/14"]
    assert site.listed(text="QUESTION 77?") == ["made/train/38/77"]
    assert site.listed(step_from="2") == []
    assert "121 of 121 kept trajectories, page 1 of 3" in site.page().text
    links = {str(a["href"]) for a in site.page(env="shop", page="2").named("a")}
    assert {"/?env=shop&page=1", "/?env=shop&page=3", "/?env=shop&sort=reward&up=0"} <= links


def test_a_new_trajectory_is_followed(site: Site) -> None:
    keep(site.settings, [episode(500)])
    following = threading.Event()
    for _ in range(400):
        if site.listed()[0] == "made/train/250/500":
            break
        following.wait(0.05)
    assert site.listed()[0] == "made/train/250/500"
    assert site.get("/", follow="1")[2]["Refresh"] == "5"
    assert "Refresh" not in site.get("/")[2]


def test_a_trajectory_is_shown_with_its_group(site: Site) -> None:
    page = site.page("/trajectory", id="made/train/7/15")
    assert "question 15?" in page.text
    assert "sampled by version 1.7" in page.text
    assert "made/train/7/14" in page.text
    status, text, _ = site.get("/trajectory", id="made/train/7/999")
    assert (status, "made/train/7/999" in text) == (404, True)


def test_hostile_text_is_only_text_and_no_script_may_run(site: Site) -> None:
    for path, query in (
        ("/", {}),
        ("/trajectory", {"id": "made/train/60/120"}),
        ("/", {"text": HOSTILE, "env": HOSTILE}),
    ):
        _, text, headers = site.get(path, **query)
        page = Elements(text)
        assert not page.named("script")
        assert not page.named("img")
        assert not page.named("textarea")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "script-src" not in headers["Content-Security-Policy"]
        assert headers["X-Frame-Options"] == "DENY"
    assert "<script>document.title='owned'</script>" in site.page("/trajectory", id="made/train/60/120").text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"page": "x"}, "page = 'x' is no number"),
        ({"step_from": "1.5"}, "step_from = '1.5' is no number"),
        ({"reward_to": "nan"}, "reward_to = 'nan' is no number"),
        ({"sort": "length; DROP TABLE kept"}, "allowed: finished_at, reward"),
        ({"page": "9" * 5000}, "is no number"),
    ],
)
def test_bad_addresses_are_one_sentence(site: Site, query: dict[str, str], expected: str) -> None:
    status, text, headers = site.get("/", **query)
    assert (status, headers["Content-Type"]) == (400, "text/plain; charset=utf-8")
    assert expected in text
    assert site.get("/elsewhere")[0] == 404


def test_the_report_is_there_too(site: Site) -> None:
    page = site.page("/report")
    assert "The run is not finished" in page.text
    assert "Trajectories" in page.text


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ErgonError, match="does not exist"):
        ViewServer(tmp_path / "none", 0)


def test_an_address_keeps_what_it_does_not_change() -> None:
    query = {"env": "shop", "page": "3", "sort": "step"}
    assert address(query, page=4) == "/?env=shop&page=4&sort=step"
    assert address(query, sort="reward", up="1") == "/?env=shop&sort=reward&up=1"
    assert address(query, follow="1") == "/?env=shop&page=3&sort=step&follow=1"
    assert address({**query, "follow": "1"}, follow="") == "/?env=shop&page=3&sort=step"
