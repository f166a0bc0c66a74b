"""What nodes draw of a MODEL, by the colours in the pictures."""

import numpy as np
import pytest
import small
import torch

inheritance = small.module("asdm_core.inheritance")
inheritance_plan, inspect_model = small.module("nodes.inheritance_plan"), small.module("nodes.inspect_model")
network, picture = small.module("nodes.engine.network"), small.module("nodes.engine.picture")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.model(tmp_path_factory.mktemp("unet"))


def share_of(image, colour):
    """Share of a picture (1, H, W, 3) in exactly this colour."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(((image[0] - wanted).abs().amax(-1) < 1e-3).float().mean())


@pytest.mark.parametrize("layers", [False, True])
def test_every_player_has_its_colour(model, layers, tmp_path):
    packed = small.with_pack(model, small.write_pack(tmp_path / "pack.safetensors"))
    plain, combined = (
        inspect_model.ASDMInspectModel.execute(m, 512, 512, 0.0, layers).result[1] for m in (model, packed)
    )
    own, pack = picture.COLOURS["checkpoint"], picture.COLOURS["pack"]
    # The legend has both colours too; what is drawn is more.
    assert share_of(plain, own) > share_of(combined, own) > 0.005
    assert share_of(combined, pack) > 3 * share_of(plain, pack)
    assert np.asarray(plain).std() > 0


def test_bars_may_be_next_to_nothing(model):
    """A block of hardly any work, a step of hardly any time, more steps than a picture has room for."""
    units = network.architecture_of(model).kept
    blocks = {u.block: u for u in units}
    shares = {u.address: picture.UnitView("checkpoint", 1e-4 if u.block == "down.0" else 0.0) for u in units}
    shares[blocks["mid"].address] = picture.UnitView("pack", 1.0)
    assert picture.draw_levels(small.SD, shares, "title", ["line"]).width == picture.PLAN_WIDTH
    plan = inheritance.deepcache(small.SD, 0, inheritance.Schedule())
    m = small.with_plan(model, plan)
    facts = inheritance_plan.describe(m, 3, 128, 128, 1)
    facts["last_run"] = {"steps": 3, "roles": ("computed",) * 3, "seconds": [[0, 1.0], [1, 1.0], [2, 1e-5]]}
    assert picture.draw_plan(network.architecture_of(m), plan, facts, "text").width == picture.PLAN_WIDTH
    steps = [[step, 1.0] for step in range(1000)]
    run = {
        "step_seconds": steps,
        "inherited_steps": [],
        "forecast_steps": [1],
        "left_out_steps": [2],
        "played": [1] * 1000,
        "groups": {},
    }
    assert picture.draw_speed(run | {"seconds": 1.0, "saved": []}, "title", "line").width == picture.PLAN_WIDTH
