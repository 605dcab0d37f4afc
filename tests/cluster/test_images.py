"""The Dockerfiles: hadolint finds nothing, nobody is root, and every image that the chart names has one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.rendering import CHART, MATRIX, ROOT, TOOLS, pods, render

IMAGES = ROOT / "deploy" / "images"
FILES = sorted(IMAGES.glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word.isupper()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(
        [TOOLS / "hadolint", "--no-color", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_s_word_is_worth_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp\n")
    assert "DL3007" in subprocess.run([TOOLS / "hadolint", bad], capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nobody_is_root_and_nothing_is_fetched_by_a_moving_name(path: Path) -> None:
    found = instructions(path)
    users = [rest for word, rest in found if word == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1]), "a number, so that Kubernetes can tell that it is not root"
    assert found[-1][0] == "CMD"
    assert all(re.search(r":\w", rest) and ":latest" not in rest for word, rest in found if word == "FROM")
    assert not [word for word, _ in found if word == "ADD"]


def test_the_brokers_image_has_no_torch() -> None:
    text = (IMAGES / "broker.Dockerfile").read_text()
    assert re.findall(r'"\.\[([\w,-]+)\]"', text) == ["kubernetes"]
    assert "-r requirements.lock" not in text


def test_every_image_of_the_chart_has_a_dockerfile_of_the_same_user() -> None:
    built = {f"ergon-{path.stem}" for path in FILES}
    named = set()
    for arguments in MATRIX.values():
        for _, _, spec in pods(render(*arguments)):
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                named.add(container["image"].rpartition("/")[2].partition(":")[0])
    assert named <= built
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    assert {defaults[name] for name in ("broker", "actor", "learner", "sandbox")} <= built
