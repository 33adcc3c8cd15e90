import pytest

from pipeline.training.metrics import accuracy, macro_f1


def test_accuracy():
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_macro_f1_by_hand():
    # class 0: precision 1/2, recall 1 → 2/3; class 1: 1/1, 1/2 → 2/3; class 2 never occurs → 0
    assert macro_f1([0, 0, 1], [0, 1, 1], 3) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
