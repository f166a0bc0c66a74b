"""The classifier in VGG's place: levels, gradients, and the loss it is for."""

import pytest
import torch

from asdm_core.tensor_file import write_file
from tests.train.recipes import CONFIGS
from train import losses
from train.recipe import load
from train.data import Batch
from train.emoji.classifier import Classifier, save_classifier
from train.emoji.codec import Codec, to_taesd
from train.emoji.features import ClassifierFeatures
from train.diffusion import coefficients
from train.criterion import Criterion


@pytest.fixture()
def models(tmp_path):
    torch.manual_seed(0)
    write_file(tmp_path / "emoji-vae.safetensors", {k: v.half() for k, v in to_taesd(Codec()).items()}, {})
    save_classifier(tmp_path / "emoji-classifier.safetensors", Classifier(3).eval(), ["a", "b", "c"], {})
    return tmp_path


def test_the_classifier_sees_what_a_prediction_stands_for(models):
    recipe = load(CONFIGS / "emoji-m2.toml", [f"loss.classifier={models}", "loss.perceptual=0.1", "loss.blocks=0"])
    criterion = Criterion(recipe, torch.device("cpu"), ClassifierFeatures)
    assert list(criterion.weights) == ["output", "perceptual"] and not any(
        p.requires_grad for p in criterion.net.parameters()
    )
    x0, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    t = torch.tensor([100, 700, 900])
    a, s = coefficients(t)
    x = a * x0 + s * noise
    v = a * noise - s * x0
    student = (v + 0.1 * torch.randn_like(v)).requires_grad_()
    value = criterion(Batch(x0, noise, t, torch.zeros(3, 1, 128)), x, (student, {}), (v, {}))
    assert value[1, 0] > 0 and value[1, 1] > 0 and value[1, 2] == 0  # x_0 of t = 900 shows nothing yet
    value[1].sum().backward()
    assert student.grad[0].abs().sum() > 0 and not student.grad[2].any()
    # The teacher's own prediction shows the picture of x0 itself.
    wanted = criterion.net(criterion.net.pictures(x0))
    assert len(wanted) == 5 and [w.shape[-1] for w in wanted] == [32, 16, 16, 8, 8]
    assert losses.perceptual(criterion.picture(x0), criterion.picture(x0), criterion.net, t < 800).tolist() == [0, 0, 0]


def test_it_is_for_the_emoji_family_alone():
    with pytest.raises(ValueError, match="knows the pictures of the emoji family alone, not of 'sd15'"):
        load(CONFIGS / "sd15-m2.toml", ["loss.classifier=models/emoji"])
    with pytest.raises(ValueError, match="or for emoji with loss.classifier"):
        load(CONFIGS / "emoji-m2.toml", ["loss.perceptual=0.1"])
