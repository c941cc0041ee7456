from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from hagmoe_hf.training.sampling import DomainBatchSampler


def sampler(sizes, batch_size=4, steps_done=0, drop_last=False, processes=1, accumulation=1, **changes):
    generator = torch.Generator()
    parts = [list(range(size)) for size in sizes]
    inner = [
        DefaultBatchSampler(
            RandomSampler(part, generator=generator), batch_size=batch_size, drop_last=drop_last, generator=generator
        )
        for part in parts
    ]
    settings = {"temperature": 1.0, "one_domain_batches": True, "mix_at": None, **changes}
    return DomainBatchSampler(
        ConcatDataset(parts),
        inner,
        generator,
        3,
        domains=[f"d{number}" for number in range(len(sizes))],
        steps_done=lambda: steps_done,
        batches_per_step=processes * accumulation,
        processes=processes,
        **settings,
    )


def domain_of(row, sizes):
    return int(np.searchsorted(np.cumsum(sizes), row, side="right"))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), batch_size=st.integers(1, 7), one_domain=st.booleans())
def test_in_proportion_every_row_comes_once(sizes, batch_size, one_domain):
    """Otherwise a user pays for data that is never used."""
    batches = list(sampler(sizes, batch_size, one_domain_batches=one_domain))
    assert sorted(row for batch in batches for row in batch) == list(range(sum(sizes)))
    assert len(batches) == len(sampler(sizes, batch_size, one_domain_batches=one_domain))
    assert max(map(len, batches)) <= batch_size
    if one_domain:
        assert all(len({domain_of(row, sizes) for row in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("one_domain", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_epoch_begins_the_same_way_whenever_it_is_reached(one_domain, temperature):
    """A resumed run starts in the middle: it must not replay the first epoch's order, nor make up a new one."""
    options = {"sizes": [40, 12], "one_domain_batches": one_domain, "temperature": temperature, "accumulation": 2}
    first = list(sampler(**options))
    steps_per_epoch = -(-len(first) // 2)
    second = list(sampler(**options, steps_done=steps_per_epoch))
    assert second != first
    assert list(sampler(**options, steps_done=steps_per_epoch + 3)) == second
    moved_on = sampler(**options, steps_done=steps_per_epoch)
    list(islice(moved_on, 3))
    assert list(moved_on) == second, "nothing may be left over from an iteration that was broken off"


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.1), (2.0, 0.25), (float("inf"), 0.5)])
@pytest.mark.parametrize("one_domain", [True, False])
def test_temperature_lifts_a_small_domain(temperature, share, one_domain):
    """n ** (1 / T): 1 to 9 rows becomes 1 to 3 at T = 2, and 1 to 1 without end."""
    sizes = [900, 100]
    batches = list(sampler(sizes, 1, temperature=temperature, one_domain_batches=one_domain))
    assert len(batches) == 1000
    drawn = [domain_of(row, sizes) for batch in batches for row in batch]
    assert abs(np.mean(drawn) - share) < 0.05
    small = [row for batch in batches for row in batch if row >= 900]
    assert set(small[:100]) == set(range(900, 1000)), "all rows of a domain come before one comes again"


@pytest.mark.parametrize("one_domain", [True, False])
def test_a_mix_holds_from_the_step_that_it_is_for(one_domain):
    """Steps, not batches: with accumulation and several processes a step takes several."""
    sizes, mixes = [80, 80, 80], {False: None, True: {"d2": 1.0, "d0": 0.0}}
    options = {"processes": 2, "accumulation": 2, "one_domain_batches": one_domain}
    batches = list(sampler(sizes, 4, mix_at=lambda step: mixes[step >= 5], **options))
    domains = [{domain_of(row, sizes) for row in batch} for batch in batches]
    assert all(found == {2} for found in domains[20:])
    assert set().union(*domains[:20]) == {0, 1, 2}


def test_two_processes_see_the_rows_of_one(tmp_path):
    """Else 2 x 4 rows would not be the same training as 8."""
    one = list(sampler([40, 24], 8, one_domain_batches=False, drop_last=True))
    two = list(sampler([40, 24], 4, one_domain_batches=False, drop_last=True, processes=2))
    assert [two[i] + two[i + 1] for i in range(0, len(two), 2)] == one


def test_what_cannot_be_drawn_is_refused():
    """With the names that can."""
    with pytest.raises(ValueError, match=r"temperature=0.5 is not possible; allowed: 1"):
        sampler([4], temperature=0.5)
    with pytest.raises(ValueError, match=r"mix names the domain 'x'; allowed: \['d0', 'd1'\]"):
        list(sampler([4, 4], mix_at=lambda step: {"x": 1.0}))
