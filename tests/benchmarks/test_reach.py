"""benchmarks/reach.py: what it measures, on the embedded world; nothing is sampled."""

import dataclasses

import pytest

import aegis_jax
from benchmarks import reach, study


@pytest.mark.slow
def test_a_form_goes_some_of_the_way_and_to_the_concept_itself_none():
    pipeline, run = aegis_jax.load_pipeline("world"), study.settings(study.closed(["uce"], ["star"])[0])
    way, others = reach.reach(pipeline, run)
    assert 0 < way and 0 < others
    exact = dataclasses.replace(run.erase, tokens="all", lamb=1e-6, guide=("star",))
    assert reach.reach(pipeline, dataclasses.replace(run, erase=exact)) == (0.0, 0.0)  # to itself
