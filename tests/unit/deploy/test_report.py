"""The report: what a run's folder says of it, what is missing said in a sentence, and nothing hostile comes alive."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from broker.protocol.trajectory import Mode, Outcome
from deploy.report import machinery, sections
from deploy.report.charts import Axis, Line, bars, lines, number, ticks
from deploy.report.content import Section
from deploy.report.kept import Index
from deploy.report.page import Pages, pick
from deploy.report.run import changed_settings, find_run, read_run
from deploy.tally import FILE
from tests.unit.deploy.recorded import (
    HOSTILE,
    HereTranscriber,
    episode,
    evaluation_record,
    keep,
    make_run,
    make_settings,
    record,
    step_record,
)

BEGAN = {
    "cpu": "a processor",
    "cores": 2,
    "memory_mb": 8192,
    "gpus": [],
    "python": "3.11",
    "system": "Linux",
    "versions": {},
}


class Elements(HTMLParser):
    """Every element of a page, as a browser would see it, and the text outside of the style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def rendered(settings: Settings) -> str:
    index = Index(settings.run_dir)
    with HereTranscriber(settings) as transcriber:
        return Pages(transcriber).report(read_run(settings.run_dir), index)


def full_run(settings: Settings) -> Path:
    records = [
        record("began", 0, 999.0, **BEGAN),
        evaluation_record("before", 0, 1000.0, 0.0),
        record("warm_start", 0, 1001.0, number=1, nll=2.0),
        record("warm_start", 0, 1002.0, number=2, nll=1.0),
        evaluation_record("after-warm-start", 0, 1003.0, 0.25),
        step_record(1, 1010.0),
        step_record(2, 1020.0, loss=9.0),
        record("began", 1, 1025.0, **BEGAN),
        step_record(2, 1030.0) | {"lineage": 2},  # a resumed learner took it again
        step_record(3, 1040.0) | {"lineage": 2},
        evaluation_record("after", 3, 1050.0, 0.75),
    ]
    audit = [
        {"ticket_id": f"made/train/{n}", "step": 1, "fate": fate, "reason": reason}
        for n, (fate, reason) in enumerate([("trained", "trained")] * 3 + [("masked", "zero_variance")])
    ]
    directory = make_run(settings, records, audit)
    keep(settings, [episode(n, reward=n / 4, versions=(7, 8, 9) if n == 2 else (7,)) for n in range(4)])
    keep(settings, [episode(9, mode=Mode.EVAL), episode(10, outcome=Outcome.TIMEOUT)])
    rows = [
        ["actor-0", "ergon_actor_infra_failures_total", {"env": "shop", "cause": "sandbox"}, 2.0],
        ["actor-0", "ergon_actor_adopt_pause_seconds_count", {}, 4.0],
        ["actor-0", "ergon_actor_adopt_pause_seconds_sum", {}, 0.2],
        ["actor-0", "ergon_actor_adopt_pause_seconds_bucket", {"le": "0.1"}, 3.0],
        ["actor-0", "ergon_actor_adopt_pause_seconds_bucket", {"le": "+Inf"}, 4.0],
        ["actor-0", "ergon_weights_fetched_bytes_total", {"kind": "delta"}, 2_000_000.0],
    ]
    (directory / FILE).write_text(json.dumps(rows))
    return directory


def test_a_run_is_read_as_its_surviving_history(tmp_path: Path) -> None:
    directory = full_run(make_settings(tmp_path))
    run = read_run(directory)
    assert [(step["step"], step["lineage"]) for step in run.steps] == [(1, 1), (2, 2), (3, 2)]
    assert list(run.evaluations) == ["before", "after-warm-start", "after"]
    assert len(run.began) == 2
    assert run.audit == {("trained", "trained"): 3, ("masked", "zero_variance"): 1}
    assert run.num_repeated == 0
    assert run.total("ergon_actor_infra_failures_total") == 2.0
    assert run.total("ergon_actor_infra_failures_total", cause="engine") is None
    assert run.by_label("ergon_actor_adopt_pause_seconds_bucket", "le") == {"+Inf": 4.0, "0.1": 3.0}


def test_a_run_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ErgonError, match="does not exist; name a run's folder"):
        read_run(tmp_path / "none")
    with pytest.raises(ErgonError, match=r"no run's folder \(there is no config.toml in it\); name one, as"):
        read_run(tmp_path)
    settings = make_settings(tmp_path)
    directory = make_run(settings, [])
    with pytest.raises(ErgonError, match="name one in it: made"):
        read_run(tmp_path)
    with pytest.raises(ErgonError, match="holds nothing yet"):
        read_run(directory)
    (directory / "metrics.jsonl").write_text('{"event": "phase"\n')
    with pytest.raises(ErgonError, match=r"metrics\.jsonl is damaged"):
        read_run(directory)


