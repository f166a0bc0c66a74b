import pytest
import torch

from train.emoji.classifier import FEATURES, Classifier, augment, load_classifier, save_classifier, top_k
from train.emoji.evaluate import background_of, summary
from train.emoji.render import BACKGROUNDS
from train.metrics import border, by_bins, frechet, gradient, kid


def test_top_k_counts_first_and_first_five():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :8]

    images = torch.zeros(3, 1, 2, 4)
    images[0, 0, 0, 2] = 1  # first
    images[1] = torch.arange(8.0).view(1, 2, 4)  # label 4 is fourth
    images[2] = torch.arange(8.0).view(1, 2, 4)  # label 0 is last
    first, five = top_k(Fixed(), images, torch.tensor([2, 4, 0]))
    assert first.tolist() == [True, False, False] and five.tolist() == [True, True, False]


def test_the_classifier_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    model = Classifier(5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    save_classifier(tmp_path / "emoji-classifier.safetensors", model, list("abcde"), {"steps": 0})
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path, list("abcde"))(x), model(x))
        torch.testing.assert_close(load_classifier(tmp_path, list("eca"))(x), model(x)[:, [4, 2, 0]])
        assert model.features(x).shape == (2, FEATURES)
    with pytest.raises(ValueError, match="does not know z"):
        load_classifier(tmp_path, ["z"])


def test_augmenting_depends_on_the_generator_alone():
    x = torch.rand(4, 3, 32, 32)
    a, b = (augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and 0 <= a.min() and a.max() <= 1


def test_backgrounds_are_told_from_the_corners():
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[:, :, None, None] / 255
    images = colours.expand(-1, -1, 16, 16).clone()
    images[:, :, 4:12, 4:12] = 0
    assert background_of(images) == list(BACKGROUNDS)


def test_the_gate_is_not_met_by_top_5_alone():
    rows = [{"row": "teacher, plain prompts", "emoji": 360, "top1": 0.7, "top5": 0.99}]
    assert summary({"teacher": rows})["gate_met"] is False
    rows[0]["top1"] = 0.81
    assert summary({"teacher": rows})["gate_met"] is True
    rows[0]["emoji"] = 52  # few emoji are easy
    assert summary({"teacher": rows})["gate_met"] is False


def test_distances_of_equal_sets_are_zero_and_of_shifted_ones_the_shift():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 4, generator=g)
    assert abs(frechet(a, a)) < 1e-9 and abs(frechet(a, a + 3) - 4 * 9) < 1e-4
    # One dimension: (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2.
    x = a[:, :1]
    y = 2 * a[:, :1] + 1
    wanted = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert frechet(x, y) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="needs more than 4 pictures, got 400 and 4"):
        frechet(a, a[:4])


def test_the_kernel_distance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    halves = [torch.randn(40, 4, generator=g).split(20) for _ in range(200)]
    values = torch.tensor([kid(a, b) for a, b in halves])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5 and values.min() < 0  # around 0, so also below it
    assert kid(halves[0][0], halves[0][1] + 2) > 10 * values.abs().max()


def test_means_by_bins_of_t():
    found = by_bins(torch.tensor([1.0, 2.0, 6.0, 7.0]), torch.tensor([0, 499, 500, 999]), bins=2)
    assert found == {"all": 4.0, "0-499": 1.5, "500-999": 6.5}


def test_borders_of_one_colour_and_sharp_edges():
    grey, half = torch.full((1, 3, 16, 16), 0.3), torch.full((1, 3, 16, 16), 0.3)
    grey[..., 5:11, 5:11] = 1.0  # what is shown is no border
    half[..., :8] = 0.9  # half of the frame has another colour
    assert border(grey) == 0 and border(half) == pytest.approx(0.6 * 0.5, abs=0.05)
    # One edge of height .6 in 15 steps across, none down.
    assert gradient(half) == pytest.approx(0.6 / 15) and gradient(torch.full((1, 3, 8, 8), 0.5)) == 0
