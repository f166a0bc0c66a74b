"""Pictures from folders, shards and streams, and the teacher's own: the samples, broken ones, and resumed runs bit for
bit.
"""

import io
import json
import sys
import tarfile

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_core.architecture import Architecture
from asdm_core.packs import open_pack
from tests.train.recipes import CONFIGS, NARROW
from train import loop, sources, networks
from train.recipe import load
from train.data import Batches, Cache
from train.diffusion import STEPS, coefficients
from train.seeds import seeded
from train.encoders import load_text
from train.loop import train
from train.sources import open_source

WORDS = ("red", "blue", "cat", "dog", "a", "of")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A diffusers folder with a narrow VAE (8 px a latent), text encoder (32 wide) and tokeniser."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")
    words = {
        w: i
        for i, w in enumerate(
            [f"{w}</w>" for w in WORDS] + [c for c in "abcdefgor"] + ["<|startoftext|>", "<|endoftext|>"]
        )
    }
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=8,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    ).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "<|endoftext|>"})
    )
    return folder


def picture(i, broken=()):
    """Picture i is of the grey 10 i."""
    if i in broken:
        return b"no picture"
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (10 * i,) * 3).save(file, "png")
    return file.getvalue()


def write_folder(path, count=12, broken=()):
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i:02d}.png").write_bytes(picture(i, broken))
        (path / f"{i:02d}.txt").write_text("red" if i % 2 else "blue cat")
    return path


