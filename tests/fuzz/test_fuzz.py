"""A fixed number of cases of each target: about a minute. `make fuzz` runs as many as one likes."""

import pytest

from sparsekern._load import _C

from .campaign import campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_C is None, reason="what may crash is compiled"),
]
CASES = {"calls": 8000, "files": 400, "plans": 1500}


@pytest.mark.parametrize("target", CASES)
def test_random_bad_input(target):
    outcome = campaign(target, seed=0, cases=CASES[target])
    assert outcome.findings == []
    assert outcome.cases == CASES[target]
