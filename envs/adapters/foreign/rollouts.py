"""Environments of the `verifiers` library, whose rollouts ask an endpoint and are scored by its own rubrics.

See serve.py. A rollout and its scoring share the fork: a rubric that evaluates what the policy wrote can be made to say
what the policy likes, for that one episode.
"""

import asyncio
import importlib
import os
from collections.abc import Callable
from typing import Any

LOADED: "dict[str, Any]" = {}


def load(options: "dict[str, Any]") -> "dict[str, Any]":
    """Make the environment: `module:Class`, or the name of an installed one. How many tasks its splits have."""
    verifiers = importlib.import_module("verifiers")
    name, arguments = options["id"], options["options"]
    if ":" in name:
        module, _, attribute = name.partition(":")
        environment = getattr(importlib.import_module(module), attribute)(**arguments)
    else:
        environment = verifiers.load_environment(name, **arguments)
    train, heldout = environment.build_dataset(), environment.build_eval_dataset()
    if train is None and heldout is None:
        raise ValueError("it has no tasks")
    LOADED["environment"] = environment
    LOADED["rows"] = {"train": train, "heldout": heldout}
    return {split: 0 if rows is None else len(rows) for split, rows in LOADED["rows"].items()}


def play(ask: "Callable[[dict[str, Any]], Any]", options: "dict[str, Any]") -> None:
    """One request: {"split", "row", "url", "key", "model"}. One answer: the reward and the metrics."""
    client_config = importlib.import_module("verifiers.types").ClientConfig
    request = ask({})
    row = dict(LOADED["rows"][request["split"]][request["row"]])
    os.environ["ERGON_FOREIGN_KEY"] = request["key"]
    client = client_config(api_key_var="ERGON_FOREIGN_KEY", api_base_url=request["url"], max_retries=0)

    async def rollout() -> Any:
        return await LOADED["environment"].run_rollout(
            row, client=client, model=request["model"], sampling_args={}, max_retries=0
        )

    output = asyncio.run(rollout())
    metrics = {name: value for name, value in output["metrics"].items() if isinstance(value, int | float)}
    answer = {"reward": output["reward"], "metrics": metrics}
    if output.get("error") is not None:
        answer["error"] = str(output["error"])[:500]
    ask(answer)
