"""Workflows that do not run, and what mends them."""

import json
import re

from playwright.sync_api import expect

from demo.server import PACK
from demo.thumbnails import api_graph

from tests.host.browser.on_page import NODE, SHOTS, drop, run, set_widget, wait_for_picture


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
