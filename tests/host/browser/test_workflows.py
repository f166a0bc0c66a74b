"""The bundled workflows: found, opened, legible."""

import pytest
from playwright.sync_api import expect

from demo.server import PACK
from demo.thumbnails import SIDE, api_graph

from tests.host.browser.on_page import WORKFLOWS, SHOTS, drop, run, select, set_widget, until


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
                until(lambda: page.evaluate(CUT) == [], seconds=120)  # a text too long never fits: said soon
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
