"""Reports without a browser: what the page, the Markdown and the JSON say, how charts are built, comparisons and sweeps."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import run_folders
from geta.cli.main import main
from geta.errors import ConfigError, GetaError
from geta.report import words
from geta.report.charts import pareto_front
from geta.report.comparison import read_comparison
from geta.report.markup import Html, breakable, tag
from geta.report.run_facts import headlines, pareto
from geta.report.run_files import read_run
from geta.report.run_report import write_report
from geta.report.scales import Scale, around
from geta.report.treemap import Box, squarify

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "report.md"


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = run_folders.small_run(tmp_path_factory.mktemp("runs") / "small")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    run_folders.write_run(folder, run_folders.hostile_net(), (torch.randn(2, 4),), name=run_folders.HOSTILE, saved=False)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    return run_folders.sweep(tmp_path_factory.mktemp("sweeps") / "sweep", (0.3, 0.7))


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag_: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag_, dict(attrs)))
        if tag_ not in ("meta", "wbr", "br", "input"):
            self.open.append(tag_)

    def handle_endtag(self, tag_: str) -> None:
        if not self.open or self.open.pop() != tag_:
            self.wrong.append(tag_)


def test_three_files_are_written(complete):
    assert [(complete / f"report.{kind}").stat().st_size > 1000 for kind in ("html", "md", "json")] == [True] * 3
    assert [path.name for path in complete.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["complete", "hostile"])
def test_the_page_is_well_formed_and_asks_for_nothing(request, name):
    text = (request.getfixturevalue(name) / "report.html").read_text()
    page = Elements(text)
    assert page.wrong == [] and page.open == []
    assert [found for found in page.found if {"src", "srcset"} & set(found[1]) or found[0] in ("link", "img", "iframe", "object")] == []
    assert all(str(values["href"]).startswith("#") for _, values in page.found if "href" in values)
    assert "@import" not in text and "url(" not in text
    assert any("default-src 'none'" in str(values.get("content")) for _, values in page.found)
    anchors = [str(values["id"]) for _, values in page.found if "id" in values]
    assert len(anchors) == len(set(anchors))
    assert {str(values["href"])[1:] for kind, values in page.found if kind == "a"} <= set(anchors)


def test_hostile_names_stay_text(hostile):
    text = (hostile / "report.html").read_text()
    assert "onerror" in text
    assert "<img" not in text
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", (hostile / "report.md").read_text(), flags=re.DOTALL)
    assert re.findall(r"(?<!\\)<", outside_code) == []
    assert json.loads((hostile / "report.json").read_text())["name"] == run_folders.HOSTILE


def test_every_part_is_on_the_page(complete):
    text = (complete / "report.html").read_text()
    headings = re.findall(r'<h2 id="([\w-]+)-heading">', text)
    assert headings == ["headline", "notes", "pareto", "training", "bits", "groups", "costs", "latency", "not-pruned", "graph", "reproduce"]
    assert "98.61\u00a0%" in text and "\u22120.28\u00a0points" in text
    assert "a note with &lt;b&gt;markup&lt;/b&gt; in it" in text
    assert "it reaches the model output" in text
    assert all(f"stage-{stage}" in text for stage in ("warm-up", "projection", "joint", "cool-down"))
    assert "geta compress recipe.yaml train.seed=0" in text and "weight_bits: [4, 8]" in text


def documented_keys(record: dict) -> list[str]:
    """Keys as docs/report.md writes them, down to where keys are names of the user's."""
    found = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found += [f"{key}[]", *(f"{key}[].{inner}" for inner in value[0])]
        else:
            found += [key, *(f"{key}.{inner}" for inner in (value if key == "metric" else ()))]
    return found


def test_the_json_says_the_same_and_is_documented(complete):
    record = json.loads((complete / "report.json").read_text())
    assert (record["format"], record["kind"], record["name"]) == (1, "run", "small")
    assert {row["key"]: row["compact"] for row in record["headline"]}["params"] == 355
    assert [group["kept"] for group in record["groups"]] == [4, 3]
    assert record["missed"] == []
    documented = re.findall(r"^\| `([\w.\[\]]+)` \|", DOCUMENT.read_text().partition("## report.json")[2], flags=re.MULTILINE)
    assert sorted(documented) == sorted({key for key in documented_keys(record) if key.count(".") < 2})


