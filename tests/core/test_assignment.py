"""Who plays a unit at a step, and how casts compose."""

import pytest

from asdm_core.assignment import CHECKPOINT, Assignment, Override, Provider, Window, fingerprint
from tests.core.narrow import SD

PACK = Provider("pack", "a")
OTHER = Provider("pack", "b")
CUT = Provider("cut")
EARLY, LATE = Window(0.0, 0.4), Window(0.4, 1.0)
RESNET, TRANSFORMER = "down.0.0.resnet", "down.0.0.transformer"


def test_whom_no_line_names_the_host_plays():
    assert Assignment(SD).providers() == {}
    assignment = Assignment(SD, (Override((RESNET,), PACK),))
    assert assignment.providers() == {RESNET: PACK}


def test_later_lines_hold():
    assignment = Assignment(SD, (Override((RESNET, TRANSFORMER), PACK),)).with_overrides([Override((RESNET,), CUT)])
    assert assignment.providers() == {RESNET: CUT, TRANSFORMER: PACK}
    assert assignment.with_overrides([Override((RESNET, TRANSFORMER), CHECKPOINT)]).providers() == {}


def test_lines_count_while_their_window_is_active():
    assignment = Assignment(
        SD, (Override((RESNET,), PACK, EARLY), Override((RESNET,), OTHER, LATE), Override((TRANSFORMER,), CUT))
    )
    assert assignment.windows == (EARLY, LATE, Window())
    assert assignment.providers((EARLY, Window())) == {RESNET: PACK, TRANSFORMER: CUT}
    assert assignment.providers((LATE, Window())) == {RESNET: OTHER, TRANSFORMER: CUT}
    assert assignment.providers() == {TRANSFORMER: CUT}, "at every step, only this is so"


def test_order_counts_between_windows_too():
    assignment = Assignment(SD, (Override((RESNET,), PACK, EARLY), Override((RESNET,), OTHER)))
    assert assignment.providers((EARLY, Window())) == {RESNET: OTHER}


EXPERTS = Provider("experts", "e")
WEAK = Provider("experts", "e", 0.5)


def test_experts_join_whoever_plays():
    assignment = Assignment(SD, (Override((RESNET,), EXPERTS), Override((RESNET,), PACK)))
    assert assignment.providers() == {RESNET: PACK} and assignment.joining("experts") == {RESNET: EXPERTS}
    assert Assignment(SD, (Override((RESNET,), EXPERTS),)).providers() == {}


def test_later_experts_hold_within_their_window():
    assignment = Assignment(SD, (Override((RESNET,), EXPERTS), Override((RESNET,), WEAK, LATE)))
    assert assignment.joining("experts") == assignment.joining("experts", (EARLY, Window())) == {RESNET: EXPERTS}
    assert assignment.joining("experts", (LATE, Window())) == {RESNET: WEAK}


def test_cut_units_have_no_convolution_to_join():
    assignment = Assignment(SD, (Override((RESNET,), EXPERTS), Override((RESNET,), CUT, LATE)))
    assert (
        assignment.joining("experts", (EARLY, Window())) == {RESNET: EXPERTS}
        and assignment.joining("experts", (LATE, Window())) == {}
    )


def test_experts_of_a_packs_own_unit_join_no_other_player():
    own = (Override((RESNET,), PACK), Override((RESNET,), Provider("experts", "a")))
    assert Assignment(SD, own).joining("experts") == {RESNET: Provider("experts", "a")}
    assert Assignment(SD, (*own, Override((RESNET,), OTHER))).joining("experts") == {}
    assert Assignment(SD, (Override((RESNET,), EXPERTS), *own, Override((RESNET,), OTHER))).joining("experts") == {
        RESNET: EXPERTS
    }


def test_composition_does_not_alter_what_is_composed():
    assignment = Assignment(SD)
    assignment.with_overrides([Override((RESNET,), PACK)])
    assert assignment.providers() == {}
    assert hash(assignment) == hash(Assignment(SD))


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
        (lambda: Override((), PACK), "at least one unit"),
        (lambda: Override((RESNET,), Provider("guest")), "role must be one of"),
        (lambda: Assignment(SD, (Override(("down.9.0.resnet",), CUT),)), "no unit 'down.9.0.resnet'"),
        (lambda: Assignment(SD, (Override(("down.0.0.transformer.0",), CUT),)), "inside one"),
    ],
)
def test_lines_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fingerprint_tells_assignments_apart():
    providers = {RESNET: PACK, TRANSFORMER: CUT}
    same = {TRANSFORMER: CUT, RESNET: PACK}
    assert fingerprint(providers) == fingerprint(same)
    others = [{}, {RESNET: PACK}, {RESNET: OTHER, TRANSFORMER: CUT}, {RESNET: CUT, TRANSFORMER: CUT}]
    assert len({fingerprint(p) for p in [providers, *others]}) == 5
    assert fingerprint(providers) != fingerprint(providers, "1")
    assert fingerprint(providers).isidentifier() or fingerprint(providers).isalnum(), "it becomes part of a keyword"
