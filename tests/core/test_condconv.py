"""Convolutions with several experts: the layer, its starts, who can share with whom, and packs of experts."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from asdm_core import condconv, packs
from asdm_core.__main__ import main
from asdm_core.addresses import keys, walk
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.condconv import CondConv, CondConv2d
from asdm_core.packs import Description, open_pack
from asdm_core.tensor_file import BadFile, TensorFile
from asdm_core.surgery import Mismatch, cut, extract
from tests.core.narrow import SD, weights

CONV1, CONV2 = "up.3.2.resnet.conv1", "up.3.2.resnet.conv2"
SHALLOW = ("down.0", "down.1", "up.2", "up.3")


def layer(experts=3, form="difference", address=CONV2, random=True, **more):
    """A convolution of the narrow UNet with random further experts, in float32."""
    settings = CondConv({address: experts}, form)
    conv = condconv.convolution(SD, address)
    torch.manual_seed(0)
    c_out, c_in, *kernel = conv.shape
    first = nn.Conv2d(c_in, c_out, kernel, padding=1)
    made = CondConv2d(first, *condconv.further_experts(settings, conv), form, **more)
    if not random:
        made.experts.weight.data.zero_()
        made.experts.bias.data.zero_()
    return made


def picture(batch=3, channels=8, size=(7, 5)):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)) * 3


def reference(made, x):
    """Sample by sample, expert by expert, by the formulas of the paper."""
    out = []
    for sample in x:
        pooled = sample.double().mean((1, 2))
        r = torch.sigmoid(made.router.weight.double() @ pooled + made.router.bias.double())
        first, bias = made.conv.weight.double(), made.conv.bias.double()
        experts = made.experts.weight.double().unflatten(0, (-1, len(first)))
        biases = made.experts.bias.double().unflatten(0, (-1, len(first)))
        if made.form == "mixture":
            experts, biases = torch.cat([first[None], experts]), torch.cat([bias[None], biases])
            first, bias = 0 * first, 0 * bias
        for k in range(len(experts)):
            first, bias = first + r[k] * experts[k], bias + r[k] * biases[k]
        out.append(F.conv2d(sample.double(), first, bias, made.conv.stride, made.conv.padding))
    return torch.stack(out).float()


# The layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", condconv.FORMS)
@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("address", [CONV1, CONV2])
def test_equals_the_formula_sample_by_sample(form, experts, batch, address):
    made = layer(experts, form, address)
    x = picture(batch, made.conv.in_channels)
    torch.testing.assert_close(made(x), reference(made, x), atol=1e-5, rtol=1e-4)
    assert (made(x) - made.conv(x)).abs().max() > 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_differences_of_zero_change_no_bit(batch):
    made = layer(random=False)
    x = picture(batch)
    assert torch.equal(made(x), torch.cat([made.conv(sample) for sample in x.split(1)]))


@pytest.mark.parametrize("form", condconv.FORMS)
def test_strength_zero_is_the_convolution_itself(form):
    made = layer(form=form, strength=0.0)
    x = picture()
    assert torch.equal(made(x), made.conv(x))


@pytest.mark.parametrize("form", condconv.FORMS)
def test_strength_is_the_way_between_the_convolution_and_all_experts(form):
    made = layer(form=form)
    x = picture()
    plain = made.conv(x)
    whole = made(x)
    made.strength = 0.3
    torch.testing.assert_close(made(x), plain.lerp(whole, 0.3))


def test_stride_and_padding_are_those_of_the_convolution():
    made = layer()
    x = picture(size=(8, 8))
    made.conv.stride = (2, 2)
    assert made(x).shape[2:] == (4, 4)
    torch.testing.assert_close(made(x), reference(made, x), atol=1e-5, rtol=1e-4)
    made.conv.padding_mode = "circular"
    made.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    rolled = made(x.roll(2, 3))  # on a torus a shift of the input is a shift of the output
    torch.testing.assert_close(rolled, made(x).roll(1, 3))


def test_shared_routes_mix_one_kernel(monkeypatch):
    made, x = layer(), picture()
    routes = made.routes(x[:1])
    calls = []
    convolve = made.conv._conv_forward
    monkeypatch.setattr(made.conv, "_conv_forward", lambda *args: calls.append(len(args[0])) or convolve(*args))
    shared = made(x, routes)
    assert calls == [3]
    torch.testing.assert_close(shared, made(x, routes.expand(3, -1)))
    assert calls == [3, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routes_are_float32_in_every_precision(dtype):
    made, x = layer(), picture()
    wanted = made.routes(x)
    half = copy.deepcopy(made).to(dtype)
    half.router = made.router
    with torch.autocast("cpu", dtype):
        assert torch.equal(made.routes(x), wanted)
    x = x.to(dtype)
    assert half.routes(x).dtype == torch.float32
    assert torch.equal(half.routes(x), made.routes(x.float()))
    assert half(x).dtype == dtype
    torch.testing.assert_close(half(x).float(), made(x.float()), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("form", condconv.FORMS)
def test_gradients_are_those_of_the_formula(form):
    made = layer(form=form)
    x = picture().requires_grad_()
    wanted = torch.autograd.grad(reference(made, x).square().sum(), [*made.parameters(), x])
    found = torch.autograd.grad(made(x).square().sum(), [*made.parameters(), x])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        assert b.abs().max() > 0


def test_experts_that_start_at_zero_learn_at_once_and_apart():
    settings = CondConv({CONV2: 3})
    made = layer(random=False)
    x = picture()
    made.load_state_dict(
        {k.removeprefix("output_blocks.11.0.out_layers.3."): v for k, v in condconv.start(SD, settings).items()},
        strict=False,
    )
    made(x).square().sum().backward()
    first, second = made.experts.weight.grad.chunk(2)
    assert first.abs().max() > 0 and second.abs().max() > 0
    assert not torch.allclose(first, second, rtol=1e-3)


# Addresses, settings, starts ------------------------------------------------------------------------


def test_convolutions_are_the_3x3_ones_of_resnets_and_samplers():
    found = condconv.convolutions(SD)
    names = {conv.key(leaf) for conv in found.values() for leaf in ("weight", "bias")}
    table = {k for k, s in keys(SD).items() if s.tensor.part == "conv" and s.unit.side != "stem"}
    assert names == table
    assert len(found) == 2 * sum(u.kind == "resnet" for u in walk(SD)) + 6
    assert (
        found[CONV1].path("diffusers") == "up_blocks.3.resnets.2.conv1"
        and found["down.0.sampler.conv"].path("ldm") == "input_blocks.3.0.op"
    )


def test_size_of_two_experts_on_the_shallow_blocks_of_m2():
    config = FAMILIES["sd15"]
    chosen = Architecture.preset("m2")
    convs = [
        a for a, c in condconv.convolutions(config).items() if c.unit.address in chosen.own and c.unit.kind == "resnet"
    ]
    numbers = sum(
        s.tensor.numel
        for k, s in CondConv(dict.fromkeys(convs, 2)).keys(config).items()
        if k.endswith("experts.weight")
    )
    assert round(numbers / 1e6, 1) == 37.8


@pytest.mark.parametrize(
    "data, message",
    [
        (3, "JSON object"),
        ({}, "experts must give at least one"),
        ({"experts": {}}, "at least one"),
        ({"experts": [CONV1]}, "at least one"),
        ({"experts": {CONV1: 1}}, "must have 2 to 64 experts, got 1"),
        ({"experts": {CONV1: 65}}, "got 65"),
        ({"experts": {CONV1: True}}, "got True"),
        ({"experts": {CONV1: "2"}}, "got '2'"),
        ({"experts": {CONV1: 2}, "form": "sum"}, "form must be one of"),
        ({"experts": {CONV1: 2}, "form": []}, "form"),
        ({"experts": {CONV1: 2}, "router": 1}, r"unknown fields \['router'\]"),
    ],
    ids=str,
)
def test_wrong_settings(data, message):
    with pytest.raises(ValueError, match=f"condconv.*{message}"):
        CondConv.from_dict(data)


@pytest.mark.parametrize(
    "address", ["up.3.2.resnet", "up.3.2.resnet.conv3", "up.3.2.transformer.conv", "stem.conv_in.", "moon"]
)
def test_addresses_of_no_convolution(address):
    with pytest.raises(ValueError, match=f"no convolution '{address}'"):
        CondConv({address: 2}).keys(SD)


@pytest.mark.parametrize("form", condconv.FORMS)
@pytest.mark.parametrize("how", condconv.STARTS)
def test_starts_have_the_shapes_of_the_file(form, how):
    settings = CondConv({CONV1: 2, "down.0.sampler.conv": 4}, form)
    tensors = condconv.start(SD, settings, how)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {k: s.shape for k, s in settings.keys(SD).items()}
    assert all(bool(t.any()) == (how == "random" or ".router." in k) for k, t in tensors.items())
    assert all(torch.equal(t, tensors[k]) for k, t in condconv.start(SD, settings, how).items())
    with pytest.raises(ValueError, match="start must be one of"):
        condconv.start(SD, settings, "warm")


def test_random_experts_are_drawn_as_torch_draws_a_convolution():
    settings = CondConv({CONV1: 64}, "mixture")
    drawn = condconv.start(SD, settings, "random")[condconv.convolution(SD, CONV1).key("experts.weight")]
    torch.manual_seed(0)
    own = nn.Conv2d(drawn.shape[1], len(drawn), 3).weight
    assert abs(drawn.std() / own.std() - 1) < 0.02 and abs(drawn.abs().max() / own.abs().max() - 1) < 0.01


# CLME -----------------------------------------------------------------------------------------------

# Which convolutions of which block can share, by A-SDM's choice of donors and the widths of SD1.5.
SHARED = {
    "up.3.0.resnet.conv2": ("up.3.1.resnet.conv2", "up.3.2.resnet.conv2"),
    "up.3.2.resnet.conv1": ("up.3.1.resnet.conv1",),
    "up.3.2.resnet.conv2": ("up.3.0.resnet.conv2", "up.3.1.resnet.conv2"),
    "down.0.0.resnet.conv1": ("down.0.1.resnet.conv1",),
    "down.0.0.resnet.conv2": ("down.0.1.resnet.conv2",),
    "down.1.0.resnet.conv2": ("down.1.1.resnet.conv2",),
    "up.2.0.resnet.conv2": ("up.2.1.resnet.conv2", "up.2.2.resnet.conv2"),
    "up.0.0.resnet.conv1": ("up.0.1.resnet.conv1", "up.0.2.resnet.conv1"),
    "down.3.0.resnet.conv1": ("down.3.1.resnet.conv1",),
    "mid.0.resnet.conv1": ("mid.1.resnet.conv1",),
}


@pytest.mark.parametrize("address", SHARED)
def test_convolutions_in_the_same_place_and_of_the_same_shape_share(address):
    assert condconv.donors(FAMILIES["sd15"], address) == SHARED[address]


@pytest.mark.parametrize(
    "address, said",
    [
        (
            "up.3.0.resnet.conv1",
            "(960 -> 320) has nobody in up.3 to share experts with; there are: up.3.1.resnet.conv1 (640 -> 320), "
            "up.3.2",
        ),
        ("up.2.2.resnet.conv1", "(960 -> 640) has nobody in up.2"),
        ("down.1.0.resnet.conv1", "(320 -> 640) has nobody in down.1"),
        ("down.2.0.resnet.conv1", "(640 -> 1280)"),
        ("up.2.sampler.conv", "there are: none"),
        ("down.0.sampler.conv", "there are: none"),
    ],
)
def test_what_cannot_share_says_so(address, said):
    with pytest.raises(ValueError, match=re.escape(f"{address} ") + ".*" + re.escape(said)):
        condconv.donors(FAMILIES["sd15"], address)


@pytest.mark.parametrize("form", condconv.FORMS)
def test_gathered_experts_are_the_donors_weights(form):
    teacher, student = weights(SD, 0), weights(SD, 1)
    convs = ("up.3.0.resnet.conv1", "up.3.0.resnet.conv2", "up.3.2.resnet.conv1")
    settings, tensors, alone = condconv.clme(teacher, student, SD, convs, form)
    assert settings == CondConv({"up.3.0.resnet.conv2": 3, "up.3.2.resnet.conv1": 2}, form)
    assert list(alone) == ["up.3.0.resnet.conv1"] and "nobody in up.3" in alone["up.3.0.resnet.conv1"]
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {k: s.shape for k, s in settings.keys(SD).items()}
    first = "output_blocks.9.0.out_layers.3"
    own = student[f"{first}.weight"] if form == "difference" else 0
    for donor, got in zip((10, 11), tensors[f"{first}.experts.weight"].chunk(2), strict=True):
        torch.testing.assert_close(got + own, teacher[f"output_blocks.{donor}.0.out_layers.3.weight"])
    routes = torch.sigmoid(tensors[f"{first}.router.bias"])
    assert [round(float(r), 2) for r in routes] == ([0.01, 0.01] if form == "difference" else [0.99, 0.01, 0.01])


def test_gathered_experts_start_close_to_the_plain_convolution():
    address = "up.3.2.resnet.conv2"
    settings, tensors, _ = condconv.clme(weights(SD, 0), weights(SD, 0), SD, [address])
    conv = condconv.convolution(SD, address)
    first = nn.Conv2d(8, 8, 3, padding=1)
    made = CondConv2d(first, *condconv.further_experts(settings, conv))
    first.load_state_dict({leaf: weights(SD, 0)[conv.key(leaf)] for leaf in ("weight", "bias")})
    for leaf in settings.shapes(conv):
        made.get_parameter(leaf).data.copy_(tensors[conv.key(leaf)])
    x = picture()
    assert 0 < (made(x) - first(x)).norm() / first(x).norm() < 0.04  # two donors of other weights at r = 0.01


def test_nobody_to_gather_from():
    with pytest.raises(ValueError, match="no convolution can share experts: .*nobody in up.3"):
        condconv.clme(weights(SD), weights(SD), SD, ["up.3.0.resnet.conv1"])
    with pytest.raises(ValueError, match="no convolution 'moon'"):
        condconv.clme(weights(SD), weights(SD), SD, ["moon"])
    broken = {k: v for k, v in weights(SD).items() if k != "output_blocks.10.0.in_layers.2.bias"}
    with pytest.raises(
        Mismatch, match=r"teacher: output_blocks.10.0.in_layers.2.bias \(up.3.1.resnet.conv1\) is missing, wanted \[8\]"
    ):
        condconv.clme(broken, weights(SD), SD, [CONV1])
    with pytest.raises(Mismatch, match=r"student: .* has shape \[1\], wanted \[8, 16, 3, 3\]"):
        condconv.clme(weights(SD), weights(SD) | {"output_blocks.11.0.in_layers.2.weight": torch.zeros(1)}, SD, [CONV1])


# Packs ----------------------------------------------------------------------------------------------

M2 = Architecture.preset("m2", SD)
EXPERTS = CondConv({CONV1: 2, CONV2: 3, "down.0.sampler.conv": 2})
KEY = "output_blocks.11.0.out_layers.3.experts.weight"


def write(path, settings=EXPERTS, units=(), architecture=None, dtype=None, how="random"):
    chosen = architecture or (M2 if units else Architecture.full(SD))
    tensors = condconv.start(SD, settings, how) | extract(weights(SD), chosen, units)
    packs.write_pack(path, tensors, Description("pack", chosen, units, condconv=settings), dtype)
    return path


@pytest.fixture
def pack(tmp_path):
    return write(tmp_path / "experts.safetensors")


@pytest.mark.parametrize("form", condconv.FORMS)
@pytest.mark.parametrize("units", [(), M2.pack_units()], ids=["experts only", "with units"])
def test_pack_there_and_back(tmp_path, form, units):
    settings = CondConv(EXPERTS.experts, form)
    found = open_pack(write(tmp_path / "pack.safetensors", settings, units))
    assert found.description.condconv == settings and found.description.units == units
    assert found.description.expert_units == ("down.0.sampler", "up.3.2.resnet")
    wanted = condconv.start(SD, settings, "random") | extract(weights(SD), M2, units)
    assert set(found.tensors) == set(wanted) and all(torch.equal(found.tensors[k], v) for k, v in wanted.items())


def test_int8_gives_each_output_channel_of_each_expert_a_scale(tmp_path):
    found = open_pack(write(tmp_path / "pack.safetensors", dtype="int8"))
    tensor = condconv.start(SD, EXPERTS, "random")[KEY]
    step = tensor.abs().amax((1, 2, 3), keepdim=True) / 127
    assert ((found.tensors[KEY] - tensor).abs() <= step * 0.51).all()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SD.to_diffusers(), norm_num_groups=4).eval()


def evaluate(unet, batch=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 16, 16, generator=generator)
    context = torch.randn(batch, 3, SD.context_dim, generator=generator)
    return unet(x, torch.tensor(500), context).sample


def test_a_network_gets_its_experts_from_a_pack_and_gives_them_back(network, pack):
    tensors = open_pack(pack).tensors
    unet = copy.deepcopy(network)
    condconv.install(unet, "diffusers", SD, EXPERTS, tensors)
    found = condconv.extract(unet, "diffusers", SD, EXPERTS)
    assert set(found) == set(tensors) and all(torch.equal(found[k], tensors[k]) for k in found)
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, CondConv2d)}
    assert set(layers) == {
        "up_blocks.3.resnets.2.conv1",
        "up_blocks.3.resnets.2.conv2",
        "down_blocks.0.downsamplers.0.conv",
    }
    assert all(torch.equal(m.conv.weight, network.get_submodule(name).weight) for name, m in layers.items())
    with pytest.raises(Mismatch, match=f"experts: {KEY} is missing"):
        condconv.install(
            copy.deepcopy(network), "diffusers", SD, EXPERTS, {k: v for k, v in tensors.items() if k != KEY}
        )


def test_a_network_with_all_experts_at_zero_is_the_network_and_learns(network):
    settings = CondConv(dict.fromkeys(condconv.convolutions(SD), 2))
    unet = copy.deepcopy(network)
    condconv.install(unet, "diffusers", SD, settings, condconv.start(SD, settings))
    assert torch.equal(evaluate(unet), evaluate(network))
    torch.testing.assert_close(evaluate(unet, 3), evaluate(network, 3))
    evaluate(unet).square().mean().backward()
    for m in unet.modules():
        if isinstance(m, CondConv2d):
            assert m.experts.weight.grad.abs().max() > 0 and m.conv.weight.grad.abs().max() > 0


CHANGES = {
    "missing": (lambda sd: sd.pop(KEY), rf"{KEY} is missing \(up.3.2.resnet, wanted shape \[16, 8, 3, 3\]\)"),
    "shape": (
        lambda sd: sd.update({KEY: torch.zeros(2, 8, 8, 3, 3)}),
        rf"{KEY} .* has shape \[2, 8, 8, 3, 3\], wanted \[16, 8, 3, 3\]",
    ),
    "unknown": (
        lambda sd: sd.update({"output_blocks.11.0.out_layers.3.gate": torch.zeros(1)}),
        "unknown tensor .*gate",
    ),
    "expert 1": (
        lambda sd: sd.update({"output_blocks.11.0.out_layers.3.weight": torch.zeros(8, 8, 3, 3)}),
        "unknown tensor",
    ),
    "nan": (lambda sd: sd[KEY].view(-1)[:1].fill_(float("nan")), f"tensor {KEY} holds numbers that are not finite"),
    "dtype": (lambda sd: sd.update({KEY: sd[KEY].double()}), f"tensor {KEY} has dtype F64"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_wrong_tensors(pack, change, message):
    sd = load_file(pack)
    change(sd)
    save_file(sd, pack, TensorFile(pack).metadata)
    with pytest.raises(BadFile, match=f"^experts.safetensors: {message}"):
        open_pack(pack)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"condconv": {"experts": {"moon": 2}}}, "no convolution 'moon'"),
        ({"condconv": {"experts": {CONV1: 1}}}, "2 to 64 experts"),
        ({"condconv": []}, "condconv must be a JSON object"),
        ({"condconv": None}, "at least one unit"),
        ({"kind": "unet"}, "further experts and log gains come in packs only"),
        (
            {"architecture": M2.to_dict()},
            "a pack that plays no unit cannot cut units, and this one cuts down.0.1.resnet",
        ),
        (
            {
                "architecture": M2.to_dict(),
                "units": list(M2.pack_units()),
                "condconv": {"experts": {"down.0.1.resnet.conv1": 2}},
            },
            "down.0.1.resnet is cut in this architecture",
        ),
    ],
    ids=str,
)
def test_wrong_descriptions(pack, change, message):
    data = json.loads(TensorFile(pack).metadata["asdm"]) | change
    save_file(load_file(pack), pack, {"asdm": json.dumps(data)})
    with pytest.raises(BadFile, match=f"^experts.safetensors: .*{re.escape(message)}"):
        open_pack(pack)


def test_wrong_tensors_are_not_written(tmp_path):
    with pytest.raises(Mismatch, match="experts.weight is missing"):
        packs.write_pack(
            tmp_path / "pack.safetensors", {}, Description("pack", Architecture.full(SD), condconv=EXPERTS)
        )


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A teacher, a base student of it, and where a pack goes."""
    monkeypatch.setitem(FAMILIES, SD.family, SD)
    base = Architecture.preset("base", SD)
    packs.write_unet(tmp_path / "teacher.safetensors", weights(SD), Description("unet", Architecture.full(SD)))
    packs.write_unet(tmp_path / "base.safetensors", cut(weights(SD, 1), base)[0], Description("unet", base))
    return tmp_path / "teacher.safetensors", tmp_path / "base.safetensors", tmp_path / "out.safetensors"


