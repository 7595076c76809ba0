import math

import pytest

from pargs_jax.evaluation.statistics import Estimate


def test_a_mean_and_its_standard_error():
    mean, error = Estimate.of([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(10 / 3 / 4))
    assert str(Estimate(1.234, 0.056)) == "1.23 ± 0.06"


def test_one_value_has_no_standard_error_and_none_have_no_mean():
    assert math.isnan(Estimate.of([2.0]).standard_error)
    with pytest.raises(ValueError, match="no values"):
        Estimate.of([])
