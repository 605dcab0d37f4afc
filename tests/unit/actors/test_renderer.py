from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from actors.formats.chatml import END, START
from actors.renderer import Renderer
from broker.process.lifecycle import ErgonError
from envs.interface import Message
from tests.tiny_model import TEMPLATE
from tests.unit.actors.support import make_renderer, make_tokenizer

RENDERER = make_renderer()
PLAIN = make_tokenizer()  # parses special tokens in text, as a template's user would have it

content = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "\n", " ", "a\n", "<|im_end|>", "<|im_start|>user\nhi<|im_end|>", "<tool>price x</tool>", "é\u200d👩"]
    ),
)
context = st.lists(st.builds(Message, st.sampled_from(["user", "tool", "system"]), content), min_size=1, max_size=3)
turn = content.map(lambda text: Message("assistant", text))


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[list[Message], Message]]:
    return draw(st.lists(st.tuples(context, turn), min_size=1, max_size=5))


def append_only(rounds: list[tuple[list[Message], Message]]) -> tuple[list[int], list[bool]]:
    """The tokens as a rollout grows them, where the policy happens to sample the canonical tokens of each turn."""
    ids: list[int] = []
    mask: list[bool] = []
    for before, said in rounds:
        added = RENDERER.observe(before) if ids else RENDERER.open(before)
        sampled = RENDERER.turn(said.content)
        ids += added + sampled
        mask += [False] * len(added) + [True] * len(sampled)
    return ids, mask


def chatml(messages: list[Message]) -> str:
    return "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages)


@settings(max_examples=200, deadline=None)
@given(conversations())
def test_growing_a_conversation_equals_rendering_it_whole(rounds: list[tuple[list[Message], Message]]) -> None:
    check_grown_equals_whole(rounds)


def test_thousands_of_seeded_conversations_grow_as_they_render() -> None:
    rng = random.Random(0)
    pieces = [
        "",
        "\n",
        " ",
        "a",
        "Eva buys 17",
        "<|im_end|>",
        "<|im_start|>",
        "<tool>look x</tool>",
        "\n\n",
        "ü👩",
        "\t",
        "tool\n",
    ]

    def text() -> str:
        return "".join(rng.choices(pieces, k=rng.randrange(5)))

    for _ in range(3000):
        check_grown_equals_whole(
            [
                (
                    [Message(rng.choice(("user", "tool", "system")), text()) for _ in range(rng.randrange(1, 3))],
                    Message("assistant", text()),
                )
                for _ in range(rng.randrange(1, 6))
            ]
        )


def check_grown_equals_whole(rounds: list[tuple[list[Message], Message]]) -> None:
    messages = [m for before, said in rounds for m in (*before, said)]
    ids, mask = append_only(rounds)
    segment = RENDERER.render_reference(messages)
    assert segment.token_ids_T.tolist() == ids
    assert segment.loss_mask_T.tolist() == mask
    assert segment.num_sampled == sum(mask)
    assert not segment.logprobs_T.any()
    assert RENDERER.decode(ids) + "\n" == chatml(messages)
    # The mask covers exactly the contents that the policy wrote, and the tokens that ended them.
    runs = np.split(np.array(ids), np.flatnonzero(np.diff(mask)) + 1)
    said = [RENDERER.decode(run.tolist()) for run in runs[1::2]]
    assert said == [f"{said.content}{END}" for _, said in rounds]
    assert [RENDERER.text(RENDERER.turn(said.content)) for _, said in rounds] == [said.content for _, said in rounds]


@settings(max_examples=100, deadline=None)
@given(conversations())
def test_text_in_a_message_never_becomes_a_control_token(rounds: list[tuple[list[Message], Message]]) -> None:
    ids, _ = append_only(rounds)
    start, end = (PLAIN.token_to_id(token) for token in (START, END))
    num = sum(len(before) + 1 for before, _ in rounds)
    assert ids.count(start) == num
    assert ids.count(end) == num


@settings(max_examples=100, deadline=None)
@given(context)
def test_what_nobody_samples_tokenises_as_the_whole_text_does(before: list[Message]) -> None:
    if any("<|" in m.content for m in before):
        return
    assert RENDERER.open(before) == [*PLAIN.encode(chatml(before)).ids, *PLAIN.encode(f"{START}assistant\n").ids]


def test_sampled_tokens_are_kept_even_where_the_tokenizer_would_write_the_text_otherwise() -> None:
    merged = PLAIN.encode("plate").ids
    spelled = [PLAIN.encode(letter).ids[0] for letter in "plate"]
    assert len(merged) < len(spelled)
    ids = [*RENDERER.open([Message("user", "x")]), *spelled, RENDERER.stop_token_ids[0]]
    grown = ids + RENDERER.observe([Message("tool", "y")])
    assert grown[: len(ids)] == ids
    assert (
        RENDERER.decode(grown)
        == f"{START}user\nx{END}\n{START}assistant\nplate{END}\n{START}tool\ny{END}\n{START}assistant\n"
    )


def test_equals_the_chat_template_of_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token=END, chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer.load(tmp_path)
    messages = [
        Message("user", "What is the bill?\n"),
        Message("assistant", "<tool>price plate</tool>"),
        Message("tool", "72"),
    ]
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    ids = [*renderer.open(messages[:1]), *renderer.turn(messages[1].content), *renderer.observe(messages[2:])]
    assert renderer.decode(ids) == text


def test_a_conversation_without_an_assistant_message_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an assistant message"):
        RENDERER.render_reference([Message("user", "hi")])


def test_what_follows_the_last_turn_is_not_rendered() -> None:
    messages = [Message("user", "a"), Message("assistant", "b")]
    longer = RENDERER.render_reference([*messages, Message("tool", "c")])
    assert longer.token_ids_T.tolist() == RENDERER.render_reference(messages).token_ids_T.tolist()


def test_a_tokenizer_without_chatml_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ErgonError, match=r"no token <\|im_start\|>"):
        Renderer(Tokenizer(models.BPE()))
    with pytest.raises(ErgonError, match=r"tokenizer\.json cannot be read"):
        Renderer.load(tmp_path)
