"""Verifiers that are programs: what one finds in its working directory, and how its verdict is read. Runs nothing.

A verifier runs after the program has ended, in a place of its own that the program never was in. Its last line of
output is the verdict, in JSON: a number, or {"reward": 1.0, "components": {"tests": 1.0}}. One that runs what the
program has written must keep its own output from it, since that line is believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from envs.interface import EnvironmentFailureError, Reward
from envs.program.program import Program, ProgramResult

PLACE = "program"


def verifier_program(command: tuple[str, ...], files: Mapping[str, bytes], result: ProgramResult) -> Program:
    """The verifier: its own files, and in `program/` what the program left: stdout, stderr, result.json, artifacts."""
    facts = {"exit_code": result.exit_code, "timed_out": result.timed_out, "seconds": round(result.duration_s, 3)}
    left = {
        f"{PLACE}/stdout": result.stdout,
        f"{PLACE}/stderr": result.stderr,
        f"{PLACE}/result.json": json.dumps(facts).encode(),
        **{f"{PLACE}/artifacts/{name}": content for name, content in result.artifacts.items()},
    }
    return Program(command, text_by="nothing", files={**files, **left})


def read_verdict(result: ProgramResult) -> Reward:
    """The verifier's verdict. Raises EnvironmentFailureError for one that breaks: the policy is not to blame."""
    lines = result.text.splitlines()
    try:
        verdict = json.loads(lines[-1]) if result.exit_code == 0 and lines else None
        if isinstance(verdict, dict):
            components = {str(name): float(value) for name, value in verdict.get("components", {}).items()}
            return Reward(float(verdict["reward"]), components)
        if isinstance(verdict, int | float) and not isinstance(verdict, bool):
            return Reward(float(verdict))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # told below, with what it said
    raise EnvironmentFailureError(
        f"the verifier ended with {result.exit_code} and printed {lines[-1:]!r:.200}; its last line must be a number "
        f'or {{"reward": NUMBER, "components": {{...}}}}. Its stderr: {result.stderr[-500:].decode(errors="replace")}'
    )
