from pathlib import Path

import pytest

from train import config
from train.config import load

RECIPES = sorted((Path(config.__file__).parent / "configs").glob("*.toml"))
SMOKE = next(p for p in RECIPES if p.stem == "smoke")


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if not p.stem.startswith("sdxl-")], ids=lambda p: p.stem
)  # these: test_sdxl.py
def test_recipes_are_what_their_names_say(path):
    recipe = load(path)
    assert recipe.name == path.stem and recipe.product == Path("runs", path.stem, f"{path.stem}.safetensors")
    family, _, name = path.stem.partition("-")
    if "-steps-" in name:
        return _check_few_steps(recipe, family, name.rpartition("-")[2])
    name, _, experts = name.partition("-")
    if name:
        frozen = {"m4": "m1", "m5": "m2", "gri": "full"}
        assert recipe.network.family == family and recipe.architecture.name == frozen.get(name, name)
        assert recipe.student.trained == ("all" if name in ("m4", "m5") else "own")
        # A recipe of stage 2 begins with what the recipe of stage 1 ends in.
        before = name if experts else "base" if name[:1] == "m" else ""
        assert recipe.student.start == (str(load(path.with_name(f"{family}-{before}.toml")).product) if before else "")
        assert (recipe.condconv is not None) == bool(experts) and (recipe.gains is not None) == (name == "gri")
        assert {
            "": not experts,
            "e2": set(recipe.condconv.experts.values() if experts else ()) == {2},
            "clme": recipe.experts.start == "clme",
        }[experts]


def _check_few_steps(recipe, family, kind):
    """kind: "lora" for a LoRA on the original, else the preset whose own units are trained beside one."""
    assert recipe.network.family == family and recipe.rollout.steps[-1] == 2 and recipe.lora.convolutions
    assert recipe.architecture.name == ("full" if kind == "lora" else kind)
    assert recipe.makes_network == (kind != "lora") and bool(recipe.student.start) == (kind != "lora")
    assert recipe.data.caption_dropout == 0 and recipe.optimiser.weight_decay == 0


def test_experts_sit_where_the_recipe_says():
    e2, clme = (load(SMOKE.with_name(f"sd15-tiny-{name}.toml")).condconv.experts for name in ("e2", "clme"))
    kept = ["down.0.0", "down.1.0", "up.2.0", "up.2.2", "up.3.0", "up.3.2"]
    assert list(e2) == [f"{layer}.resnet.{conv}" for layer in kept for conv in ("conv1", "conv2")]
    # up.3.0's first convolution is wider than all others of its block.
    assert clme == {
        "down.0.0.resnet.conv1": 2,
        "down.0.0.resnet.conv2": 2,
        "up.3.0.resnet.conv2": 3,
        "up.3.2.resnet.conv1": 2,
        "up.3.2.resnet.conv2": 3,
    }


def test_stage_one_has_the_settings_of_bk_sdm():
    recipe = load(SMOKE.with_name("sd15-base.toml"))
    assert recipe.optimiser == config.Optimiser(5e-5, (0.9, 0.999), 0.01, 1.0, 0, 0, 0.9999)
    assert (recipe.run.batch, recipe.run.steps) == (256, 50_000)
    assert (recipe.loss.task, recipe.loss.output, recipe.loss.blocks, recipe.loss.mid) == (1, 1, 1, 0)


def test_changes_win_over_the_recipe_and_keep_the_rest():
    recipe = load(
        SMOKE,
        [
            "optimiser.lr=3e-4",
            "run.steps=7",
            "student.preset=base",
            "run.folder=some/where",
            "optimiser.betas=[0.8, 0.9]",
        ],
    )
    assert recipe.optimiser.lr == 3e-4 and recipe.run.steps == 7 and recipe.architecture.name == "base"
    assert recipe.folder == Path("some/where") and recipe.optimiser.betas == (0.8, 0.9)
    assert recipe.data == load(SMOKE).data and recipe.optimiser.ema == load(SMOKE).optimiser.ema


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "a.toml").write_text('name = "a"\n[student]\npreset = "base"\n[loss]\nmid = 2\ntask = 0.5\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n[loss]\nmid = 0.25\n')
    recipe = load(tmp_path / "b.toml")
    assert (recipe.name, recipe.student.preset, recipe.loss.mid, recipe.loss.task) == ("b", "base", 0.25, 0.5)


def test_the_printed_recipe_is_a_recipe(tmp_path):
    recipe = load(SMOKE)
    (tmp_path / "again.toml").write_text(recipe.to_text())
    assert load(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=1", "unknown key 'optimizer'; did you mean 'optimiser'"),
        ("run.step=1", "unknown key 'step'; did you mean 'steps'"),
        ("run.steps=many", "steps: wanted a whole number, got 'many'"),
        ("run.steps=true", "steps: wanted a whole number, got True"),
        ("run.steps=0", "run.steps must be at least 1"),
        ("optimiser.betas=[0.9]", "betas: wanted a list of 2"),
        ("data.source=cach", "'cach' is none of cache, folder, .*; did you mean 'cache'"),
        ("student.preset=m22", "no preset 'm22'"),
        ("experts.on=moon", "'moon' matches no unit"),
        ("experts.on=up.3.1", "'up.3.1' holds no convolution that m2 keeps"),
        ("experts.start=one", "'one' is none of zero, random, clme"),
        (
            'student={preset = "full", start = "a.safetensors", trained = "all"}',
            "student.preset = 'full' the student is the original",
        ),
        ("student.cut=mid", "give either preset or cut"),
        ("loss.mid=-1", "weights must not be negative"),
        ("loss.perceptual=0.1", "no known way to a picture"),
        ("data.caption_dropout=1.5", "between 0 and 1"),
        ("seed.x=1", "wanted a whole number"),
        ("lr", "wanted key=value"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load(SMOKE, [change])


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="network.family: 'sd16' is none of sd15.*did you mean 'sd"):
        load(SMOKE.with_name("sd15-base.toml"), ["network.family=sd16", "loss.mid=1"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.toml: cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ValueError, match="bad.toml: not valid TOML"):
        load(tmp_path / "bad.toml")


def test_the_batch_is_shared_out_or_refused():
    recipe = load(SMOKE, ["run.batch=32", "run.micro_batch=4"])
    assert [recipe.accumulation(n) for n in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ValueError, match="32 is no multiple of run.micro_batch = 4 times 3 processes = 12"):
        recipe.accumulation(3)
