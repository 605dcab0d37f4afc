"""A run for people to look at: `ergon report` writes one HTML page, `ergon view` browses its trajectories. Reads."""

from __future__ import annotations

from importlib.util import find_spec

from broker.process.lifecycle import ErgonError


def check_packages() -> None:
    """Raise ErgonError where a package is missing that pages are made with."""
    if missing := [package for package in ("jinja2", "svg", "tokenizers") if find_spec(package) is None]:
        raise ErgonError(f"the Python packages {', '.join(missing)} are missing; pip install 'ergon[report]'")
