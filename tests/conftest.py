"""What all tests share: no property test fails because the machine was slow. Speed belongs to tests/bench."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
