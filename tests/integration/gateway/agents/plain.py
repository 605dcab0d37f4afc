"""An agent with nothing but Python's standard library: one question, whose answer goes to a file and to the output."""

import json
import os
import sys
import urllib.request
from pathlib import Path

request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps(
        {"model": os.environ["OPENAI_MODEL"], "messages": [{"role": "user", "content": sys.stdin.read()}]}
    ).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    answer = json.loads(reply.read())["choices"][0]["message"]["content"]
Path("answer.txt").write_text(answer)
print(answer)