def test_the_markdown_says_the_same(complete):
    text = (complete / "report.md").read_text()
    assert "| parameters | 1,138 | 355 | 31.2 % |" in text
    assert "| `body.0` | 3 | 6 | channels |" in text
    assert "```yaml\nversion: 1" in text


def test_missed_targets_and_failed_checks_come_first(complete, tmp_path):
    folder = Path(shutil.copytree(complete, tmp_path / "run"))
    data = json.loads((folder / "result.json").read_text())
    data["groups"]["target_groups"], data["reloaded_equal"], data["max_rel_difference"] = 9, False, 0.5
    (folder / "result.json").write_text(json.dumps(data))
    page = write_report(folder)[0].read_text()
    assert "Missed targets and notes" in page
    assert "7 groups were removed, 9 were wanted" in page
    assert "loaded again" in page and "5.0e-01" in page


def test_a_run_without_baseline_latency_or_graph(complete, tmp_path):
    folder = Path(shutil.copytree(complete, tmp_path / "run"))
    data = json.loads((folder / "result.json").read_text())
    data["metric"] |= {"dense": None, "difference": None}
    data["latency_ms"] = {}
    (folder / "result.json").write_text(json.dumps(data))
    (folder / "graph.json").unlink()
    (folder / "history.jsonl").write_text("")
    page = write_report(folder)[0].read_text()
    assert "no dense baseline" in page
    headings = re.findall(r'<h2 id="([\w-]+)-heading">', page)
    assert not {"latency", "graph", "training"} & set(headings)


def test_a_graph_that_is_too_large_is_left_out_and_said_so(complete, monkeypatch):
    monkeypatch.setattr("geta.report.run_report.LARGEST_GRAPH", 100)
    monkeypatch.setattr("geta.report.page_sections.LARGEST_GRAPH", 100)
    page = write_report(complete, complete / "other.html")[0].read_text()
    assert "too large for this file" in page
    assert "graph-data" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_a_saved_model_alone_gets_its_report_beside_the_folder(complete, capsys):
    assert main(["report", str(complete / "compact")]) == 0
    assert (complete / "compact-report.html").exists()
    assert sorted(path.name for path in (complete / "compact").iterdir()) == ["manifest.json", "model.json.gz", "model.safetensors"]
    assert "saved compact model alone" in (complete / "compact-report.html").read_text()
    assert json.loads((complete / "compact-report.json").read_text())["kind"] == "model"


