"""The table of structure: what is asked of the commands, what is told of several rows, the page and its drawing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import runner, structure, tuned
from benchmarks.command import BESIDE, Other
from benchmarks.models import MINILM, MPNET, Model
from benchmarks.runner import Job, pack_scores
from benchmarks.structure import aims, chart, large, rows, zeros
from benchmarks.structure.asks import ASKS, CURVE, SPEEDUPS, STAGES, VOCABULARY, Ask, curve_key, row_name
from benchmarks.structure.found import Found
from benchmarks.table import STAR
from flyweight.recipe import Recipe, check_order
from flyweight.settings import DistillSettings, PruneSettings, TeacherSettings

EVERY = {f"{ask.model.key}-{ask.key}": ask for ask in ASKS}
TABLE = structure.TABLE


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    return tmp_path


def job_of(ask: Ask, places: Path, trial: bool = False) -> Job:
    return Job("structure", ask.row(0), 0, places / "work" / "structure" / ask.row(0), trial)


def asked(verb: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe that the command line makes of it, by its own parser."""
    from flyweight.cli import commands, compress

    taken: list[Recipe] = []
    monkeypatch.setattr(compress, "execute", lambda recipe, *rest: taken.append(recipe))
    command = typer.main.get_command(commands.app)
    with command.make_context("flyweight", [verb, *arguments, "--out", "out"]) as context:
        command.invoke(context)
    return taken[0]


