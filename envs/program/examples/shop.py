"""The shop's questions, worked at by a program: shop_agent.py, which anybody could have written with the openai SDK.

Tasks, reference policies and the grade are the shop's; only the loop of turns and the tools are the program's. In the
run file: name = "envs.program.examples.shop:ShopProgram".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from envs.interface import ReferencePolicy, Reward, Split, Task
from envs.program.environment import ProgramEnvironment
from envs.program.program import Program, ProgramResult
from envs.shop import calc
from envs.shop.environment import PERFECT, ShopEnvironment, parse_answer


class ShopProgram(ProgramEnvironment):
    """Word problems whose price only the agent's tool tells. kinds, demonstrations: see ShopEnvironment.

    trusted: the agent is ours and the policy fills in two arguments of tools, so it may be; in a sandbox the openai
    package must be mounted (mounts) and named in PYTHONPATH (python_path).
    """

    name = "envs.program.examples.shop:ShopProgram"

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        demonstrations: str = PERFECT,
        trusted: bool = False,
        timeout_s: float = 60.0,
        mounts: dict[str, str] | None = None,
        python_path: str = "",
    ) -> None:
        super().__init__(trusted=trusted, timeout_s=timeout_s, mounts=mounts)
        self._shop = ShopEnvironment(kinds, warm_sandboxes=0, demonstrations=demonstrations)
        self._variables = {"PYTHONPATH": python_path} if python_path else {}
        self._agent = Path(__file__).with_name("shop_agent.py").read_bytes()
        self._calculator = Path(calc.__file__).read_bytes()

    def task(self, split: Split, index: int) -> Task:
        """The shop's."""
        return self._shop.task(split, index)

    def program(self, task: Task) -> Program:
        """The agent, with the price list that its tool reads."""
        prices = "".join(f"{item}\t{coins}\n" for item, coins in task.secret["prices"].items())
        files = {"agent.py": self._agent, "calc.py": self._calculator, "prices.tsv": prices.encode()}
        python = "python" if self.bounds.trusted else "python3"
        return Program((python, "agent.py"), task.prompt[0].content, files=files, variables=self._variables)

    async def verify(self, task: Task, result: ProgramResult, reports: Sequence[Reward]) -> Reward:
        """1 for the exact integer in what the agent printed, else 0."""
        correct = float(result.exit_code == 0 and parse_answer(result.text) == task.secret["answer"])
        return Reward(correct, {"correct": correct})

    def reference(self, task: Task) -> ReferencePolicy:
        """The shop's: its messages are what the agent shows the model."""
        return self._shop.reference(task)

    def demonstrator(self, task: Task) -> ReferencePolicy:
        """The shop's, the careless clerk where that is chosen."""
        return self._shop.demonstrator(task)
