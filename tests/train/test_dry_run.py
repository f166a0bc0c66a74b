"""The memory of a plan against real tensors: what a real forward pass keeps, in numbers of bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.recipes import CONFIGS, NARROW
from train import networks, vgg
from train.recipe import load
from train.attention import BmmAttention
from train.dry_run import CARDS, Kept, activations, memory, meta_student, perceptual, table


def really_kept(network, call):
    """Bytes of the storages a forward pass saves, without those of the network itself."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return sum(storage.nbytes() for storage in seen.values()), out


@pytest.fixture()
def norms_as_on_a_gpu(monkeypatch):
    """On a CPU autocast leaves norms in half precision; on a GPU it takes them to float32."""
    for name in ("group_norm", "layer_norm"):
        plain = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *a, plain=plain, **k: plain(x.float(), *a, **k))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        ["student.preset=m2"],
        ["student.preset=m1"],
        ["student.preset=base", "loss.mid=0"],
        ["student.preset=tiny", "loss.mid=0", "student.trained=all"],
    ],
    ids=lambda c: c[0],
)
def test_a_plan_counts_what_a_real_step_keeps(changes, precision, norms_as_on_a_gpu):
    config = load(NARROW, [*changes, f"run.precision={precision}", "run.micro_batch=2", "data.size=256"])
    student = networks.make_student(networks.load_teacher(config), config)
    if precision == "bf16":
        networks.hold_frozen(student, None, torch.bfloat16)
    x, t, context = torch.randn(2, 4, 32, 32), torch.tensor([1, 999]), torch.randn(2, 77, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        real, _ = really_kept(student, lambda: student(x, t, context).sample)
    planned = activations(meta_student(config), config)
    assert sum(planned) == pytest.approx(real, rel=0.1)
    half_weights = 2 * sum(
        m.weight.numel() for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.requires_grad
    )
    assert planned[1] >= 0.8 * half_weights if precision == "bf16" else planned[1] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plan_for_the_cpu_counts_its_attention(precision):
    config = load(NARROW, ["student.preset=m2", f"run.precision={precision}", "run.micro_batch=2", "data.size=128"])
    student = networks.make_student(networks.load_teacher(config), config)
    if precision == "bf16":
        networks.hold_frozen(student, None, torch.bfloat16)
    networks.set_attention(student, BmmAttention())
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([1, 999]), torch.randn(2, 77, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        real, _ = really_kept(student, lambda: student(x, t, context).sample)
    on_cpu, on_a_card = (sum(activations(meta_student(config), config, cpu)) for cpu in (True, False))
    assert on_cpu == pytest.approx(real, rel=0.03) and abs(on_a_card - real) > 0.05 * real


def test_what_autocast_keeps_of_a_few_layers_is_what_its_rules_say():
    """Convolution, norm, SiLU, convolution, all trained; worked out by hand."""
    b, c, s = 3, 8, 16
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(2, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))
        x = torch.empty(b, c, s, s)
    maps, weights = b * c * s * s, c * c * 9
    kept = Kept(net)
    with kept.counted(torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    # Input in half; the norm's input in float32; the SiLU's too; the second convolution's in half; mean and deviation.
    assert kept.tensors.total() == 2 * maps + 4 * maps + 4 * maps + 2 * maps + 2 * 4 * b * 2
    assert kept.copies.total() == 2 * 2 * weights
    plain = Kept(net)
    with plain.counted(torch.float32):
        net(x)
    assert (plain.tensors.total(), plain.copies.total()) == (4 * maps * 4 + 2 * 4 * b * 2, 0)


def test_the_perceptual_network_is_counted(monkeypatch):
    changes = ["network.teacher=x", "run.batch=2", "run.micro_batch=2", "data.size=64"]
    config = load(CONFIGS / "sd15-m2.toml", changes)
    net = vgg.VGG16().requires_grad_(False)
    pictures = torch.rand(2, 3, 64, 64, requires_grad=True)
    real, levels = really_kept(net, lambda: net(pictures))
    weights = sum(4 * p.numel() for p in net.parameters())
    assert perceptual(config) == pytest.approx(real + weights + sum(4 * level.numel() for level in levels), rel=0.05)
    assert memory(meta_student(config), config, 1).perceptual == perceptual(config)
    assert perceptual(load(CONFIGS / "sd15-m2.toml", [*changes, "loss.perceptual=0"])) == 0


def test_what_the_losses_keep_is_the_teachers_features():
    """Of the mid block alone: 1280 channels at 4 x 4; and of the prediction, 4 at 32 x 32."""
    changes = ["network.teacher=x", "run.precision=bf16", "run.batch=3", "run.micro_batch=3", "data.size=256"]
    config = load(CONFIGS / "sd15-m2.toml", changes)
    assert {kind: len(taps) for kind, taps in config.taps.items()} == {"mid": 1}
    assert memory(meta_student(config), config, 1).compared == 3 * (1280 * 4 * 4 + 4 * 32 * 32) * 2


def test_of_m2_only_what_is_trained_is_held_twice():
    """Two bytes for each number that is multiplied: of frozen ones the teacher's own, of the others a copy a step."""
    changes = ["network.teacher=x", "run.precision=bf16", "run.checkpoint_gradients=false", "run.micro_batch=1"]
    config = load(CONFIGS / "sd15-m2.toml", [*changes, "run.batch=1"])
    student = meta_student(config)
    need = memory(student, config, 1)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    products = sum(p.numel() for p in student.parameters() if p.requires_grad and p.dim() > 1)
    small = sum(p.numel() for p in student.parameters() if not p.requires_grad and p.dim() < 2)
    assert 0.9 * 2 * products < need.copies <= 2 * products  # what meets the text first needs no gradient of its input
    assert need.student == 4 * (trained + small)
    # A checkpoint of SD1.5 in half precision, once; and three more numbers for each that is trained, and its gradient.
    assert need.teacher == pytest.approx(2 * 859_520_964, rel=1e-6)
    assert need.gradients + need.optimiser + need.average == 4 * 4 * trained


PAGE = (CONFIGS.parents[1] / "docs" / "training.md").read_text("utf-8")


def rows():
    """The table of docs/training.md: {recipe: cells}."""
    found = (line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `sd"))
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in found if len(cells) == 7}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("recipe", ["sd15-m2", "sd15-base", "sd15-m3", "sdxl-ssd-1b-1"])
def test_the_page_has_the_row_that_the_plan_gives(recipe):
    assert table([CONFIGS / f"{recipe}.toml"]).splitlines()[-1] in PAGE


def test_every_recipe_fits_the_card_that_people_have():
    found = rows()
    assert found.keys() == {path.stem for path in CONFIGS.glob("sd*.toml")}
    for recipe, cells in found.items():
        assert float(cells[0]) <= CARDS[12 if recipe.startswith("sd15") else 24], recipe
    assert float(found["sd15-m2"][1]) < 6
