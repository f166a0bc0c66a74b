"""The nodes as a person meets them: the real front end in a real browser.

Screenshots are written to output/browser/, to be looked at.
"""

import base64
import html
import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from demo.browser import WANTED, find_browser
from demo.server import PACK, Client
from demo.thumbnails import SIDE, api_graph
from tools.registry import node_ids

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
SHOTS = PACK / "output" / "browser"
# The page takes a dropped file when it has its nodes and has opened its first workflow.
READY = (
    "() => window.LiteGraph?.registered_node_types?.ASDMApplyPack"
    " && window.app?.extensionManager?.workflow?.activeWorkflow"
)
PATIENCE = 600_000  # ms; a busy machine. Nothing here waits for a fixed time.
expect.set_options(timeout=PATIENCE)
DROP = """([name, text]) => {
  const data = new DataTransfer()
  data.items.add(new File([text], name, {type: "application/json"}))
  const at = {bubbles: true, cancelable: true, clientX: 700, clientY: 500, dataTransfer: data}
  const canvas = document.querySelector("#graph-canvas, .litegraph")
  for (const kind of ["dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, at))
}"""
# A tab of its own, all nodes, and all of them in view, as the front end fits a graph without a saved view.
DROPPED = """([tabs, nodes]) => {
  const workflows = app.extensionManager.workflow
  const [x, y, w, h] = app.canvas.visible_area
  const inView = ({pos, size}) =>
    pos[0] >= x && pos[1] - 30 >= y && pos[0] + size[0] <= x + w && pos[1] + size[1] <= y + h
  return workflows.openWorkflows.length > tabs && workflows.activeWorkflow === workflows.openWorkflows.at(-1)
    && app.graph._nodes.length === nodes && app.graph._nodes.every(inView)
}"""
NODE = "const node = app.graph._nodes.find(n => n.type === type)"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    assert program, WANTED
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def opened(browser, server):
    """ComfyUI's page, loaded once: loading takes longer than most of the tests."""
    Client(server.url).request(
        "/settings", {"Comfy.TutorialCompleted": True}
    )  # a new user's page opens with the templates over it
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY)
    page.screenshot()  # what fades out as the page opens goes with a frame, and without a window nobody asks for one
    expect(page.locator(".p-blockui-mask")).to_have_count(0)
    return page


@pytest.fixture
def page(opened, request):
    opened.errors.clear()
    yield opened
    opened.screenshot(path=SHOTS / f"{request.node.name}.png")
    for _ in range(3):
        opened.keyboard.press("Escape")
    if opened.get_by_test_id("error-overlay-dismiss").is_visible():
        opened.get_by_test_id("error-overlay-dismiss").click()
    assert not opened.errors


def drop(page, path: Path, change=lambda text: text, name="") -> dict:
    """Drop a workflow file onto the canvas, changed and renamed if so wished; returns its JSON."""
    text = change(path.read_text("utf-8"))
    workflow = json.loads(text)
    tabs = page.evaluate("() => app.extensionManager.workflow.openWorkflows.length")
    page.evaluate(DROP, [name or path.name, text])
    page.wait_for_function(DROPPED, arg=[tabs, len(workflow["nodes"])])
    return workflow


def select(page, type: str) -> None:
    page.evaluate(
        f"type => {{ {NODE}; app.canvas.ds.scale = 1; app.canvas.centerOnNode(node); app.canvas.selectNode(node); "
        "app.canvas.setDirty(true, true) }",
        type,
    )


def until(check) -> None:
    """Wait until check() is true."""
    end = time.monotonic() + PATIENCE / 1000
    while not check():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def set_widget(page, type: str, name: str, value) -> None:
    page.evaluate(
        f"([type, name, value]) => {{ {NODE}; const w = node.widgets.find(w => w.name === name); w.value = value; "
        f"w.callback?.(value) }}",
        [type, name, value],
    )


def run(page) -> None:
    page.get_by_test_id("queue-button").click()


def wait_for_picture(page, type="SaveImage") -> None:
    page.wait_for_function(
        f"type => {{ {NODE}; return node.imgs?.length && node.imgs[0].naturalWidth }}", arg=type, timeout=2 * PATIENCE
    )


# The tests ------------------------------------------------------------------------------------------


