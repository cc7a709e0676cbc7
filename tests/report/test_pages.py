"""Report, card and tables: complete, escaped, offline, and the same for the same manifest."""

from __future__ import annotations

import ast
import re
from html.parser import HTMLParser

import pytest
import yaml

from flyweight.artifact import FileEntry, Manifest, StepRecord, Verdict
from flyweight.report.card import card
from flyweight.report.html import html
from flyweight.report.table import compare_table, table
from sample_manifest import figure, make, measurements

VOID = {"meta", "br", "link", "img", "hr", "input"}
EVIL = '<script>alert("x")</script>&`|'


class Checker(HTMLParser):
    """Tags close in order; ids are unique; collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_fetches_nothing(manifest: Manifest) -> None:
    page = html(manifest, "flyweight: 1\n")
    checker = checked(page)
    assert checker.fetched == []
    assert "script" not in checker.tags
    assert not re.search(r"https?://|url\(|@import", page)
    assert checker.tags.count("svg") >= 8
    assert page == html(manifest, "flyweight: 1\n")


def test_the_page_tells_every_figure_with_interval_and_method(manifest: Manifest) -> None:
    page = html(manifest)
    for figures in manifest.measurements.values():
        for key in figures:
            assert f'title="{key}"' in page
    for text in ("83.4", "81.6 to 85.1", "-0.5 points", "interleaved rounds", "n = 1696", "7.69x less than torch fp32",
                 "estimated: CPU time", "finetune", "control without the teacher 82.1 %", "avx512_vnni"):  # fmt: skip
        assert text in page, text
    assert manifest.verdict is not None
    assert manifest.verdict.text in page


def test_pages_do_not_tell_their_own_hash(manifest: Manifest) -> None:
    """Else writing the page would change the page."""
    files = dict(manifest.files)
    files["report.html"] = files["README.md"] = FileEntry(sha256="cd" * 32, bytes=99)
    other = manifest.model_copy(update={"files": files})
    assert html(other) == html(manifest)
    assert card(other) == card(manifest)


def empty() -> Manifest:
    return make(measurements={}, verdict=None, steps=(), environment={}, files={}, versions={}, engines={}, labels=None,
                blocks={}, quantized={})  # fmt: skip


def test_an_empty_manifest_says_what_is_missing() -> None:
    page = html(empty())
    assert "svg" not in checked(page).tags
    for text in ("No verdict", "Quality was not measured", "Latency was not measured", "Nothing was measured"):
        assert text in page
    assert "Nothing was measured" in card(empty())
    assert table(empty())


def strange() -> Manifest:
    figures = measurements()
    figures[EVIL] = figures.pop("reference_torch")
    figures["result"]["bytes"] = figure(3, "B")
    figures["result"]["latency_ms.p50@1x128"] = figure(2e-3, "ms")
    figures[EVIL]["latency_ms.p50@1x128"] = figure(9e5, "ms")
    notes = {"history": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.5}, "?"], "after": {"bytes": 1, "quality": EVIL},
             "control": EVIL, "best_metric": None}  # fmt: skip
    record = StepRecord(
        name=EVIL, settings={EVIL: EVIL, "unlabelled": "/home/somebody/texts.jsonl"}, seconds=4000, notes=notes
    )
    return make(measurements=figures, labels=(EVIL, "b"), steps=(record,), environment={EVIL: [EVIL]},
                verdict=Verdict(accepted=False, text=EVIL), files={EVIL: FileEntry(sha256="0", bytes=1)})  # fmt: skip


def test_everything_is_escaped_and_huge_ranges_fit() -> None:
    page = html(strange(), EVIL)
    assert "script" not in checked(page).tags
    assert "&lt;script&gt;" in page
    assert "1 h 6 min" in page
    assert "nan" not in page.lower().replace("finance", "")
    without_code = re.sub(r"```.*?```|`+ .*? `+|`[^`\n]*`", "", card(strange()), flags=re.S)
    assert "<script>" not in without_code


def test_folders_of_the_maker_stay_private() -> None:
    for text in (html(strange()), card(strange())):
        assert "somebody" not in text
        assert "texts.jsonl" in text


def test_the_card_is_markdown_with_a_yaml_head(manifest: Manifest) -> None:
    text = card(manifest)
    _, head, body = text.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["pipeline_tag"] == "text-classification"
    assert {"flyweight", "int8", "pruned", "onnxruntime"} <= set(fields["tags"])
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) > 20
    for text in ("No row of the data", "licence", manifest.origin, "flyweight predict", "6 min 52 s"):
        assert text in body


def test_the_card_has_python_that_compiles(manifest: Manifest) -> None:
    for made in (manifest, strange(), make(labels=None)):
        snippet = re.search(r"```python\n(.*?)```", card(made), re.S)
        assert snippet
        ast.parse(snippet[1])


def test_the_table_has_all_models_and_the_verdict(manifest: Manifest) -> None:
    text = table(manifest, width=150, color=False)
    assert "\x1b" not in text
    for part in (
        "torch fp32",
        "onnxruntime fp32",
        "result",
        "7.70x faster (7.55 to 7.85)",
        "-0.5 points (-1.7 to +0.7)",
        "Accepted",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 150
    narrow = table(manifest, width=80, color=False)
    assert "to 7.85" not in narrow
    assert "\x1b[" in table(manifest, width=150, color=True)


def test_a_slower_result_is_not_called_faster(manifest: Manifest) -> None:
    figures = measurements()
    figures["result"]["speedup.reference_torch@1x128"] = figure(0.5, "x")
    row = next(line for line in table(make(measurements=figures), 150, False).splitlines() if "p50 1x128" in line)
    assert "2.00x slower (1.96 to 2.04)" in row


@pytest.mark.parametrize(("key", "best"), [("throughput 32x128", "result"), ("size on disk", "result")])
def test_compare_marks_the_best(key: str, best: str) -> None:
    found = measurements()
    lines = compare_table(found, width=150, color=False).splitlines()
    row = next(line for line in lines if line.startswith(key))
    cells = [cell.strip() for cell in row.split("│")][1:]
    assert [cell.endswith("*") for cell in cells] == [name == best for name in found]


def test_compare_says_what_it_cannot_tell_apart() -> None:
    rows = compare_table(measurements(), width=150, color=False).splitlines()
    accuracy = next(line for line in rows if line.startswith("accuracy"))
    assert [cell.strip()[-1] for cell in accuracy.split("│")[1:]] == ["*", "~", "~"]


def test_compare_with_gaps() -> None:
    found = measurements()
    del found["result"]["peak_memory_bytes"]
    row = next(line for line in compare_table(found, 150, False).splitlines() if line.startswith("peak"))
    assert row.split("│")[-1].strip() == "-"


def test_only_packed_weights_are_called_packed() -> None:
    """Pruned heads leave shapes that a config cannot say, in plain floats."""
    cut = make(plain=False, quantized={}, sparse={})
    assert "packed" not in card(cut).partition("## ")[0]
    assert "shapes that no config can say" in card(cut)
    assert "packed in Flyweight" in card(make(plain=False, sparse={"x": "unstructured"}))


def test_the_card_says_where_rows_of_the_data_are(manifest: Manifest) -> None:
    assert "No row of the data" in card(manifest)
    assert "No row of the data" not in card(manifest, samples=True)
    assert "`report.html` shows rows of the evaluation data" in card(manifest, samples=True)


def test_the_card_s_own_python_is_exact_on_every_processor(manifest: Manifest) -> None:
    """As the engine is opened here; without it int8 sums saturate where the CPU has no VNNI."""
    assert "x64quantprecision" in card(manifest)


GATE = {
    "told": "1 of 3 layers fell back.",
    "verdict": "Accepted: accuracy 83.4 against 83.9 of the reference.",
    "held": True,
    "metric": "accuracy",
    "layers": [
        {
            "layer": "encoder.layer.2.output.dense",
            "linears": ["encoder.layer.2.output.dense"],
            "was": "4 bits",
            "output_error": 0.0625,
            "metric_change": 0.034,
            "became": "8 bits, inputs in float",
        },
        {
            "layer": "encoder.layer.0.attention.self.query",
            "linears": ["encoder.layer.0.attention.self.query", "b", "c"],
            "was": "4 bits",
            "output_error": 0.0001,
            "metric_change": None,
            "became": "kept",
        },
        {
            "layer": "x<b>",
            "linears": ["x"],
            "was": "8 bits",
            "output_error": None,
            "metric_change": 0,
            "became": "kept",
        },
    ],
}
MIXED = {
    "budget": 4.0,
    "bits_per_weight": 3.9876,
    "layers": [{"layer": "encoder.layer.0.output.dense", "bits": 3, "error": 0.0004}],
}


def with_notes(**notes: object) -> Manifest:
    made = make()
    last = made.steps[-1]
    return make(steps=(*made.steps[:-1], last.model_copy(update={"notes": {**last.notes, **notes}})))


def test_fallbacks_are_told_layer_by_layer() -> None:
    page = html(with_notes(gate=GATE, mixed=MIXED, peak_memory_bytes=812_000_000))
    checked(page)
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page, re.DOTALL)
    found = {row.partition("</th>")[0]: re.findall(r"<td>(.*?)</td>", row) for row in rows}
    assert found["encoder.layer.2.output.dense"] == ["4 bits", "25.00 %", "+3.4 points", "8 bits, inputs in float"]
    assert found["encoder.layer.0.attention.self.query and 2 more"] == ["4 bits", "1.00 %", "-", "kept"]
    assert found["x&lt;b&gt;"][1] == "-"
    assert found["encoder.layer.0.output.dense"] == ["3", "2.00 %"]
    assert "1 of 3 layers fell back. Accepted: accuracy 83.4" in page
    assert "3.988 bits a weight, scales included; 4 were allowed. Each alone" in page
    over = html(with_notes(gate=GATE, mixed=MIXED | {"over_budget": 12345}))
    assert "4 were allowed: 12,345 bytes more than the budget, as the acceptance rule came first. Each alone" in over
    kept = {**GATE, "layers": [{**row, "became": "kept"} for row in GATE["layers"]]}
    alone = html(with_notes(gate=kept, mixed=MIXED | {"over_budget": 12345}))
    assert "4 were allowed: 12,345 bytes more than the budget. Each alone" in alone
    whole = html(with_notes(gate=GATE, mixed=MIXED | {"over_budget": 99, "megabytes": 0.0591, "max_megabytes": 0.059}))
    assert (
        "scales included. All weights take 0.0591 MB; 0.059 were allowed: 99 bytes more than the budget, as the "
        "acceptance rule came first. Each alone" in whole
    )
    assert "at most 812 MB of memory" in page
    text = card(with_notes(gate=GATE))
    assert "Fallen back: encoder.layer.2.output.dense to 8 bits, inputs in float." in text
    assert "Gate on the validation examples: 1 of 3 layers fell back. Accepted: accuracy 83.4" in text
    assert "Accuracy gate" not in html(make())


def test_time_of_a_resumed_step_says_so() -> None:
    assert "since it went on" in html(with_notes(resumed=True))
    assert "since it went on" in card(with_notes(resumed=True))
    assert "since it went on" not in html(make()) + card(make())


def test_a_gate_that_was_left_out_is_told() -> None:
    made = with_notes(gate={"told": "Left out: there were no validation examples."})
    assert "Left out: there were no validation examples." in html(made)
    assert "Gate on the validation examples: Left out" in card(made)
