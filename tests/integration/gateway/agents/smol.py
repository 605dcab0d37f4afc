"""An agent with smolagents: its ToolCallingAgent asks for a call in every turn and ends with its own tool."""

import os
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def look(word: str) -> str:
    """Look a word up.

    Args:
        word: The word.
    """
    return f"w{word}"


model = OpenAIModel(
    model_id=os.environ["OPENAI_MODEL"], api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
)
agent = ToolCallingAgent(tools=[look], model=model, max_steps=4, verbosity_level=0)
print(agent.run(sys.stdin.read()))
