"""The entry point on a ComfyUI that is too old, and outside of one."""

import asyncio
import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(monkeypatch, version, v3=True):
    """The root package as a ComfyUI of this version loads it; version None: no ComfyUI."""
    for name, there in (("comfyui_version", version is not None), ("comfy_api.latest", v3)):
        if there:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__=version))
        else:
            monkeypatch.delitem(sys.modules, name, raising=False)
    name = "asdm_of_some_version"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentence(version):
    return f"asdm needs ComfyUI 0.27 or newer, and this is {version}. Update ComfyUI, then start again."


@pytest.mark.parametrize("version", ["0.26.9", "0.18.0", "0.3.64", "0.3.10+local"])
@pytest.mark.parametrize("v3", [True, False])
def test_a_host_that_is_too_old_gets_one_sentence(monkeypatch, caplog, version, v3):
    module = load(monkeypatch, version, v3)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [sentence(version)] * (not v3)
    with pytest.raises(RuntimeError) as e:
        asyncio.run(module.comfy_entrypoint())
    assert str(e.value) == sentence(version)


@pytest.mark.parametrize("version", ["0.27.0", "0.30.0", "0.100.1", "1.0", "unknown", "", None])
def test_others_get_none(monkeypatch, caplog, version):
    module = load(monkeypatch, version, v3=version is not None)
    assert module._too_old() == "" and not caplog.records


def test_a_host_from_before_it_told_its_version_gets_the_sentence_too(monkeypatch, caplog):
    # Our own tests run with a ComfyUI beside them at times; here nothing may find its version.
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "comfyui_version" else find(name))
    module = load(monkeypatch, None, v3=False)
    assert [r.getMessage() for r in caplog.records] == [sentence("0.3.10 or older")]
    with pytest.raises(RuntimeError, match="0.3.10 or older"):
        asyncio.run(module.comfy_entrypoint())
