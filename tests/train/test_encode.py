"""Pictures to a cache, with stand-ins for VAE and text encoder; and the real classes with few channels."""

import json
import struct
import zlib

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import train.encode
from asdm_core.tensor_file import write_file
from tests.train.recipes import NARROW
from train.recipe import load
from train.data import Cache
from train.encode import captioned, encode, read_picture
from train.encoders import Text, latents_of, load_text, load_vae
from train.provenance import made, same_file


def to_latents(pictures):
    return pictures.mean((1, 2, 3), keepdim=True).expand(-1, 4, 8, 8)


def to_text(captions):
    return Text(torch.tensor([len(c) for c in captions]).float()[:, None, None].expand(-1, 3, 32))


def paint(path, grey, size=(16, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path)


@pytest.fixture()
def folder(tmp_path):
    for i in range(5):
        paint(tmp_path / "in" / f"{i}.png", 50 * i)
    return tmp_path / "in"


def test_captions_come_from_tables_or_text_files(folder):
    with pytest.raises(ValueError, match="no pictures with captions"):
        captioned(folder)
    (folder / "0.txt").write_text("a cat\n")
    assert captioned(folder) == [(folder / "0.png", ["a cat"])]
    (folder / "metadata.csv").write_text('file_name,text\n1.png,"red, round"\n')
    assert captioned(folder) == [(folder / "1.png", ["red, round"])]
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "3.png", "text": ["x", "y"]}\n{"file_name": "2.png", "text": "z"}\n'
    )
    assert captioned(folder) == [(folder / "2.png", ["z"]), (folder / "3.png", ["x", "y"])]
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png"}\n')
    with pytest.raises(ValueError, match="entry 1 of its metadata has no file_name or no text"):
        captioned(folder)


def test_pictures_are_cropped_about_their_centre(tmp_path):
    picture = Image.new("L", (30, 10), 0)
    picture.paste(255, (10, 0, 20, 10))
    picture.save(tmp_path / "a.png")
    cropped, sizes = read_picture(tmp_path / "a.png", (10, 10))
    assert torch.equal(cropped, torch.ones(3, 10, 10))
    assert sizes.tolist() == [10, 30, 0, 10, 10, 10]


def test_the_cache_holds_the_pictures_and_names_the_broken_ones(folder, tmp_path, capsys):
    (folder / "metadata.jsonl").write_text(
        "\n".join(
            json.dumps({"file_name": f"{i}.png", "text": ["a" * i, "b" * (i + 1)] if i == 3 else "a" * i or "-"})
            for i in range(5)
        )
    )
    (folder / "1.png").write_bytes(b"no picture")
    found = captioned(folder)
    out = tmp_path / "out"
    broken = encode(found, out, 8, to_latents, to_text, batch=2, shard=3)
    assert broken == [folder / "1.png"] and "left out" in capsys.readouterr().out
    source = Cache(out, load(NARROW))
    assert len(source) == 4 and len(source.paths) == 2
    first = source.examples(range(4), [0.0] * 4)
    wanted = [torch.tensor(grey / 127.5 - 1).half().float() for grey in (0, 100, 150, 200)]
    assert [float(x.unique()) for x in first.latents] == [float(w) for w in wanted]
    assert [float(c.unique()) for c in first.text.states] == [1, 2, 3, 4]
    assert [float(c.unique()) for c in source.examples([2, 3], [0.9, 0.9]).text.states] == [4, 4]
    assert not source.empty.states.any()
    # Once written a part is not made again.
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    (out / "00001.safetensors").unlink()
    encode(found, out, 8, to_latents, to_text, batch=2, shard=3)
    after = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert after.keys() == before.keys() and after["00000.safetensors"] == before["00000.safetensors"]


