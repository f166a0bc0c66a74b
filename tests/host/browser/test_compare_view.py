"""The view that compares pictures."""

import base64
import io
import re
import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from demo.server import PACK, Client

from tests.host.browser.on_page import (
    NODE,
    PATIENCE,
    READY,
    SHOTS,
    SPLIT,
    drop,
    loaded,
    run,
    select,
    set_widget,
    show_pictures,
    until,
    view_of,
)


@pytest.mark.sweep(1)
def test_quick_start_runs_to_a_comparison(page, front_end):
    drop(page, PACK / "workflows" / "01 Quick start.json")
    for name, value in (("steps", 6), ("rounds", 1)):
        set_widget(page, "ASDMABCompare", name, value)
    run(page)
    view = view_of(page, "ASDMABCompare", "compared")
    expect(view.locator(".asdm-title")).to_have_text(re.compile(r"^\d+\.\d\dx, .* to "), timeout=2 * PATIENCE)
    select(page, "ASDMABCompare")
    stage, second = view.locator(".asdm-stage"), view.locator("img").nth(1)
    loaded(second)

    def at_rest():
        before = stage.bounding_box()
        time.sleep(0.2)
        return (
            before == stage.bounding_box() and before["width"] > 400
        )  # the whole node, whatever the properties panel thinks

    until(at_rest)
    box = stage.bounding_box()
    for share in (0.25, 0.75):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        until(
            lambda share=share: (
                second.evaluate("image => parseFloat(image.style.clipPath.split(' ').pop())")
                == pytest.approx(share * stage.evaluate("stage => stage.clientWidth"), abs=3)
            )
        )
    # Small pictures are drawn smoothly until somebody zooms in; every mode shows the zoom and resets it.
    zoom = view.locator(".asdm-zoom")
    expect(zoom).to_have_text("1.0\u00d7")
    expect(stage).not_to_have_class(re.compile("asdm-pixels"))
    stage.click()
    page.mouse.wheel(0, -1200)
    expect(stage).to_have_class(re.compile("asdm-pixels"))
    expect(zoom).not_to_have_text("1.0\u00d7")
    zoom.click()
    expect(zoom).to_have_text("1.0\u00d7")
    view.get_by_role("button", name="Flip").click()
    expect(second).to_be_hidden()
    stage.click()
    expect(second).to_be_visible()
    page.screenshot(path=SHOTS / f"flipped-{front_end}.png")
    index = view.locator(".asdm-index")
    expect(index).to_have_text("1 of 4")
    page.keyboard.press("ArrowRight")
    expect(index).to_have_text("2 of 4")
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    expect(index).to_have_text("4 of 4")
    view.get_by_role("button", name="Difference").click()
    expect(second).to_have_css("mix-blend-mode", "difference")
    pane = view.locator(".asdm-pane")
    expect(pane).to_have_css("filter", "brightness(4)")
    view.get_by_role("slider").fill("4")
    expect(pane).to_have_css("filter", "brightness(16)")
    expect(view.locator(".asdm-gain")).to_have_text("\u00d716")
    view.get_by_role("button", name="Side by side").click()
    expect(pane).to_have_count(2)
    with page.expect_download() as saved:
        view.get_by_role("button", name="Save").click()
    assert saved.value.suggested_filename.startswith("asdm.compare.")
    copies_are_what_is_shown(page, view)


COPIED = """async () => {
  const [item] = await navigator.clipboard.read()
  const bytes = new Uint8Array(await (await item.getType("image/png")).arrayBuffer())
  return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""))
}"""


