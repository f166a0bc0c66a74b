"""What nodes draw of a MODEL, by the colours in the pictures."""

import numpy as np
import pytest
import small
import torch

inspect_model = small.module("nodes.inspect_model")
picture = small.module("nodes.engine.picture")


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
