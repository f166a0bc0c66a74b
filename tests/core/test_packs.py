"""Packs and pruned UNets on disk: written, read, and refused when something is wrong."""

import json
import re
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asdm_core import packs, recognise, surgery, tensor_file
from asdm_core.architecture import PRESETS, Architecture
from asdm_core.gri import LogGains
from asdm_core.packs import Description, open_pack, open_unet
from asdm_core.tensor_file import BadFile, TensorFile, parse_header
from asdm_core.surgery import ADDRESSED, Form, Mismatch
from tests.core.narrow import CONFIGS, SD, equal, weights

pytestmark = pytest.mark.usefixtures("known")

KEY = "input_blocks.1.0.in_layers.2.weight"
M2 = Architecture.preset("m2", SD)
BASE = Architecture.preset("base", SD)


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "pack.safetensors"
    packs.write_pack(
        path, surgery.extract(weights(SD), M2, M2.pack_units()), Description("pack", M2, M2.pack_units()), None
    )
    return path


@pytest.fixture
def unet(tmp_path):
    path = tmp_path / "unet.safetensors"
    packs.write_unet(path, surgery.cut(weights(SD), BASE)[0], Description("unet", BASE, prediction="v"))
    return path


# There and back -------------------------------------------------------------------------------------


def test_pack_there_and_back(pack):
    found = open_pack(pack)
    assert found.description == Description("pack", M2, M2.pack_units())
    assert equal(found.tensors, surgery.extract(weights(SD), M2, M2.pack_units()))


@pytest.mark.parametrize("name", PRESETS)
def test_unet_there_and_back(tmp_path, name):
    chosen = Architecture.preset(name, CONFIGS[PRESETS[name].family])
    sd, _ = surgery.cut(weights(chosen.config), chosen)
    told = Description(
        "unet", chosen, prediction="v", licence="none", training={"steps": 3}, companions={"vae": "vae.safetensors"}
    )
    packs.write_unet(tmp_path / "file.safetensors", sd, told)
    found = open_unet(tmp_path / "file.safetensors")
    assert found.description == told
    assert equal(found.tensors, sd)
    assert set(load_file(tmp_path / "file.safetensors")) - {"v_pred"} == set(chosen.keys("ldm", "renumbered"))


def test_choice_without_a_renumbered_form_is_written_addressed(tmp_path):
    chosen = Architecture.choose(SD, "down.1.1")
    sd, _ = surgery.cut(weights(SD), chosen)
    packs.write_unet(tmp_path / "file.safetensors", sd, Description("unet", chosen))
    assert set(load_file(tmp_path / "file.safetensors")) == set(sd)
    assert equal(open_unet(tmp_path / "file.safetensors").tensors, sd)


def test_config_of_no_known_family_is_carried_along(tmp_path):
    config = replace(SD, family="of my own", context_dim=5)
    full = Architecture.full(config)
    packs.write_unet(tmp_path / "file.safetensors", weights(config), Description("unet", full))
    assert open_unet(tmp_path / "file.safetensors").description.architecture == full


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packs_are_stored_as_told(tmp_path, dtype):
    sd = surgery.extract(weights(SD), M2, M2.pack_units())
    packs.write_pack(tmp_path / "file.safetensors", sd, Description("pack", M2, M2.pack_units()), dtype)
    assert equal(open_pack(tmp_path / "file.safetensors").tensors, {k: v.to(dtype) for k, v in sd.items()})


def test_int8_is_close_and_small(tmp_path):
    sd = surgery.extract(weights(SD), M2, M2.pack_units())
    packs.write_pack(tmp_path / "file.safetensors", sd, Description("pack", M2, M2.pack_units()), "int8")
    found = open_pack(tmp_path / "file.safetensors").tensors
    assert set(found) == set(sd)
    for key, tensor in sd.items():
        # Half a step of 127, of the largest number in each output channel; small tensors stay fp16.
        step = tensor.abs().amax(dim=tuple(range(1, tensor.dim())), keepdim=True) / 127
        assert ((found[key] - tensor).abs() <= step * 0.51 + 1e-2).all(), key
    assert tensor_file.read_header(tmp_path / "file.safetensors").tensors[KEY][0] == "I8"


def test_files_are_read_lazily(pack, monkeypatch):
    read = []
    real = TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: read.append(key) or real(self, key))
    file = TensorFile(pack)
    assert packs.describe(file).units == M2.pack_units()
    assert len(file.shapes) == len(list(file)) and not read