def copies_are_what_is_shown(page, view) -> None:
    """Each mode's picture on the clipboard, against the files that the view shows."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view.get_by_role("button", name="Slider").click()
    sources = view.locator("img").evaluate_all("images => images.map(image => image.src)")
    first, second = (pixels(page.request.get(source).body()) for source in sources)
    width = first.shape[1]
    stage = view.locator(".asdm-stage").bounding_box()
    page.mouse.move(stage["x"] + stage["width"] / 4, stage["y"] + stage["height"] / 2)
    line = round(width * view.locator("img").nth(1).evaluate(SPLIT))
    brighter = 4 * np.abs(first.astype(int) - second)
    wanted = {
        "Slider": np.concatenate([first[:, :line], second[:, line:]], 1),
        "Flip": second,
        "Side by side": np.concatenate([first, second], 1),
        "Difference": brighter.clip(0, 255),
    }
    for mode, picture in wanted.items():
        view.get_by_role("button", name=mode).click()
        if mode == "Flip" and view.locator("img").nth(1).is_hidden():
            view.locator(".asdm-stage").click()
        if mode == "Difference":
            view.get_by_role("slider").fill("2")
        view.get_by_role("button", name="Copy").click()
        expect(view.get_by_role("button", name="Copied")).to_have_count(1)
        found = pixels(base64.b64decode(page.evaluate(COPIED)))
        assert found.shape == picture.shape, mode
        off = np.abs(found.astype(int) - picture).max((0, 2))
        at_line = np.abs(np.arange(off.size) - line) <= 1 if mode == "Slider" else np.zeros(off.size, bool)
        assert off[~at_line].max() <= 4 * (mode == "Difference"), mode  # a brightness is rounded twice
        expect(view.get_by_role("button", name="Copied")).to_have_count(0)


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def with_pictures(page, name: str, count: int):
    """The view of A/B Compare in a workflow of its own, with so many pictures, chosen."""
    drop(page, PACK / "workflows" / "01 Quick start.json", name=f"{name}.json")
    show_pictures(page, "ASDMABCompare", count)
    view = view_of(page, "ASDMABCompare", name.replace(" ", "-"))
    select(page, "ASDMABCompare")
    return view


@pytest.mark.sweep(1)
def test_the_view_fills_the_window_and_goes_back(page, front_end):
    view = with_pictures(page, f"Large {front_end}", 3)
    view.get_by_role("button", name="Side by side").click()
    expect(view.locator(".asdm-pane")).to_have_count(3)  # more than two, with one zoom
    view.get_by_role("button", name="Enlarge").click()
    large = page.locator("dialog.asdm-compare")
    expect(large.locator(".asdm-pane")).to_have_count(3)
    assert large.locator(".asdm-stage").bounding_box()["width"] > 1500
    page.screenshot(path=SHOTS / f"large-{front_end}.png")
    page.keyboard.press("Escape")
    expect(large).to_have_count(0)
    expect(view.locator(".asdm-pane")).to_have_count(3)


def test_the_view_works_by_touch(page, front_end):
    """One finger moves the line, or a picture that is zoomed in; two zoom; a tap flips."""
    view = with_pictures(page, f"Touch {front_end}", 2)
    view.get_by_role("button", name="Enlarge").click()
    large = page.locator("dialog.asdm-compare")
    stage, second, zoom = large.locator(".asdm-stage"), large.locator("img").nth(1), large.locator(".asdm-zoom")
    expect(stage).to_be_visible()
    box = stage.bounding_box()
    hand = page.context.new_cdp_session(page)

    def touch(kind, *shares):
        points = [
            {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": i}
            for i, (x, y) in enumerate(shares)
        ]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def line():
        return second.evaluate(SPLIT)

    touch("touchStart", (0.3, 0.5))
    for share in (0.4, 0.6, 0.8):
        touch("touchMove", (share, 0.5))
    until(lambda: line() == pytest.approx(0.8, abs=0.02))
    touch("touchEnd")

    touch("touchStart", (0.4, 0.5), (0.6, 0.5))
    touch("touchMove", (0.3, 0.5), (0.7, 0.5))
    expect(zoom).to_have_text("2.0\u00d7")
    touch("touchEnd")
    assert line() == pytest.approx((0.8 + 0.5) / 2, abs=0.02)  # of the picture, twice as large about the middle
    moved = "image => image.style.transform"
    before = second.evaluate(moved)
    touch("touchStart", (0.5, 0.2))
    touch("touchMove", (0.6, 0.3))
    until(lambda: second.evaluate(moved) != before)
    touch("touchEnd")
    expect(zoom).to_have_text("2.0\u00d7")

    zoom.click()
    large.get_by_role("button", name="Flip").click()
    hidden = second.is_hidden()
    touch("touchStart", (0.5, 0.5))
    touch("touchEnd")
    until(lambda: second.is_hidden() != hidden)
    hand.detach()
    page.keyboard.press("Escape")
    expect(large).to_have_count(0)


def test_words_of_the_view_are_translated(browser, server):
    """On a page of its own: one that changes its language while open may take what loads late for the new one."""
    client = Client(server.url)
    client.request("/settings", {"Comfy.Locale": "ja"})
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    try:
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        page.wait_for_function(READY)
        drop(page, PACK / "workflows" / "01 Quick start.json", name="Japanese.json")
        show_pictures(page, "ASDMABCompare", 2)
        view = view_of(page, "ASDMABCompare", "japanese")
        expect(view.get_by_role("button", name="横並び")).to_have_count(1)
        expect(view.locator(".asdm-likeness")).to_have_text("同一")
    finally:
        page.close()
        client.request("/settings", {"Comfy.Locale": "en"})


def test_of_fewer_pictures_than_before_none_is_compared_with_itself(page):
    def show(count):
        pairs = [f"{i}{j}" for j in range(count) for i in range(j)]
        shown = {
            "title": "",
            "labels": [""] * count,
            "batches": [[{"filename": f"{i}.png"}] for i in range(count)],
            "likeness": dict.fromkeys(pairs, ["of two"]),
        }
        page.evaluate(
            f"([type, shown]) => {{ {NODE}; node.onExecuted({{asdm_compare: [shown]}}) }}", ["ASDMABCompare", shown]
        )

    drop(page, PACK / "workflows" / "01 Quick start.json")
    page.evaluate(
        f"type => {{ {NODE}; node.widgets.find(w => w.name === 'asdm_compare').element.id = 'fewer' }}",
        "ASDMABCompare",
    )
    select(page, "ASDMABCompare")
    view = page.locator("#fewer")
    for chosen in (("2", "0"), ("0", "0")):
        show(3)
        for i, value in enumerate(chosen):
            view.locator("select").nth(i).select_option(value, force=True)
        show(2)
        expect(view.locator(".asdm-tag")).to_have_text(["A", "B"])
        expect(view.locator(".asdm-likeness")).to_have_text("of two")