def test_templates_are_listed_with_pictures(page):
    page.get_by_test_id("side-toolbar").get_by_role("button", name="Templates").click()
    dialog = page.get_by_role("dialog").filter(has_text="asdm")
    dialog.get_by_text("asdm", exact=True).click()
    for path in WORKFLOWS:
        title = dialog.get_by_text(path.stem, exact=True).first  # the card's title; its description below is the same
        title.scroll_into_view_if_needed()
        expect(title).to_be_visible()
        page.wait_for_function(
            "([name, side]) => [...document.images].some(i => i.alt === name && i.naturalWidth === side)",
            arg=[path.stem, SIDE],
        )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_drops_onto_the_canvas(page, path):
    workflow = drop(page, path)
    # Room for the picture that a node draws, though the inputs behind a choice change its size as they come.
    rooms = {
        node["id"]: node["size"]
        for node in workflow["nodes"]
        if node["type"] in ("ASDMCalibrate", "ASDMInheritancePlan", "ASDMInspectModel")
    }
    assert (
        page.evaluate(
            "rooms => Object.entries(rooms).filter(([id, size]) => app.graph.getNodeById(id).size[1] < size[1])", rooms
        )
        == []
    )
    unknown = page.evaluate(
        "() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    )
    assert not unknown
    # The graph that a Run would send is the one that test_nodes.py runs.
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == api_graph(path)
    overlaps = page.evaluate("""() => {
      const box = n => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]
      const overlap = (a, b) => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]
      const boxes = app.graph._nodes.map(box)
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => overlap(a, b)).map(b => [a[0], b[0]]))
    }""")
    assert not overlaps


SIZES = ((1366, 768), (1440, 800), (1600, 1000), (1920, 1080))
LEAST_ZOOM = 8 / 14  # below it the classic front end draws no text
# Titles wider than their node, and texts that need to be scrolled.
CUT = """() => {
  const measure = document.createElement("canvas").getContext("2d")
  measure.font = "14px Inter, Arial"
  const titles = app.graph._nodes.filter(n => measure.measureText(n.title).width > n.size[0] - 40).map(n => n.title)
  const texts = app.graph._nodes.flatMap(n => n.widgets ?? []).map(w => w.element).filter(Boolean)
    .flatMap(e => [e, ...e.querySelectorAll("*")])
    .filter(e => e.clientHeight && e.scrollHeight > e.clientHeight + 4 && getComputedStyle(e).overflowY !== "visible")
    .map(e => (e.value ?? e.textContent).slice(0, 40))
  return [...titles, ...texts]
}"""


@pytest.mark.sweep(1)
def test_workflows_open_legible_and_whole(page, front_end):
    """At the smallest window; in the larger ones the saved view is the same, with more room around it."""
    try:
        for path in WORKFLOWS:
            page.set_viewport_size(dict(zip(("width", "height"), SIZES[0], strict=True)))
            drop(page, path, name=f"{path.stem} {front_end}.json")  # waits until every node is in view
            assert page.evaluate("() => app.canvas.ds.scale") >= LEAST_ZOOM, path.stem
            for width, height in SIZES:
                page.set_viewport_size({"width": width, "height": height})
                assert not page.evaluate("() => app.canvas.low_quality")
                until(lambda: page.evaluate(CUT) == [])
            page.screenshot(path=SHOTS / f"{path.stem}-{front_end}.png")
    finally:
        page.set_viewport_size({"width": 1600, "height": 1000})


def test_three_clicks_from_the_templates_to_ones_own_checkpoint(page, server):
    """Open the template, choose the checkpoint, Run."""
    (server.base / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
    sent = []

    def take(route):
        sent.append(route.request.post_data_json["prompt"])
        route.fulfill(json={"prompt_id": "none", "number": 1, "node_errors": {}})

    page.get_by_test_id("side-toolbar").get_by_role("button", name="Templates").click()
    dialog = page.get_by_role("dialog").filter(has_text="asdm")
    dialog.get_by_text("asdm", exact=True).click()
    dialog.get_by_text("02 Speed up my checkpoint", exact=True).first.click()
    page.wait_for_function("() => app.graph._nodes.some(n => n.type === 'ASDMABCompare')")
    first = page.evaluate("() => { const n = app.graph._nodes[0]; return [n.type, n.title, Boolean(n.color)] }")
    assert first == ["CheckpointLoaderSimple", "1. Choose your checkpoint, then press Run", True]
    set_widget(page, "CheckpointLoaderSimple", "ckpt_name", "mine.safetensors")
    page.route("**/api/prompt", take)
    run(page)
    until(lambda: sent)
    page.unroute("**/api/prompt")
    expected = api_graph(PACK / "workflows" / "02 Speed up my checkpoint.json")
    expected["1"]["inputs"]["ckpt_name"] = "mine.safetensors"
    assert sent == [expected]


@pytest.fixture(params=["canvas", "vue"])
def front_end(page, request):
    """Both of the host's front ends for nodes: the one that draws them on the canvas, and the one of Vue components."""
    choose = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(choose, request.param == "vue")
    yield request.param
    page.evaluate(choose, False)


def view_of(page, type: str, id: str):
    """The compare view of a node, by an id that it gets."""
    page.evaluate(
        f"([type, id]) => {{ {NODE}; node.widgets.find(w => w.name === 'asdm_compare').element.id = id }}", [type, id]
    )
    return page.locator(f"#{id}")


def loaded(image) -> None:
    until(lambda: image.evaluate("image => image.complete && image.naturalWidth > 0"))


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


SPLIT = "image => parseFloat(image.style.clipPath.split(' ').pop()) / image.parentElement.clientWidth"


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


# Words an artist types: what comes first, and what is among the finds.
SEARCHES = {
    "faster": ("Speed Up", {"Feature Inheritance", "GRI Attention"}),
    "speed up": ("Speed Up", {"Feature Inheritance", "GRI Attention"}),
    "accelerate": ("Speed Up", {"Feature Inheritance"}),
    "optimize": ("Speed Up", {"Feature Inheritance"}),
    "performance": ("Speed Up", {"Feature Inheritance"}),
    "quick": ("Speed Up", {"Feature Inheritance"}),
    "easycache": (None, {"Speed Up", "Feature Inheritance"}),  # the host's own comes first
    "memory": (None, {"GRI Attention", "Load Pruned UNet"}),
    "sd1.5": (None, {"Feature Inheritance", "Load Pruned UNet"}),
    "4k": (None, {"GRI Attention"}),
    "hires fix": (None, {"GRI Attention"}),
    "tiled attention": (None, {"GRI Attention"}),
    "freeze": (None, {"Feature Inheritance"}),
}
NOT_AT_ONCE = {"Apply Pack", "Switch UNet", "Speed Readout"}  # they need a pack, a second model, a run


def test_search_lists_first_what_helps_at_once(page):
    drop(page, PACK / "workflows" / "01 Quick start.json", name="Search.json")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = page.get_by_role("combobox", name="Add a node...")
    for words, (first, among) in SEARCHES.items():
        box.fill(words)
        until(lambda among=among: among <= set(finds(page)))
        found = finds(page)
        assert first in (None, found[0]), words
        if first:
            assert not NOT_AT_ONCE & set(found), words


def finds(page) -> list[str]:
    """What the search box lists, in its order."""
    return page.evaluate("() => [...document.querySelectorAll('[role=option]')].map(e => e.innerText.split('\\n')[0])")


@pytest.mark.sweep(1)
def test_the_view_fills_the_window_and_goes_back(page, front_end):
    drop(page, PACK / "workflows" / "01 Quick start.json", name=f"Large {front_end}.json")
    show_pictures(page, "ASDMABCompare", 3)
    view = view_of(page, "ASDMABCompare", "small")
    select(page, "ASDMABCompare")
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
    drop(page, PACK / "workflows" / "01 Quick start.json", name=f"Touch {front_end}.json")
    show_pictures(page, "ASDMABCompare", 2)
    view = view_of(page, "ASDMABCompare", "touched")
    select(page, "ASDMABCompare")
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


def show_pictures(page, type: str, count: int) -> None:
    """What a node would show of so many pictures, which are those of the workflows' list."""
    shown = {
        "title": "",
        "labels": [""] * count,
        "batches": [[{"filename": f"{i}.png"}] for i in range(count)],
        "likeness": {f"{i}{j}": ["identical"] for j in range(count) for i in range(j)},
    }
    page.evaluate(f"([type, shown]) => {{ {NODE}; node.onExecuted({{asdm_compare: [shown]}}) }}", [type, shown])


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


def test_words_of_a_run_stand_on_the_node(page, front_end):
    drop(page, PACK / "workflows" / "11 Full stack.json")
    page.evaluate(f"type => {{ {NODE}; node.onExecuted({{text: ['plays in large pictures']}}) }}", "ASDMGRIAttention")
    select(page, "ASDMGRIAttention")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.asdm-words')].some(e => e.textContent === 'plays in large pictures' && "
        "e.clientWidth > 100)"
    )
    # They are not sent with the next run.
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == api_graph(
        PACK / "workflows" / "11 Full stack.json"
    )


def test_what_a_technique_says_in_a_run_stands_on_its_node_until_the_next(page):
    drop(page, PACK / "workflows" / "11 Full stack.json", name="Notes.json")
    id = page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", "ASDMGRIAttention")
    speak = """([id, notes]) => app.api.dispatchCustomEvent("asdm.notes", {node: id, notes, prompt_id: ""})"""
    standing = """notes => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(graph => graph.nodes)
      .flatMap(node => node.widgets ?? []).filter(w => w.name === "asdm_notes").map(w => w.value).join("|") === notes"""
    before = page.evaluate("async () => (await app.graphToPrompt()).output")
    page.evaluate(speak, [id, ["another node replaces it.", "too small."]])
    page.wait_for_function(standing, arg="another node replaces it.\ntoo small.")
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == before
    page.evaluate("""() => app.api.dispatchCustomEvent("execution_start", {prompt_id: "", timestamp: 0})""")
    page.wait_for_function(standing, arg="")
    group = page.evaluate("id => String(app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])).node.id)", id)
    (inside,) = page.evaluate(
        "group => app.graph.getNodeById(group).subgraph.nodes.map(n => `${group}:${n.id}`)", group
    )
    page.evaluate(speak, [inside, ["in a subgraph."]])
    page.wait_for_function(standing, arg="in a subgraph.")


@pytest.mark.sweep(1)
def test_a_page_that_is_opened_later_shows_what_was_said(browser, page, server, front_end):
    """In two steps nothing can be left out, and Speed Up says so on its node."""
    name = f"Said before, {front_end}"
    drop(page, PACK / "workflows" / "11 Full stack.json", name=f"{name}.json")
    id = page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", "ASDMSpeedUp")
    for widget, value in (("steps", 2), ("rounds", 1), ("seed", 10 + len(front_end))):  # not the host's kept result
        set_widget(page, "ASDMABCompare", widget, value)
    said = """id => app.graph.getNodeById(id)?.widgets?.find(w => w.name === "asdm_notes")?.value ?? ''"""
    run(page)
    until(lambda: "every step is computed" in page.evaluate(said, id))
    # Once more, with nothing changed: the host runs nothing, and what it shows is what that was said of.
    page.evaluate("() => { window.over = new Promise(done => app.api.addEventListener('execution_success', done)) }")
    run(page)
    page.evaluate("() => window.over.then(() => true)")
    until(lambda: "every step is computed" in page.evaluate(said, id))
    saved = page.evaluate("() => app.graph.serialize()")
    later = browser.new_page(viewport={"width": 1366, "height": 768})
    try:
        later.set_default_timeout(PATIENCE)
        later.goto(server.url)
        later.wait_for_function(READY)
        later.evaluate("saved => app.loadGraphData(saved)", saved)
        until(lambda: "every step is computed" in later.evaluate(said, id))
        later.evaluate("saved => app.loadGraphData(saved)", saved | {"id": "11111111-1111-4111-8111-111111111111"})
        until(lambda: later.evaluate(said, id) == "")  # another workflow, where the same id is another node
    finally:
        later.close()


SPOKEN = """([id, note, title]) => {
  const batches = [[{filename: "a.png"}], [{filename: "b.png"}]]
  const said = {text: [note], asdm_compare: [{title, labels: ["a", "b"], batches, likeness: {"01": ["identical"]}}]}
  app.api.dispatchCustomEvent("executed", {node: id, display_node: id, output: said, prompt_id: ""})
}"""
SHOWN = """([note, title]) => {
  const nodes = [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(graph => graph.nodes)
  const [words, view] = ["ASDMGRIAttention", "ASDMABCompare"].map(type => nodes.find(n => n.type === type)?.widgets)
  return words?.find(w => w.name === "note")?.value === note
    && view?.find(w => w.name === "asdm_compare").element.querySelector(".asdm-title")?.textContent === title
}"""


@pytest.mark.sweep(1)
def test_what_a_run_showed_is_back_after_a_change_of_tabs_and_an_undo(page, front_end):
    name = f"Left and back, {front_end}"
    drop(page, PACK / "workflows" / "01 Quick start.json", name=f"{name}.json")
    page.evaluate("() => app.graph.add(LiteGraph.createNode('ASDMGRIAttention'))")
    ids = [
        page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", type)
        for type in ("ASDMGRIAttention", "ASDMABCompare")
    ]
    for id in ids:
        page.evaluate(SPOKEN, [id, "large pictures", "1.5x"])
    page.wait_for_function(SHOWN, arg=["large pictures", "1.5x"])
    drop(page, PACK / "workflows" / "09 Combined UNet from a pack.json")
    page.locator(".workflow-tab").filter(has_text=name).click()
    page.wait_for_function("name => app.extensionManager.workflow.activeWorkflow.filename === name", arg=name)
    page.wait_for_function(SHOWN, arg=["large pictures", "1.5x"])
    # The same in a subgraph, where the front end names outputs in another way.
    group = page.evaluate(
        "ids => String(app.graph.convertToSubgraph(new Set(ids.map(id => app.graph.getNodeById(id)))).node.id)", ids
    )
    inside = page.evaluate("group => app.graph.getNodeById(group).subgraph.nodes.map(n => `${group}:${n.id}`)", group)
    for id in inside:
        page.evaluate(SPOKEN, [id, "in a subgraph", "2.5x"])
    page.wait_for_function(SHOWN, arg=["in a subgraph", "2.5x"])
    assert page.evaluate(
        """async group => {
      const {changeTracker} = app.extensionManager.workflow.activeWorkflow
      const before = app.graph.getNodeById(group)
      changeTracker.captureCanvasState()
      before.title = "Moved"
      changeTracker.captureCanvasState()
      await changeTracker.undo()
      return app.graph.getNodeById(group) !== before
    }""",
        group,
    )
    page.wait_for_function(SHOWN, arg=["in a subgraph", "2.5x"])


def test_help_opens_beside_the_graph(page):
    drop(page, PACK / "workflows" / "09 Combined UNet from a pack.json")
    select(page, "ASDMApplyPack")
    page.get_by_test_id("info-button").click()
    panel = page.get_by_test_id("properties-panel")
    expect(panel.get_by_role("heading", name="Apply Pack", exact=True)).to_be_visible()
    expect(panel.get_by_role("code").filter(has_text="models/asdm_packs").first).to_be_visible()
    picture = panel.get_by_role("img", name="Apply Pack", exact=True)
    picture.scroll_into_view_if_needed()
    until(lambda: picture.evaluate("image => image.naturalWidth > 200 && image.clientWidth > 200"))


RUN = {"seed": 1, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
RUN |= {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
# Every node of the pack, so that each has something to show after one run.
EVERYTHING = {
    "1": ("ASDMCheckpointLoader", {"ckpt_name": "emoji-teacher.safetensors"}),
    "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": "red apple on white, noto style"}),
    "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
    "4": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
    "5": ("ASDMApplyPack", {"model": ["1", 0], "pack_name": "emoji-m2.safetensors"}),
    "6": ("ASDMGRIAttention", {"model": ["5", 0]}),
    "7": ("ASDMFeatureInheritance", {"model": ["6", 0], "preset": "balanced"}),
    "8": ("ASDMSpeedUp", {"model": ["1", 0], "likeness": "close"}),
    "9": ("ASDMSwitchUNet", {"model_first": ["7", 0], "model_second": ["1", 0], "switch_at": 6, "unit": "step"}),
    "10": ("ASDMMeasureSpeed", {"model": ["9", 0]}),
    "11": ("KSampler", {"model": ["10", 0], **RUN, "denoise": 1.0}),
    "12": ("ASDMSpeedReadout", {"model": ["10", 0], "after": ["11", 0]}),
    "13": (
        "ASDMInheritancePlan",
        {"model": ["7", 0], "steps": 8, "width": 128, "height": 128, "batch_size": 1, "after": ["11", 0]},
    ),
    "14": ("ASDMInspectModel", {"model": ["9", 0], "width": 128, "height": 128, "at_percent": 0.0}),
    "15": ("ASDMABCompare", {"model": ["8", 0], "vae": ["1", 2], **RUN, "denoise": 1.0, "rounds": 1}),
    "16": (
        "ASDMCompareImages",
        {"images.a": ["15", 1], "images.b": ["15", 2], "labels": "in full, sped up", "title": "Speed Up"},
    ),
    "17": (
        "ASDMXYPlot",
        {"model": ["1", 0], "vae": ["1", 2], **RUN, "denoise": 1.0, "rounds": 1, "y": "nothing"}
        | {"x": "speed up", "x.values": "off, close"},
    ),
    "19": (
        "ASDMCalibrate",
        {"model": ["1", 0], **RUN, "denoise": 1.0, "pictures": 4, "name": "shown", "likeness": "close"},
    ),
    "20": (
        "ASDMFitPack",
        {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "pack_name": "emoji-m2.safetensors"}
        | {"prompts": "panda\nrocket", "minutes": 0.05, "width": 128, "height": 128, "filename_prefix": "shown"}
        | {"cfg": 3.0, "batch": 1, "learning_rate": 0.0005, "seed": 0},
    ),
    "21": ("ASDMSaveUNet", {"model": ["5", 0], "filename_prefix": "shown", "dtype": "fp16"}),
    "22": ("ASDMLoadPrunedUNet", {"unet_name": "emoji-small.safetensors"}),
    "23": ("KSampler", {"model": ["22", 0], **RUN, "steps": 1, "denoise": 1.0}),
    "24": ("VAEDecode", {"samples": ["23", 0], "vae": ["1", 2]}),
    "25": ("PreviewImage", {"images": ["24", 0]}),
}
DRAWING = {"ASDMInspectModel", "ASDMInheritancePlan", "ASDMSpeedReadout", "ASDMXYPlot", "ASDMCalibrate"}
COMPARING = {"ASDMABCompare", "ASDMCompareImages", "ASDMFitPack"}
SPEAKING = {
    "ASDMSpeedUp": "left out",
    "ASDMGRIAttention": "",
    "ASDMFeatureInheritance": "",
    "ASDMSaveUNet": ".safetensors",
}
# The size at which a drawing is seen, against its own; of one that is wider than its node, against the node's width.
SHOWN_AT = """node => {
  const [picture] = node.imgs, fitting = Math.min(1, (node.size[0] - 16) / picture.naturalWidth)
  const drawn = node.widgets.find(w => w.name === "$$canvas-image-preview")?.computedHeight ?? 0
  const shown = document.querySelector(`[data-node-id="${node.id}"] img`)?.clientHeight ?? drawn
  return shown / (fitting * picture.naturalHeight)
}"""
# Texts of a node that are cut: what it says, in a field that would have to be scrolled, or stands beside it.
CUT_WORDS = """node => (node.widgets ?? []).filter(w => w.element?.className === "asdm-words")
  .filter(({element: e, computedHeight: room}) => e.scrollHeight > e.clientHeight + 1
    || e.scrollWidth > e.clientWidth + 1 || (!LiteGraph.vueNodesMode && e.offsetHeight > room - 19))
  .map(w => w.element.textContent)"""


@pytest.fixture(scope="module")
def after_a_run(browser, server):
    """A page with every node of the pack in its default size, after one run of all of them."""
    Client(server.url).request("/settings", {"Comfy.TutorialCompleted": True})
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PACK / "models/emoji/emoji-small.safetensors", folder / "emoji-small.safetensors")
    page = browser.new_page(viewport={"width": 1600, "height": 1300})
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    page.wait_for_function(READY)
    page.evaluate("graph => app.loadApiJson(graph, 'Everything')", graph_of(EVERYTHING))
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(EVERYTHING))
    page.evaluate("() => app.graph._nodes.forEach((node, i) => { node.pos = [1500 * i, 0] })")
    assert page.evaluate("async () => Object.keys((await app.graphToPrompt()).output).length") == len(EVERYTHING)
    page.evaluate(
        """() => { window.over = new Promise(done => {
          for (const how of ["execution_success", "execution_error"])
            app.api.addEventListener(how, ({detail}) => done([how, detail.exception_message ?? ""]))
        }) }"""
    )
    run(page)
    assert page.evaluate("() => window.over") == ["execution_success", ""]
    yield page
    page.close()


