"""Every node of the pack after a run, in both front ends and palettes."""

import shutil

import pytest

from demo.server import PACK, Client
from tools.registry import node_ids

from tests.host.browser.on_page import (
    NODE,
    PATIENCE,
    READY,
    SHOTS,
    loaded,
    run,
    select,
    until,
    view_of,
    wait_for_picture,
)


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
LOWEST = "Math.max(0, ...(node.widgets ?? []).map(w => w.element ? w.y + w.computedHeight : 0).filter(y => y > 0))"
SAID = "(node.widgets ?? []).filter(w => ['note', 'asdm_notes'].includes(w.name)).map(w => w.value).join(' ')"


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
