import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_asr.score.language_id import LanguageId, calibration_error, language_id
from mole_asr.score.pairs import UNKNOWN_LANGUAGE, Pair


def pair(heard: str | None, reliability: float | None) -> Pair:
    return Pair("a", "", "", "en", hypothesis_language=heard, reliability=reliability)


def test_accuracy_and_mean_reliability() -> None:
    found = language_id([pair("en", 0.9), pair("en", 0.7), pair("fr", 0.2), pair("", 0.0), pair(None, None)])
    assert found.language_id_accuracy == 50
    assert found.reliability_right == pytest.approx(0.8)
    assert found.reliability_wrong == pytest.approx(0.1)


def test_hypotheses_that_do_not_tell() -> None:
    found = language_id([pair(None, None)])
    assert found.language_id_accuracy is found.ece is found.reliability_right is None
    assert language_id([pair("en", None)]).language_id_accuracy == 100


def test_references_that_name_no_language_have_no_right_answer() -> None:
    told = Pair("a", "", "", UNKNOWN_LANGUAGE, hypothesis_language="de", reliability=0.9)
    assert language_id([told]) == LanguageId()


def test_calibration_error_by_hand() -> None:
    # Bin 0.9-1.0: accuracy 1/2, mean 0.95; bin 0.2-0.3: accuracy 0, mean 0.25; weights 2/3 and 1/3.
    error = calibration_error(np.array([0.9, 1.0, 0.25]), np.array([True, False, False]))
    assert error == pytest.approx((2 * 0.45 + 0.25) / 3)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_calibration_error_agrees_with_the_definition(points: list[tuple[float, bool]]) -> None:
    reliability, right = (np.array(column) for column in zip(*points, strict=True))
    expected = 0.0
    for index in range(10):
        inside = (reliability * 10).astype(int).clip(max=9) == index
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - reliability[inside].mean())
    assert calibration_error(reliability, right) == pytest.approx(expected)
