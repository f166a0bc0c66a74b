"""The nodes as a person meets them: the real front end in a real browser.

Screenshots are written to output/browser/, to be looked at.
"""

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from demo.browser import WANTED, find_browser
from demo.server import PACK
from demo.thumbnails import SIDE, api_graph

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
SHOTS = PACK / "output" / "browser"
READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.ASDMApplyPack"
expect.set_options(timeout=60_000)  # a busy machine
DROP = """([name, text]) => {
  const data = new DataTransfer()
  data.items.add(new File([text], name, {type: "application/json"}))
  const at = {bubbles: true, cancelable: true, clientX: 700, clientY: 500, dataTransfer: data}
  for (const kind of ["dragover", "drop"]) document.querySelector("#graph-canvas, .litegraph").dispatchEvent(new DragEvent(kind, at))
}"""
DROPPED = "n => app.graph._nodes.length === n"
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
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(1000)
    return page


@pytest.fixture
def page(opened, request):
    opened.errors.clear()
    yield opened
    opened.screenshot(path=SHOTS / f"{request.node.name}.png")
    for _ in range(3):
        opened.keyboard.press("Escape")
    assert not opened.errors


def drop(page, path: Path) -> dict:
    """Drop a workflow file onto the canvas; returns its JSON."""
    text = path.read_text("utf-8")
    workflow = json.loads(text)
    page.evaluate("() => app.graph.clear()")
    page.evaluate(DROP, [path.name, text])
    page.wait_for_function(DROPPED, arg=len(workflow["nodes"]))
    page.wait_for_timeout(500)
    return workflow


def select(page, type: str) -> None:
    page.evaluate(f"type => {{ {NODE}; app.canvas.centerOnNode(node); app.canvas.selectNode(node); app.canvas.setDirty(true, true) }}", type)
    page.wait_for_timeout(500)


def set_widget(page, type: str, name: str, value) -> None:
    page.evaluate(f"([type, name, value]) => {{ {NODE}; const w = node.widgets.find(w => w.name === name); w.value = value; w.callback?.(value) }}",
                  [type, name, value])


def run(page) -> None:
    page.get_by_test_id("queue-button").click()


def wait_for_picture(page, type="SaveImage") -> None:
    page.wait_for_function(f"type => {{ {NODE}; return node.imgs?.length && node.imgs[0].naturalWidth }}", arg=type, timeout=120_000)


# The tests ------------------------------------------------------------------------------------------


def test_templates_are_listed_with_pictures(page):
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("asdm", exact=True).click()
    for path in WORKFLOWS:
        title = dialog.get_by_text(path.stem, exact=True).first
        title.scroll_into_view_if_needed()
        expect(title).to_be_visible()
        page.wait_for_function("([name, side]) => [...document.images].some(i => i.alt === name && i.naturalWidth === side)", arg=[path.stem, SIDE])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_drops_onto_the_canvas(page, path):
    drop(page, path)
    unknown = page.evaluate("() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert not unknown
    # The graph that a Run would send is the one that test_nodes.py runs.
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == api_graph(path)
    page.keyboard.press(".")  # fit view
    page.wait_for_timeout(300)
    overlaps = page.evaluate("""() => {
      const boxes = app.graph._nodes.map(n => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]).map(b => [a[0], b[0]]))
    }""")
    assert not overlaps


def test_quick_start_runs_to_a_comparison(page):
    drop(page, PACK / "workflows" / "Quick start.json")
    for name, value in (("steps", 6), ("rounds", 1)):
        set_widget(page, "ASDMABCompare", name, value)
    run(page)
    wait_for_picture(page)
    select(page, "ASDMCompareImages")
    stage = page.locator(".asdm-compare .asdm-stage").last
    box = stage.bounding_box()
    assert box["width"] > 400  # the whole node, whatever the properties panel thinks
    second = stage.locator("img").nth(1)
    clips = []
    for share in (0.25, 0.75):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        clips.append(second.evaluate("image => parseFloat(image.style.clipPath.split(' ').pop())"))
    assert clips == pytest.approx([0.25 * box["width"], 0.75 * box["width"]], abs=3)
    view = page.locator(".asdm-compare").last
    view.get_by_role("button", name="Flip").click()
    shown = []
    for _ in range(2):
        shown.append(second.evaluate("image => image.style.visibility"))
        stage.click()
    assert shown == ["hidden", "visible"]
    page.screenshot(path=SHOTS / "flipped.png")
    view.get_by_role("button", name="Difference").click()
    assert second.evaluate("image => image.style.mixBlendMode") == "difference"


def test_help_opens_beside_the_graph(page):
    drop(page, PACK / "workflows" / "Combined UNet from a pack.json")
    select(page, "ASDMApplyPack")
    page.get_by_test_id("info-button").click()
    expect(page.get_by_role("heading", name="Apply Pack", exact=True)).to_be_visible()
    expect(page.get_by_test_id("properties-panel").get_by_text("models/asdm_packs")).to_be_visible()


def test_a_broken_pack_is_a_clear_error_and_the_graph_can_be_mended(page, server):
    packs = server.base / "models" / "asdm_packs"
    packs.mkdir(parents=True, exist_ok=True)
    (packs / "cut off.safetensors").write_bytes((PACK / "models/emoji/emoji-m2.safetensors").read_bytes()[:3000])
    drop(page, PACK / "workflows" / "Combined UNet from a pack.json")
    set_widget(page, "ASDMApplyPack", "pack_name", "cut off.safetensors")
    run(page)
    page.get_by_role("button", name="View details").click(timeout=60_000)
    expect(page.get_by_text("cut off.safetensors").first).to_be_visible()
    page.screenshot(path=SHOTS / "broken_pack.png")
    set_widget(page, "ASDMApplyPack", "pack_name", "emoji-m2.safetensors")
    run(page)
    wait_for_picture(page)
