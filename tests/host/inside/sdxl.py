"""The SDXL family: its pruned UNets take LoRAs, packs, inherited features, GRI attention and switches at their
addresses.
"""

import pytest
import small
import torch
from in_host import module

SDXL, surgery = small.SDXL, small.surgery
Architecture, addresses = small.Architecture, small.addresses
inheritance, switch, switching = (
    module("asdm_core.inheritance"),
    module("nodes.engine.switch"),
    module("asdm_core.switching"),
)
regional = module("nodes.engine.regional")
PRESETS = ("ssd-1b", "vega", "koala-1b", "koala-700m")
# Some stages of a student over SDXL, as M1 to M3 are some stages of BK-SDM Base over SD1.5.
STAGES = [("ssd-1b", "down.2, up.0"), ("vega", "down.1, up.1"), ("koala-1b", "down.0-1, up.1-2")]


@pytest.fixture(scope="module")
def model(folder):
    return small.model(folder, SDXL)


def sample(model, **more):
    return small.sample(model, SDXL, **more)


def load(path, chosen, weights):
    small.packs.write_unet(
        path, surgery.cut(weights, chosen)[0], small.packs.Description("unet", chosen, prediction="eps")
    )
    return small.models.load_unet(str(path))


@pytest.fixture(scope="module")
def koala():
    """KOALA-1B as it would be if its authors had kept every other transformer block: known, or found by matching."""
    chosen = Architecture.preset("koala-1b", SDXL)
    return chosen.keeping(", ".join(b for u in chosen.kept if u.depth == 10 for b in u.blocks[1::2] + u.blocks[-2:-1]))


@pytest.fixture(scope="module")
def pruned(folder, koala):
    """Pruned MODELs with the original's own weights, by preset."""
    chosen = {name: Architecture.preset(name, SDXL) for name in PRESETS} | {"koala-1b, other blocks": koala}
    return {name: load(folder / f"{name}.safetensors", a, small.weights(SDXL)) for name, a in chosen.items()}


@pytest.fixture(scope="module")
def vega_pack(folder):
    return small.write_pack(folder / "vega-pack.safetensors", SDXL, "vega", seed=1)


# LoRAs ----------------------------------------------------------------------------------------------

DIALECTS = {
    "kohya": lambda ldm, diffusers: f"lora_unet_{diffusers.replace('.', '_')}",
    "kohya, LDM names": lambda ldm, diffusers: f"lora_unet_{ldm.replace('.', '_')}",
    # As the host knows diffusers' names: attention by its processor. It has no name for PEFT's plain `to_q.lora_A`.
    "diffusers": lambda ldm, diffusers: f"unet.{diffusers}".replace(".to_", ".processor.to_").replace(
        ".to_out.0", ".to_out"
    ),
}


def in_dialect(lora, dialect):
    """A LoRA of small.lora's in the names of another dialect."""
    modules = {}
    for slot in addresses.keys(SDXL).values():
        ldm, diffusers = (slot.unit.key(slot.tensor, layout).removesuffix(".weight") for layout in ("ldm", "diffusers"))
        modules[DIALECTS["kohya"](ldm, diffusers)] = DIALECTS[dialect](ldm, diffusers)
    ends = (
        {"lora_down.weight": "_lora.down.weight", "lora_up.weight": "_lora.up.weight"} if dialect == "diffusers" else {}
    )
    split = ((*name.partition(".")[::2], tensor) for name, tensor in lora.items())
    return {f"{modules[name]}{ends.get(end, f'.{end}')}": tensor for name, end, tensor in split}


