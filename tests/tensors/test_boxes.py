import pytest

from dist_export.tensors.boxes import Box, first_overlap, partition_faults, row_major_strides, uncovered_elements


def test_intersection_is_the_common_region_or_none():
    assert Box((0, 0), (4, 4)).intersection(Box((2, 3), (9, 9))) == Box((2, 3), (2, 1))
    assert Box((0, 0), (4, 4)).intersection(Box((4, 0), (1, 4))) is None
    assert Box((), ()).intersection(Box((), ())) == Box((), ())


def test_row_major_strides():
    assert row_major_strides((2, 3, 4)) == (12, 4, 1)
    assert row_major_strides(()) == ()


@pytest.mark.parametrize(
    "boxes, shape, fault",
    [
        pytest.param([Box((0, 0), (2, 4)), Box((2, 0), (2, 4))], (4, 4), None, id="two halves"),
        pytest.param([Box((0,), (3,))], (4,), "1 of 4 elements are not covered", id="gap"),
        pytest.param([Box((0,), (3,)), Box((2,), (2,))], (4,), "overlap", id="overlap"),
        pytest.param([Box((0,), (4,)), Box((0,), (4,))], (4,), "overlap", id="duplicate"),
        pytest.param([Box((0,), (5,))], (4,), "outside", id="outside"),
        pytest.param([Box((), ())], (), None, id="scalar"),
        pytest.param([Box((), ()), Box((), ())], (), "overlap", id="scalar twice"),
        pytest.param([], (0, 4), None, id="empty tensor"),
    ],
)
def test_partition_faults(boxes, shape, fault):
    faults = partition_faults(boxes, shape)
    assert (faults == []) if fault is None else fault in faults[0]


def test_overlap_is_found_between_boxes_whose_rows_merely_touch():
    assert first_overlap([Box((0, 0), (2, 2)), Box((1, 1), (2, 2)), Box((3, 0), (1, 1))]) is not None
    assert first_overlap([Box((0, 0), (2, 2)), Box((2, 0), (2, 2)), Box((0, 2), (4, 2))]) is None


def test_uncovered_elements_counts_overlaps_once():
    assert uncovered_elements([Box((0, 0), (2, 4)), Box((1, 0), (2, 4))], (4, 4)) == 4
    assert uncovered_elements([], (3,)) == 3
    assert uncovered_elements([Box((), ())], ()) == 0
