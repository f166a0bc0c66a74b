import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16

from train.vgg import SIZE, VGG16, load_vgg


def test_its_levels_are_the_last_relu_of_four_stages():
    with torch.device("meta"):
        net = VGG16()
        whole = vgg16(weights=None)
    shapes = [tuple(level.shape) for level in net(torch.empty(2, 3, 64, 64, device="meta"))]
    assert shapes == [(2, c, SIZE // s, SIZE // s) for c, s in ((64, 1), (128, 2), (256, 4), (512, 8))]
    # The names are torchvision's, so its files load.
    known = {k: v.shape for k, v in whole.state_dict().items()}
    assert all(known[k] == v.shape for k, v in net.state_dict().items())


def test_weights_come_from_a_safetensors_file_or_an_error_says_which(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs the weights of VGG16, and loss.vgg names no file. Give model.safetensors"
    ):
        load_vgg("")
    with pytest.raises(ValueError, match=r"none.safetensors does not exist. Give model.safetensors"):
        load_vgg(str(tmp_path / "none.safetensors"))
    torch.save({}, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"vgg16.pth is no .safetensors file, and no other kind is read"):
        load_vgg(str(tmp_path / "vgg16.pth"))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: features.0.weight is missing or of another shape"):
        load_vgg(str(tmp_path / "other.safetensors"))
    torch.manual_seed(0)
    net = VGG16()
    save_file(net.state_dict(), tmp_path / "vgg16.safetensors")
    loaded = load_vgg(str(tmp_path / "vgg16.safetensors"))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))


@torch.no_grad()
def test_pictures_are_normalised_as_imagenet_is():
    net = VGG16()
    seen = []
    net.features[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    net.features = net.features[:1]
    net((mean + std).expand(1, 3, 8, 8))
    torch.testing.assert_close(seen[0], torch.ones(1, 3, SIZE, SIZE))
