"""Between a program's messages and the texts that the policy reads and writes, in the model's chat format.

The thin adapter to the format and to the tags of thinking; the only module of the gateway that knows how a call or a
thought is written. Knows no HTTP and no tokens, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from actors.formats.base import Format
from actors.formats.calls import dump, load
from actors.gateway.conversation import ChatMessage, FunctionCall
from actors.thinking import Thinking
from envs.interface import Action, Message, Tool, ToolCall


class Spoken(NamedTuple):
    """A turn's text taken apart: the thought, the prose, the calls in it, and why they could not be read, if so.

    said: everything but the thought, as it was written.
    """

    thought: str
    content: str
    said: str
    calls: tuple[ToolCall, ...] = ()
    malformed: str | None = None


class Interpreter:
    """Translates in one chat format; stateless."""

    def __init__(self, chat_format: Format, thinking: Thinking) -> None:
        self.thinking = thinking
        self._format = chat_format

    def told(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], telling: str) -> tuple[ChatMessage, ...]:
        """The conversation as the policy is told it. tools: in the system message, or in one put before it, where the
        format has no place of its own for them. telling: at the end of the first question, or in one of its own before
        the first answer, so that it stays where it is while the conversation grows."""
        told = list(messages)
        if described := self._format.describe(tools):
            if told and told[0].role == "system":
                told[0] = ChatMessage("system", f"{told[0].content}\n\n{described}")
            else:
                told.insert(0, ChatMessage("system", described))
        if telling:
            at = next((i for i, message in enumerate(told) if message.role == "user"), None)
            if at is not None:
                told[at] = replace(told[at], content=f"{told[at].content}\n{telling}")
            else:
                answered = next((i for i, message in enumerate(told) if message.role == "assistant"), len(told))
                told.insert(answered, ChatMessage("user", telling))
        return tuple(told)

    def spoken(self, text: str, is_open: bool, opening: str, tools: Sequence[Tool] | None) -> Spoken:
        """What a turn's text says. is_open: whether thinking is open before it. opening: what stands before the answer
        already, since a call must be. tools: what may be called; None where no call is to be looked for.

        One bad call makes all of it prose: none of its calls must run.
        """
        thought, answer, unended = self.thinking.split(text, is_open)
        said = opening + answer
        if unended:
            return Spoken(
                thought, said, said, malformed=f"the thinking was not ended with {self.thinking.settings.tags[1]}"
            )
        if tools is None:
            return Spoken(thought, said, said)
        action = self._format.parse(said, tools)
        if action.malformed is not None or not action.tool_calls:
            return Spoken(thought, said, said, malformed=action.malformed)
        return Spoken(thought, self._format.prose(said), said, action.tool_calls)

    def written(self, message: ChatMessage, tools: Sequence[Tool]) -> Message:
        """A message as text; an assistant's as the policy would write it, its thought and its calls included."""
        if message.role != "assistant":
            return Message(message.role, message.content)
        said = self._with_calls(message.content, message.calls, tools) if message.calls else message.content
        return Message("assistant", self.thinking.join(message.thought, said))

    def recalled(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
        """A conversation as text, its turns as the format tells them anew: some leave earlier thoughts out."""
        return self._format.recall([self.written(message, tools) for message in messages])

    def thinks(self, text: str) -> bool:
        """Whether a turn's text begins with a thought, be it an empty one."""
        return self.thinking.begins(text)

    def opening(self, name: str | None) -> str:
        """The text that a turn begins with which must call a tool: this one, or any."""
        return self._format.begin_call(name)

    def acted(self, action: Action, tools: Sequence[Tool], opening: str) -> str:
        """The text of a reference policy's turn after its opening, before which nothing is thought.

        Raises ValueError where the action does not begin so.
        """
        text = self._format.write(replace(action, thinking="") if opening else action, tools)
        if not text.startswith(opening):
            raise ValueError(f"the program wants a call, and the reference policy says {text!r:.200}")
        return text.removeprefix(opening)

    def _with_calls(self, content: str, calls: Sequence[FunctionCall], tools: Sequence[Tool]) -> str:
        bound = [(name, _object(arguments)) for _, name, arguments in calls]
        try:
            made = tuple(ToolCall(name, known) for name, known in bound if known is not None)
            if len(made) == len(bound):
                return self._format.write(Action(content, made), tools)
        except ValueError:
            pass  # there is another way to write them
        # Calls that the policy could not have made, of a tool that is gone perhaps: they are context, and told as they
        # are.
        quoted = [
            self._format.quote_call(call.name, call.arguments if known is None else dump(known))
            for call, (_, known) in zip(calls, bound, strict=True)
        ]
        return self._format.join(content, quoted)


def _object(arguments: str) -> dict[str, Any] | None:
    """The arguments of a call; None where they are no JSON object."""
    try:
        value, end = load(arguments, 0)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not arguments[end:].strip() else None
