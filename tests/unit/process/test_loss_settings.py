"""[learner.loss]: one line per kind, and combinations that make no sense are refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.process.config import load_settings, save_settings
from broker.process.lifecycle import ErgonError
from broker.process.loss_settings import LossSection

ALL = ("truncated", "window", "guard")


def load(tmp_path: Path, lines: str) -> LossSection:
    path = tmp_path / "run.toml"
    path.write_text(f"[learner.loss]\n{lines}\n")
    return load_settings(path, (), {}).learner.loss


@pytest.mark.parametrize(
    ("kind", "corrections", "aggregation"),
    [
        ("grpo", ALL, "token"),
        ("cispo", ALL, "token"),
        ("gspo", ("guard",), "sequence"),
        ("dppo_tv", ("truncated", "guard"), "token"),
        ("decoupled", ALL, "token"),
        ("reinforce", (), "token"),
    ],
)
def test_one_line_chooses_a_loss(tmp_path: Path, kind: str, corrections: tuple[str, ...], aggregation: str) -> None:
    loss = load(tmp_path, f'kind = "{kind}"')
    assert (loss.corrections, loss.aggregated_by) == (corrections, aggregation)


@pytest.mark.parametrize(
    ("line", "corrections"),
    [
        ('importance = ["truncated"]', ("truncated",)),
        ('importance = ["window"]', ("window",)),
        ('importance = ["guard"]', ("guard",)),
        ("importance = []", ()),
    ],
)
def test_one_line_chooses_the_importance_correction(tmp_path: Path, line: str, corrections: tuple[str, ...]) -> None:
    assert load(tmp_path, line).corrections == corrections


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('kind = "cispo"\nimportance = ["window"]', 'add "truncated", or choose kind = "reinforce"'),
        ('kind = "reinforce"\nimportance = ["truncated"]', 'choose kind = "cispo"'),
        ('kind = "gspo"\nimportance = ["window", "guard"]', 'only "guard" goes with it'),
        ('kind = "gspo"\naggregation = "token"', 'set "auto" or "sequence"'),
        ('importance = ["guard", "guard"]', "name each correction once"),
        ('importance = ["auto", "guard"]', '"auto" alone'),
        ('importance = ["mask"]', "should be 'truncated', 'window', 'guard' or 'auto'"),
        ("token_window = [2.0, 3.0]", "token_window = [2, 3]; it must enclose 1"),
        ("sequence_guard = [0.5, 1.0]", "sequence_guard = [0.5, 1]; it must enclose 1"),
        ("sequence_clip = [-0.1, 0.1]", "sequence_clip = [-0.1, 0.1]"),
        ('overlong = "soft"', "set overlong_tokens to the most tokens an episode may sample"),
        ('overlong = "soft"\noverlong_tokens = 8\noverlong_buffer = 8', "overlong_buffer between 0 and that"),
        ("importance_cap = 0.5", "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(ErgonError) as caught:
        load(tmp_path, lines)
    assert sentence in str(caught.value).replace("input ", "")


def test_the_choice_survives_being_written_and_read(tmp_path: Path) -> None:
    settings = load_settings(None, ['learner.loss.kind="gspo"'], {})
    save_settings(settings, tmp_path / "saved.toml")
    assert load_settings(tmp_path / "saved.toml", (), {}).learner.loss == settings.learner.loss
