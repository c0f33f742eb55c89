"""Seeds by purpose: valid, repeatable, and different for every purpose and index."""

from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.training.seeds import seed_for

SEEDS = st.integers(0, 2**63 - 1)
NAMES = ("step", "lora", "adapter", "combiner", "generator", "context", "contrast", "class picture", "augmentation")


@given(seed=SEEDS, name=st.sampled_from(NAMES), index=st.integers(0, 10**10))
def test_a_seed_is_valid_and_repeats(seed, name, index):
    assert 0 <= seed_for(seed, name, index) < 2**63
    assert seed_for(seed, name, index) == seed_for(seed, name, index)


@given(seed=SEEDS, index=st.integers(0, 10**10))
def test_purposes_indices_and_seeds_differ(seed, index):
    drawn = [seed_for(seed, name, index) for name in NAMES]
    drawn += [seed_for(seed, "step", index + 1), seed_for((seed + 1) % 2**63, "step", index)]
    assert len(set(drawn)) == len(drawn)


def test_a_seed_is_the_same_on_every_machine_and_in_every_version():
    """Written down once: a checkpoint that goes on elsewhere must meet the same numbers."""
    assert seed_for(7, "step", 3) == 1064330164574334273