def write_shards(path, count=12, shard=5, broken=()):
    path.mkdir(parents=True)
    for first in range(0, count, shard):
        with tarfile.open(path / f"{first:03d}.tar", "w") as tar:
            for i in range(first, min(first + shard, count)):
                caption = json.dumps({"caption": ["red", "blue"]}) if i % 2 else "blue cat"
                for name, data in (
                    (f"{i:02d}.png", picture(i, broken)),
                    (f"{i:02d}.{'json' if i % 2 else 'txt'}", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"a/{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def write_stream(path, count=12, broken=()):
    import pyarrow
    import pyarrow.parquet

    path.mkdir(parents=True)
    rows = [
        {"image": {"bytes": picture(i, broken), "path": f"{i}.png"}, "text": "red" if i % 2 else "blue cat"}
        for i in range(count)
    ]
    for n in range(2):
        part = pyarrow.Table.from_pylist(rows[n * count // 2 : (n + 1) * count // 2])
        pyarrow.parquet.write_table(part, path / f"train-{n:05d}-of-00002.parquet", row_group_size=3)
    return path


WRITERS = {"folder": write_folder, "shards": write_shards, "hub": write_stream}


def recipe(source, path, models, *changes):
    return load(
        NARROW,
        [f"data.source={source}", f"data.path={path}", f"encoders.models={models}", "data.caption_dropout=0", *changes],
    )


def greys(source, numbers):
    """Which pictures these are, by what the VAE is given."""
    seen = []

    def to_latents(pictures):
        seen.extend(round(float(p.mean() + 1) * 12.75) for p in pictures)
        return torch.zeros(len(pictures), 4, 8, 8)

    source.to_latents = to_latents
    source.examples(numbers, [0.0] * len(numbers))
    return seen


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(sources, "SHUFFLED", 4)


# The samples ----------------------------------------------------------------------------------------


def test_every_picture_comes_once_an_epoch(models, tmp_path):
    config = recipe("folder", write_folder(tmp_path / "data"), models)
    opened = open_source(config)
    batches = Batches(opened, config)
    epochs = [greys(opened, batches.order(epoch)) for epoch in range(2)]
    assert len(opened) == 12 and all(sorted(e) == list(range(12)) for e in epochs) and epochs[0] != epochs[1]


def test_a_stream_goes_on_for_ever_and_from_where_it_was(models, tmp_path):
    config = recipe("hub", write_stream(tmp_path / "data", 10), models)
    opened = open_source(config)
    seen = greys(opened, range(40))
    assert (
        all(seen.count(i) == 4 for i in range(10)) and seen[:8] != list(range(8)) and sorted(seen[:4]) == list(range(4))
    )
    for n in (0, 3, 4, 9, 10, 11, 21, 38):  # within a window, at its edge, and in later epochs
        first, again = open_source(config), open_source(config)
        if n:
            greys(first, range(n))
        again.restore(json.loads(json.dumps(first.state(n))))
        assert greys(again, range(n, 40)) == seen[n:], n


@pytest.mark.parametrize("source", WRITERS)
def test_the_caption_and_the_picture_are_encoded(source, models, tmp_path):
    config = recipe(source, WRITERS[source](tmp_path / "data"), models)
    batch = Batches(open_source(config), config)(range(12))
    # "blue cat" is 7 tokens, of which a row holds 6.
    assert batch.x0.shape == (12, 4, 8, 8) and batch.context.shape == (12, 16, 32) and batch.pooled is None
    to_text = load_text(models)
    wanted = [to_text([caption]).states[0] for caption in ("red", "blue cat", "blue")]
    assert all(any(torch.allclose(row, w.repeat(16 // len(w), 1), atol=1e-6) for w in wanted) for row in batch.context)


@pytest.mark.parametrize("source", WRITERS)
def test_broken_pictures_are_replaced_named_and_counted(source, models, tmp_path, capsys):
    config = recipe(source, WRITERS[source](tmp_path / "data", broken=(3, 4)), models)
    opened = open_source(config)
    # Lanes of shards go on to the next epoch before all pictures of this one were read.
    count = 48 if source == "shards" else 12
    batch = Batches(opened, config)(range(count))
    assert 2 <= int(batch.left_out.sum()) <= count / 3 and capsys.readouterr().out.count("left out") == 2
    assert not {3, 4} & set(greys(opened, range(12)))
    broken = open_source(recipe(source, WRITERS[source](tmp_path / "all", broken=range(12)), models))
    with pytest.raises(ValueError, match="none of 100 pictures in a row could be read"):
        broken.examples([0], [0.0])


def test_what_is_missing_is_named(models, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    for source, path, message in (
        ("folder", "empty", "no pictures with captions"),
        ("shards", "empty", "names no .tar file"),
        ("shards", "bad.tar", "bad.tar holds no pictures with captions"),
        ("prompts", "none.txt", "cannot be read"),
        ("prompts", "no.txt", "holds no prompts"),
    ):
        (tmp_path / "no.txt").write_text("\n \n")
        with pytest.raises(ValueError, match=message):
            open_source(recipe(source, tmp_path / path, models))
    with pytest.raises(ValueError, match="has text states 32 wide, a UNet of sd15 takes 768"):
        open_source(
            recipe(
                "folder",
                write_folder(tmp_path / "data"),
                models,
                "network.family=sd15",
                "network.shape.context_dim=768",
            )
        )
    for source, library in (("hub", "datasets"), ("shards", "webdataset")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=f"needs the {library} library: pip install {library}"):
            open_source(recipe(source, tmp_path, models))


# The text encoder of a checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize("classic", [True, False])
def test_a_checkpoint_brings_its_own_text_encoder(classic, models, tmp_path):
    inner = "text_model." if classic else ""
    sd = {
        f"cond_stage_model.transformer.{inner}{k.removeprefix('text_model.')}": v.half()
        for k, v in load_file(models / "text_encoder" / "model.safetensors").items()
    }
    save_file(sd | {"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    found = load_text(tmp_path / "checkpoint.safetensors", models / "tokenizer")(["blue cat", ""]).states
    assert (found - load_text(models)(["blue cat", ""]).states).abs().max() < 1e-2
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="unet.safetensors holds no CLIP text encoder"):
        load_text(tmp_path / "unet.safetensors", models / "tokenizer")
    with pytest.raises(ValueError, match="encoders.tokenizer: .*wanted a folder with CLIP's vocab.json"):
        load_text(tmp_path / "checkpoint.safetensors", tmp_path)


def test_the_teacher_lies_in_a_whole_checkpoint(models, tmp_path):
    config = load(CONFIGS / "emoji-base.toml", ["network.teacher=random"])
    teacher = networks.load_teacher(config)
    sd = {
        f"model.diffusion_model.{k}": v.half()
        for k, v in networks.addressed(teacher, Architecture.full(config.network.config)).items()
    }
    text = {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v.half()
        for k, v in load_file(models / "text_encoder" / "model.safetensors").items()
    }
    whole = sd | text | {"first_stage_model.x": torch.zeros(1)}
    save_file({k: v.contiguous() for k, v in whole.items()}, tmp_path / "finetune.safetensors")
    found = networks.load_teacher(
        load(CONFIGS / "emoji-base.toml", [f"network.teacher={tmp_path / 'finetune.safetensors'}"])
    ).state_dict()
    assert all(torch.equal(found[k], v.half().float()) for k, v in teacher.state_dict().items())
    assert load_text(tmp_path / "finetune.safetensors", models / "tokenizer")(["red"]).states.shape == (1, 8, 32)


# The teacher's own pictures -------------------------------------------------------------------------


@pytest.fixture()
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red cat\n\nblue dog\na cat\n")
    return path


DRAWN = ("samples.steps=2", "samples.count=6", "run.batch=2", "run.micro_batch=2")


def test_the_teacher_draws_what_is_missing_and_no_more(prompts, models, tmp_path, monkeypatch):
    config = recipe("prompts", prompts, models, *DRAWN, f"run.folder={tmp_path / 'run'}")
    calls = []

    def predict(x, t, context, added):
        calls.append(len(x))
        return 0.1 * x + context.mean((1, 2))[:, None, None, None]

    cache = open_source(config, predict)
    assert (
        isinstance(cache, Cache) and len(cache) == 6 and calls == [4] * 6
    )  # 3 batches, 2 steps, both halves of the guidance
    before = cache.examples(range(6), [0.0] * 6)
    assert torch.equal(before.text.states[0], before.text.states[3]) and not torch.equal(
        before.latents[0], before.latents[3]
    )
    open_source(config, predict)
    assert len(calls) == 6
    # Killed between two files: the same pictures again. Two processes make one file each.
    monkeypatch.setattr(sources, "SAMPLES_IN_FILE", 2)
    parts = tmp_path / "parts"
    for process in (1, 0):  # the first has made its file before the second looks
        sources.write_samples(
            parts, sources.Prompts(config, predict, load_text(models), torch.device("cpu")), 6, 2, process, 2
        )
    assert len(Cache(parts, config)) == 6
    (parts / "00001.safetensors").unlink()
    sources.write_samples(parts, sources.Prompts(config, predict, load_text(models), torch.device("cpu")), 6, 2)
    again = Cache(parts, config).examples(range(6), [0.0] * 6)
    assert torch.equal(again.latents, before.latents) and torch.equal(again.text.states, before.text.states)


def test_pictures_drawn_with_other_settings_are_refused(prompts, models, tmp_path):
    def opened(*changes):
        return open_source(
            recipe("prompts", prompts, models, *DRAWN, f"run.folder={tmp_path / 'run'}", *changes), lambda x, *_: x
        )

    drawn = opened()
    again = opened("run.micro_batch=1")  # which may change, and changes no file
    assert torch.equal(again.examples(range(6), [0.0] * 6).latents, drawn.examples(range(6), [0.0] * 6).latents)
    for change, message in (
        ("samples.guidance=2", "samples.guidance was 7.5 and is 2.0"),
        ("samples.count=5", "samples.count was 6 and is 5"),
        ("network.teacher=other", "network.teacher was 'random' and is 'other'"),
        ("seed=7", "seed was 1234 and is 7"),
    ):
        with pytest.raises(
            ValueError,
            match=f"00000.safetensors was made with other settings .{message}.; delete .*samples to have them drawn "
            "anew",
        ):
            opened(change)
    prompts.write_text("red cat\n")
    with pytest.raises(ValueError, match="hash of the prompts was"):
        opened()


def test_pictures_that_no_process_drew_are_missed(prompts, models, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLES_IN_FILE", 2)
    config = recipe("prompts", prompts, models, *DRAWN, f"run.folder={tmp_path}")
    with pytest.raises(ValueError, match="holds 4 pictures, wanted samples.count = 6"):  # nobody waits for the other
        open_source(config, lambda x, *_: x, process=0, processes=2)


def test_drawing_follows_the_probability_flow(prompts, models):
    # From noise to a Gaussian of variance 1 around 3 the flow only shifts: by 3 less the 3 a that the last step has of
    # it.
    def exact(kind):
        def predict(x, t, context, added):
            a, s = coefficients(t)
            eps = s * (x - 3 * a)  # the mean of eps, given x
            return eps if kind == "eps" else a * eps - s * (x - s * eps) / a

        return predict

    for kind in ("eps", "v"):
        config = recipe(
            "prompts",
            prompts,
            models,
            "samples.steps=100",
            "samples.guidance=1",
            "samples.count=0",
            f"network.prediction={kind}",
        )
        drawn = open_source(config, exact(kind)).examples(range(3), []).latents
        noise = torch.stack([torch.randn(4, 8, 8, generator=seeded(config.seed, 8, n)) for n in range(3)])
        a, _ = coefficients(torch.tensor([STEPS - 1]))
        torch.testing.assert_close(drawn, noise + 3 * (1 - a), atol=0.08, rtol=0)


# Runs -----------------------------------------------------------------------------------------------


def newest(folder):
    return max(folder.glob("checkpoint-*.safetensors"))


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("source", "workers"),
    [*((source, 0) for source in WRITERS), ("folder", 2), ("shards", 2), ("hub", 2), ("prompts", 0), ("fresh", 0)],
)
def test_a_resumed_run_equals_an_unbroken_one(source, workers, models, prompts, tmp_path, monkeypatch):
    path = prompts if source in ("prompts", "fresh") else WRITERS[source](tmp_path / "data", 6, broken=(3, 4))
    changes = [
        *DRAWN,
        "samples.count=0" if source == "fresh" else "samples.count=6",
        "run.steps=4",
        "run.picture_every=0",
    ]
    name = "prompts" if source == "fresh" else source

    def run(folder, workers=workers):
        config = recipe(name, path, models, *changes, f"run.folder={tmp_path / folder}", f"run.workers={workers}")
        train(config, Accelerator(cpu=True))
        return config

    whole = run("whole", 0)

    class Stop(Exception):
        pass

    original = loop.learning_rate
    with monkeypatch.context() as m, pytest.raises(Stop):

        def until(config, step):
            if step == 3:
                raise Stop
            return original(config, step)

        m.setattr(loop, "learning_rate", until)
        run("broken")
    assert newest(tmp_path / "broken").stem == "checkpoint-00000002"
    run("broken")
    a, b = load_file(newest(tmp_path / "whole")), load_file(newest(tmp_path / "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    training = open_pack(whole.product).description.training
    assert (training["left_out"] > 0) == (path != prompts)
    assert (
        open_pack(tmp_path / "broken" / "narrow.safetensors").description.training["left_out"] == training["left_out"]
    )