def test_a_caption_whose_states_are_not_finite_is_named(folder, tmp_path):
    def strong(captions):
        states = to_text(captions).states.clone()
        states[[c == "b" for c in captions]] *= 1e5
        return Text(states)

    found = [(path, ["aa", "b"] if path.stem == "2" else ["a"]) for path in sorted(folder.iterdir())]
    with pytest.raises(ValueError, match="'b': for this caption the text encoder gives numbers that half precision"):
        encode(found, tmp_path / "out", 8, to_latents, strong, batch=2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("more", [("--size", "60"), ("--size", "0"), ("--rows", "0"), ("--batch", "0")])
def test_numbers_of_the_command_are_checked(more, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["encode", str(folder), str(tmp_path / "out"), "--models", "none", *more])
    with pytest.raises(SystemExit, match=f"{more[0]}: wanted a .* got {more[1]}"):
        train.encode.main()


def test_files_older_than_a_setting_say_nothing_of_it(tmp_path):
    path = tmp_path / "00000.safetensors"
    write_file(path, {"latents": torch.zeros(1)}, {})
    same_file(path, {"size": 1}, "")
    write_file(path, {"latents": torch.zeros(1)}, made({"size": 1}))
    same_file(path, {"size": 1, "new": 2}, "")
    for other, said in (({"size": 2}, "size was 1 and is 2"), ({}, "size was 1 and is None")):
        with pytest.raises(ValueError, match=f"{said}.; delete it"):
            same_file(path, other, "delete it")


def test_a_folder_that_has_changed_is_not_taken_for_the_one_it_was(folder, tmp_path):
    def encoded(count, size=8, models="a", rows=3):
        for i in range(count):
            (folder / f"{i}.txt").write_text("cat")
        return encode(
            captioned(folder)[:count],
            tmp_path / "out",
            size,
            to_latents,
            to_text,
            batch=2,
            shard=2,
            models=models,
            reading={"rows": rows},
        )

    encoded(5), encoded(5)
    for changed, message in (
        (lambda: encoded(4), "00002.* was .* and is None"),
        (lambda: encoded(3), "00001.*hash of the pictures' names"),
        (lambda: encoded(5, 16), "00000.*size was 8 and is 16"),
        (lambda: encoded(5, 8, "b"), "models was 'a' and is 'b'"),
        (lambda: encoded(5, rows=1), "rows was 3 and is 1"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*; delete it and those after it"):
            changed()
    paint(folder / "00.png", 0)  # now the second of all
    (folder / "00.txt").write_text("dog")
    with pytest.raises(ValueError, match="00000.safetensors was made with other settings"):
        encoded(5)


def test_the_last_line_counts_what_the_cache_holds(folder, tmp_path, monkeypatch, capsys):
    for i in range(5):
        (folder / f"{i}.txt").write_text("cat")
    # A PNG whose chunk eXIf is too short: Pillow raises struct.error.
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(
        data[:33] + struct.pack(">I4s6sI", 6, b"eXIf", b"II*\0\x08\0", zlib.crc32(b"eXIfII*\0\x08\0")) + data[33:]
    )
    monkeypatch.setattr(train.encode, "load_vae", lambda *_: None)
    monkeypatch.setattr(train.encode, "latents_of", lambda vae: to_latents)
    monkeypatch.setattr(train.encode, "load_text", lambda *_, **__: to_text)
    monkeypatch.setattr(
        "sys.argv", ["encode", str(folder), str(tmp_path / "out"), "--models", str(tmp_path), "--size", "8"]
    )
    lines = []
    for _ in range(2):
        train.encode.main()
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines == [f"4 pictures in {tmp_path / 'out'}; 1 could not be read", f"4 pictures in {tmp_path / 'out'}"]


@torch.no_grad()
def test_encoders_come_from_a_whole_model(tmp_path):
    with pytest.raises(ValueError, match="has no folder vae; wanted a diffusers folder"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="has no folder text_encoder; wanted a diffusers folder"):
        load_text(tmp_path)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    words = ["a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=6,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=3,
        )
    ).eval()
    text.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 6, "pad_token": "<|endoftext|>"})
    )
    to_latents = latents_of(load_vae(tmp_path))

    def to_states(captions):
        return load_text(tmp_path)(captions).states

    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(to_latents(picture), 0.5 * vae.encode(picture).latent_dist.mean)
    wanted = text(torch.tensor([[2, 0, 1, 3, 3, 3], [2, 3, 3, 3, 3, 3]])).last_hidden_state
    torch.testing.assert_close(to_states(["a b", ""]), wanted)
