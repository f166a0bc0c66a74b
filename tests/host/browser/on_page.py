"""What tests do on ComfyUI's page."""

import json
import time
from pathlib import Path

from playwright.sync_api import expect

from demo.server import PACK

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
SPLIT = "image => parseFloat(image.style.clipPath.split(' ').pop()) / image.parentElement.clientWidth"


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


def until(check, seconds=PATIENCE / 1000) -> None:
    """Wait until check() is true."""
    end = time.monotonic() + seconds
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


def view_of(page, type: str, id: str):
    """The compare view of a node, by an id that it gets."""
    page.evaluate(
        f"([type, id]) => {{ {NODE}; node.widgets.find(w => w.name === 'asdm_compare').element.id = id }}", [type, id]
    )
    return page.locator(f"#{id}")


def loaded(image) -> None:
    until(lambda: image.evaluate("image => image.complete && image.naturalWidth > 0"))


def show_pictures(page, type: str, count: int) -> None:
    """What a node would show of so many pictures, which are those of the workflows' list."""
    shown = {
        "title": "",
        "labels": [""] * count,
        "batches": [[{"filename": f"{i}.png"}] for i in range(count)],
        "likeness": {f"{i}{j}": ["identical"] for j in range(count) for i in range(j)},
    }
    page.evaluate(f"([type, shown]) => {{ {NODE}; node.onExecuted({{asdm_compare: [shown]}}) }}", [type, shown])