@pytest.mark.parametrize("form", [Form("ldm", "renumbered"), Form("diffusers", "renumbered"), ADDRESSED], ids=str)
def test_unets_without_a_description(tmp_path, form):
    sd, _ = surgery.cut(weights(SD), BASE)
    save_file(surgery.convert(sd, BASE, ADDRESSED, form), tmp_path / "file.safetensors")
    found = open_unet(tmp_path / "file.safetensors")
    assert found.description.architecture.cut == BASE.cut and found.description.prediction is None
    assert equal(found.tensors, sd)


# What is wrong is named -----------------------------------------------------------------------------


def rewritten(path, change, metadata=None):
    sd = load_file(path)
    change(sd)
    save_file(sd, path, TensorFile(path).metadata if metadata is None else metadata)
    return path


CHANGES = {
    "missing": (lambda sd: sd.pop(KEY), rf": {KEY} is missing \(down.0.0.resnet, wanted shape \[8, 8, 3, 3\]\)"),
    "extra": (
        lambda sd: sd.update({"input_blocks.1.0.more": torch.zeros(1)}),
        ": unknown tensor input_blocks.1.0.more",
    ),
    "shape": (
        lambda sd: sd.update({KEY: torch.zeros(8, 8)}),
        rf": {KEY} \(down.0.0.resnet\) has shape \[8, 8\], wanted \[8, 8, 3, 3\]",
    ),
    "renamed": (lambda sd: sd.update({KEY + "s": sd.pop(KEY)}), f": {KEY} is missing"),
    "nan": (lambda sd: sd[KEY].view(-1)[3:4].fill_(float("nan")), f": tensor {KEY} holds numbers that are not finite"),
    "infinite": (
        lambda sd: sd[KEY].view(-1)[3:4].fill_(float("-inf")),
        f": tensor {KEY} holds numbers that are not finite",
    ),
    "nan in fp8": (
        lambda sd: sd.update({KEY: torch.full((8, 8, 3, 3), float("nan")).to(torch.float8_e4m3fn)}),
        f": tensor {KEY} holds numbers",
    ),
    "dtype": (
        lambda sd: sd.update({KEY: sd[KEY].double()}),
        rf": tensor {KEY} has dtype F64; wanted one of BF16, F16, F32",
    ),
    "int8": (
        lambda sd: sd.update({KEY: sd[KEY].to(torch.int8)}),
        rf": tensor {KEY} has dtype I8; .*int8 weights need {KEY}.scale",
    ),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["pack", "unet"])
def test_wrong_tensors(request, kind, change, message):
    path = rewritten(request.getfixturevalue(kind), change)
    with pytest.raises(BadFile, match=rf"^{kind}.safetensors{message}"):
        {"pack": open_pack, "unet": open_unet}[kind](path)


LCM = "time_embed.cond_proj.weight"


def test_unknown_tensors_are_left_out_only_when_told(unet):
    rewritten(unet, lambda sd: None, {})
    plain = open_unet(unet)
    rewritten(unet, lambda sd: sd.update({LCM: torch.zeros(8, 3)}), {})
    with pytest.raises(
        BadFile,
        match=rf"^unet.safetensors: no layer of a narrow-sd UNet has {LCM}, so it would be lost.* --drop-unknown",
    ):
        open_unet(unet)
    found = open_unet(unet, drop_unknown=True)
    assert found.unknown == (LCM,) and plain.unknown == ()
    assert found.description == plain.description and equal(found.tensors, plain.tensors)


@pytest.mark.parametrize("drop", [True, False])
def test_tensors_that_change_what_weights_mean_are_never_left_out(unet, drop):
    rewritten(unet, lambda sd: sd.update({KEY + "_scale": torch.ones(1), LCM: torch.zeros(8, 3)}), {})
    with pytest.raises(BadFile, match=rf"^unet.safetensors: {KEY}_scale stands beside the weights of a layer"):
        open_unet(unet, drop_unknown=drop)


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(7), r"scale \(F32, \[7\]\) is no scale of int8 weights; wanted \[8\]"),
        (torch.ones(8, 3), "is no scale"),
        (torch.ones(()), "is no scale"),
        (torch.full((8,), float("nan")), "not finite"),
        (torch.ones(8).to(torch.int32), "is no scale"),
    ],
    ids=["length", "rank", "scalar", "nan", "dtype"],
)
def test_wrong_int8_scales(tmp_path, scale, message):
    path = tmp_path / "pack.safetensors"
    packs.write_pack(
        path, surgery.extract(weights(SD), M2, M2.pack_units()), Description("pack", M2, M2.pack_units()), "int8"
    )
    rewritten(path, lambda sd: sd.update({KEY + tensor_file.SCALE: scale}))
    with pytest.raises(BadFile, match=rf"^pack.safetensors: .*{message}"):
        open_pack(path)