def test_a_run_is_named_by_its_folder_wherever_it_is_or_by_its_toml(tmp_path: Path) -> None:
    directory = make_run(make_settings(tmp_path), [])
    moved = tmp_path / "elsewhere"
    directory.rename(moved)
    assert find_run(moved)[:2] == (moved / "config.toml", moved)
    assert find_run(moved / "config.toml")[1] == directory  # the TOML says where the run is


def test_settings_that_are_not_the_defaults() -> None:
    changed = changed_settings(Settings.model_validate({"run": {"seed": 3}, "learner": {"loss": {"kind": "cispo"}}}))
    assert changed == [("run.seed", 3, 0), ("learner.loss.kind", "cispo", "grpo")]
    assert changed_settings(Settings()) == []


def test_every_section_of_a_full_run_shows_something(tmp_path: Path) -> None:
    run = read_run(full_run(make_settings(tmp_path)))
    held_out = sections.held_out(run)
    assert [figure.title for figure in held_out.figures] == [
        "held-out reward",
        "held-out reward by kind of task, at the training temperature",
    ]
    table = held_out.figures[0].table
    assert table.header[1:] == ("at the training temperature", "greedy")
    assert [row[0] for row in table.rows] == ["before", "0", "3"]
    assert table.rows[2][1] == "0.75 (0.375 to 0.875)"
    assert [row[1] for row in sections.training_reward(run).figures[0].table.rows] == [0.25, 0.5, 0.75]
    assert [figure.title for figure in sections.losses(run).figures][:3] == [
        "warm start",
        "loss",
        "entropy of the policy",
    ]
    histogram = machinery.staleness(run).figures[1].table.rows
    assert [(name, value) for name, value in histogram] == [
        ("0 versions", 0.0),
        ("1 version", 150.0),
        ("2 versions", 150.0),
    ]
    rates = machinery.throughput(run).figures[0].table.rows
    assert rates == [("3", 10.0, 8.0)]  # between the second and the third step; a resumed learner was away before
    assert ("training", "shop", "timeout", 3, "12 %") in machinery.outcomes(run).tables[0].rows
    assert "sandbox 2" in " ".join(machinery.outcomes(run).sentences)
    channel = machinery.weight_channel(run)
    assert ("bytes fetched", "2 MB in deltas") in channel.facts
    assert ("pause of sampling, mean", "0.05 s") in channel.facts
    assert channel.figures[0].table.rows == [("up to 0.1 s", 3.0), ("up to ∞ s", 1.0)]
    assert ("trained", 3) in machinery.ledger(run).tables[0].rows


def test_the_budgets_of_evaluations_and_of_training(tmp_path: Path) -> None:
    point = {"episodes": 4, "reward_ci95": 0.25, "tokens": 5.0, "adherence": 0.5, "over": 0.0, "forced": 0.5}
    curve = [{"budget": 0, "reward": 0.25, **point}, {"budget": "unlimited", "reward": 0.75, **point}]
    thinking = {"zero": {"episodes": 4, "reward": 0.5, "tokens": 0.0, "adherence": 1.0, "forced": 0.0}}
    evaluations = [evaluation_record(name, 1, 1.0, 0.5, sampled_curve=curve) for name in ("before", "step-1", "step-2")]
    settings = make_settings(tmp_path)
    section = sections.budgets(read_run(make_run(settings, [*evaluations, step_record(1, 2.0, thinking=thinking)])))
    first = section.figures[0]
    assert first.legend == ("before", "step-2")
    assert [row[:2] for row in first.table.rows] == [("0", "0.25 (0 to 0.5)"), ("unlimited", "0.75 (0.5 to 1)")]
    assert section.tables[0].rows == [("zero", 4, 0.5, 0.0, "100 %", "0 %")]


MAKERS: list[Callable[[Any], Section]] = [
    sections.held_out,
    sections.training_reward,
    sections.losses,
    sections.budgets,
    machinery.staleness,
    machinery.throughput,
    machinery.outcomes,
    machinery.ledger,
    machinery.weight_channel,
]


@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_run_has_not_is_a_sentence_and_no_empty_picture(tmp_path: Path, maker: Callable[[Any], Section]) -> None:
    run = read_run(make_run(make_settings(tmp_path), [record("phase", 0, 1.0, detail="evaluating before")]))
    section = maker(run)
    assert section.sentences
    assert not section.figures
    assert all(len(sentence) > 30 for sentence in section.sentences)


def test_a_record_of_an_earlier_release_is_shown_without_what_it_lacks(tmp_path: Path) -> None:
    old = step_record(1, 1.0)
    for name in ("outcomes", "staleness_tokens", "ess"):
        del old[name]
    evaluation = evaluation_record("after", 1, 2.0, 0.5)
    for name in [name for name in evaluation if name.endswith("ci95")]:
        del evaluation[name]
    settings = make_settings(tmp_path)
    make_run(settings, [old, evaluation])
    page = Elements(rendered(settings))
    assert "recorded no intervals" in page.text
    assert "which staleness was not recorded" in page.text
    assert "No trajectory is kept" in page.text


