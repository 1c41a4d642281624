"""The page of a dependency graph in a real browser: search, families, keyboard, phone, dark mode, and 5,000 operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from torch import nn

import browser
import geta
import page_nets


class Net(nn.Module):
    """Two prunable families, one that stays, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder with small.html (quantized), hostile.html and big.html (5,000 operators)."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    model = geta.quantize(Net(), weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[images])
    geta.analyze(model, (images,)).save_html(folder / "small.html")
    page_nets.hostile_graph().save_html(folder / "hostile.html")
    page_nets.big_graph(5000).save_html(folder / "big.html")
    return folder


@pytest.fixture(scope="module")
def chrome(tmp_path_factory) -> Iterator[Chrome]:
    with browser.started(tmp_path_factory.mktemp("profile"), ("browser",)) as found:
        yield found


@pytest.fixture
def show(chrome, pages):
    """Open a page in a window of the given size and colour scheme; afterwards nothing may have gone wrong in it."""

    def opened(name: str, width: int = 1280, height: int = 800, scheme: str = "light") -> Chrome:
        browser.visit(chrome, (pages / f"{name}.html"), (width, height), scheme)
        return chrome

    chrome.get_log("browser")
    yield opened
    assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def names(page: Chrome) -> list[str]:
    """The families that the table shows, from top to bottom."""
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#families .pick span:last-child") if cell.is_displayed()]


def status(page: Chrome) -> str:
    return page.find_element(By.ID, "status").text


def picture(page: Chrome) -> list[int]:
    """Per colour of the drawing, rounded to 16 steps a channel, how many pixels have it: [colour, count, ...], commonest first."""
    return page.execute_async_script(
        """const done = arguments[0];
        requestAnimationFrame(() => requestAnimationFrame(() => {
          const canvas = document.getElementById("drawing");
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, seen = new Map();
          for (let at = 0; at < pixels.length; at += 4) {
            const colour = (pixels[at] >> 4) * 256 + (pixels[at + 1] >> 4) * 16 + (pixels[at + 2] >> 4);
            seen.set(colour, (seen.get(colour) || 0) + 1);
          }
          done([...seen].sort((a, b) => b[1] - a[1]).flat());
        }));"""
    )