GAINS = LogGains(("down.0.0.transformer", "mid.0.transformer"))


def gain_tensors(description):
    return {k: torch.full(slot.shape, 0.5) for k, slot in description.log_gain_keys.items()}


@pytest.mark.parametrize("units", [(), M2.pack_units()], ids=["alone", "with units"])
def test_gains_there_and_back(tmp_path, units):
    description = Description("pack", M2 if units else Architecture.full(SD), units, gri=GAINS)
    assert list(description.log_gain_keys) == [
        f"{at}.1.transformer_blocks.0.attn1.log_gain" for at in ("input_blocks.1", "middle_block")
    ]
    assert {slot.shape for slot in description.log_gain_keys.values()} == {(SD.num_heads,)}
    tensors = surgery.extract(weights(SD), M2, units) | gain_tensors(description)
    packs.write_pack(tmp_path / "pack.safetensors", tensors, description, None)
    found = open_pack(tmp_path / "pack.safetensors")
    assert found.description == description and equal(found.tensors, tensors)


def test_gains_of_format_1_are_read(tmp_path):
    description = Description("pack", Architecture.full(SD), gri=GAINS)
    path = tmp_path / "pack.safetensors"
    packs.write_pack(path, gain_tensors(description), description, None)
    data = json.loads(TensorFile(path).metadata["asdm"]) | {"format": 1, "gri": {"gains": list(GAINS.units)}}

    def as_it_was(sd):
        for key in list(sd):
            sd[key.replace("attn1.log_gain", "attn1.gain")] = sd.pop(key)

    rewritten(path, as_it_was, {"asdm": json.dumps(data)})
    found = open_pack(path)
    assert found.description == description and equal(found.tensors, gain_tensors(description))


@pytest.mark.parametrize(
    "gains, message",
    [
        ({"log_gains": []}, "at least one transformer"),
        ({"log_gains": ["down.0.0.resnet"]}, "down.0.0.resnet is none"),
        ({"log_gains": ["moon"]}, "moon"),
        ({"log_gains": ["down.0.0.transformer.0"]}, "down.0.0.transformer is none"),
        ({"log_gains": "down"}, "list of transformers"),
        ({"log_gains": ["down.0.1.transformer"]}, "is cut in this architecture"),
        ({"log_gains": [1]}, "at least one transformer"),
        (3, "JSON object"),
        ({"log_gains": ["mid.0.transformer"], "window": 8}, "list of transformers"),
    ],
    ids=str,
)
def test_wrong_gains(pack, gains, message):
    data = json.loads(TensorFile(pack).metadata["asdm"]) | {"gri": gains}
    rewritten(pack, lambda sd: None, {"asdm": json.dumps(data)})
    with pytest.raises(BadFile, match=f"^pack.safetensors: .*{re.escape(message)}"):
        open_pack(pack)


def test_gains_come_in_packs_only_and_whole(tmp_path):
    with pytest.raises(ValueError, match="come in packs only"):
        Description("unet", Architecture.full(SD), gri=GAINS)
    description = Description("pack", Architecture.full(SD), gri=GAINS)
    with pytest.raises(Mismatch, match=r"attn1.log_gain is missing"):
        packs.write_pack(tmp_path / "pack.safetensors", dict(list(gain_tensors(description).items())[:1]), description)


def test_pack_and_unet_are_told_apart(pack, unet):
    with pytest.raises(
        BadFile, match="^unet.safetensors: this is a whole UNet, not a pack. Load it with Load Pruned UNet"
    ):
        open_pack(unet)
    with pytest.raises(BadFile, match="^pack.safetensors: this is a pack, not a whole UNet. Use Apply Pack"):
        open_unet(pack)


