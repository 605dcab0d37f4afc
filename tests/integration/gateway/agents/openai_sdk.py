"""An agent with the Python `openai` SDK, as in its README: a tool, then an answer."""

import json
import os
import sys

from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
client = OpenAI()
messages = [{"role": "user", "content": sys.stdin.read()}]
while True:
    reply = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages, tools=[TOOL])
    message = reply.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        word = json.loads(call.function.arguments)["word"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"w{word}"})