def graph_of(nodes) -> dict:
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def ours() -> list[str]:
    return sorted(kind for kind, _ in EVERYTHING.values() if kind.startswith("ASDM"))


def test_every_node_is_among_those_that_are_shown():
    assert ours() == sorted(node_ids())


@pytest.mark.sweep(0)
@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
@pytest.mark.parametrize("palette", ["dark", "light"])
def test_every_node_is_legible_after_a_run(after_a_run, palette, vue):
    """The screenshots, output/browser/nodes/, are to be looked at. A drawing is shown at its own size, in which its
    letters are read, and what a node says is not cut.
    """
    page, folder = after_a_run, SHOTS / "nodes"
    folder.mkdir(exist_ok=True)
    for name, value in (("Comfy.VueNodes.Enabled", vue), ("Comfy.ColorPalette", palette)):
        page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
    for type in ours():
        select(page, type)
        page.evaluate("() => app.canvas.deselectAll()")
        if type in DRAWING:
            wait_for_picture(page, type)
            node, picture = page.evaluate(
                f"type => {{ {NODE}; return [node.size[0], node.imgs[0].naturalWidth] }}", type
            )
            assert node >= 0.9 * min(picture, 540), type
            until(lambda type=type: page.evaluate(f"type => {{ {NODE}; return ({SHOWN_AT})(node) }}", type) > 0.85)
        if type in COMPARING:
            for image in view_of(page, type, f"{type}-{palette}-{vue}").locator("img").all():
                loaded(image)
        lowest = page.evaluate(f"type => {{ {NODE}; return {LOWEST} }}", type)
        assert lowest <= page.evaluate(f"type => {{ {NODE}; return node.size[1] }}", type) + 1, type
        if type in SPEAKING:
            until(lambda type=type: SPEAKING[type] in page.evaluate(f"type => {{ {NODE}; return {SAID} }}", type))
        until(lambda type=type: page.evaluate(f"type => {{ {NODE}; return ({CUT_WORDS})(node) }}", type) == [])
        page.screenshot(path=folder / f"{type}-{'vue' if vue else 'canvas'}-{palette}.png", clip=around(page, type))


