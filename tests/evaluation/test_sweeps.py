"""The combinations of options that a sweep decodes."""

import pytest

from pargs_jax.config import DecodeConfig
from pargs_jax.errors import InputError
from pargs_jax.evaluation.sweeps import settings

BASE = {"method": "pargs", "rm": ["runs/a", "runs/b"], "limit": 3}
RMS = ("runs/a", "runs/b")


def test_every_combination_on_top_of_the_base():
    found = settings(["weight=0.5,1 2", "k=5,10"], BASE)
    assert [each.name for each in found] == [
        "pargs weight=0.5 k=5", "pargs weight=0.5 k=10", "pargs weight=1 2 k=5", "pargs weight=1 2 k=10",
    ]  # fmt: skip
    assert found[2].config == DecodeConfig(method="pargs", rm=RMS, limit=3, weight=(1.0, 2.0), k=5)
    assert found[2].file == "pargs_weight=1_2_k=5.jsonl"


def test_options_that_do_not_apply_to_a_method_give_no_duplicates():
    base = BASE | {"weight": 3, "temperature": 0.5}
    found = settings(["method=greedy,top_k,pargs_greedy", "weight=1,2", "max-new-tokens=8"], base)
    assert [each.name for each in found] == ["greedy", "top_k", "pargs_greedy weight=1", "pargs_greedy weight=2"]
    assert found[0].config == DecodeConfig(method="greedy", rm=RMS, limit=3, max_new_tokens=8)
    assert found[1].config.temperature == 0.5 and found[1].config.weight == ()
    assert found[3].file == "pargs_greedy_weight=2_max_new_tokens=8.jsonl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weight"], "must be NAME=VALUE"),
        (["weight=1,,2"], "must be NAME=VALUE"),
        (["wieght=1"], "'wieght' cannot be swept"),
        (["out=a,b"], "'out' cannot be swept"),
        (["k=1", "k=2"], "k is given twice"),
        (["k=many"], 'sweep: k: got "many", must be a whole number'),
        (["method=parg"], 'sweep: method: got "parg", must be one of'),
        (["weight=1 2 3"], "3 weights for 2 reward models"),
        (["rm=runs/a,runs:a", "weight=1"], "two settings would be written to"),
    ],
)
def test_combinations_that_cannot_be_decoded_are_refused(words, message):
    with pytest.raises(InputError) as refused:
        settings(words, BASE)
    assert message in str(refused.value)


def test_a_sweep_needs_a_method():
    with pytest.raises(InputError, match="sweep: needs a method"):
        settings(["k=1,2"], {})
