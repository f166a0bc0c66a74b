import dataclasses
import re
import typing
from pathlib import Path

import pytest

from train import config, sections
from train.losses import LOSSES
from train.recipe import load

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
    if name.endswith("-styles"):
        name = name.removesuffix("-styles")
        assert recipe.architecture.name == name and recipe.student.trained == "own" and recipe.styles.many
        # The pack goes on learning: the shipped one, or what its own recipe ends in.
        assert Path(recipe.student.start).name == f"{family}-{name}.safetensors"
        return
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
    assert recipe.optimiser == sections.Optimiser(5e-5, (0.9, 0.999), 0.01, 1.0, 0, 0, 0.9999)
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
        ("loss.mid=-1", "loss.mid must be at least 0, got -1"),
        ("loss={task = 0, output = 0}", "one of the weights must be above 0"),
        ("loss.perceptual=0.1", "no known way to a picture"),
        ("data.caption_dropout=1.5", "between 0 and 1"),
        ("seed.x=1", "wanted a whole number"),
        ("lr", "wanted key=value"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load(SMOKE, [change])


# What each number of a recipe must not be, beside nan and the infinities.
OUTSIDE = {
    "seed": [-1, 2**63],
    "experts.count": [1, 0, -2],
    "gri.window": [-1],
    "gri.pool": [-1],
    "lora.rank": [-1],
    "lora.alpha": [-0.5],
    "rollout.steps": [0, -1, 1001],
    "rollout.teacher_steps": [0, 1001],
    "rollout.times": [-1, 1000],
    "rollout.guidance": [0.5, -3.0],
    "rollout.uses": [0],
    "rollout.window": [0],
    "data.size": [0, -8, 4, 509],
    "data.caption_dropout": [-0.1, 1.1],
    "data.lanes": [0, 65537],
    "data.bucket_batch": [0, -4],
    "data.held_out_count": [0, -1],
    "encoders.clip_skip": [-1, 25],
    "encoders.rows": [0, 5],
    "samples.count": [-1],
    "samples.steps": [0, 1001],
    "samples.guidance": [0.0, -1.0],
    **{f"loss.{n}": [-1.0] for n in "task output blocks layers attention mid perceptual rollout".split()},
    "loss.perceptual_until": [-1, 1001],
    "loss.perceptual_warmup": [-1],
    "optimiser.lr": [-1e-5],
    "optimiser.betas": [-0.1, 1.0, 2.0],
    "optimiser.weight_decay": [-0.01, 1.5],
    "optimiser.clip": [-1.0],
    "optimiser.warmup": [-5],
    "optimiser.cooldown": [-100],
    "optimiser.ema": [-0.1, 2.0],
    **{f"run.{n}": [0, -1] for n in "steps batch micro_batch save_every keep log_every".split()},
    "run.picture_every": [-1],
    "run.workers": [-1, 65],
    **{f"styles.{n}": [-0.1, 1.5] for n in "teacher merged lora random".split()},
    **{f"styles.{n}": [0, -1] for n in "rank every uses".split()},
    "styles.strength": [-0.1],
    "styles.carry": [-1, 1025],
}


def _numbers_of(cls, section=""):
    """Every setting that is a number or a list of them, from the types alone: key, and whether it is a list."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _numbers_of(hint, f"{f.name}.")
        elif inner := {int, float} & {hint, *typing.get_args(hint)}:
            yield f"{section}{f.name}", typing.get_origin(hint) is tuple, float in inner


def _text(key, is_list, value):
    text = {"nan": "nan", "inf": "inf", "-inf": "-inf"}.get(str(value), repr(value))
    if not is_list:
        return f"{key}={text}"
    return f"{key}=[{text}, 0.5]" if key == "optimiser.betas" else f"{key}=[{text}]"


NUMBERS = list(_numbers_of(config.Config))


@pytest.mark.parametrize(("key", "is_list", "is_float"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_every_number_has_a_range_and_what_lies_outside_is_refused_by_name(key, is_list, is_float):
    """A number that is added without a line in the table above fails here."""
    never = [float("nan"), float("inf"), float("-inf")] if is_float else []
    for value in [*OUTSIDE[key], *never]:
        with pytest.raises(ValueError, match=f"^{re.escape(key)} must be .*, got {re.escape(str(value))}$"):
            load(SMOKE, [_text(key, is_list, value)])


def test_what_lies_on_the_edge_is_taken():
    edges = ["optimiser.clip=0", "optimiser.lr=0.0", "optimiser.ema=1", "optimiser.betas=[0, 0.999]", "seed=0"]
    edges += ["data.caption_dropout=1", "run.picture_every=0", "loss.perceptual_until=1000", "samples.count=0"]
    assert load(SMOKE, edges).optimiser.clip == 0


@pytest.mark.parametrize("value", ["5", "1979-05-27", "[1]", "{a = 1}", "true", "1e400", "1" + "0" * 400])
@pytest.mark.parametrize(
    "key", ["optimiser", "network.teacher", "optimiser.lr", "optimiser.betas", "run.steps", "network.shape", "name"]
)
def test_settings_of_wrong_types_are_refused_in_one_line(key, value):
    """A section, a text, a number, a list and a table, each set to something else."""
    if (key, value) in (("optimiser.lr", "5"), ("run.steps", "5"), ("run.steps", "1" + "0" * 400)):
        return
    with pytest.raises(ValueError) as caught:
        load(SMOKE, [f"{key}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\\\\b"])
def test_a_name_that_would_lead_out_of_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="name: wanted a plain file name"):
        load(SMOKE, [f'name="{name}"'])


def test_recipes_that_go_round_in_circles_are_refused(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "a.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "c.toml"\n')
    (tmp_path / "c.toml").write_text('extends = "./b.toml"\n')
    (tmp_path / "d.toml").write_text("extends = 5\n")
    (tmp_path / "e.toml").write_text(f'extends = "{tmp_path.name}"\n')
    for name, said in (
        ("a", r"a.toml: a recipe cannot extend itself \(a.toml -> a.toml\)"),
        ("b", r"a recipe cannot extend itself \(b.toml -> c.toml -> b.toml\)"),
        ("d", "d.toml: extends: wanted the name of another recipe, got 5"),
        ("e", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / f"{name}.toml")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_recipes_that_are_not_utf_8_are_named(tmp_path, encoding):
    (tmp_path / "a.toml").write_bytes('name = "caf\u00e9"\n'.encode(encoding))
    with pytest.raises(ValueError, match="a.toml: not UTF-8"):
        load(tmp_path / "a.toml")


def test_recipes_of_windows_editors_are_read(tmp_path):
    (tmp_path / "a.toml").write_bytes('extends = "b.toml"\r\n'.encode("utf-8-sig"))
    (tmp_path / "b.toml").write_bytes(b'[student]\r\npreset = "base"\r\n')
    assert load(tmp_path / "a.toml").student.preset == "base"


def test_losses_and_their_weights_have_the_same_names():
    weights = {f.name for f in dataclasses.fields(sections.Loss) if f.type == "float"}
    assert weights == set(LOSSES)


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