def test_a_model_is_opened_as_what_it_is_and_a_pack_described_without_its_weights(pack, unet, tmp_path):
    assert packs.open_model(pack).description == open_pack(pack).description
    assert packs.open_model(unet).description == open_unet(unet).description
    folder = tmp_path / "unet"
    folder.mkdir()
    unet.rename(folder / "diffusion_pytorch_model.safetensors")
    assert packs.open_model(folder).description.prediction == "v"
    broken = torch.full_like(TensorFile(pack)[next(iter(TensorFile(pack)))], float("nan"))
    description = open_pack(pack).description
    rewritten(pack, lambda sd: sd.update({next(iter(TensorFile(pack))): broken}))
    assert packs.describe_pack(TensorFile(pack)) == description  # nothing of a weight is read
    with pytest.raises(BadFile, match="not finite"):
        packs.open_model(pack)
    with pytest.raises(BadFile, match="this is a whole UNet, not a pack"):
        packs.describe_pack(TensorFile(folder / "diffusion_pytorch_model.safetensors"))


def test_a_lora_is_told_where_loras_go(tmp_path):
    save_file(
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 4)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(BadFile, match="^l.safetensors: this is a LoRA, not a pack. Put it into models/loras"):
        open_pack(tmp_path / "l.safetensors")


def test_a_file_without_a_description_is_no_pack(pack):
    rewritten(pack, lambda sd: None, {})
    with pytest.raises(BadFile, match="^pack.safetensors: this is no pack"):
        open_pack(pack)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 5}, "format 5; this version of asdm reads up to 4, so update asdm"),
        ({"format": None}, "format None"),
        ({"format": True}, "format True"),
        ({"format": "1"}, "format '1'"),
        ({"format": 0}, "format 0"),
        ({"kind": "plugin"}, "plugin"),
        ({"kind": None}, "kind"),
        ({"units": "down"}, "units in its description must be a list"),
        ({"units": [1]}, "list of addresses"),
        ({"units": ["down.0.0.resnet", "moon"]}, "moon"),
        ({"units": []}, "at least one unit"),
        ({"units": ["down.0.1.resnet"]}, "is cut in this architecture"),
        ({"architecture": None}, "wanted a JSON object"),
        ({"architecture": {"format": 9}}, "format 9 is newer"),
        ({"prediction": "x0"}, "prediction"),
        ({"training": []}, "training in its description must be a JSON object"),
        ({"condconv": 3}, "condconv"),
    ],
    ids=str,
)
def test_wrong_descriptions(pack, change, message):
    data = json.loads(TensorFile(pack).metadata["asdm"]) | change
    rewritten(pack, lambda sd: None, {"asdm": json.dumps(data)})
    with pytest.raises(BadFile, match=f"^pack.safetensors: .*{re.escape(message)}"):
        open_pack(pack)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '"text"', "[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "NaN"],
    ids=lambda t: t[:12],
)
def test_descriptions_that_are_none(pack, text):
    rewritten(pack, lambda sd: None, {"asdm": text})
    with pytest.raises(BadFile, match="^pack.safetensors: its description "):
        open_pack(pack)


def test_absent_files_folders_and_pickles(tmp_path, pack):
    for read in (open_pack, open_unet, TensorFile):
        with pytest.raises(BadFile, match="^gone.safetensors: there is no such file"):
            read(tmp_path / "gone.safetensors")
    with pytest.raises(BadFile, match="this is a folder; wanted a .safetensors file"):
        open_pack(tmp_path)
    with pytest.raises(BadFile, match="this folder holds no UNet; wanted diffusion_pytorch_model.safetensors"):
        open_unet(tmp_path)
    for protocol, name in (({}, "zip"), ({"_use_new_zipfile_serialization": False}, "old")):
        torch.save({"a": torch.zeros(3)}, tmp_path / f"{name}.safetensors", **protocol)
        for read in (open_pack, open_unet):
            with pytest.raises(
                BadFile, match=f"^{name}.safetensors: this is a pickle file .*asdm reads only safetensors"
            ):
                read(tmp_path / f"{name}.safetensors")
    (tmp_path / "model/unet").mkdir(parents=True)
    torch.save({}, tmp_path / "model/unet/diffusion_pytorch_model.bin")
    with pytest.raises(BadFile, match="^model: it holds only diffusion_pytorch_model.bin, a pickle file"):
        open_unet(tmp_path / "model")


def test_truncated_anywhere(pack):
    data = pack.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        pack.write_bytes(data[:length])
        with pytest.raises(BadFile, match="^pack.safetensors: "):
            open_pack(pack)
    pack.write_bytes(data + b"\0")
    with pytest.raises(BadFile, match="too long"):
        open_pack(pack)


