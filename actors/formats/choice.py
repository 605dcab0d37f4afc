"""Which chat format a model is sampled in: the one that `model.tool_format` names, or the one its tokenizer speaks.

Owns the rules of `auto` and what is refused. Looks at the names of added tokens, the chat template and the end-of-text
token of a model directory; renders nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.formats import llama3
from actors.formats.base import Format
from actors.formats.chatml import END, START
from actors.formats.chatml_json import ChatMlJson
from actors.formats.plain import Plain
from actors.formats.qwen3 import RESPONSE, Qwen3
from actors.formats.tagged import Tagged
from broker.process.lifecycle import ErgonError

logger = logging.getLogger(__name__)

AUTO = "auto"
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, slots=True)
class Speaker:
    """What of a model decides about its format. name: how errors call it. begin: tokens put before every text.

    tokens: names of its special and added tokens. template: its chat template, None for a model that has none.
    """

    name: str
    tokens: frozenset[str]
    template: str | None = None
    end_of_text: str | None = None
    begin: tuple[str, ...] = ()

    def knows(self, *tokens: str) -> bool:
        """Whether all of these are tokens of its own."""
        return self.tokens.issuperset(tokens)


FORMATS: Mapping[str, Callable[[Speaker], Format]] = {
    "tagged": lambda _: Tagged(),
    "chatml_json": lambda _: ChatMlJson(),
    "qwen3": lambda _: Qwen3(),
    "llama3": lambda _: llama3.Llama3(),
    "plain": lambda speaker: Plain(_end_of_text(speaker), speaker.begin),
}


def choose_format(tool_format: str, speaker: Speaker) -> Format:
    """The format of this name; `auto` is the one that suits the model. Raises ErgonError where `auto` knows none."""
    suited, reason = _suited(speaker)
    if tool_format == AUTO:
        if suited is None:
            raise ErgonError(
                f"model.tool_format = 'auto': {reason} of {speaker.name}; allowed are {', '.join(FORMATS)}: "
                "choose `plain` to train the model without its chat tokens"
            )
        logger.info("tool format chosen tool_format=%s reason=%r model=%r", suited, reason, speaker.name)
        return FORMATS[suited](speaker)
    if suited in ("qwen3", "llama3") and tool_format != suited:
        logger.warning(
            "tool format is not the model's own tool_format=%s own=%s reason=%r", tool_format, suited, reason
        )
    return FORMATS[tool_format](speaker)


def check_tokens(chat_format: Format, speaker: Speaker) -> None:
    """Raises ErgonError where the tokenizer lacks a token without which the format cannot be written."""
    missing = [token for token in chat_format.required if not speaker.knows(token)]
    if not missing:
        return
    usable = [each for each, make in FORMATS.items() if each != "plain" and speaker.knows(*make(speaker).required)]
    usable += ["plain"] if _ends(speaker) else []
    raise ErgonError(
        f"model.tool_format = {chat_format.name!r}: {speaker.name} has no token {', '.join(missing)}; "
        f"its tokens allow {', '.join(usable) or 'none'}: choose one of these, or another model"
    )


def read_speaker(model: Path, tokens: frozenset[str], begin: Sequence[str] = ()) -> Speaker:
    """What a Hugging Face model directory says of its format. Raises ErgonError for a file that is not JSON."""
    config = _read_json(model / "tokenizer_config.json")
    template: Any = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if template is None and (file := model / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return Speaker(f"the tokenizer of model.path = {model}", tokens, template, end, tuple(begin))


def _suited(speaker: Speaker) -> tuple[str | None, str]:
    """The format that suits a model, None where none does, and why."""
    template = speaker.template
    if template is None:
        return "plain", "it has no chat template"
    if speaker.knows(llama3.HEADER, llama3.END_OF_TURN) and llama3.HEADER in template:
        return "llama3", "its template writes header ids"
    if not (speaker.knows(START, END) and START in template):
        return None, "no format is known that the chat template speaks"
    if RESPONSE in template and "<tools>" in template and "<function=" not in template:
        return "qwen3", "its template writes <tools> and <tool_response>"
    return "chatml_json", "its template is ChatML and describes no tools in a known way"


def _ends(speaker: Speaker) -> list[str]:
    candidates = [speaker.end_of_text, *ENDS_OF_TEXT]
    return [token for token in candidates if token is not None and token in speaker.tokens]


def _end_of_text(speaker: Speaker) -> str:
    if not (ends := _ends(speaker)):
        raise ErgonError(
            f"model.tool_format = 'plain': {speaker.name} names no end-of-text token that it has; "
            "set eos_token in its tokenizer_config.json"
        )
    return ends[0]


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        read: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ErgonError(f"{path} is not JSON ({error}); name a complete model in model.path") from error
    return read