LOWEST = "Math.max(0, ...(node.widgets ?? []).map(w => w.element ? w.y + w.computedHeight : 0).filter(y => y > 0))"
SAID = "(node.widgets ?? []).filter(w => ['note', 'asdm_notes'].includes(w.name)).map(w => w.value).join(' ')"


def around(page, type: str) -> dict:
    """Where a node lies on the page, with a little around it."""
    x, y, width, height = page.evaluate(
        f"""type => {{ {NODE}
      const {{scale, offset}} = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
      const [x, y] = [0, 1].map(i => (node.pos[i] + offset[i]) * scale + [box.x, box.y][i])
      return [x - 20, y - 50, node.size[0] * scale + 40, node.size[1] * scale + 70] }}""",
        type,
    )
    left, top = max(x, 0), max(y, 0)
    return {"x": left, "y": top, "width": min(width, 1600 - left), "height": min(height, 1300 - top)}


def as_page(markdown: str) -> str:
    """The little of Markdown that the first screen of the README uses, as HTML in the form of a code host's page."""
    blocks = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        if block.startswith("```"):
            blocks.append(f"<pre>{html.escape(block.strip('`').strip())}</pre>")
            continue
        text = html.escape(block)
        text = re.sub(r"!\[(.*?)\]\((.*?)\)", r'<img alt="\1" src="\2">', text)
        text = re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', text)
        text = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", text)
        text = re.sub(r"\*(.*?)\*", r"<i>\1</i>", text)
        heading = re.match(r"(#+) (.*)", text)
        blocks.append(f"<h{len(heading[1])}>{heading[2]}</h{len(heading[1])}>" if heading else f"<p>{text}</p>")
    style = """body { width: 838px; margin: 32px auto; font: 16px/1.5 sans-serif } h1, p, pre { margin: 0 0 16px }
      img { max-width: 100% } pre { font-size: 85%; padding: 16px; line-height: 1.45 }"""
    return f"<style>{style}</style>{''.join(blocks)}"


