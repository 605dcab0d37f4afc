"""The documents are true: reference page, README's example and commands, links, version."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.reference import PAGE, ROOT, page

DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "broker/PROTOCOL.md",
    "actors/GATEWAY.md",
    "deploy/REFERENCE.md",
    "deploy/chart/README.md",
    "deploy/monitoring/RUNBOOK.md",
]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_setting_command_and_metric_is_in_the_reference() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make reference"


def test_every_make_target_is_in_the_readme() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", text("Makefile"), re.MULTILINE)
    missing = [target for target in targets if f"make {target}" not in text("README.md")]
    assert targets
    assert not missing


def test_the_readme_names_no_make_target_that_does_not_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z-]+)", "".join(re.findall(r"`[^`\n]*`|```.*?```", text("README.md"), re.DOTALL)))
    )
    assert named
    assert named <= targets


def test_the_readmes_environment_is_the_tested_one() -> None:
    example = text("tests/unit/envs/example_environment.py")
    blocks = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    code = example[example.index("from ") :].strip()
    assert any(block.strip() == code for block in blocks)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 40


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    here = (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text(name)) if not link.startswith("http")]
    assert not [link for link in links if not (here / link).exists()]


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert f"## {version}" in text("CHANGELOG.md")


def test_files_named_in_the_architecture_exist() -> None:
    named = re.findall(r"`((?:broker|actors|learner|envs|deploy|tests)/[\w./]+)`", text("ARCHITECTURE.md"))
    assert named
    assert not [path for path in named if not (ROOT / path.split("::")[0]).exists()]


def test_every_parameter_of_the_gateway_is_on_its_page() -> None:
    from actors.gateway import chat_completions, responses

    named = set(re.findall(r"`(\w+)`", text("actors/GATEWAY.md")))
    assert {*chat_completions.NEUTRAL, *responses.NEUTRAL, *chat_completions.LABELS} <= named


def test_modules_say_what_they_own() -> None:
    packages = ("actors", "learner", "broker", "envs", "deploy")
    silent = [
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if not Path(path).read_text(encoding="utf-8").lstrip().startswith('"""')
    ]
    assert not silent
