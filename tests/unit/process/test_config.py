"""One TOML is one run: precedence, refusals with the nearest key, lossless round trip."""

from pathlib import Path

import pytest

from broker.process.config import load_settings, save_settings
from broker.process.lifecycle import ErgonError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_precedence_is_file_then_environment_then_set(tmp_path: Path) -> None:
    path = write(tmp_path, "[learner]\nnum_steps = 3\nlearning_rate = 1e-6\ngroup_size = 4\n")
    environ = {"ERGON__LEARNER__NUM_STEPS": "5", "ERGON__LEARNER__GROUP_SIZE": "6", "HOME": "ignored"}
    settings = load_settings(path, ["learner.group_size=16"], environ)
    assert (settings.learner.num_steps, settings.learner.group_size) == (5, 16)
    assert settings.learner.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.learning_rte=1", "unknown key learner.learning_rte; did you mean learner.learning_rate?"),
        ("lerner.num_steps=1", "unknown key lerner; did you mean learner?"),
        ("run.zzzz=1", "unknown key run.zzzz; known keys there: directory, name, seed"),
        ("learner.num_steps=0", "learner.num_steps = 0: input should be greater than or equal to 1"),
        ("run.name=a/b", "run.name = 'a/b'"),
        ("learner.num_steps", "not of the form section.key=value"),
        ("environments.3.name=x", "index '3' is not one of the 1 sections"),
        ("run.name.deeper=1", "name is a value, not a section"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path, "[run]\nname = 'x'\n[[environments]]\nname = 'shop'\n")
    with pytest.raises(ErgonError) as caught:
        load_settings(path, [override], {})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_a_list_of_sections_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "[[environments]]\nname = 'shop'\nwieght = 2\n")
    with pytest.raises(ErgonError, match=r"did you mean environments\.0\.weight\?"):
        load_settings(path, environ={})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ErgonError, match="does not exist"):
        load_settings(tmp_path / "none.toml", environ={})
    with pytest.raises(ErgonError, match="cannot be read"):
        load_settings(tmp_path, environ={})
    with pytest.raises(ErgonError, match="not valid TOML"):
        load_settings(write(tmp_path, "[run\n"), environ={})


def test_saved_settings_are_read_back_equal(tmp_path: Path) -> None:
    settings = load_settings(None, ["run.name=n", "learner.betas=[0.8, 0.9]", "environments.0.name=x"][:2], {})
    save_settings(settings, tmp_path / "config.toml")
    assert load_settings(tmp_path / "config.toml", environ={}) == settings
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