def header_bytes(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def test_header_lengths_that_begin_like_pickles(tmp_path):
    # 0x80 begins a pickle and 0x504b a zip file; both are lengths too.
    for length in (0x80, 0x4B50):
        body = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
        path = tmp_path / "file.safetensors"
        path.write_bytes(header_bytes(body) + b"\0" * 4)
        assert TensorFile(path).shapes == {"a": (1,)}


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_names_in_files_are_printed_in_one_short_line_without_control_characters(tmp_path, unet):
    evil = "\x1b[2Jasdm: all is well\r\n\u202e\ud800" + "x" * 100_000
    path = tmp_path / "evil.safetensors"
    messages = []
    data = header_bytes({evil: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})
    for attempt in (
        lambda: parse_header(data, len(data) + 4, evil),
        lambda: surgery.check({evil: (1,)}, {}, "file"),
        lambda: recognise.recognise({evil: (1,)}),
        lambda: recognise.recognise({"input_blocks.0.0.weight": (1, 2, 3), evil: (1,)}),
        lambda: recognise.recognise(
            {k: s.shape for k, s in BASE.keys("ldm", "renumbered").items()} | {"out.2.bias": ()}
        ),
    ):
        with pytest.raises(ValueError) as e:
            attempt()
        messages.append(str(e.value))
    save_file({"a": torch.zeros(1)}, path, {"asdm": json.dumps({"format": 1, "kind": evil})})
    with pytest.raises(BadFile) as e:
        open_unet(path)
    messages.append(str(e.value))
    for message in messages:
        assert len(message) < 1000 and message.isprintable() and message.isascii(), message


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("v_pred", torch.zeros(17), "at most 16 numbers"),
        ("edm_vpred.sigma_max", torch.zeros(2), "one number"),
        ("edm_mean", torch.zeros(4, dtype=torch.complex64), "dtype C64"),
    ],
)
def test_markers_are_small(tmp_path, unet, name, tensor, message):
    path = tmp_path / "marked.safetensors"
    save_file(load_file(unet) | {name: tensor}, path)
    with pytest.raises(BadFile, match=message):
        open_unet(path)


@pytest.mark.parametrize("name", [5, ["vae"], "../vae.safetensors", "a\nb", ""])
def test_companions_are_names_of_files_beside_it(pack, name):
    text = json.dumps(json.loads(tensor_file.TensorFile(pack).metadata["asdm"]) | {"companions": {"vae": name}})
    with pytest.raises(ValueError, match="names of files beside it"):
        Description.from_json(text)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"[]", "not a table"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ({"a": 3}, "tensor a is malformed"),
        (entry(shape=3), "malformed"),
        (entry(shape=[-1]), "malformed"),
        (entry(shape=[True]), "malformed"),
        (entry(shape=["2"]), "malformed"),
        (entry(dtype=None), "malformed"),
        (entry(data_offsets=[0]), "malformed"),
        (entry(data_offsets=[0, 4]), "does not fit its shape"),
        (entry(shape=[2**60]), "claims the shape"),
        (entry(shape=[0, 2**31]), "claims the shape"),
        (entry(shape=[0, 2**30, 2**30]), "claims the shape"),
        (entry(shape=[1] * 9), "at most 8 dimensions"),
        (entry(shape=[2**70]), "not valid JSON"),
        (entry(dtype="F4", data_offsets=[0, 10**4000]), "not valid JSON"),
        ({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(65_537)}, "at most 65536"),
        (b"{" + b" " * 16_000_000 + b"}", "at most 16000000"),
        (entry(data_offsets=[8, 16]), "should be"),
        ({"__metadata__": {"a": 1}}, "metadata is not a table of texts"),
        ({"__metadata__": [1]}, "metadata"),
        (b'{"a":' * 5000, "not valid JSON"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_headers(header, message):
    data = header_bytes(header)
    with pytest.raises(BadFile, match=f"^file: .*{message}"):
        parse_header(data, len(data) + 8, "file")


# Any bytes ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I8", "BOOL", "X9"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    },
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "a.scale"]), ENTRIES | JSON, max_size=4) | JSON
TEXTS = HEADERS.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=60)


def quiet_on_memory(call):
    """Runs a call, which must not allocate much whatever a file claims."""
    tracemalloc.start()
    try:
        return call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