def test_the_command_writes_where_it_is_told(complete, tmp_path, capsys):
    assert main(["report", str(complete), "--out", str(tmp_path / "new" / "a.html")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.html", "a.json", "a.md"]
    assert capsys.readouterr().out.count("wrote ") == 3
    assert main(["report", str(complete), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((complete / "report.json").read_text())


def test_bad_arguments_and_places(complete, tmp_path, capsys):
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(complete), "--out", str(tmp_path / "a.pdf")]) == 2
    assert main(["report", str(complete), str(complete)]) == 2
    (tmp_path / "file").write_text("")
    assert main(["report", str(complete), "--out", str(tmp_path / "file" / "a.html")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unwritable_folder_is_an_error(complete, tmp_path, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("geta.report.writing.write_atomically", full)
    with pytest.raises(GetaError, match="No space left on device"):
        write_report(complete, tmp_path / "a.html")


def test_two_runs_side_by_side(swept, tmp_path, capsys):
    folders = [swept / "sparsity=0.3", swept / "sparsity=0.7"]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "ab.html")]) == 0
    page = (tmp_path / "ab.html").read_text()
    assert "Side by side" in page and "compress.sparsity" in page
    assert page.count('class="line compact"') and page.count('class="line compact line-2"')
    record = json.loads((tmp_path / "ab.json").read_text())
    assert record["kind"] == "comparison"
    assert {"key": "compress.sparsity", "values": {"sparsity=0.3": 0.3, "sparsity=0.7": 0.7}} in record["differing"]
    capsys.readouterr()
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "ab.html"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == record


def test_a_sweep_draws_the_front_and_names_what_is_missing(swept, tmp_path, capsys):
    folder = Path(shutil.copytree(swept, tmp_path / "sweep"))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert 'class="line front"' in page and "the front of the sweep over compress.sparsity" in page
    (folder / "sparsity=0.3" / "result.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert "left out: sparsity = 0.3" in capsys.readouterr().err
    assert "not complete" in (folder / "report.html").read_text()
    (folder / "sparsity=0.7" / "result.json").unlink()
    assert main(["report", str(folder)]) == 1


def test_a_run_of_a_sweep_shows_the_others(swept):
    page = write_report(swept / "sparsity=0.7")[0].read_text()
    assert "sparsity = 0.3" in page and "the front of the sweep" in page


def test_one_run_is_no_comparison(complete):
    with pytest.raises(ConfigError, match="no sweep"):
        read_comparison([complete])


def test_points_of_other_metrics_do_not_share_an_axis(complete, tmp_path):
    folder = Path(shutil.copytree(complete, tmp_path / "run"))
    data = json.loads((folder / "result.json").read_text())
    data["metric"]["name"] = "PSNR"
    (folder / "result.json").write_text(json.dumps(data))
    points = pareto({"a": read_run(complete), "b": read_run(folder)})
    assert [point.label for point in points] == ["dense", "a", "published"]


def test_the_front():
    points = [(1.0, 99.0), (0.5, 98.0), (0.4, 98.5), (0.1, 90.0), (0.1, 90.0)]
    assert pareto_front(points, higher_is_better=True) == [True, False, True, True, True]
    assert pareto_front(points, higher_is_better=False) == [False, False, False, True, True]


def test_headlines_of_a_run(complete):
    rows = {row.key: row for row in headlines(read_run(complete))}
    assert list(rows) == ["metric", "params", "macs", "bops", "weight_bytes", "folder_bytes", "groups", "weight_bits"]
    assert rows["groups"].texts == ("14", "7", "50.0\u00a0%")
    assert rows["weight_bits"].texts[1:] == ("4 to 7", "mean 5.50")


@pytest.mark.parametrize("values", [[5.0], [6, 6, 4, 3, 2, 2, 1], [1.0] * 50, [1000, 1, 1e-6]])
def test_a_treemap_fills_its_box_with_areas_in_proportion(values):
    box = Box(10, 20, 300, 170)
    found = squarify(values, box)
    assert len(found) == len(values)
    for value, place in zip(values, found, strict=True):
        assert place.width * place.height == pytest.approx(value / sum(values) * 300 * 170, rel=1e-6)
        assert place.x > 10 - 1e-6 and place.x + place.width < 310 + 1e-6
        assert place.y > 20 - 1e-6 and place.y + place.height < 190 + 1e-6
    for number, one in enumerate(found):
        for two in found[number + 1 :]:
            wide = min(one.x + one.width, two.x + two.width) - max(one.x, two.x)
            tall = min(one.y + one.height, two.y + two.height) - max(one.y, two.y)
            assert min(wide, tall) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0103, 0.0107), (-5, 12345), (98.1, 99.2), (3, 3)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_on_the_axis(low, high, log):
    if log and low <= 0:
        low = 1e-4
    scale = Scale(*around([low, high], log=log), 0, 100, log)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert [scale(tick) for tick in ticks] == sorted(scale(tick) for tick in ticks)
    assert all(math.isfinite(scale(tick)) for tick in ticks)


def test_whole_ticks_are_whole():
    assert Scale(0, 8.5, 0, 100).ticks(whole=True) == [0, 4, 8]
    assert Scale(0, 1.2, 0, 100).ticks(whole=True) == [0, 1]


def test_markup_escapes_what_is_no_markup():
    assert tag("td", "<b>", Html("<i>"), class_='a"b', hidden=False, x=1.50) == '<td class="a&quot;b" x="1.5">&lt;b&gt;<i></td>'
    assert breakable("a.<b>.c") == "a.<wbr>&lt;b&gt;.<wbr>c"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (words.count(1234567), "1,234,567"),
        (words.count(2_593_783_808), "2.59 G"),
        (words.size(45_713), "45.7 kB"),
        (words.percent(0.0152), "1.52 %"),
        (words.difference(-0.37, "%"), "\u22120.37 points"),
        (words.score(None, "%"), "\u2013"),
        (words.duration(3725), "1 h 2 min"),
        (words.plural(1, "family", "families"), "1 family"),
    ],
)
def test_numbers_in_words(made, text):
    assert made.replace("\u00a0", " ") == text
