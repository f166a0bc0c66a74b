"""Who plays a unit at a step, and how casts compose."""

import pytest

from asdm_core.cast import HOST, Cast, Line, Part, Window, fingerprint
from tests.core.narrow import SD

PACK = Part("pack", "a")
OTHER = Part("pack", "b")
CUT = Part("cut")
EARLY, LATE = Window(0.0, 0.4), Window(0.4, 1.0)
RESNET, TRANSFORMER = "down.0.0.resnet", "down.0.0.transformer"


def test_whom_no_line_names_the_host_plays():
    assert Cast(SD).parts() == {}
    cast = Cast(SD, (Line((RESNET,), PACK),))
    assert cast.parts() == {RESNET: PACK}


def test_later_lines_hold():
    cast = Cast(SD, (Line((RESNET, TRANSFORMER), PACK),)).with_lines([Line((RESNET,), CUT)])
    assert cast.parts() == {RESNET: CUT, TRANSFORMER: PACK}
    assert cast.with_lines([Line((RESNET, TRANSFORMER), HOST)]).parts() == {}


def test_lines_count_while_their_window_is_active():
    cast = Cast(SD, (Line((RESNET,), PACK, EARLY), Line((RESNET,), OTHER, LATE), Line((TRANSFORMER,), CUT)))
    assert cast.windows == (EARLY, LATE, Window())
    assert cast.parts((EARLY, Window())) == {RESNET: PACK, TRANSFORMER: CUT}
    assert cast.parts((LATE, Window())) == {RESNET: OTHER, TRANSFORMER: CUT}
    assert cast.parts() == {TRANSFORMER: CUT}, "at every step, only this is so"


def test_order_counts_between_windows_too():
    cast = Cast(SD, (Line((RESNET,), PACK, EARLY), Line((RESNET,), OTHER)))
    assert cast.parts((EARLY, Window())) == {RESNET: OTHER}


def test_sources_are_the_packs_that_play():
    cast = Cast(SD, (Line((RESNET,), OTHER), Line((RESNET,), PACK, LATE), Line((TRANSFORMER,), CUT)))
    assert cast.sources == ("b", "a")


EXPERTS = Part("experts", "e")
WEAK = Part("experts", "e", 0.5)


def test_experts_join_whoever_plays():
    cast = Cast(SD, (Line((RESNET,), EXPERTS), Line((RESNET,), PACK)))
    assert cast.parts() == {RESNET: PACK} and cast.joining("experts") == {RESNET: EXPERTS}
    assert Cast(SD, (Line((RESNET,), EXPERTS),)).parts() == {}


def test_later_experts_hold_within_their_window():
    cast = Cast(SD, (Line((RESNET,), EXPERTS), Line((RESNET,), WEAK, LATE)))
    assert cast.joining("experts") == cast.joining("experts", (EARLY, Window())) == {RESNET: EXPERTS}
    assert cast.joining("experts", (LATE, Window())) == {RESNET: WEAK}


def test_cut_units_have_no_convolution_to_join():
    cast = Cast(SD, (Line((RESNET,), EXPERTS), Line((RESNET,), CUT, LATE)))
    assert (
        cast.joining("experts", (EARLY, Window())) == {RESNET: EXPERTS}
        and cast.joining("experts", (LATE, Window())) == {}
    )


def test_experts_of_a_packs_own_unit_join_no_other_player():
    own = (Line((RESNET,), PACK), Line((RESNET,), Part("experts", "a")))
    assert Cast(SD, own).joining("experts") == {RESNET: Part("experts", "a")}
    assert Cast(SD, (*own, Line((RESNET,), OTHER))).joining("experts") == {}
    assert Cast(SD, (Line((RESNET,), EXPERTS), *own, Line((RESNET,), OTHER))).joining("experts") == {RESNET: EXPERTS}


def test_composition_does_not_alter_what_is_composed():
    cast = Cast(SD)
    cast.with_lines([Line((RESNET,), PACK)])
    assert cast.parts() == {}
    assert hash(cast) == hash(Cast(SD))


@pytest.mark.parametrize(
    "start, end, message",
    [
        (0.5, 0.5, "must start before it ends"),
        (0.6, 0.5, "must start before it ends"),
        (-0.1, 1.0, "between 0 and 1"),
        (0.0, 1.1, "between 0 and 1"),
        (float("nan"), 1.0, "between 0 and 1"),
    ],
)
def test_windows_that_cannot_be(start, end, message):
    with pytest.raises(ValueError, match=message):
        Window(start, end)


def test_only_the_whole_run_is_whole():
    assert Window().whole and not EARLY.whole and not LATE.whole


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Line((), PACK), "at least one unit"),
        (lambda: Line((RESNET,), Part("guest")), "role must be one of"),
        (lambda: Cast(SD, (Line(("down.9.0.resnet",), CUT),)), "no unit 'down.9.0.resnet'"),
        (lambda: Cast(SD, (Line(("down.0.0.transformer.0",), CUT),)), "inside one"),
    ],
)
def test_lines_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fingerprint_tells_assignments_apart():
    parts = {RESNET: PACK, TRANSFORMER: CUT}
    same = {TRANSFORMER: CUT, RESNET: PACK}
    assert fingerprint(parts) == fingerprint(same)
    others = [{}, {RESNET: PACK}, {RESNET: OTHER, TRANSFORMER: CUT}, {RESNET: CUT, TRANSFORMER: CUT}]
    assert len({fingerprint(p) for p in [parts, *others]}) == 5
    assert fingerprint(parts) != fingerprint(parts, "1")
    assert fingerprint(parts).isidentifier() or fingerprint(parts).isalnum(), "it becomes part of a keyword"