@settings(max_examples=300)
@given(TEXTS, st.none() | st.integers(0, 2**64 - 1), st.integers(0, 50), st.integers(0, 2**63))
def test_any_header_is_read_or_refused(text, length, more, size):
    data = header_bytes(text, length) + b"\0" * more
    for claimed in (len(data), size):
        try:
            header = quiet_on_memory(lambda c=claimed: parse_header(data, c, "file"))
        except BadFile as e:
            assert str(e).startswith("file: ")
        else:
            assert all(isinstance(k, str) and isinstance(v, str) for k, v in header.metadata.items())
            assert all(isinstance(d, str) and all(n >= 0 for n in shape) for d, shape in header.tensors.values())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_read_or_refused(tmp_path, data):
    path = tmp_path / "pack.safetensors"
    if not (tmp_path / "good").exists():
        small = Architecture.full(SD)
        units = ("mid.0.resnet",)
        packs.write_pack(path, surgery.extract(weights(SD), small, units), Description("pack", small, units), None)
        (tmp_path / "good").write_bytes(path.read_bytes())
    good = bytearray((tmp_path / "good").read_bytes())
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        match data.draw(st.sampled_from(["flip", "drop", "insert"])):
            case "flip":
                good[at] ^= data.draw(st.integers(1, 255))
            case "drop":
                del good[at : at + data.draw(st.integers(1, 30))]
            case "insert":
                good[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(good)
    for read in (open_pack, open_unet):
        try:
            quiet_on_memory(lambda r=read: r(path))
        except BadFile as e:
            assert str(e).startswith("pack.safetensors: ")


@settings(max_examples=200)
@example(
    {"format": 1, "kind": "unet", "architecture": Architecture.full(SD).to_dict(), "training": None, "companions": None}
)
@given(
    JSON
    | st.fixed_dictionaries(
        {"format": st.just(1), "kind": st.sampled_from(["pack", "unet"]) | JSON},
        optional={
            "architecture": st.fixed_dictionaries(
                {"format": st.just(1)},
                optional={
                    "family": st.sampled_from(["sd15", "sdxl"]) | JSON,
                    "cut": st.lists(st.sampled_from(["mid", "mid.0.resnet", "down.0.1.resnet", "x"])) | JSON,
                    "own": JSON,
                    "config": JSON,
                    "name": JSON,
                },
            )
            | JSON,
            "units": st.lists(st.sampled_from(["mid.0.resnet", "down.0.0.resnet"])) | JSON,
            "prediction": st.sampled_from(["eps", "v"]) | JSON,
            "training": JSON,
            "companions": JSON,
            "condconv": JSON,
            "gri": JSON,
            "licence": JSON,
        },
    )
)
def test_any_description_is_read_or_refused(value):
    try:
        found = Description.from_json(json.dumps(value))
    except ValueError:
        return
    assert Description.from_json(found.to_json()) == found


# Writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, torch.float16, "is too large for float16, so nothing was written; store it as bf16 or fp32"),
        (float("nan"), torch.float32, "holds numbers that are not finite"),
        (float("inf"), None, "holds numbers that are not finite"),
        (float("inf"), "int8", "holds numbers that are not finite"),
    ],
)
def test_what_nobody_could_read_again_is_not_written(tmp_path, value, dtype, message):
    for kind, architecture, units in (("unet", BASE, ()), ("pack", M2, M2.pack_units())):
        tensors = surgery.extract(weights(SD), architecture, units) if units else surgery.cut(weights(SD), BASE)[0]
        key = next(iter(tensors))
        tensors[key] = torch.full_like(tensors[key], value)
        write = packs.write_pack if units else packs.write_unet
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "a.safetensors", tensors, Description(kind, architecture, units), dtype)
    assert not list(tmp_path.iterdir())


def test_wrong_tensors_are_not_written(tmp_path):
    sd = dict(surgery.extract(weights(SD), M2, M2.pack_units()))
    del sd[KEY]
    with pytest.raises(Mismatch, match=f"{KEY} is missing"):
        packs.write_pack(tmp_path / "pack.safetensors", sd, Description("pack", M2, M2.pack_units()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message", [("pack.ckpt", "must end in .safetensors"), ("no/pack.safetensors", "there is no folder")]
)
def test_places_where_nothing_is_written(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        tensor_file.write_file(tmp_path / name, {}, {})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(pack, monkeypatch):
    before = pack.read_bytes()

    def fail(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensor_file, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tensor_file.write_file(pack, {"a": torch.zeros(1)}, {})
    assert pack.read_bytes() == before and list(pack.parent.iterdir()) == [pack]