def merged(lora):
    """The original's weights with a LoRA added to them by hand."""
    weights = dict(small.weights(SDXL))
    for key, slot in addresses.keys(SDXL).items():
        name = DIALECTS["kohya"]("", slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight"))
        if f"{name}.alpha" in lora:
            up, down = (lora[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
            weights[key] = weights[key] + (up @ down).view(slot.shape)  # alpha is the rank
    return weights


@pytest.fixture(scope="module")
def lora():
    return small.lora(SDXL)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_patches_what_is_kept_under_its_own_address(pruned, lora, dialect):
    matrices = {k for k, slot in addresses.keys(SDXL).items() if len(slot.shape) > 1}
    for name, loaded in pruned.items():
        kept = small.network.architecture_of(loaded).keys().keys() & matrices
        patched = small.add_lora(loaded, in_dialect(lora, dialect)).patches
        assert patched.keys() == {f"diffusion_model.{k}" for k in kept}, name
        assert len(kept) < len(matrices)


def test_a_lora_acts_as_if_it_had_been_merged_before_the_cut(folder, pruned, lora):
    weights = merged(lora)
    for name in ("ssd-1b", "koala-1b, other blocks"):
        loaded = pruned[name]
        wanted = sample(load(folder / "merged.safetensors", small.network.architecture_of(loaded), weights), steps=1)
        found = sample(small.add_lora(loaded, lora), steps=1)
        assert small.difference(found, wanted) < 1e-4, name
        assert small.difference(found, sample(loaded, steps=1)) > 0.01


def test_which_blocks_were_kept_matters_to_a_lora_only(folder, pruned, koala, lora):
    # The same small network, once said to have kept the first blocks of each transformer and once where it really did.
    assumed = Architecture.preset("koala-1b", SDXL)
    names = surgery.readdressed(koala, assumed)
    really = surgery.cut(small.weights(SDXL), koala)[0]
    path = folder / "assumed.safetensors"
    small.packs.write_unet(
        path,
        {new: really[old] for new, old in names.items()},
        small.packs.Description("unet", assumed, prediction="eps"),
    )
    first = small.models.load_unet(str(path))
    right = pruned["koala-1b, other blocks"]
    assert small.network.architecture_of(right).cut == koala.cut != assumed.cut
    assert torch.equal(sample(first, steps=1), sample(right, steps=1))
    assert (
        small.difference(sample(small.add_lora(first, lora), steps=1), sample(small.add_lora(right, lora), steps=1))
        > 0.01
    )


# Combinations and packs -----------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("preset", "stages"), STAGES)
def test_some_stages_of_a_student_over_sdxl(folder, model, lora, preset, stages):
    chosen = Architecture.preset(preset, SDXL).over(stages)
    assert chosen.cut and chosen.cut < Architecture.preset(preset, SDXL).cut
    weights = surgery.combine(small.weights(SDXL), small.weights(SDXL, 1), chosen, chosen.pack_units())
    path = folder / "stages.safetensors"
    small.packs.write_unet(path, weights, small.packs.Description("unet", chosen, prediction="eps"))
    combined = small.models.load_unet(str(path))
    assert small.network.architecture_of(combined).cut == chosen.cut
    pack = small.write_pack(folder / f"{preset} {stages}.safetensors", SDXL, seed=1, chosen=chosen)
    assert torch.equal(sample(small.with_pack(model, pack), size=(13, 19)), sample(combined, size=(13, 19)))
    played = small.with_pack(small.add_lora(model, lora), pack)
    assert torch.equal(sample(played), sample(small.add_lora(combined, lora)))
    assert small.difference(sample(played), sample(model)) > 0.01


# What else plays on them ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(folder, model, vega_pack):
    """SDXL with a Vega pack, and the file of the same weights."""
    return small.with_pack(model, vega_pack), small.combined(folder, SDXL, "vega")


def test_features_are_inherited(both):
    plans = [inheritance.attention(SDXL), inheritance.deepcache(SDXL, 2).reusing("forecast")]
    for plan in plans:
        found, wanted = (sample(small.with_plan(m, plan), steps=4) for m in both)
        assert torch.equal(found, wanted)
        assert small.difference(found, sample(both[0], steps=4)) > 1e-4
    never = inheritance.deepcache(SDXL, 2, inheritance.Schedule(interval=1))
    assert torch.equal(sample(small.with_plan(both[0], never)), sample(both[0]))


def gri(model, window, pool):
    return small.with_technique(model, regional.Regional(window, pool, 2, False, small.assignment.Window()))


def test_gri_attention_plays(both):
    plain = sample(both[0])
    for m in both:
        assert small.difference(sample(gri(m, 4, 1)), plain) < 1e-4  # cells of one token: full attention
    rough = [sample(gri(m, 4, 4)) for m in both]
    assert torch.equal(*rough)
    assert small.difference(rough[0], plain) > 1e-4


def continued(first, second, steps):
    """What two samplers in a row make: the first model for two steps, the second for the others. For a sampler without
    memory.
    """
    half = sample(first, steps=steps, last_step=2)
    return small.run(second, torch.zeros_like(half), half, SDXL, steps=steps, seed=0, start_step=2, disable_noise=True)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("which", ["from a pruned UNet", "to a pack", "to one with a LoRA"])
def test_switching(model, pruned, both, lora, which):
    first, second = {
        "from a pruned UNet": (pruned["koala-700m"], model),
        "to a pack": (model, both[0]),
        "to one with a LoRA": (both[0], small.add_lora(model, lora)),
    }[which]
    switched = switch.with_switch(first, second, switching.SwitchPoint(0.5, "share of steps"))
    found = sample(switched, steps=4)
    assert small.difference(found, continued(first, second, 4)) < 1e-4
    assert min(small.difference(found, sample(m, steps=4)) for m in (first, second)) > 0.001
    whole = switch.with_switch(first, second, switching.SwitchPoint(1000.0, "sigma"))
    assert torch.equal(sample(whole), sample(second))