def test_the_page_is_one_file_with_a_table_behind_every_picture(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    full_run(settings)
    text = rendered(settings)
    page = Elements(text)
    assert not page.named("script")
    addresses = [a[k] for _, a in page.tags for k in ("src", "href", "action", "xlink:href") if a.get(k)]
    assert all(address in ("data:,",) or str(address).startswith("#") for address in addresses)
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert len(page.named("figure")) == text.count("The figures as a table") > 8
    charts = [a for a in page.named("svg") if a.get("class") == "chart"]
    assert len(charts) == len(page.named("figure"))
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert not any("style" in attributes for _, attributes in page.tags)
    assert [a["lang"] for a in page.named("html")] == ["en"]
    anchors = {str(a["href"])[1:] for a in page.named("a")}
    assert anchors <= {a["id"] for _, a in page.tags if "id" in a}


def test_examples_are_shown_turn_by_turn(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    full_run(settings)
    index = Index(settings.run_dir)
    index.refresh()
    picked = {why: kept.trajectory.ticket.ticket_id for why, kept in pick(index)}
    assert picked["the highest reward"] == "made/eval/4/9"
    assert picked["new weights in its middle"] == "made/train/1/2"
    assert picked["outcome timeout"] == "made/train/5/10"
    assert len(set(picked.values())) == len(picked)
    text = rendered(settings)
    page = Elements(text)
    assert "version 1.8 from here" in page.text
    assert '<span class="call">&lt;tool&gt;price plate&lt;/tool&gt;</span>' in text
    assert "sampled by version 1.7, then 1.8" in page.text or "sampled by version 1.8, then 1.9" in page.text
    rows = re.findall(r'<td class="token">[^<]*</td><td>yes</td><td class="n">-0\.2500</td><td>1\.8</td>', text)
    assert rows


@pytest.mark.parametrize("where", ["env", "kind", "said", "told", "run"])
def test_hostile_text_is_only_text(tmp_path: Path, where: str) -> None:
    settings = make_settings(tmp_path)
    directory = full_run(settings)
    name = HOSTILE[:200]
    if where == "run":
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["detail"] = line["kind"] = name
            for key in ("outcomes", "by_env", "sampled_by_kind", "reward_by_kind", "sampled_by_env", "seconds"):
                if key in line:
                    line[key] = {name: next(iter(line[key].values())), **line[key]}
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = ((HOSTILE if where == "told" else "?", HOSTILE if where == "said" else "!"),)
    keep(settings, [episode(99, *turns, env=name if where == "env" else "e", kind=name if where == "kind" else "k")])
    text = rendered(settings)
    page = Elements(text)
    assert not page.named("script")
    assert not page.named("img")
    assert not page.named("textarea")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "<script>document.title='owned'</script>" in page.text


def test_without_the_tokenizer_the_rest_is_shown(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    full_run(settings)

    class Refusing(HereTranscriber):
        def _ask(self, request: object) -> list[Any]:
            raise ErgonError("model.path = x: no tokenizer; name another")

    index = Index(settings.run_dir)
    text = Elements(Pages(Refusing(settings)).report(read_run(settings.run_dir), index)).text
    assert "model.path = x: no tokenizer; name another" in text
    assert "held-out reward" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0, [0, 0.2]),
        (3, 3, [3, 3.6]),
        (-0.3, 0.9, [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) <= 8
    if (low, high) in ((0, 1), (-0.3, 0.9)):
        assert found == pytest.approx(expected)


def test_numbers_are_short() -> None:
    values = [0, 1, 12345, 0.123456, 1.5e-6, 2.5e7, float("nan"), float("inf"), -0.25]
    assert [number(value) for value in values] == [
        "0",
        "1",
        "12,345",
        "0.123",
        "1.50e-6",
        "25,000,000",
        "–",
        "–",
        "-0.25",
    ]


def test_pictures_are_drawn_of_odd_values() -> None:
    text = lines('a "title" <b>', [Line("x", [(0, float("nan")), (1, 5.0)]), Line("empty", [])], Axis("<i>"), Axis("&"))
    assert 'aria-label="a &quot;title&quot; &lt;b&gt;"' in text
    assert "nan" not in text
    assert "&lt;i&gt;" in text
    assert "<svg" in lines("constant", [Line("x", [(2, 0.0), (3, 0.0)])], Axis("a"), Axis("b"))
    assert "<svg" in bars("nothing", [("none", (0.0,)), ("a" * 99, (0.0,))], "")
