"""Reports in a real browser: no errors, no requests, keyboard, values under the pointer, themes, phones, and large networks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import browser
import geta
import nets
import page_nets
import run_folders
from geta.report.run_files import analysis_files
from geta.report.run_report import write_report

LARGE = {
    "demo": lambda: geta.analyze(*nets.resnet20("conv")),
    "vit": lambda: geta.analyze(*nets.vit()),
    "llama": lambda: geta.analyze(*nets.llama_gqa()),
    "big": lambda: page_nets.big_graph(10_000),  # 1,000 layers
}


def large_run(folder: Path, small: Path, name: str) -> Path:
    """The run of `small`, but with the graph, the layers and the costs of a larger network."""
    shutil.copytree(small, folder)
    graph = LARGE[name]()
    for file, text in analysis_files(graph).items():
        (folder / file).write_text(text, encoding="utf-8")
    layers = list(dict.fromkeys(member.param.removesuffix(".weight") for family in graph.families for member in family.members))
    rows = [{"name": layer, "op": "linear", "macs": 16, "bops": 16 * 1024} for layer in layers]
    (folder / "costs.json").write_text(json.dumps({"dense": {"operations": rows}, "compact": {"operations": rows}}))
    result = json.loads((folder / "result.json").read_text())
    result["bits"] = {
        key: width for n, layer in enumerate(layers) for key, width in ((f"{layer}:input", 8), (f"{layer}.weight", 4 + n % 5))
    }
    result["kept"] = {family.name: family.size // 2 for family in graph.families if family.prunable}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder of run folders with their reports, and the page of a sweep."""
    root = tmp_path_factory.mktemp("reports")
    write_report(run_folders.small_run(root / "small"))
    write_report(
        run_folders.write_run(root / "hostile", run_folders.hostile_net(), (torch.randn(2, 4),), name=run_folders.HOSTILE, saved=False)
    )
    for name in LARGE:
        write_report(large_run(root / name, root / "small", name))
    return root


@pytest.fixture(scope="module")
def chrome(tmp_path_factory) -> Iterator[Chrome]:
    with browser.started(tmp_path_factory.mktemp("profile"), ("browser", "performance")) as found:
        yield found


@pytest.fixture
def show(chrome, pages):
    """Open a report in a window of the given size and colour scheme; afterwards nothing was requested and nothing went wrong in it."""

    def opened(name: str, width: int = 1280, height: int = 800, scheme: str = "light") -> Chrome:
        browser.visit(chrome, (pages / name / "report.html"), (width, height), scheme)
        chrome.execute_script("try { localStorage.clear() } catch { }")
        return chrome

    for kind in ("browser", "performance"):
        chrome.get_log(kind)
    yield opened
    assert [entry for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith("file://") or not url.endswith("/report.html")] == []


def background(page: Chrome) -> tuple[int, ...]:
    text = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in text[text.index("(") + 1 : -1].split(","))


def open_graph(page: Chrome) -> None:
    page.find_element(By.ID, "open-graph").click()
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "#graph-frame iframe"))


def test_structure_of_the_page(show):
    page = show("small")
    assert page.find_element(By.TAG_NAME, "h1").text == "small"
    assert [h.tag_name for h in page.find_elements(By.CSS_SELECTOR, "h1, h2")] == ["h1"] + ["h2"] * 11
    assert "98.61" in page.find_element(By.CSS_SELECTOR, ".tiles").text
    assert all(svg.get_attribute("aria-label") for svg in page.find_elements(By.CSS_SELECTOR, "svg"))
    for link in page.find_elements(By.CSS_SELECTOR, "nav a"):
        assert page.execute_script("return document.querySelector(arguments[0])", "#" + str(link.get_attribute("href")).partition("#")[2])


def test_hostile_names_are_shown_as_text(show):
    page = show("hostile")
    assert page.find_element(By.TAG_NAME, "h1").text == run_folders.HOSTILE
    assert run_folders.HOSTILE in page.find_element(By.ID, "groups").text
    assert page.find_elements(By.TAG_NAME, "img") == []
    plot = page.find_element(By.CSS_SELECTOR, "#bits .wide svg")
    plot.send_keys(Keys.HOME)
    assert run_folders.HOSTILE in page.find_element(By.ID, "tip").text
    open_graph(page)
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert run_folders.HOSTILE in page.find_element(By.ID, "families").text
    page.switch_to.default_content()