@pytest.mark.parametrize("trial", [False, True])
@pytest.mark.parametrize("name", sorted(EVERY))
def test_flags_are_understood_and_go_together(
    name: str, trial: bool, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, here = EVERY[name], Model("minilm", "all-MiniLM-L6-v2", lambda: places / "minilm")
    monkeypatch.setattr(rows, "MINILM", here)
    monkeypatch.setattr(runner, "result_path", lambda table, row: places / "none.json")
    flags = [
        str(flag.path) if isinstance(flag, Other) else flag for flag in rows.arguments(ask, job_of(ask, places, trial))
    ]
    recipe = asked(ask.verb, ["model", "--train", "train.jsonl", *flags], monkeypatch)
    check_order(recipe.steps)
    step = recipe.steps[0]
    assert step.name == ask.verb
    if ask.total is not None:
        assert isinstance(step.settings, PruneSettings)
        assert step.settings.speedup == pytest.approx(rows.SPARE * ask.total, abs=0.006)
    if isinstance(step.settings, TeacherSettings) and "{reference}" in ask.flags:
        assert step.settings.teacher == str(tuned.folder(ask.model, 0))


@pytest.mark.parametrize("key", sorted(large.WAYS))
def test_flags_of_the_large_model(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, verb, flags, _ = large.WAYS[key]
    recipe = asked(verb, ["model", "--train", "train.jsonl", *flags.split()], monkeypatch)
    assert recipe.steps[0].name == verb


def test_a_student_and_its_control_differ_by_the_teacher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("3l", "2l", "1l", "half"):
        pair = [EVERY[f"minilm-{name}"] for name in (key, f"{key}-alone")]
        taught, alone = (asked(ask.verb, ["model", *ask.flags.split()], monkeypatch).steps[0].settings for ask in pair)
        assert isinstance(taught, DistillSettings)
        assert isinstance(alone, DistillSettings)
        assert alone.alpha == 0
        same = {"alpha": taught.alpha, "hidden_weight": taught.hidden_weight}
        assert alone.model_copy(update=same) == taught
        assert pair[0].control == f"minilm-{key}-alone"


def test_rows_come_after_what_they_need_and_take_half_an_hour() -> None:
    names = [row.name for row in TABLE.rows]
    assert len(set(names)) == len(names)
    for number, row in enumerate(TABLE.rows):
        assert set(row.needs) <= set(names[:number]), row.name
        assert row.minutes <= 30 or "cofi" in row.name  # which stops by itself and goes on
        assert row.on_request or not any(need.startswith("mpnet") for need in row.needs)
    assert rows.needs(EVERY["mpnet-4x-2"], 0) == ("mpnet-fp32-s0", "mpnet-4x-1-s0")
    assert rows.needs(EVERY["minilm-3l-two"], 2) == ("minilm-fp32-s2", "mpnet-fp32-s0")
    assert rows.needs(EVERY["mpnet-to-minilm"], 2) == ("mpnet-fp32-s0",)
    assert {ask.control for ask in ASKS if ask.control} <= set(EVERY)


def test_what_others_begin_with_is_kept() -> None:
    begun = {row_name(ask.model, ask.start, 0) for ask in ASKS if ask.start} | set(zeros.KINDS.values())
    kept = {ask.row(0) for ask in ASKS if ask.kept}
    assert begun - kept == {row_name(MINILM, "plain", 0)}
    assert not any(ask.kept for ask in CURVE)  # 84 artifacts of MiniLM are more than ten gigabytes


def keep(row: str, figures: dict[str, Any] | None = None, scores: list[float] | None = None) -> dict[str, Any]:
    made = {
        key: {"unit": "", "method": "by hand", **(value if isinstance(value, dict) else {"value": value})}
        for key, value in (figures or {}).items()
    }
    record = {
        "row": row,
        "figures": made,
        "scores": None if scores is None else pack_scores(scores),
        "machine": {"cpu": "c", "cores": 2, "system": "s"},
        "versions": {},
        "seed": 0,
    }
    path = runner.result_path("structure", row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return record


def test_what_is_left_of_a_wish(places: Path) -> None:
    ask = EVERY["mpnet-10x-3"]
    keep("mpnet-10x-2-s0", {"speedup@1x128": 5.0})
    assert rows.left(ask, job_of(ask, places)) == pytest.approx(2 * rows.SPARE)
    assert rows.arguments(ask, job_of(ask, places))[-2:] == ["--speedup", "2.04"]
    keep("mpnet-10x-2-s0", {"speedup@1x128": 10.4})
    with pytest.raises(SystemExit, match=r"a start that is slower than 10x, got 10.40x"):
        rows.left(ask, job_of(ask, places))


def wrong(number: int, start: int = 0, of: int = 100) -> list[float]:
    return [0.0 if start <= i < start + number else 1.0 for i in range(of)]


def found_of(**given: list[float]) -> Found:
    return Found(
        {name.replace("_", "-"): {"figures": {}, "scores": pack_scores(scores)} for name, scores in given.items()}
    )


def test_differences_are_pooled_over_seeds_and_controls() -> None:
    student = EVERY["minilm-3l"]
    found = found_of(
        **{f"minilm_fp32_s{seed}": wrong(0) for seed in range(3)},
        **{f"minilm_3l_s{seed}": wrong(2, 10 * seed) for seed in range(3)},
        **{f"minilm_3l_alone_s{seed}": wrong(8, 10 * seed) for seed in range(2)},
    )
    drop, over = found.drop(student), found.over(student)
    assert drop is not None
    assert drop.value == pytest.approx(-0.02)
    assert drop.n == 3
    assert over is not None  # 8 - 2 wrong ones, under the two seeds that have a control
    assert over.value == pytest.approx(0.06)
    assert over.n == 2
    assert over.low is not None
    assert over.low > 0


def test_all_seeds_of_a_student_of_mpnet_are_told_against_its_one_reference() -> None:
    student = EVERY["mpnet-to-minilm"]
    found = found_of(mpnet_fp32_s0=wrong(1), **{f"mpnet_to_minilm_s{seed}": wrong(5 + seed) for seed in range(3)})
    drop = found.drop(student)
    assert drop is not None
    assert drop.value == pytest.approx(-0.05)  # 6 wrong on average, 1 of the reference
    assert found.seeds(student) == [0, 1, 2]


def test_an_aim_is_met_by_its_lower_bound_and_all_its_seeds() -> None:
    reference = {f"minilm_fp32_s{seed}": wrong(0) for seed in range(3)}
    same = {f"minilm_vocabulary_s{seed}": wrong(0) for seed in range(3)}
    worse = {f"minilm_vocabulary_s{seed}": wrong(2) for seed in range(3)}
    assert aims.within(found_of(**reference, **same), VOCABULARY, 0.5, "v").met is True
    assert aims.within(found_of(**reference, **worse), VOCABULARY, 0.5, "v").met is False
    assert aims.within(found_of(**reference, **worse), VOCABULARY, 6, "v").met is True
    same.popitem()
    few = aims.within(found_of(**reference, **same), VOCABULARY, 0.5, "v")
    assert few.met is None
    assert few.figure.endswith("(2 of 3 seeds)")


def test_above_and_not_below() -> None:
    student = EVERY["minilm-3l"]
    rows_of = {f"minilm_fp32_s{seed}": wrong(8) for seed in range(3)}
    rows_of |= {f"minilm_3l_s{seed}": wrong(8) for seed in range(3)}
    rows_of |= {f"minilm_3l_alone_s{seed}": wrong(20) for seed in range(3)}
    found = found_of(**rows_of)
    assert aims.not_below(found, student, "s").met is True
    assert aims.above(found.over(student), student, "s").met is True
    assert aims.above(found.drop(student), student, "s").met is False
    less = found_of(**{**rows_of, "minilm_3l_s1": wrong(9)})
    assert aims.not_below(less, student, "s").met is False


@pytest.mark.parametrize(("low", "met"), [(1.46, True), (1.45, False)])
def test_a_wish_is_met_by_its_lower_bound(low: float, met: bool, places: Path) -> None:
    record = keep("mpnet-1.5x-s0", {"speedup@1x128": {"value": 1.52, "low": low, "high": 1.6}, "prune.seconds": 301})
    found = Found({"mpnet-1.5x-s0": record})
    assert aims.at_wish(found, EVERY["mpnet-1.5x"], 1.5, "w").met is met
    seconds = next(line for line in aims.lines(found) if "seconds of the whole command" in line.what)
    assert seconds.verdict == "**not met**"


@pytest.mark.parametrize(("ratio", "met"), [(0.76, True), (1.24, True), (0.74, False), (1.26, False)])
def test_an_estimate_may_be_off_by_a_quarter(ratio: float, met: bool, places: Path) -> None:
    found = Found({"large-cosine": keep("large-cosine", {"memory_ratio": ratio})})
    line = next(one for one in aims.lines(found) if "layers by cosine: memory" in one.what)
    assert line.met is met


def test_times_of_a_busy_machine_are_marked(places: Path) -> None:
    busy, quiet = ({"method": f"wall clock{how}"} for how in (f"{BESIDE} 0.9 cores", ""))
    for key, how in (("fisher", busy), ("taylor", quiet)):
        told = {"step_seconds": {"value": 100, **how}, "seconds": {"value": 140, **how}, "estimated_seconds": 80}
        keep(
            f"large-{key}",
            {**{f"prune.{name}": one for name, one in told.items()}, "time_ratio": {"value": 1.25, **how}},
        )
    keep("mpnet-1.5x-s0", {"prune.seconds": {"value": 301, **busy}})
    page = structure.page.markdown(TABLE)
    assert "| 100\\* | 80 | 1.25 | – | – | – | 140\\* |" in page
    assert "| 100 | 80 | 1.25 | – | – | – | 140 |" in page
    aim = {line.what: line.figure for line in aims.lines(Found.of(TABLE))}
    assert aim[f"{large.TITLE}, heads + neurons by Fisher, linears solved: time / estimate"] == "1.25\\*"
    assert aim[f"{large.TITLE}, heads by Taylor: time / estimate"] == "1.25"
    assert aim[f"{MPNET.title}, 1.5x: seconds of the whole command"] == "301\\*"
    assert STAR in page


def test_page_of_nothing_and_of_a_failure(places: Path) -> None:
    page = structure.page.markdown(TABLE)
    assert "No row has been run yet." in page
    assert "svg" not in page
    assert all(line.verdict == "–" for line in aims.lines(Found({})))
    runner.keep_failure(TABLE, TABLE.row("mpnet-10x-s0"), 0, "stopped after 25 minutes")
    page = structure.page.markdown(TABLE)
    assert "- `mpnet-10x-s0`: stopped after 25 minutes" in page
    assert "| **10x, distilled and pruned**, 13 epochs in three stages (failed) |" in page


def test_page_tells_what_was_run(places: Path) -> None:
    keep("minilm-fp32-s0", {"bytes": 91e6}, wrong(20))
    figures = {"bytes": 47e6, "speedup@1x128": {"value": 1.93, "low": 1.9, "high": 1.96}, "distill.seconds": 412.4}
    keep("minilm-3l-s0", figures, wrong(18))
    keep("minilm-3l-alone-s0", {}, wrong(21))
    keep("bigram-bayes", {"quality.accuracy": 0.7}, wrong(30))
    row = row_name(MINILM, curve_key("linear", 2.0), 0)
    keep(row, {"speedup@1x128": 1.8}, wrong(25))
    candidate = f"{zeros.candidate('90 %', 'openvino')}:{zeros.faster('openvino')}@1x128"
    keep("zeros-latency", {candidate: 1.01})
    keep("large-fisher", {"prune.step_seconds": 100, "prune.estimated_seconds": 80, "time_ratio": 1.25})
    page = structure.page.markdown(TABLE).splitlines()
    cells = next(line for line in page if line.startswith("| **three layers**, distilled |")).split(" | ")
    assert cells[1] == "47.0"
    assert cells[2].startswith("82.0 [")
    assert cells[3].startswith("+2.00 [")
    assert cells[4].startswith("+3.00 [")
    assert cells[5:8] == ["0", "–", "1.93 [1.90, 1.96]"]
    assert cells[9] == "412 (–, –)"
    bayes = [line for line in page if line.startswith("| naive Bayes on words and pairs of words |")]
    assert "| 70.0 | –" in bayes[0]  # MPNet's reference was not run
    assert "| 70.0 | -10.00 [" in bayes[1]
    assert any(line.startswith("| + rearranged + linears solved | – | – | -5.00 [") for line in page)
    assert any(line.startswith("| 90 % | – | – | – | – | 1.01 ") for line in page)
    assert any("| 100 | 80 | 1.25 | – | – | – | – |" in line for line in page)
    assert f"![{chart.TITLE}](structure-curve.svg)" in page
    assert (runner.RESULTS / "structure-curve.svg").is_file()


def test_the_curve_is_drawn(places: Path) -> None:
    given = {"minilm-fp32-s0": {"figures": {}, "scores": pack_scores(wrong(0))}}
    for number, stage in enumerate(STAGES):
        for at, speedup in enumerate(SPEEDUPS):
            name = row_name(MINILM, curve_key(stage, speedup), 0)
            given[name] = {"figures": {}, "scores": pack_scores(wrong(number + at))}
    found = Found(given)
    lines = chart.points_of(found)
    assert [speedup for speedup, _ in lines["masks"]] == [1, *SPEEDUPS]
    assert [lost for _, lost in lines["masks"]] == pytest.approx([0, 3, 4, 5, 6])
    drawing = chart.drawn(found)
    assert drawing is not None
    root = ElementTree.fromstring(drawing)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert len(root.findall(f"{space}polyline")) == len(STAGES)
    written = [element.text for element in root.findall(f"{space}text")]
    assert [written.count(summary) for summary, _ in STAGES.values()] == [1] * len(STAGES)
    height = float(root.attrib["viewBox"].split()[3])
    assert max(float(element.attrib["y"]) for element in root.findall(f"{space}text")) < height
    assert len(CURVE) == len(STAGES) * len(SPEEDUPS)


def test_the_references_are_those_of_the_table_of_quantization(places: Path) -> None:
    from benchmarks.quantization import classes

    job = Job("quantization", "minilm-class-fp32-s1", 1, runner.WORK / "quantization" / "minilm-class-fp32-s1")
    assert rows.reference(MINILM, 1) == classes.reference(job, MINILM) == job.work / "artifact"
    assert rows.reference(MPNET, 2) == tuned.folder(MPNET, 0)
