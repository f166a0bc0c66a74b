"""The command line: what it makes is what the core makes, and mistakes cost one line and no file."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asdm_core import packs, surgery, tensor_file
from asdm_core.__main__ import main
from asdm_core.addresses import LAYOUTS, UNetConfig, keys, select, walk
from asdm_core.architecture import FAMILIES, PRESETS, Architecture
from asdm_core.measure import costs, total

ROOT = Path(__file__).parents[2]
SD = FAMILIES["sd15"]
NARROW = replace(SD, family="narrow", model_channels=32, channel_mult=(1, 2, 2, 2), context_dim=24, num_heads=4)
NARROW_XL = UNetConfig(
    "narrow-xl",
    32,
    (1, 1),
    ((0,), (3,)),
    3,
    ((3, 3), (0, 0)),
    context_dim=16,
    head_channels=16,
    use_linear=True,
    adm_channels=40,
)
RENUMBERED = surgery.Form("ldm", "renumbered")


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """The narrow UNets as families of their own, so that files without a description are recognised too."""
    for config in (NARROW, NARROW_XL):
        monkeypatch.setitem(FAMILIES, config.family, config)


def weights(architecture, seed):
    """Random fp16 weights in addressed LDM form."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s.shape, generator=generator).half() for k, s in architecture.keys().items()}


def owning(architecture):
    """A UNet that stands for itself has weights of its own everywhere."""
    return replace(architecture, own=tuple(u.address for u in architecture.kept)).named()


