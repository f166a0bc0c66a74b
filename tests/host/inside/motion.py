"""Modules that nodes insert between the layers of a UNet stay there after a run, and the layers behind them have other
names then: in the MODEL itself and in all its clones, which share the UNet.
"""

import comfy.model_management
import motion_modules as motion
import pytest
import small
import torch
from in_host import execute, module

SD, packs = small.SD, small.packs
differences, identity = module("asdm_core.differences"), module("asdm_core.identity")
unpatched, fingerprint = module("nodes.engine.unpatched"), module("nodes.engine.fingerprint")
M2 = small.Architecture.preset("m2", SD)
assert any(address.endswith("sampler") for address in M2.pack_units()), "what lies behind the modules"


@pytest.fixture
def injected(model):
    """The checkpoint; another clone of it with motion modules has just played, and they are in the UNet."""
    other = motion.with_motion(model)
    small.sample(other, steps=1, batch=3)
    unet = model.model.diffusion_model
    assert any(isinstance(m, motion.VanillaTemporalModule) for m in unet.modules()) and not model.is_injected
    yield model
    comfy.model_management.unload_all_models()
    assert not any(isinstance(m, motion.VanillaTemporalModule) for m in unet.modules())


@pytest.mark.parametrize("behind", [True, False])
def test_every_run_with_a_pack_is_the_first(model, combined, m2, behind):
    played = (
        motion.with_motion(small.with_pack(model, m2)) if behind else small.with_pack(motion.with_motion(model), m2)
    )
    wanted = small.sample(motion.with_motion(combined), batch=3)
    assert not torch.equal(wanted, small.sample(combined, batch=3))
    for _ in range(3):
        assert torch.equal(small.sample(played, batch=3), wanted)


@pytest.fixture(scope="module")
def difference(folder):
    whole = small.weights(SD)
    description, changes = differences.to_difference(
        packs.open_pack(small.write_pack(folder / "for-motion.safetensors", seed=1)), whole, "teacher"
    )
    path = folder / "motion-difference.safetensors"
    packs.write_pack(path, changes, description, None)
    return path


def test_a_difference_is_added_to_the_checkpoints_own_weights(injected, combined, difference):
    wanted = small.sample(combined, steps=1)
    alone, moved = small.with_pack(injected, difference), small.with_pack(motion.with_motion(injected), difference)
    assert small.difference(small.sample(alone, steps=1), wanted) < 1e-5
    made = small.sample(moved, steps=1, batch=3)
    assert small.difference(made, small.sample(motion.with_motion(combined), steps=1, batch=3)) < 1e-5


def test_the_names_and_the_fingerprint_are_those_of_the_checkpoint(injected):
    own = dict(unpatched.Unpatched(injected))
    told = fingerprint.fingerprint(injected, lambda technique: False)
    comfy.model_management.unload_all_models()
    assert own.keys() == set(small.weights(SD)) and all(torch.equal(own[k], w) for k, w in small.weights(SD).items())
    assert told == fingerprint.fingerprint(injected, lambda technique: False)


def test_what_is_saved_is_the_checkpoint(injected, tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    for m in (injected, motion.with_motion(injected)):
        small.sample(motion.with_motion(injected), steps=1, batch=3)
        saved = packs.open_unet(execute("ASDMSaveUNet", model=m, filename_prefix="own", dtype="as loaded")[0])
        assert all(torch.equal(saved.tensors[k], w) for k, w in small.weights(SD).items())
