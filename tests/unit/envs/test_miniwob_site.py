"""MiniWoB++'s pages as a site, and what is paid for; without a browser."""

from __future__ import annotations

import json

import pytest

from envs.browser.miniwob import MiniwobEnvironment
from envs.browser.miniwob import site as site_module
from envs.browser.miniwob.environment import verify
from envs.browser.miniwob.site import MiniwobSite, pages_folder
from envs.browser.web import Request
from envs.interface import EnvironmentOptionsError


def test_the_site_has_files_of_the_package_and_its_page_once() -> None:
    site = MiniwobSite("/miniwob/click-button.html")

    def status(target: str, method: str = "GET") -> int:
        return int(site.answer(Request(method, target)).status)

    assert status("/miniwob/click-test.html") == 403
    assert status("/miniwob/click-button.html", "POST") == 403
    assert status("/miniwob/click-button.html") == 200
    assert status("/miniwob/click-button.html") == 403
    assert status("/core/core.js") == 200
    for target in (
        "/../__init__.py",
        "/core/../../../../etc/passwd",
        "/core",
        "/nothing.js",
        "//etc/passwd",
        "/%2e%2e/x.js",
    ):
        assert status(target) == 404
    assert (pages_folder() / "core" / "core.js").is_file()


def test_the_verifier_pays_for_full_marks_at_the_end_only() -> None:
    for ended, raw, reward in ((True, 1.0, 1.0), (True, 0.5, 0.0), (True, -1.0, 0.0), (False, 1.0, 0.0)):
        assert verify(json.dumps({"ended": ended, "raw": raw}).encode()).total == reward


def test_options_are_checked() -> None:
    for options in ({"pages": []}, {"pages": ["draw-line"]}, {"pages": ["enter-text"] * 2}, {"action_timeout_s": 0}):
        with pytest.raises(ValueError):
            MiniwobEnvironment(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="splits train and heldout"):
        MiniwobEnvironment().task("test", 0)  # type: ignore[arg-type]


def test_without_the_package_it_is_said_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module.importlib.util, "find_spec", lambda name: None)
    pages_folder.cache_clear()
    try:
        with pytest.raises(EnvironmentOptionsError, match=r"pip install ergon\[miniwob\]"):
            MiniwobEnvironment()
    finally:
        pages_folder.cache_clear()
