"""What an actor's sandboxes are like where they are pods: by the settings, and by where the actor is."""

from __future__ import annotations

import socket

import pytest

from actors.process import pods_of
from broker.process.settings import Settings


def test_pods_are_as_the_settings_say_and_know_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"run": {"name": "mine"}, "sandboxes": {"namespace": "boxes", "memory_mb": 512}})
    made = pods_of(settings, 3)
    assert (made.namespace, made.memory_mb, made.run) == ("boxes", 512, "mine")
    assert made.actor == f"{socket.gethostname()}-3"
    assert made.owner is None
    for name, value in {"NAME": "actor-x", "UID": "1-2", "NAMESPACE": "boxes"}.items():
        monkeypatch.setenv(f"ERGON_POD_{name}", value)
    assert pods_of(settings, 3).owner == ("actor-x", "1-2")
    monkeypatch.setenv("ERGON_POD_NAMESPACE", "other")
    assert pods_of(settings, 3).owner is None
