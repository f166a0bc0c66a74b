"""Profiles: what they say they are for, and what files may hold."""

import json
import os
from dataclasses import replace

import pytest

from asdm_core import profile as profiles
from asdm_core.forecast import every
from asdm_core.forecast_fit import Offer
from asdm_core.profile import BadProfile, Circumstances, Profile

MADE = Circumstances("a1", "euler", tuple(10.0 - s for s in range(11)), 7.0, (64, 64))
OFFERS = (
    Offer(0.4, 0.05, 6),
    Offer(0.5, 0.02, 10, every(10, 2)),
    Offer(0.6, 0.04, 10, every(10, 3)),
    Offer(0.8, 0.2, 2),
)
MINE = Profile(MADE, OFFERS, 8, "normal", "mine")


def test_a_profile_is_json_both_ways():
    assert Profile.from_json(MINE.to_json()) == MINE


def test_the_plan_that_saves_most_within_an_error_and_fewer_steps_where_they_save_more():
    assert MINE.plan(0.03) == OFFERS[1] and MINE.plan(0.1) == OFFERS[2] and MINE.plan(0.01) is None
    assert MINE.fewer_steps(0.03) is None and MINE.fewer_steps(0.06) is None
    assert MINE.fewer_steps(0.3) == OFFERS[3]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sampler": "heun"}, "for the sampler euler, and this run has heun"),
        ({"sigmas": MADE.sigmas[1:]}, "for 10 steps, and this run has 9"),
        ({"sigmas": tuple(2 * s for s in MADE.sigmas)}, "for other noise levels"),
        ({"model": "b2"}, "for another model"),
        ({"size": (128, 128)}, "for latents of 64 x 64, and these are 128 x 128"),
        ({"cfg": 3.0}, "for CFG 7, and this run has 3"),
    ],
)
def test_what_a_profile_was_not_made_for(change, said):
    found = MADE.differences(replace(MADE, **change))
    assert len(found) == 1 and found[0].startswith(said)
    assert MADE.same_steps(replace(MADE, **change)) == (not {"sampler", "sigmas"} & set(change))


def test_sizes_of_one_class_are_no_difference():
    assert not MADE.differences(replace(MADE, size=(64, 80), sigmas=tuple(s * (1 + 1e-6) for s in MADE.sigmas)))


@pytest.mark.parametrize(
    "made, run, same",
    [(7, 7.5, True), (7.5, 7, True), (5, 5.5, True), (7, 8, False), (3, 7, False), (7, 1, False)]
    + [(1, 1, True), (1, 1.005, False), (0, 0, True), (0, 0.1, False), (-2, 2, False)],
)
def test_a_profile_is_for_about_its_cfg(made, run, same):
    made_for, asked = replace(MADE, cfg=float(made)), replace(MADE, cfg=float(run))
    assert made_for.same_guidance(asked) == same
    assert (profiles.nearest({"it": replace(MINE, made_for=made_for)}, asked) == "it") == same
    assert same or made_for.differences(asked)


def test_what_keeps_a_profile_from_being_taken_is_named_first():
    found = MADE.differences(replace(MADE, cfg=3.0, size=(128, 128)))
    assert [text.split(",")[0] for text in found] == ["for CFG 7", "for latents of 64 x 64"]


def test_the_nearest_is_of_the_model_and_steps_and_cfg_then_of_the_size():
    found = {
        "other model": replace(MINE, made_for=replace(MADE, model="b2")),
        "other sampler": replace(MINE, made_for=replace(MADE, sampler="heun")),
        "other size": replace(MINE, made_for=replace(MADE, size=(128, 128))),
        "other cfg": replace(MINE, made_for=replace(MADE, cfg=6.5)),
    }
    assert profiles.nearest(found, MADE) == "other cfg"
    assert profiles.nearest(found | {"same": MINE}, MADE) == "same"
    del found["other cfg"]
    assert profiles.nearest(found, MADE) == "other size"
    del found["other size"]
    assert profiles.nearest(found, MADE) is None


def test_a_file_is_written_into_the_first_folder_that_takes_it(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    path = profiles.write_profile(MINE, "mine", [blocked / "in", tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "a" / "mine.json" and profiles.read_profile(path) == MINE
    assert os.listdir(path.parent) == ["mine.json"] and not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="could not be written: .*in"):
        profiles.write_profile(MINE, "mine", [blocked / "in"])


@pytest.mark.parametrize("name", ["", " ", "..", "../up", "a/b", "a\\b", "C:x", ".hidden", "x" * 200, "a\x1b[2J"])
def test_a_name_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="profile"):
        profiles.write_profile(MINE, name, [tmp_path])
    assert not os.listdir(tmp_path)


def test_a_name_is_as_long_as_file_systems_take_it(tmp_path):
    name = "日" * (profiles.LONGEST // 3)
    assert profiles.write_profile(MINE, name, [tmp_path]).stem == name
    with pytest.raises(ValueError, match="a name of 1 to 120 letters"):
        profiles.file_name(name + "日")


def damaged(**changes):
    return json.dumps(json.loads(MINE.to_json()) | changes)


OFFER = json.loads(MINE.to_json())["offers"][1]
BAD = {
    "empty": "",
    "no JSON": "{",
    "bytes": b"\xff\xfe\x00",
    "a plan": json.dumps(every(10, 2).to_dict()),
    "a list": "[1]",
    "another format": damaged(format=9),
    "learned from nothing": damaged(pictures=-5),
    "no offers": damaged(offers=[]),
    "offers of another kind": damaged(offers=5),
    "an error that is no number": damaged(offers=[OFFER | {"error": float("nan")}]),
    "a saving beyond 1": damaged(offers=[OFFER | {"saving": 2}]),
    "a plan for other steps": damaged(offers=[OFFER | {"plan": every(4, 2).to_dict()}]),
    "a plan of nothing": damaged(offers=[OFFER | {"plan": {}}]),
    "made for nothing": damaged(made_for={}),
    "noise levels that are none": damaged(made_for=json.loads(MINE.to_json())["made_for"] | {"sigmas": [1e999, 0]}),
    "nested": "[" * 100_000,
    "too large": b" " * (profiles.LARGEST + 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_profile_ends_in_one_sentence(name, tmp_path):
    path = tmp_path / "given.json"
    content = BAD[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadProfile) as caught:
        profiles.read_profile(path)
    said = str(caught.value)
    assert said.startswith("given.json") and said.endswith(".") and "\n" not in said and len(said) < 300


def test_a_file_that_is_gone_ends_in_one_sentence(tmp_path):
    with pytest.raises(BadProfile, match=r"gone\.json cannot be read: .*\.$"):
        profiles.read_profile(tmp_path / "gone.json")
