"""Chat formats under test: tokenizers with their special tokens, reference templates, and conversations to compare.

The templates in `templates/` say whole what the formats append piece by piece. They are rendered as Hugging Face's
tokenizers render a model's own.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from actors.formats.calls import tool_json
from actors.formats.chatml import END, START
from actors.formats.chatml_json import ChatMlJson
from actors.formats.llama3 import Llama3
from actors.formats.plain import Plain
from actors.formats.qwen3 import Qwen3
from actors.formats.tagged import Tagged
from actors.renderer import Renderer
from envs.interface import Action, Message, Tool, ToolCall
from tests.unit.actors.support import ADD, LOOKUP

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = {f.name: f for f in (Tagged(), ChatMlJson(), Qwen3(), Llama3(), Plain("<|endoftext|>"))}
NAMES = tuple(FORMATS)
TOOLS = (LOOKUP, ADD)

CHATML_TOKENS = {"<|endoftext|>": True, START: True, END: True}
QWEN_TOKENS = CHATML_TOKENS | dict.fromkeys(
    ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
    False,  # whether a token is special; Qwen's are not, and its tokenizer takes them in any text all the same
)
LLAMA_TOKENS = dict.fromkeys(
    [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    ],
    True,
)
TOKENS = {
    "tagged": CHATML_TOKENS,
    "chatml_json": CHATML_TOKENS,
    "qwen3": QWEN_TOKENS,
    "llama3": LLAMA_TOKENS,
    "plain": {"<|endoftext|>": True},
}
# How the families cut text before they merge: what of it could be joined across a border must be the same.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen3": WORDS.replace("NUMBERS", r"\p{N}"), "llama3": WORDS.replace("NUMBERS", r"\p{N}{1,3}")}

CORPUS = [
    "Eva buys 17 plates.\n\nWhat is the bill?\n 1212  coins; user assistant tool system ipython",
    '<tool>look plate</tool> {"name": "look", "arguments": {"word": "plate"}} "parameters": {"type": "integer"}',
]


@cache
def tokenizer_json(name: str) -> str:
    """A small byte-level BPE that cuts text as the format's models do and has their tokens."""
    bpe = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    adapt(bpe, name)
    return str(bpe.to_str())


def adapt(bpe: Tokenizer, name: str) -> None:
    """Have a tokenizer cut text as the format's models do, and give it their tokens."""
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if name == "qwen3":
        bpe.normalizer = normalizers.NFC()
    for token, special in TOKENS[name].items():
        bpe.add_tokens([AddedToken(token, special=special, normalized=False)])
        if special:
            bpe.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if name == "llama3":
        begin = "<|begin_of_text|>"
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))]
        )


def make_tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(name))


@cache
def make_renderer(name: str) -> Renderer:
    return Renderer(make_tokenizer(name), chat_format=FORMATS[name])


def reference(name: str) -> str:
    """The format's reference template."""
    return (TEMPLATES / f"{name}.jinja").read_text()


