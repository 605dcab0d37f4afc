"""An agent as anybody would write it with the `openai` SDK; it knows nothing of Ergon.

Reads a customer's question from standard input, lets the model call two tools, prints the model's answer. The price
list lies in its working directory, and so does the calculator.
"""

import json
import os
import sys
from pathlib import Path

from calc import Refused, calculate  # type: ignore[import-not-found]  # beside this file where it runs
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

MAX_TURNS = 4


def tool(name: str, description: str, parameter: str) -> ChatCompletionToolParam:
    """A tool with one text argument."""
    schema: dict[str, object] = {
        "type": "object",
        "properties": {parameter: {"type": "string"}},
        "required": [parameter],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("price", "The price of an item.", "item"), tool("calc", "Integer arithmetic.", "expression")]


def run(name: str, arguments: str) -> str:
    """The result of a tool call."""
    (argument,) = json.loads(arguments).values()
    if name == "price":
        prices = dict(line.split("\t") for line in Path("prices.tsv").read_text(encoding="utf-8").splitlines())
        return prices.get(argument.strip(), "error: no such item")
    try:
        return str(calculate(argument))
    except Refused as refused:
        return f"error: {refused}"


def main() -> None:
    """One question."""
    client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY are in the environment
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": sys.stdin.read()}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        if not message.tool_calls:
            sys.stdout.write(message.content or "")
            return
        messages.append(message.model_dump(exclude_none=True))  # type: ignore[arg-type]
        for call in message.tool_calls:
            if call.type == "function":
                result = run(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    main()
