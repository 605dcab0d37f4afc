"""Programs as environments: an episode is a run of any agent program, which asks the policy over OpenAI's HTTP API."""

from envs.program.environment import ProgramEnvironment
from envs.program.program import Bounds, Program, ProgramResult

__all__ = ["Bounds", "Program", "ProgramEnvironment", "ProgramResult"]