@pytest.mark.parametrize("only", [[], ["--experts-only"]], ids=["with units", "alone"])
def test_the_command_line_gathers_experts(files, capsys, only):
    teacher, base, out = files
    assert (
        main(
            [
                "extract-pack",
                str(base),
                str(out),
                "--units",
                "down.0, up.3",
                "--experts-from",
                str(teacher),
                "--dtype",
                "keep",
                *only,
            ]
        )
        == 0
    )
    assert "up.3.0.resnet.conv1" in capsys.readouterr().out, "which convolution could not share"
    found = open_pack(out)
    settings, wanted, _ = condconv.clme(weights(SD), weights(SD, 1), SD, found.description.condconv.experts)
    assert found.description.condconv == settings and bool(found.description.units) != bool(only)
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in wanted.items())


def test_the_command_line_takes_experts_out_of_a_pack(files, capsys):
    teacher, base, out = files
    both = out.with_name("both.safetensors")
    assert (
        main(
            [
                "extract-pack",
                str(base),
                str(both),
                "--units",
                "down.0, up.3",
                "--experts-from",
                str(teacher),
                "--dtype",
                "keep",
            ]
        )
        == 0
    )
    assert main(["extract-pack", str(both), str(out), "--units", "up.3", "--experts-only", "--dtype", "keep"]) == 0
    source, found = open_pack(both), open_pack(out)
    mine = {a: n for a, n in source.description.condconv.experts.items() if a.startswith("up.3")}
    assert found.description.condconv == CondConv(mine) and not found.description.units
    assert set(found.tensors) < set(source.tensors) and all(
        torch.equal(t, source.tensors[k]) for k, t in found.tensors.items()
    )
    for source, units, message in ((both, "mid", "no experts in 'mid'"), (base, "up.3", "has no further experts")):
        assert main(["extract-pack", str(source), str(out), "--units", units, "--experts-only"]) == 2
        assert message in capsys.readouterr().err
    assert main(["extract-pack", str(teacher), str(out), "--units", "up.3", "--experts-from", str(base)]) == 2
    assert "come from an unpruned" in capsys.readouterr().err


def test_the_command_line_knows_packs_of_experts(pack, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, SD.family, SD)
    assert main(["inspect", str(pack)]) == 0
    out = capsys.readouterr().out
    assert (
        "it plays: no unit of its own" in out
        and f"experts per convolution: {CONV1} 2, {CONV2} 3, down.0.sampler.conv 2" in out
    )
    packs.write_unet(tmp_path / "unet.safetensors", weights(SD), Description("unet", Architecture.full(SD)))
    assert main(["assemble", str(tmp_path / "unet.safetensors"), str(pack), str(tmp_path / "out.safetensors")]) == 2
    assert (
        "experts.safetensors has convolutions with several experts, which no single UNet file can hold"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out.safetensors").exists()