def test_the_readme_opens_with_picture_headline_and_commands(browser):
    file = PACK / "readme-first-screen.html"  # beside the README, whose pictures it shows
    file.write_text(as_page((PACK / "README.md").read_text("utf-8").split("\n## ")[0]), "utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    try:
        page.goto(file.as_uri())
        picture, commands = page.locator("img"), page.locator("pre")
        loaded(picture)
        for shown in (page.locator("h1"), picture, commands):
            box = shown.bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= 720
        expect(commands).to_contain_text("make demo")
        assert picture.evaluate("image => image.naturalWidth") >= 838  # not blown up
        page.screenshot(path=SHOTS / "readme.png")
    finally:
        page.close()
        file.unlink()


def test_a_workflow_with_a_dead_deepcache_node_is_mended_with_a_click(page):
    def older(text):
        workflow = json.loads(text)
        node = next(n for n in workflow["nodes"] if n["type"] == "ASDMApplyPack")
        node |= {
            "type": "DeepCache",
            "widgets_values": [3, 0, 0, 1000],
            "inputs": [i for i in node["inputs"] if "widget" not in i],
        }
        return json.dumps(workflow)

    drop(page, PACK / "workflows" / "09 Combined UNet from a pack.json", older, "With DeepCache.json")
    page.get_by_test_id("error-overlay-see-errors").click()
    expect(page.get_by_role("button", name="Replace Node")).to_be_visible()
    page.screenshot(path=SHOTS / "deepcache.png")
    page.get_by_role("button", name="Replace Node").click()
    page.wait_for_function(
        "() => app.graph._nodes.some(n => n.type === 'ASDMFeatureInheritance') && app.graph._nodes.every(n => n.type "
        "!== 'DeepCache')"
    )
    graph = page.evaluate("async () => (await app.graphToPrompt()).output")
    key, node = next((key, node) for key, node in graph.items() if node["class_type"] == "ASDMFeatureInheritance")
    assert (
        node["inputs"]["preset"] == "custom"
        and graph[node["inputs"]["model"][0]]["class_type"] == "ASDMCheckpointLoader"
    )
    assert next(n for n in graph.values() if n["class_type"] == "KSampler")["inputs"]["model"] == [key, 0]
    run(page)
    wait_for_picture(page)


def test_a_workflow_with_calibrate_inheritance_is_mended_with_a_click(page):
    path = PACK / "workflows" / "06 Calibrate my model.json"

    def older(text):
        workflow = json.loads(text)
        node = next(n for n in workflow["nodes"] if n["type"] == "ASDMCalibrate")
        node |= {
            "type": "ASDMCalibrateInheritance",
            "widgets_values": [1, "fixed", 20, 3, "euler", "normal", "saving", 0.35, 2],
            "inputs": [i for i in node["inputs"] if "widget" not in i],
        }
        node["outputs"][1] |= {"localized_name": "plan", "name": "plan"}
        return json.dumps(workflow)

    drop(page, path, older, "With Calibrate Inheritance.json")
    page.get_by_test_id("error-overlay-see-errors").click()
    page.get_by_role("button", name="Replace Node").click()
    page.wait_for_function(
        "() => app.graph._nodes.some(n => n.type === 'ASDMCalibrate') && app.graph._nodes.every(n => n.type "
        "!== 'ASDMCalibrateInheritance')"
    )
    expected = api_graph(path)
    (calibrate,) = (node for node in expected.values() if node["class_type"] == "ASDMCalibrate")
    calibrate["inputs"]["name"] = "my profile"
    graph = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert {key: (n["class_type"], n["inputs"]) for key, n in graph.items()} == {
        key: (n["class_type"], n["inputs"]) for key, n in expected.items()
    }
    control = "node.widgets.find(w => w.name === 'control_after_generate').value"
    assert page.evaluate(f"type => {{ {NODE}; return {control} }}", "ASDMCalibrate") == "fixed"


def test_a_broken_pack_is_a_clear_error_and_the_graph_can_be_mended(page, server):
    packs = server.base / "models" / "asdm_packs"
    packs.mkdir(parents=True, exist_ok=True)
    (packs / "cut off.safetensors").write_bytes((PACK / "models/emoji/emoji-m2.safetensors").read_bytes()[:3000])
    drop(page, PACK / "workflows" / "09 Combined UNet from a pack.json")
    set_widget(page, "ASDMApplyPack", "pack_name", "cut off.safetensors")
    run(page)
    page.get_by_test_id("error-overlay-see-errors").click()
    expect(page.get_by_test_id("properties-panel")).to_contain_text(
        re.compile("cut off.safetensors.*cut short", re.DOTALL)
    )
    page.screenshot(path=SHOTS / "broken_pack.png")
    set_widget(page, "ASDMApplyPack", "pack_name", "emoji-m2.safetensors")
    run(page)
    wait_for_picture(page)
    wait_for_picture(page, "ASDMInspectModel")  # a node that draws shows it