def test_values_under_the_pointer_and_by_keys(show):
    page = show("small")
    plot = page.find_element(By.CSS_SELECTOR, ".wide svg[data-chart=score]")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    page.execute_script(
        "const b = arguments[0].getBoundingClientRect(); arguments[0].dispatchEvent(new PointerEvent('pointermove', "
        "{clientX: b.left + b.width * 0.6, clientY: b.top + 40, bubbles: true}))",
        plot,
    )
    tip = page.find_element(By.ID, "tip")
    assert "epoch 11, joint" in tip.text and "dense" in tip.text and "compact" in tip.text
    plot.send_keys(Keys.END)
    assert "epoch 20, cool-down" in tip.text and "98.61 %" in tip.text
    plot.send_keys(Keys.ARROW_LEFT)
    assert "epoch 19" in tip.text
    plot.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_the_keyboard_reaches_charts_buttons_and_the_graph(show):
    page = show("small")
    seen = []
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(page.execute_script("const e = document.activeElement; return e.id || e.dataset.chart || e.dataset.copy || e.tagName"))
        outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", seen[-1]
        if seen[-1] == "open-graph":
            break
    assert {"theme", "loss", "score", "groups", "bits", "layers", "open-graph"} <= set(seen)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "#graph-frame iframe"))
    assert page.find_element(By.TAG_NAME, "h1").text == "Net"
    page.switch_to.default_content()


def test_tiles_count_macs_or_bops(show):
    page = show("small")
    panels = {kind: page.find_element(By.CSS_SELECTOR, f"[data-panel={kind}]") for kind in ("bops", "macs")}
    assert panels["bops"].is_displayed() and not panels["macs"].is_displayed()
    button = page.find_element(By.CSS_SELECTOR, "[data-show=macs]")
    button.send_keys(Keys.ENTER)
    assert panels["macs"].is_displayed() and not panels["bops"].is_displayed()
    assert button.get_attribute("aria-pressed") == "true"


def test_copying(show):
    page = show("small")
    page.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.find_element(By.CSS_SELECTOR, "[data-copy=recipe]").send_keys(Keys.ENTER)
    assert page.execute_script("return window.copied") == (run_folders.RECIPE.format(name='"small"', sparsity=0.5).rstrip("\n"))
    assert page.find_element(By.CSS_SELECTOR, "[data-copy=recipe]").text == "Copied"


def test_light_dark_and_the_button(show):
    assert min(background(show("small", scheme="light"))) > 230
    page = show("small", scheme="dark")
    assert max(background(page)) < 60
    open_graph(page)
    assert max(background(page)) < 60
    page.switch_to.default_content()
    button = page.find_element(By.ID, "theme")
    button.click()
    assert button.text == "Light" and min(background(page)) > 230
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "#graph-frame iframe"))
    assert min(background(page)) > 230  # the graph follows
    assert page.execute_script("return isDark()") is False
    page.switch_to.default_content()
    page.refresh()
    assert page.find_element(By.ID, "theme").text == "Light" and min(background(page)) > 230  # remembered


@pytest.mark.parametrize("name", ["small", "hostile", "big"])
def test_a_phone_shows_the_page_without_sideways_scrolling(show, name):
    page = show(name, width=375, height=740)
    assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [375, 375]
    shown = [svg.size for svg in page.find_elements(By.CSS_SELECTOR, "svg") if svg.is_displayed()]
    assert len(shown) >= 7
    assert all(size["width"] >= 300 for size in shown)
    small = page.execute_script("""return [...document.querySelectorAll("svg text")].filter((e) => e.getClientRects().length)
        .filter((e) => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a < 10.5).length""")
    assert small == 0


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_open_fast_and_stay_small(show, pages, name):
    assert (pages / name / "report.html").stat().st_size < 5_000_000
    times = []
    for _ in range(3):
        start = time.perf_counter()
        page = show(name)
        assert page.execute_script("return document.readyState") == "complete"
        times.append(time.perf_counter() - start)
    assert min(times) < 2
    families = len(json.loads((pages / name / "analysis.json").read_text())["families"])
    open_graph(page)
    assert page.execute_script("return [data.nodes.length > 20, data.families.length]") == [True, families]
    page.switch_to.default_content()
    if name == "big":
        assert page.execute_script("return charts.layers.x.length") == 1999  # weights and biases, without the last one
