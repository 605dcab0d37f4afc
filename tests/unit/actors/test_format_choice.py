"""Which format a model directory is rendered in, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.formats.choice import AUTO, FORMATS
from actors.formats.plain import Plain
from actors.renderer import Renderer
from broker.process.lifecycle import ErgonError
from broker.process.settings import ModelSection
from envs.interface import Message
from tests.tiny_model import TEMPLATE
from tests.unit.actors.conversations import make_renderer, make_tokenizer, reference, tokenizer_json

QUESTION = [Message("user", "x")]


def directory(path: Path, tokens: str, template: Any = None, **config: Any) -> Path:
    """A model directory with the tokenizer of one format."""
    (path / "tokenizer.json").write_text(tokenizer_json(tokens))
    given = {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(given | config))
    return path


def test_the_setting_allows_every_format() -> None:
    allowed = get_args(ModelSection.model_fields["tool_format"].annotation)
    assert set(allowed) == {AUTO, *FORMATS}


@pytest.mark.parametrize(
    ("tokens", "template", "chosen"),
    [
        ("qwen3", reference("qwen3"), "qwen3"),
        ("llama3", reference("llama3"), "llama3"),
        ("chatml_json", TEMPLATE, "chatml_json"),
        ("chatml_json", [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}], "chatml_json"),
        # ChatML whose template describes tools in a way of its own.
        ("qwen3", reference("qwen3").replace('{"name": <function-name>', "<function=name>"), "chatml_json"),
        ("plain", None, "plain"),
        ("llama3", None, "plain"),
    ],
)
def test_auto_goes_by_template_and_tokens_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: str, template: Any, chosen: str
) -> None:
    with caplog.at_level(logging.INFO, "actors.formats.choice"):
        renderer = Renderer.load(directory(tmp_path, tokens, template), "auto")
    assert renderer.chat_format.name == chosen
    assert f"tool format chosen tool_format={chosen}" in caplog.text
    if (chosen, tokens) != ("plain", "llama3"):
        assert renderer.open(QUESTION) == make_renderer(chosen if tokens == chosen else tokens).open(QUESTION)


def test_a_template_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    directory(tmp_path, "qwen3")
    (tmp_path / "chat_template.jinja").write_text(reference("qwen3"))
    assert Renderer.load(tmp_path, "auto").chat_format.name == "qwen3"


def test_plain_begins_as_the_tokenizer_does_and_ends_with_its_end_of_text(tmp_path: Path) -> None:
    model = directory(tmp_path, "llama3", eos_token={"content": "<|end_of_text|>"})
    renderer, tokenizer = Renderer.load(model, "plain"), make_tokenizer("llama3")
    assert renderer.open(QUESTION) == tokenizer.encode("User:\nx\n\nAssistant:\n").ids
    assert renderer.stop_token_ids == (tokenizer.token_to_id("<|end_of_text|>"),)


def test_a_format_that_is_not_the_models_own_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = directory(tmp_path, "qwen3", reference("qwen3"))
    assert Renderer.load(model).chat_format.name == "tagged"
    assert "tool format is not the model's own tool_format=tagged own=qwen3" in caplog.text


def test_an_impossible_format_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = directory(tmp_path, "llama3", reference("llama3"))
    with pytest.raises(ErgonError) as refused:
        Renderer.load(model, "qwen3")
    assert str(refused.value) == (
        f"model.tool_format = 'qwen3': the tokenizer of model.path = {model} has no token <|im_start|>, <|im_end|>; "
        "its tokens allow llama3, plain: choose one of these, or another model"
    )


def test_auto_refuses_a_template_that_no_format_speaks(tmp_path: Path) -> None:
    model = directory(tmp_path, "plain", "[INST] {{ messages[0].content }} [/INST]")
    with pytest.raises(ErgonError, match=r"'auto': no format is known .*allowed are tagged, .*choose `plain`"):
        Renderer.load(model, "auto")
    assert Renderer.load(model, "plain").chat_format.name == "plain"


def test_plain_needs_an_end_of_text(tmp_path: Path) -> None:
    model = directory(tmp_path, "plain", eos_token="</end>")
    state = json.loads((model / "tokenizer.json").read_text())
    state["added_tokens"] = []
    (model / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ErgonError, match=r"'plain': .* no end-of-text token .*set eos_token"):
        Renderer.load(model, "plain")


def test_a_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    model = directory(tmp_path, "plain")
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(ErgonError, match=r"tokenizer_config\.json is not JSON"):
        Renderer.load(model, "plain")


def test_a_tokenizer_that_does_not_keep_text_is_refused() -> None:
    """One that puts a space before every text would put one before every observation."""
    spaced = Tokenizer.from_str(tokenizer_json("plain"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced.decoder = decoders.Metaspace(prepend_scheme="always")
    with pytest.raises(ErgonError, match="choose a model with a byte-level one"):
        Renderer(spaced, chat_format=Plain("<|endoftext|>"))


def test_a_tokenizer_whose_plain_text_makes_special_tokens_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1, " a\n\nb \n": 2}, unk_token="<|im_end|>"))
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(ErgonError, match="in plain text as its token"):
        Renderer(words)


def test_runs_of_spaces_that_were_added_to_a_vocabulary_are_text() -> None:
    bpe = make_tokenizer("tagged")
    bpe.add_tokens(["    "])
    renderer = Renderer(bpe)
    spaces = bpe.token_to_id("    ")
    assert renderer.open([Message("user", "a    b")]).count(spaces) == 1
