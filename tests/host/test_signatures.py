"""The comparison of node signatures, on the nodes as the real host tells them."""

import copy

import pytest

from tools import signatures


@pytest.fixture(scope="module")
def nodes(server):
    info = signatures.Client(server.url).object_info()
    return {name: entry for name, entry in info.items() if entry["python_module"] == "custom_nodes.asdm"}


def preset(nodes):
    return nodes["ASDMFeatureInheritance"]["input"]["required"]["preset"][1]["options"]


def test_the_same_nodes_and_further_ones_break_nothing(nodes):
    assert list(signatures.breaks(nodes, nodes)) == []
    fewer = {name: entry for name, entry in nodes.items() if name != "ASDMApplyPack"}
    assert list(signatures.breaks(fewer, nodes)) == []


def test_what_breaks_saved_workflows_is_found(nodes):
    newer = copy.deepcopy(nodes)
    del newer["ASDMSaveUNet"]
    required = newer["ASDMApplyPack"]["input"]["required"]
    del required["strength"]
    required["start_percent"][0] = "STRING"
    required["new"] = ["MODEL", {}]
    required["harmless"] = ["INT", {"default": 1}]
    newer["ASDMCheckpointLoader"]["output"].reverse()
    custom = next(option for option in preset(newer) if option["key"] == "custom")
    del custom["inputs"]["required"]["interval"]
    preset(newer)[:] = [option for option in preset(newer) if option["key"] != "fast"]
    assert set(signatures.breaks(nodes, newer)) == {
        "ASDMSaveUNet: the node is gone",
        "ASDMApplyPack: the input strength is gone",
        "ASDMApplyPack: the input start_percent was FLOAT and is STRING",
        "ASDMApplyPack: the new input new is required and has no default",
        "ASDMCheckpointLoader: the outputs were ['MODEL', 'CLIP', 'VAE'] and are ['VAE', 'CLIP', 'MODEL']",
        "ASDMFeatureInheritance: the input preset=custom.interval is gone",
        "ASDMFeatureInheritance: the input preset lacks the choice fast",
    }