@cache
def template(text: str) -> Template:
    """As transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text)


@dataclass(frozen=True)
class Conversation:
    """Tools, and in turn what the policy is told and what it does. Where `last` is None it is its turn."""

    tools: tuple[Tool, ...]
    rounds: tuple[tuple[tuple[Message, ...], Action], ...]
    last: tuple[Message, ...] | None

    def dicts(self) -> list[dict[str, Any]]:
        """As a chat template takes it."""
        dicts: list[dict[str, Any]] = []
        for before, action in self.rounds:
            dicts += [{"role": m.role, "content": m.content} for m in before]
            dicts.append({"role": "assistant", "content": action.text})
            if action.thinking:
                dicts[-1]["reasoning_content"] = action.thinking
            if action.tool_calls:
                dicts[-1]["tool_calls"] = [
                    {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                    for call in action.tool_calls
                ]
        return dicts + [{"role": m.role, "content": m.content} for m in self.last or ()]

    def whole(self, chat_template: str) -> str:
        """The text that a template makes of it at once."""
        tools = [tool_json(tool) for tool in self.tools] or None
        prompt = self.last is not None
        return template(chat_template).render(
            messages=self.dicts(), tools=tools, add_generation_prompt=prompt, bos_token="<|begin_of_text|>"
        )

    def grown(self, renderer: Renderer) -> list[int]:
        """The tokens as a rollout grows them, where the policy samples what the format would write."""
        ids: list[int] = []
        for before, action in self.rounds:
            ids += renderer.observe(before) if ids else renderer.open(before, self.tools)
            ids += renderer.turn(renderer.write(action, TOOLS))
        if self.last is not None:
            ids += renderer.observe(self.last) if ids else renderer.open(self.last, self.tools)
        return ids


WORD_LIST = [
    "Eva",
    "buys",
    "17",
    "plates.",
    "ü👩‍🚀",
    "e\u0301",
    '"quoted"',
    "a\\b",
    "{x}",
    "<b>",
    "[1]",
    "'s",
    "1212;",
    "né",
    "_",
]
SPACES = [" ", " ", " ", "\n", "\n\n", "  ", "\t", " \n "]


class Maker:
    """Makes seeded conversations that are canonical for a format: what its template and its policy write is the same.

    A turn does not begin with a space, which a template's whole text would join with the line end before it. Qwen3's
    template drops thinking before the last question, and gives the last turn some; Llama's takes spaces away, and knows
    turns of one call and nothing else.
    """

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name, self.rng = name, rng

    def text(self, least: int = 0) -> str:
        """Starts and ends with a word, or is empty."""
        words = self.rng.choices(WORD_LIST, k=self.rng.randint(least, 5))
        return "".join(word + self.rng.choice(SPACES) for word in words[:-1]) + "".join(words[-1:])

    def content(self) -> str:
        """What others say: with any spaces around it."""
        around = self.rng.choices(["", " ", "\n"], [6, 1, 1], k=2)
        return self.text().join(around)

    def call(self) -> ToolCall:
        if self.rng.random() < 0.5:
            return ToolCall("look", {"word": self.text(1)})
        return ToolCall("add", {"a": self.rng.randint(-9, 999), "b": self.rng.randint(-9, 999)})

    def action(self, thinks: bool) -> Action:
        thinking = self.text(1) if thinks else ""
        if self.rng.random() < 0.6:
            return Action(self.text(), thinking=thinking)
        calls = tuple(self.call() for _ in range(1 if self.name == "llama3" else self.rng.randint(1, 3)))
        return Action("" if self.name == "llama3" else self.text(), calls, thinking=thinking)

    def context(self, first: bool) -> tuple[Message, ...]:
        if first:
            system = [Message("system", self.content())] if self.rng.random() < 0.5 else []
            return (*system, Message("user", self.content()))
        roles = self.rng.choice([["tool"], ["tool", "tool"], ["tool", "user"], ["user"], ["tool", "user", "tool"], []])
        return tuple(Message(role, self.content()) for role in roles)  # type: ignore[arg-type]

    def conversation(self) -> Conversation:
        rng = self.rng
        contexts = [self.context(first=number == 0) for number in range(rng.randint(1, 5))]
        last = contexts.pop() if rng.random() < 0.5 else None
        asked = max(n for n, c in enumerate([*contexts, last or ()]) if any(m.role == "user" for m in c))
        rounds = []
        for number, context in enumerate(contexts):
            ends = not last and number == len(contexts) - 1
            if self.name == "qwen3":
                thinks = ends or (number >= asked and rng.random() < 0.5)
            else:
                thinks = self.name in ("chatml_json", "plain") and rng.random() < 0.3
            rounds.append((context, self.action(thinks)))
        return Conversation(rng.choice([(), TOOLS]), tuple(rounds), last)