def described(path, architecture, tensors, **more):
    packs.write_unet(path, tensors, packs.Description("unet", architecture, **more))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files the commands read and never write: a full UNet, a base student, an SDXL-like UNet, an M2 pack."""
    at = tmp_path_factory.mktemp("models")
    full = owning(Architecture.full(NARROW))
    base = Architecture.preset("base", NARROW)
    described(at / "full.safetensors", full, weights(full, 1))
    described(at / "base.safetensors", base, weights(base, 2), prediction="v", licence="test only")
    other = owning(Architecture.full(NARROW_XL))
    described(at / "xl.safetensors", other, weights(other, 3))
    m2 = Architecture.preset("m2", NARROW)
    description = packs.Description("pack", m2, m2.own, licence="pack licence")
    packs.write_pack(at / "m2.safetensors", surgery.extract(weights(base, 2), m2, m2.own), description)
    return at


@pytest.fixture
def run(capsys):
    """Calls the command line: (exit code, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return call


def same(a, b):
    """Bit-equal state dicts."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def tensors_of(path):
    """The UNet in a file, without the empty tensors that say how it was trained."""
    return {k: v for k, v in load_file(path).items() if v.numel()}


def described_as(path):
    with safe_open(path, "pt") as f:
        return packs.Description.from_json(f.metadata()[packs.METADATA_KEY])


# inspect --------------------------------------------------------------------------------------------


def test_inspect_describes_a_student(run, folder):
    code, out, err = run("inspect", folder / "base.safetensors", "--json")
    found = json.loads(out)
    base = Architecture.preset("base", NARROW)
    work = total(costs(base))
    whole = total(costs(Architecture.full(NARROW)))
    assert (code, err) == (0, "")
    assert found["file"] == str(folder / "base.safetensors")
    largest = found.pop("largest")
    assert found == {
        "file": found["file"],
        "kind": "unet",
        "family": "narrow",
        "architecture": "base",
        "params": work.params,
        "unpruned_params": whole.params,
        "macs": work.total,
        "unpruned_macs": whole.total,
        "latent": 64,
        "cut": [u.address for u in walk(NARROW) if u.address in base.cut],
        "prediction": "v",
        "licence": "test only",
        "unknown": [],
    }
    shares = {a: c.total / work.total for a, c in costs(base).items()}
    assert list(largest.values()) == pytest.approx(sorted(shares.values(), reverse=True)[:5], abs=1e-4)
    assert all(share == pytest.approx(shares[a], abs=1e-4) for a, share in largest.items())


def own_params(architecture):
    return sum(s.tensor.numel for s in architecture.keys().values() if s.unit.address in architecture.own)


def test_inspect_describes_a_pack(run, folder):
    code, out, _ = run("inspect", folder / "m2.safetensors", "--json")
    found = json.loads(out)
    m2 = Architecture.preset("m2", NARROW)
    assert code == 0
    assert (found["kind"], found["architecture"], found["licence"]) == ("pack", "m2", "pack licence")
    assert found["units"] == list(m2.own) and found["pack_params"] == own_params(m2)
    assert found["params"] == m2.params


def test_inspect_tells_people_the_same(run, folder):
    code, out, err = run("inspect", folder / "m2.safetensors")
    m2 = Architecture.preset("m2", NARROW)
    assert (code, err) == (0, "")
    assert "m2.safetensors: narrow UNet, m2" in out
    assert f"a pack of {own_params(m2) / 1e6:.2f} M parameters; it plays: down.0.0.resnet, " in out
    assert f"{m2.params / 1e6:.2f} M parameters" in out and "cut: down.0.1.resnet, down.0.1.transformer, " in out
    assert "cut: nothing" in run("inspect", folder / "full.safetensors")[1]


def test_inspect_reads_checkpoints_and_diffusers_folders_without_a_description(run, folder, tmp_path):
    base = Architecture.preset("base", NARROW)
    sd = weights(base, 2)
    checkpoint = {
        f"model.diffusion_model.{k}": v for k, v in surgery.convert(sd, base, surgery.ADDRESSED, RENUMBERED).items()
    }
    save_file(checkpoint | {"first_stage_model.x": torch.zeros(3)}, tmp_path / "checkpoint.safetensors")
    for sub in ("unet", "scheduler"):
        (tmp_path / "pipeline" / sub).mkdir(parents=True)
    diffusers = surgery.convert(sd, base, surgery.ADDRESSED, surgery.Form("diffusers", "renumbered"))
    save_file(diffusers, tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    results = [
        json.loads(run("inspect", tmp_path / name, "--json")[1]) for name in ("checkpoint.safetensors", "pipeline")
    ]
    assert [(r["family"], r["architecture"], r["params"], r["prediction"]) for r in results] == [
        ("narrow", "base", base.params, None),
        ("narrow", "base", base.params, "v"),
    ]


LCM = "model.diffusion_model.time_embed.cond_proj.weight"


@pytest.fixture
def lcm(folder, tmp_path):
    """An unpruned checkpoint with a tensor that ComfyUI does not know, and ignores."""
    path = tmp_path / "lcm.safetensors"
    full = {f"model.diffusion_model.{k}": v for k, v in tensors_of(folder / "full.safetensors").items()}
    save_file(full | {LCM: torch.zeros(32, 16), "first_stage_model.x": torch.zeros(3)}, path)
    return path


def test_inspect_names_unknown_tensors(run, lcm):
    found = json.loads(run("inspect", lcm, "--json")[1])
    assert (found["family"], found["architecture"], found["unknown"]) == ("narrow", "full", [LCM])
    assert f"unknown, which ComfyUI ignores: {LCM}\n" in run("inspect", lcm)[1]


def test_no_tensor_is_lost_silently(run, folder, lcm, tmp_path):
    out = tmp_path / "out.safetensors"
    for command in (("convert", lcm, out, "--layout", "ldm"), ("assemble", lcm, folder / "m2.safetensors", out)):
        code, told, err = run(*command)
        assert (code, told) == (2, "") and f"no layer of a narrow UNet has {LCM}, so it would be lost" in err
        assert not out.exists()
    code, told, _ = run("convert", lcm, out, "--layout", "ldm", "--drop-unknown")
    assert code == 0 and told.endswith(f", without {LCM}\n")
    assert same(tensors_of(out), tensors_of(folder / "full.safetensors"))


# convert --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "base"])
def test_convert_to_diffusers_and_back_is_bit_equal(run, folder, tmp_path, name):
    there = tmp_path / "there.safetensors"
    back = tmp_path / "back.safetensors"
    source = folder / f"{name}.safetensors"
    code, out, _ = run("convert", source, there, "--layout", "diffusers")
    assert code == 0 and "diffusers layout, renumbered" in out
    small = (Architecture.preset(name, NARROW) if name != "full" else Architecture.full(NARROW)).renumbered.config
    assert {k: tuple(v.shape) for k, v in tensors_of(there).items()} == {
        k: s.shape for k, s in keys(small, "diffusers").items()
    }
    assert run("convert", there, back, "--layout", "ldm")[0] == 0
    assert same(tensors_of(back), tensors_of(source))


def test_convert_keeps_the_description_where_it_can_be_read_again(run, folder, tmp_path):
    source, out = folder / "base.safetensors", tmp_path / "out.safetensors"
    assert run("convert", source, out, "--layout", "ldm")[0] == 0
    assert described_as(out) == described_as(source)
    assert run("convert", source, out, "--layout", "diffusers")[0] == 0
    with safe_open(out, "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_convert_to_the_addressed_names_and_back(run, folder, tmp_path):
    holes, back = tmp_path / "holes.safetensors", tmp_path / "back.safetensors"
    code, out, _ = run("convert", folder / "base.safetensors", holes, "--layout", "ldm", "--numbering", "addressed")
    assert code == 0 and "ldm layout, addressed" in out
    base = Architecture.preset("base", NARROW)
    assert same(tensors_of(holes), weights(base, 2))
    assert run("convert", holes, back, "--layout", "ldm")[0] == 0
    assert same(tensors_of(back), tensors_of(folder / "base.safetensors"))


def test_convert_refuses_a_form_in_which_the_places_of_layers_are_lost(run, folder, tmp_path, pruned):
    source, out = tmp_path / "told.safetensors", tmp_path / "out.safetensors"
    assert run("match", pruned[0], folder / "xl.safetensors", source)[0] == 0
    code, _, err = run("convert", source, out, "--layout", "diffusers")
    assert (
        code == 2 and "told.safetensors keeps other layers than its names tell in this form" in err and not out.exists()
    )


def test_assemble_offers_only_what_stock_comfyui_reads(run, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            "assemble",
            folder / "full.safetensors",
            folder / "m2.safetensors",
            tmp_path / "out.safetensors",
            "--dtype",
            "int8",
        )
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_convert_in_place(run, folder, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((folder / "base.safetensors").read_bytes())
    assert run("convert", path, path, "--layout", "diffusers")[0] == 0
    assert run("convert", path, path, "--layout", "ldm")[0] == 0
    assert same(tensors_of(path), tensors_of(folder / "base.safetensors"))
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("keep", torch.float16)]
)
def test_convert_stores_the_wanted_dtype(run, folder, tmp_path, name, dtype):
    source, out = folder / "xl.safetensors", tmp_path / "out.safetensors"
    assert run("convert", source, out, "--layout", "ldm", "--dtype", name)[0] == 0
    assert same(tensors_of(out), {k: v.to(dtype) for k, v in tensors_of(source).items()})


def test_how_a_checkpoint_was_trained_goes_with_it(run, folder, tmp_path):
    # Checkpoints without a description say so by empty tensors, which stock ComfyUI looks for.
    source, renamed, built = (tmp_path / f"{name}.safetensors" for name in ("source", "renamed", "built"))
    full = load_file(folder / "full.safetensors")
    save_file(full | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, source)
    assert run("convert", source, renamed, "--layout", "ldm")[0] == 0
    assert run("assemble", source, folder / "m2.safetensors", built)[0] == 0
    for form in ((), ("--numbering", "addressed")):
        assert run("convert", source, renamed, "--layout", "ldm", *form)[0] == 0
        there = tmp_path / "there.safetensors"
        assert run("convert", renamed, there, "--layout", "diffusers")[0] == 0
        assert run("convert", there, renamed, "--layout", "ldm")[0] == 0
        for path in (renamed, there, built):
            assert {k for k, v in load_file(path).items() if not v.numel()} == {"v_pred", "ztsnr"}
            assert packs.open_unet(path).description.prediction == "v"


def test_numbers_of_edm_models_are_kept(run, folder, tmp_path):
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    numbers = {"edm_mean": torch.tensor([0.1]), "edm_std": torch.tensor([0.7])}
    save_file(load_file(folder / "full.safetensors") | numbers, source)
    for layout in LAYOUTS:
        assert run("convert", source, out, "--layout", layout, "--dtype", "bf16")[0] == 0
        assert same({k: v for k, v in load_file(out).items() if k in numbers}, numbers)


# match ----------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(folder, tmp_path):
    """A student of xl.safetensors with transformer blocks cut, as its authors would release it, and its true
    architecture.
    """
    chosen = owning(
        Architecture.choose(NARROW_XL, "down.1.0.transformer.0, mid.0.transformer.1, up.0.1.transformer.0-1")
    )
    sd, _ = surgery.cut(packs.open_unet(folder / "xl.safetensors").tensors, chosen)
    noise = torch.Generator().manual_seed(1)
    sd = {k: (t.float() + 0.05 * torch.randn(t.shape, generator=noise)).half() for k, t in sd.items()}
    save_file(surgery.convert(sd, chosen, surgery.ADDRESSED, RENUMBERED), tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors", chosen


def test_match_finds_the_blocks_and_writes_where_they_belong(run, folder, tmp_path, pruned):
    student, chosen = pruned
    assert packs.open_unet(student).description.architecture.cut != chosen.cut
    code, out, _ = run("match", student, folder / "xl.safetensors", tmp_path / "matched.safetensors")
    assert code == 0
    assert (
        "  up.0.1.transformer.0      is up.0.1.transformer.2 " in out and "  cut: down.1.0.transformer.0, mid.0" in out
    )
    assert "resembles none" not in out
    assert packs.open_unet(tmp_path / "matched.safetensors").description.architecture == chosen
    assert same(tensors_of(tmp_path / "matched.safetensors"), load_file(student)), "only the description is new"


def test_match_in_json(run, folder, pruned):
    code, out, _ = run("match", pruned[0], folder / "xl.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert Architecture.from_dict(found["architecture"]) == pruned[1]
    homes = {pair["student"]: pair["original"] for pair in found["pairs"]}
    assert homes["up.0.1.transformer.0"] == "up.0.1.transformer.2"
    assert all(pair["distance"] < 0.01 for pair in found["pairs"])


def test_match_refuses_what_is_no_original_in_one_line(run, folder, tmp_path, pruned):
    full = owning(Architecture.full(NARROW_XL))
    other = described(tmp_path / "other.safetensors", full, weights(full, 8))
    for original, message in (
        (other, "resemble none of the original's. Give the checkpoint"),
        (pruned[0], "student.safetensors is pruned itself"),
        (folder / "full.safetensors", "student.safetensors is a narrow-xl UNet and full.safetensors a narrow one"),
    ):
        code, out, err = run("match", pruned[0], original, tmp_path / "matched.safetensors")
        assert (code, out) == (2, "")
        assert err.startswith("asdm: ") and message in err and err.count("\n") == 1
        assert not (tmp_path / "matched.safetensors").exists()


def test_some_stages_of_a_matched_student_become_a_pack(run, folder, tmp_path, pruned):
    student, chosen = pruned
    matched, pack, combined = (tmp_path / f"{name}.safetensors" for name in ("matched", "stages", "combined"))
    for command in (
        ("match", student, folder / "xl.safetensors", matched),
        ("extract-pack", matched, pack, "--units", "up.0"),
        ("assemble", folder / "xl.safetensors", pack, combined),
    ):
        assert run(*command)[0] == 0
    stages = chosen.over("up.0")
    assert stages.cut == {"up.0.1.transformer.0", "up.0.1.transformer.1"}
    assert packs.open_pack(pack).description.architecture == stages
    wanted = surgery.combine(
        packs.open_unet(folder / "xl.safetensors").tensors, packs.open_unet(matched).tensors, stages
    )
    assert same(dict(packs.open_unet(combined).tensors), wanted)


def test_convert_takes_a_list_of_kept_blocks(run, tmp_path, pruned):
    student, chosen = pruned
    keep = ", ".join(b for u in chosen.kept for b in u.blocks if b not in chosen.cut)
    code, _, _ = run("convert", student, tmp_path / "kept.safetensors", "--layout", "ldm", "--keep", keep)
    assert code == 0
    assert packs.open_unet(tmp_path / "kept.safetensors").description.architecture == chosen
    assert same(tensors_of(tmp_path / "kept.safetensors"), load_file(student)), "only the description is new"


# extract-pack and assemble --------------------------------------------------------------------------


def test_extracting_the_units_of_m2_from_base_gives_the_m2_pack(run, folder, tmp_path):
    out = tmp_path / "pack.safetensors"
    code, text, _ = run(
        "extract-pack", folder / "base.safetensors", out, "--units", "down.0-1, up.2-3", "--licence", "mine"
    )
    pack = packs.open_pack(out)
    m2 = Architecture.preset("m2", NARROW)
    assert code == 0 and "(m2)" in text and f"{len(m2.own)} units" in text
    assert pack.description.architecture == m2 and pack.description.units == m2.own
    assert (pack.description.licence, pack.description.training) == ("mine", {"extracted_from": "base.safetensors"})
    assert same(dict(pack.tensors), dict(packs.open_pack(folder / "m2.safetensors").tensors))


def test_packs_are_fp16_unless_told(run, folder, tmp_path):
    source = tmp_path / "base32.safetensors"
    whole = weights(Architecture.preset("base", NARROW), 2)
    assert run("convert", folder / "base.safetensors", source, "--layout", "ldm", "--dtype", "fp32")[0] == 0
    for wanted, stored in ((None, {"F16"}), ("fp32", {"F32"}), ("int8", {"I8", "F32"})):
        out = tmp_path / f"{wanted}.safetensors"
        assert run("extract-pack", source, out, "--units", "up.3", *(["--dtype", wanted] if wanted else []))[0] == 0
        assert {dtype for dtype, _ in tensor_file.read_header(out).tensors.values()} == stored
        for key, tensor in packs.open_pack(out).tensors.items():
            step = whole[key].float().flatten(1).abs().amax(1).max() / 127 if whole[key].dim() > 1 else 0
            assert (tensor.float() - whole[key].float()).abs().max() <= (0.51 * step if wanted == "int8" else 0)


def test_assemble_equals_combine(run, folder, tmp_path):
    out = tmp_path / "combined.safetensors"
    code, text, _ = run("assemble", folder / "full.safetensors", folder / "m2.safetensors", out)
    m2 = Architecture.preset("m2", NARROW)
    assert code == 0 and "narrow UNet, m2" in text
    combined = surgery.combine(
        weights(Architecture.full(NARROW), 1), weights(Architecture.preset("base", NARROW), 2), m2
    )
    assert same(tensors_of(out), surgery.convert(combined, m2, surgery.ADDRESSED, RENUMBERED))
    loaded = packs.open_unet(out)
    assert loaded.description.architecture == owning(m2)
    assert loaded.description.training == {"trunk": "full.safetensors", "pack": "m2.safetensors"}
    assert same(dict(loaded.tensors), combined)


def test_what_comes_from_several_files_is_under_the_licences_of_all(run, folder, tmp_path):
    out, pack, changed = (tmp_path / f"{name}.safetensors" for name in ("out", "pack", "changed"))
    assert run("extract-pack", folder / "base.safetensors", pack, "--units", "up.3")[0] == 0
    assert packs.open_pack(pack).description.licence == "test only"
    whole = tmp_path / "whole.safetensors"
    description = replace(packs.open_unet(folder / "full.safetensors").description, licence="its own")
    packs.write_unet(whole, weights(Architecture.full(NARROW), 1), description)
    assert run("assemble", whole, folder / "m2.safetensors", out)[0] == 0
    assert packs.open_unet(out).description.licence == "its own AND pack licence"
    assert run("to-difference", folder / "m2.safetensors", whole, changed)[0] == 0
    assert run("to-absolute", changed, whole, out)[0] == 0
    assert packs.open_pack(out).description.licence == "its own AND pack licence"
    assert run("assemble", folder / "full.safetensors", folder / "m2.safetensors", out)[0] == 0
    assert packs.open_unet(out).description.licence == "pack licence", "where one says nothing"


def test_assembling_a_whole_student_over_its_teacher_gives_the_student(run, folder, tmp_path):
    pack, out = tmp_path / "pack.safetensors", tmp_path / "out.safetensors"
    assert run("extract-pack", folder / "base.safetensors", pack, "--units", "*")[0] == 0
    assert run("assemble", folder / "full.safetensors", pack, out)[0] == 0
    assert same(tensors_of(out), tensors_of(folder / "base.safetensors"))


def test_assemble_into_a_pruned_trunk_keeps_what_is_cut_outside_the_pack(run, folder, tmp_path):
    pack, out = tmp_path / "pack.safetensors", tmp_path / "out.safetensors"
    assert run("extract-pack", folder / "full.safetensors", pack, "--units", "down.0, up.3")[0] == 0
    assert run("assemble", folder / "base.safetensors", pack, out)[0] == 0
    loaded = packs.open_unet(out)
    base = Architecture.preset("base", NARROW)
    cut = base.cut - {f"{a}.{k}" for a in ("down.0.1", "up.3.1") for k in ("resnet", "transformer")}
    assert loaded.description.architecture.cut == cut and loaded.description.prediction == "v"
    units = select(NARROW, "down.0, up.3")
    assert same(
        dict(loaded.tensors),
        surgery.combine(weights(base, 2), weights(Architecture.full(NARROW), 1), Architecture(NARROW, cut), units),
    )


def test_a_pack_with_the_stem_says_what_it_is_good_for(run, folder, tmp_path):
    out = tmp_path / "pack.safetensors"
    assert "Apply Pack cannot play" in run("extract-pack", folder / "base.safetensors", out, "--units", "*")[1]
    assert "Apply Pack" not in run("extract-pack", folder / "base.safetensors", out, "--units", "*, !stem")[1]
    assert packs.open_pack(out).description.units == Architecture.preset("base", NARROW).pack_units()


# presets --------------------------------------------------------------------------------------------


def test_presets_lists_the_published_numbers(run):
    code, out, err = run("presets", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "") and list(rows) == list(PRESETS)
    published = {
        "base": 579.385,
        "small": 482.347,
        "tiny": 323.385,
        "m1": 848.79,
        "m2": 809.51,
        "m3": 659.69,
        "ssd-1b": 1331.33,
        "vega": 745.23,
        "koala-1b": 1161.18,
        "koala-700m": 782.82,
    }
    assert {n: row["params"] / 1e6 for n, row in rows.items()} == pytest.approx(published, abs=0.005)
    assert rows["m2"]["macs"] / 1e9 == pytest.approx(303.66, abs=0.005) and rows["vega"]["latent"] == 128
    for name, row in rows.items():
        assert set(row["cut"]) == Architecture.preset(name).cut and row["source"] == PRESETS[name].source


def test_presets_are_printed_for_people(run):
    code, out, _ = run("presets")
    assert code == 0
    assert "m2          sd15     809.51 M params    303.66 G MACs  A-SDM, arXiv 2312.15516" in out
    assert "in: down.0-1, up.2-3" in out


# Mistakes -------------------------------------------------------------------------------------------


def bad_files(at):
    """Files with something wrong, by name."""
    (at / "text.safetensors").write_text("This is no model at all, only some text about one.")
    (at / "pickle.ckpt").write_bytes(b"PK\x03\x04" + bytes(60))
    (at / "empty.safetensors").write_bytes(b"")
    (at / "folder").mkdir()
    (at / "deep.safetensors").write_bytes(struct.pack("<Q", 500_000) + b'{"a":' * 100_000)
    save_file({"a": torch.zeros(2)}, at / "other.safetensors")
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(2, 2)}, at / "lora.safetensors")
    config = replace(NARROW, channel_mult=(1, 1, 1, 1))
    tensors = weights(Architecture.full(config), 0)
    described(at / "small.safetensors", owning(Architecture.full(config)), tensors)
    (at / "cut_short.safetensors").write_bytes((at / "small.safetensors").read_bytes()[:-1000])
    broken = load_file(at / "small.safetensors")  # no command of ours writes such a file
    broken["middle_block.1.proj_in.weight"][0] = torch.nan
    save_file(broken, at / "nan.safetensors", tensor_file.TensorFile(at / "small.safetensors").metadata)
    lopsided = owning(Architecture.choose(config, "down.0.1"))
    described(at / "lopsided.safetensors", lopsided, weights(lopsided, 0))
    for name, text in (
        ("newer", '{"format": 99}'),
        ("nonsense", "{"),
        (
            "odd",
            json.dumps(
                {
                    "format": 1,
                    "kind": "pack",
                    "architecture": {"format": 1, "family": ["sd15"]},
                    "units": ["mid.0.resnet"],
                }
            ),
        ),
    ):
        save_file({"a": torch.zeros(2)}, at / f"{name}.safetensors", {packs.METADATA_KEY: text})


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    at = tmp_path_factory.mktemp("bad")
    bad_files(at)
    return at


# G: good files, B: bad ones, OUT: the output
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert G/none.safetensors OUT --layout ldm", "none.safetensors: there is no such file"),
        ("convert B/folder OUT --layout ldm", "folder: this folder holds no UNet"),
        ("convert B/text.safetensors OUT --layout ldm", "text.safetensors: its header claims"),
        ("convert B/empty.safetensors OUT --layout ldm", "empty.safetensors: only 0 bytes long"),
        ("convert B/pickle.ckpt OUT --layout ldm", "pickle.ckpt: this is a pickle file"),
        ("convert B/deep.safetensors OUT --layout ldm", "deep.safetensors: its header is not valid JSON"),
        ("convert B/cut_short.safetensors OUT --layout ldm", "it is cut short"),
        ("convert B/other.safetensors OUT --layout ldm", "other.safetensors: no Stable Diffusion UNet in this file"),
        ("convert B/lora.safetensors OUT --layout ldm", "It looks like a LoRA"),
        (
            "convert B/nan.safetensors OUT --layout ldm",
            "tensor middle_block.1.proj_in.weight holds numbers that are not finite",
        ),
        ("convert B/newer.safetensors OUT --layout ldm", "newer.safetensors: its description has format 99"),
        ("convert B/nonsense.safetensors OUT --layout ldm", "nonsense.safetensors: its description is not valid JSON"),
        ("convert B/odd.safetensors OUT --layout ldm", "odd.safetensors: architecture: family ['sd15'] is none of"),
        ("convert G/m2.safetensors OUT --layout ldm", "m2.safetensors: this is a pack, not a whole UNet"),
        ("convert B/lopsided.safetensors OUT --layout ldm --numbering renumbered", "no renumbered form"),
        (
            "convert G/xl.safetensors OUT --layout ldm --keep mid.0.transformer.0",
            "mid.0.transformer has 3 transformer blocks in this UNet",
        ),
        ("convert G/xl.safetensors OUT --layout diffusers --keep mid.0.transformer.0-2", "give --layout ldm"),
        ("match G/none.safetensors G/xl.safetensors OUT", "none.safetensors: there is no such file"),
        ("match G/xl.safetensors G/m2.safetensors OUT", "m2.safetensors: this is a pack, not a whole UNet"),
        ("extract-pack G/none.safetensors OUT --units mid", "none.safetensors: there is no such file"),
        ("extract-pack G/m2.safetensors OUT --units mid", "m2.safetensors: this is a pack"),
        ("extract-pack G/base.safetensors OUT --units down.9", "'down.9' matches no unit of this narrow UNet"),
        ("extract-pack G/base.safetensors OUT --units down..1", "cannot read '' in 'down..1'"),
        ("extract-pack G/base.safetensors OUT --units 3-1", "the range '3-1' in '3-1' runs backwards"),
        ("extract-pack G/base.safetensors OUT --units down.0.1", "a pack must play at least one unit"),
        ("assemble G/none.safetensors G/m2.safetensors OUT", "none.safetensors: there is no such file"),
        ("assemble G/full.safetensors G/none.safetensors OUT", "none.safetensors: there is no such file"),
        ("assemble G/full.safetensors G/base.safetensors OUT", "base.safetensors: this is a whole UNet, not a pack"),
        ("assemble G/full.safetensors B/small.safetensors OUT", "small.safetensors: this is a whole UNet, not a pack"),
        ("assemble G/full.safetensors B/other.safetensors OUT", "other.safetensors: this is no pack"),
        ("assemble G/m2.safetensors G/m2.safetensors OUT", "m2.safetensors: this is a pack, not a whole UNet"),
        (
            "assemble G/xl.safetensors G/m2.safetensors OUT",
            "m2.safetensors is a pack for narrow UNets; xl.safetensors is narrow-xl",
        ),
        ("inspect G/none.safetensors", "none.safetensors: there is no such file"),
        ("inspect B/text.safetensors --json", "text.safetensors: its header claims"),
        ("inspect B/newer.safetensors", "this version of asdm reads up to 4"),
        ("inspect B/odd.safetensors", "odd.safetensors: architecture: family"),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["", "over a file"])
def test_mistakes_cost_one_line_and_no_file(run, folder, bad, tmp_path, command, message, existing):
    target = tmp_path / "out.safetensors"
    if existing:
        target.write_bytes(b"dear to somebody")
    argv = [a.replace("G/", f"{folder}/").replace("B/", f"{bad}/").replace("OUT", str(target)) for a in command.split()]
    before = sorted(os.listdir(folder)), sorted(os.listdir(bad))
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("asdm: ") and message in err and err.count("\n") == 1 and "\r" not in err
    assert os.listdir(tmp_path) == (["out.safetensors"] if existing else [])
    assert not existing or target.read_bytes() == b"dear to somebody"
    assert (sorted(os.listdir(folder)), sorted(os.listdir(bad))) == before


@pytest.mark.parametrize(
    "command",
    [
        "convert G/full.safetensors OUT --layout ldm",
        "extract-pack G/full.safetensors OUT --units mid",
        "assemble G/full.safetensors G/m2.safetensors OUT",
        "mean-pack G/m2.safetensors G/m2.safetensors OUT",
    ],
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.ckpt", "out.ckpt: the name must end in .safetensors"),
        ("nowhere/out.safetensors", "there is no folder"),
        ("taken.safetensors", "taken.safetensors"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_the_work(run, folder, tmp_path, command, name, message):
    (tmp_path / "taken.safetensors").mkdir()
    argv = [a.replace("G/", f"{folder}/").replace("OUT", str(tmp_path / name)) for a in command.split()]
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("asdm: ") and message in err and err.count("\n") == 1 and "\r" not in err
    assert os.listdir(tmp_path) == ["taken.safetensors"]


def test_the_mean_of_packs(run, folder, tmp_path):
    m2 = Architecture.preset("m2", NARROW)
    wanted, files = {}, []
    for seed, say in ((1, {}), (2, {}), (3, {}), (4, {"few_step": {"steps": 2}})):
        units = surgery.extract(weights(owning(Architecture.full(NARROW)), seed), m2, m2.own)
        description = packs.Description("pack", m2, m2.own, licence="kept", training={"seed": seed, **say})
        packs.write_pack(tmp_path / f"{seed}.safetensors", units, description)
        files.append(tmp_path / f"{seed}.safetensors")
        wanted = {k: wanted.get(k, 0) + v.double() / 3 for k, v in units.items()} if seed < 4 else wanted
    out = tmp_path / "out.safetensors"
    code, said, _ = run("mean-pack", *files[:3], out, "--dtype", "fp32")
    assert code == 0 and "the mean of 3 packs" in said
    found = packs.open_pack(out)
    assert found.description.units == m2.own and found.description.licence == "kept"
    assert found.description.training == {"seed": 1, "mean_of": [path.name for path in files[:3]]}
    assert found.tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found.tensors[key].double(), value, rtol=1e-5, atol=1e-6)
    before = files[2].read_bytes()
    code, _, err = run("mean-pack", *files[:3])  # without OUT, as happens
    assert code == 2 and "3.safetensors is there already, and comes last" in err and files[2].read_bytes() == before
    out.unlink()
    for given, message in (
        (files[:1], "two packs or more"),
        ([files[0], files[3]], "4.safetensors is another kind of pack than 1.safetensors"),
        ([files[0], folder / "m2.safetensors"], "m2.safetensors is another kind of pack"),
    ):
        code, _, err = run("mean-pack", *given, out)
        assert code == 2 and message in err and not out.exists()


def python(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_names_that_the_console_cannot_write_are_written_as_it_can(folder, tmp_path):
    out = tmp_path / "выход 日本.safetensors"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "asdm_core", "convert", str(folder / "full.safetensors"), str(out)]
    result = subprocess.run([*command, "--layout", "ldm"], cwd=ROOT, capture_output=True, env=environment, timeout=1800)
    assert result.returncode == 0 and out.is_file(), result.stderr
    assert b"\\u0432" in result.stdout


@pytest.mark.slow
def test_a_full_disk_costs_one_line_and_no_file(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"dear to somebody")
    # A limit on the size of files fails the write half way, as a full disk does.
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6));"
        "from asdm_core.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = python("-c", program, "convert", folder / "full.safetensors", out, "--layout", "ldm")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("asdm: out.safetensors: cannot be written (")
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["out.safetensors"] and out.read_bytes() == b"dear to somebody"


def test_an_interruption_leaves_no_file(folder, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"dear to somebody")

    def interrupted(tensors, path, **more):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_file, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["convert", str(folder / "full.safetensors"), str(out), "--layout", "ldm"])
    assert os.listdir(tmp_path) == ["out.safetensors"] and out.read_bytes() == b"dear to somebody"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["repair"],
        ["inspect"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--layout", "kohya"],
        ["convert", "a", "b", "--layout", "ldm", "--dtype", "int8"],
        ["extract-pack", "a", "b"],
        ["assemble", "a", "b"],
        ["presets", "m1"],
    ],
)
def test_wrong_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: python -m asdm_core") and "error: " in err.splitlines()[-1]


# As a program ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_as_a_program(folder, tmp_path):
    good = python("-m", "asdm_core", "inspect", folder / "full.safetensors", "--json")
    assert good.returncode == 0 and good.stderr == ""
    assert json.loads(good.stdout)["params"] == Architecture.full(NARROW).params
    wrong = python("-m", "asdm_core", "inspect", tmp_path / "none.safetensors")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("asdm: none.safetensors: there is no such file") and wrong.stderr.count("\n") == 1
