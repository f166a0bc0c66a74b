"""How benchmarks weigh time against quality."""

import pytest

from bench._common import at_saving, upper_edge


def test_the_upper_edge_has_what_no_other_point_beats_in_both():
    points = [(0.1, 50), (0.2, 40), (0.15, 30), (0.4, 20), (0.4, 10), (0.3, 25)]
    assert upper_edge(points) == [(0.1, 50), (0.2, 40), (0.3, 25), (0.4, 20)]


def test_quality_at_a_saving_is_read_between_points_and_never_beyond():
    points = [(0.2, 40.0), (0.4, 20.0)]
    assert at_saving(points, 0.3) == pytest.approx(30)
    assert at_saving(points, 0.1) == 40
    assert at_saving(points, 0.5) is None