def brightness(colour: int) -> float:
    return (colour // 256 + colour // 16 % 16 + colour % 16) / 45


def find(page: Chrome, text: str) -> None:
    box = page.find_element(By.ID, "search")
    box.clear()
    box.send_keys(text)


def test_headline_and_table(show):
    page = show("small")
    assert page.find_element(By.TAG_NAME, "h1").text == "Net"
    tiles = {
        tile.find_element(By.TAG_NAME, "dt").text: tile.find_element(By.TAG_NAME, "dd").text
        for tile in page.find_elements(By.CSS_SELECTOR, "#tiles div")
    }
    assert tiles["families prunable"] == "2 of 4"
    assert tiles["prunable groups"] == "14"
    assert sorted(names(page)) == ["body.0", "head", "stem", "stem (inputs)"]
    assert "stays: it reaches the model output" in page.find_element(By.ID, "families").text
    assert "inserted branch" in page.find_element(By.ID, "legend").text
    assert len(picture(page)) > 10  # something is drawn


def test_legend_of_a_float_model_has_no_quantizers(show):
    legend = show("hostile").find_element(By.ID, "legend").text
    assert "model input or output" in legend and "quantizer" not in legend


def test_hostile_names_are_shown_as_text(show):
    page = show("hostile")
    assert page_nets.HOSTILE in names(page)
    find(page, "onerror")
    assert page_nets.HOSTILE in page.find_element(By.ID, "hits").text
    page.find_element(By.CSS_SELECTOR, "#hits button").click()
    assert page_nets.HOSTILE in page.find_element(By.ID, "details").text
    assert page.find_elements(By.TAG_NAME, "img") == []


def test_search_filters_families_and_operators(show):
    page = show("small")
    find(page, "body.0")
    assert status(page).startswith("2 of 4 families")  # its own, and the one whose units it reads
    hits = [hit.text for hit in page.find_elements(By.CSS_SELECTOR, "#hits button")]
    assert any(hit.startswith("conv2d") for hit in hits)
    find(page, "nowhere")
    assert names(page) == []
    assert page.find_element(By.ID, "no-families").is_displayed()
    page.find_element(By.ID, "clear").click()
    assert len(names(page)) == 4


def test_filter_and_sorting(show):
    page = show("small")
    page.find_element(By.CSS_SELECTOR, "#filter option[value=no]").click()
    assert sorted(names(page)) == ["head", "stem (inputs)"]
    page.find_element(By.CSS_SELECTOR, "#filter option[value=all]").click()
    by_size = page.find_element(By.CSS_SELECTOR, "th button[data-key=size]")
    by_size.click()
    assert names(page) == ["stem", "body.0", "head", "stem (inputs)"]
    assert by_size.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    by_size.click()
    assert names(page) == ["stem (inputs)", "head", "body.0", "stem"]


def test_clicking_a_family_highlights_its_operators_and_dims_the_rest(show):
    page = show("small")
    before = picture(page)
    page.find_elements(By.CSS_SELECTOR, "#families .pick")[names(page).index("body.0")].click()
    assert "body.0" in page.find_element(By.CSS_SELECTOR, "#details h3").text
    assert "operators: body.0" in status(page)
    flags = page.execute_script("return [...drawing.lit]")
    assert 3 <= sum(flags) < len(flags)
    assert page.execute_script(
        "return data.nodes.every((n) => n.families.some((f) => data.families[f].name === 'body.0') === (drawing.lit[n.place] === 1))"
    )
    assert picture(page) != before
    page.find_element(By.CSS_SELECTOR, "tbody.chosen .pick").click()
    assert page.execute_script("return drawing.lit") is None
    assert not page.find_element(By.ID, "details").is_displayed()


def test_clicking_an_operator_shows_it_and_its_links_jump(show):
    page = show("small")
    find(page, "aten::relu")
    page.find_element(By.CSS_SELECTOR, "#hits button").click()  # brings it to the middle of what the details leave free
    page.find_element(By.CSS_SELECTOR, "#details .close").click()
    page.execute_script("drawing.centre(data.nodes.find((n) => n.op === 'aten::relu').place)")
    page.find_element(By.ID, "drawing").click()  # the driver clicks the middle
    text = page.find_element(By.ID, "details").text
    assert all(part in text for part in ("aten::relu", "body.1", "6 \u00d7 8 \u00d7 8", "float32", "body.0 (6 channels)"))
    page.find_element(By.XPATH, "//aside//button[starts-with(., 'conv2d')]").click()
    assert (
        "body.0.weight" in page.find_element(By.ID, "details").text
        or "fake_quantize \u00b7 body.0" in page.find_element(By.ID, "details").text
    )


def test_keyboard_reaches_everything(show):
    page = show("small")
    page.find_element(By.ID, "search").click()
    focused = []
    for _ in range(30):
        page.switch_to.active_element.send_keys(Keys.TAB)
        focused.append(page.execute_script("const e = document.activeElement; return e.id || e.className || e.dataset.key"))
        if focused[-1] == "pick":
            break
    assert focused[-1] == "pick"
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "true"
    assert page.find_element(By.ID, "details").is_displayed()
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.find_element(By.ID, "details").is_displayed()
    drawing = page.find_element(By.ID, "drawing")
    page.execute_script("chooseNode(0, true); arguments[0].focus()", drawing)
    drawing.send_keys(Keys.ARROW_DOWN)
    assert page.execute_script("return data.nodes[state.node].inputs") == [0]
    drawing.send_keys(Keys.ARROW_UP)
    assert page.execute_script("return state.node") == 0
    zoom = page.execute_script("return drawing.view.k")
    drawing.send_keys("+")
    assert page.execute_script("return drawing.view.k") > zoom


@pytest.mark.parametrize("name", ["small", "big"])
def test_a_phone_shows_the_page_without_sideways_scrolling(show, name):
    page = show(name, width=390, height=844)
    page.execute_script("document.querySelector('.pick').click()")
    assert page.execute_script("return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]") == [390, 390, 390]
    drawing = page.find_element(By.ID, "drawing").size
    assert drawing["width"] == 390 and drawing["height"] > 400
    assert len(picture(page)) > 10


def test_dark_and_light_schemes(show):
    light, dark = (picture(show("small", scheme=scheme)) for scheme in ("light", "dark"))
    assert brightness(light[0]) > 0.85
    assert brightness(dark[0]) < 0.2
    assert len(dark) > 10


def test_five_thousand_operators_stay_interactive(show):
    start = time.perf_counter()
    page = show("big")
    assert page.execute_script("return data.nodes.length") == 5002
    assert time.perf_counter() - start < 15
    start = time.perf_counter()
    find(page, "op499_3")
    assert "1 operator found" in status(page)
    page.find_element(By.CSS_SELECTOR, "#hits button").click()
    assert page.find_element(By.ID, "details").is_displayed()
    assert time.perf_counter() - start < 8
    frame = "const t = performance.now(); drawing.fit(); drawing.draw(); return performance.now() - t"
    assert min(page.execute_script(frame) for _ in range(5)) < 400  # milliseconds for all of it, drawn without a graphics card
