"""Views are checked by running them: pieces copied with numpy must equal numpy doing the same operation."""

import numpy as np
import pytest
from support.views import run

from dist_export.errors import ExportError
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Piece, Slab, View, concatenate, stack

A, B = Slab("a"), Slab("b", (3,))
SOURCES = {A: np.arange(1, 25).reshape(6, 4), B: np.arange(101, 125).reshape(6, 4)}
VIEW_A, VIEW_B = View.of(A, (6, 4)), View.of(B, (6, 4))


def test_narrow_gather_pad_and_concatenate_equal_numpy():
    a, b = SOURCES[A], SOURCES[B]
    assert (run(VIEW_A.narrow(0, 1, 3), SOURCES) == a[1:4]).all()
    assert (run(VIEW_A.narrow(1, 2, 2).narrow(0, 4, 2), SOURCES) == a[4:6, 2:4]).all()
    assert (run(VIEW_A.gather(0, [(4, 2), (0, 2)]), SOURCES) == np.concatenate([a[4:], a[:2]])).all()
    assert (run(concatenate([VIEW_A, VIEW_B], 1), SOURCES) == np.concatenate([a, b], 1)).all()
    padded = run(VIEW_A.pad(0, 8).narrow(0, 5, 3), SOURCES)
    assert (padded == np.concatenate([a[5:], np.zeros((2, 4), int)])).all()


def test_stacked_views_can_be_cut_again():
    both = stack([VIEW_A.narrow(0, 0, 4), VIEW_B.narrow(0, 2, 4)])
    expected = np.stack([SOURCES[A][:4], SOURCES[B][2:]])
    assert both.shape == (2, 4, 4)
    assert (run(both, SOURCES) == expected).all()
    assert (run(both.narrow(1, 1, 2).narrow(2, 3, 1), SOURCES) == expected[:, 1:3, 3:4]).all()
    with pytest.raises(ExportError, match=r"cannot stack shapes \[6, 4\] and \[5, 4\]"):
        stack([VIEW_A, VIEW_B.narrow(0, 1, 5)])


def test_neighbouring_pieces_become_one():
    halves = concatenate([VIEW_A.narrow(0, 0, 3), VIEW_A.narrow(0, 3, 3)], 0)
    assert halves.pieces == VIEW_A.pieces
    swapped = concatenate([VIEW_A.narrow(0, 3, 3), VIEW_A.narrow(0, 0, 3)], 0)
    assert len(swapped.pieces) == 2


def test_scalars_pass():
    view = View.of(Slab("s"), ())
    assert view.pieces == (Piece(Box((), ()), Slab("s"), ()),)
    assert view.faults() == []


def test_misfits_are_refused_with_the_numbers():
    with pytest.raises(ExportError, match="cannot take 4:8 of dim 0"):
        VIEW_A.narrow(0, 4, 4)
    with pytest.raises(ExportError, match=r"cannot join shapes \[6, 4\] and \[6, 2\] along dim 0"):
        concatenate([VIEW_A, VIEW_A.narrow(1, 0, 2)], 0)
