from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfae_export.precision import covers
from qfae_export.search import dropped_singly, finer, merged, minimal, refine, stages

OPERATIONS = ("norm1", "qkv", "attention", "proj", "residual1", "norm2", "fc1", "fc2", "residual2")
UNITS = [
    *(f"{stage}.embed.{part}" for stage in ("encoder", "decoder") for part in ("product", "table", "prefix")),
    *(f"{stage}.{block}.{one}" for stage in ("encoder", "decoder") for block in range(1, 13) for one in OPERATIONS),
    *(f"qformer.1.cross.{one}" for one in ("kv1", "null", "q", "attention", "out")),
    "qformer.1.norm",
    "qformer.1.fc1",
    "decoder.head",
]
FEW_UNITS = [unit for unit in UNITS if unit.startswith(("encoder.embed", "encoder.1.", "decoder.2.", "qformer"))]
EVEN = dict.fromkeys(UNITS, 1.0)


class Asked:
    """A predicate on policies that counts the different ones, as trials are counted."""

    def __init__(self, holds: Callable[[frozenset[str]], bool], units: Sequence[str] = UNITS) -> None:
        self._holds, self._units = holds, units
        self.policies: set[frozenset[str]] = set()

    def __call__(self, kept: Sequence[str]) -> bool:
        policy = frozenset(unit for unit in self._units if any(covers(place, unit) for place in kept))
        self.policies.add(policy)
        return bool(policy) and (len(policy) == len(self._units) or self._holds(policy))


def needing(*units: str) -> Asked:
    return Asked(lambda policy: policy >= set(units))


def assert_minimal(kept: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> None:
    assert passes(kept)
    for place in kept:
        rest = [one for one in kept if one != place]
        assert not rest or not passes(rest), f"{place} is kept for nothing"


@pytest.mark.parametrize(
    "guilty",
    [
        ("encoder.7.fc1",),
        ("encoder.7.fc1", "encoder.7.fc2"),
        ("encoder.2.norm1", "decoder.11.residual2"),
        ("encoder.embed.table", "qformer.1.cross.kv1", "decoder.head"),
    ],
)
def test_finds_exactly_what_is_guilty_in_few_trials_though_nothing_hints_at_it(guilty: tuple[str, ...]) -> None:
    passes = needing(*guilty)
    found = refine(UNITS, EVEN, passes)
    assert set(found.kept) == set(guilty)
    assert len(passes.policies) < 30 * len(guilty) < len(UNITS)


def test_a_good_hint_makes_the_search_short() -> None:
    passes = needing("decoder.9.fc1", "decoder.9.fc2")
    found = refine(UNITS, EVEN | {"decoder.9.fc1": 1e6, "decoder.9.fc2": float("inf")}, passes)
    assert set(found.kept) == {"decoder.9.fc1", "decoder.9.fc2"}
    assert len(passes.policies) <= 8


def test_the_levels_are_stages_then_blocks_then_operations() -> None:
    found = refine(UNITS, EVEN, needing("decoder.9.fc1", "qformer.1.cross.q"))
    assert found.kept == ("decoder.9.fc1", "qformer.1.cross.q")
    assert found.coarser == (
        ("decoder.9.fc1", "qformer.1.cross"),
        ("decoder.9", "qformer.1"),
        ("decoder", "qformer"),
    )


def test_a_whole_block_goes_by_its_name_and_a_whole_stage_by_its() -> None:
    block = [f"encoder.3.{one}" for one in OPERATIONS]
    stage = [unit for unit in UNITS if unit.startswith("qformer.")]
    found = refine(UNITS, EVEN, needing(*block, *stage, "decoder.head"))
    assert set(found.kept) == {"qformer", "encoder.3", "decoder.head"}


def test_errors_that_add_up_leave_a_set_that_is_just_enough() -> None:
    rng = random.Random(5)
    errors = {unit: rng.random() ** 8 for unit in UNITS}
    passes = Asked(
        lambda policy: sum(errors[unit] for unit in UNITS if unit not in policy) < 0.3 * sum(errors.values())
    )
    found = refine(UNITS, errors, passes)
    assert_minimal(found.kept, passes)
    assert len(passes.policies) < 150


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_any_predicate_gets_a_minimal_answer(seed: int, share: float) -> None:
    """Keeping more may harm: verdicts are drawn by lot for every policy."""

    def drawn(policy: frozenset[str]) -> bool:
        return random.Random(f"{seed} {sorted(policy)}").random() < share

    passes = Asked(drawn, FEW_UNITS)
    likely = {unit: random.Random(f"{seed} {unit}").random() for unit in FEW_UNITS}
    assert_minimal(refine(FEW_UNITS, likely, passes).kept, passes)


@settings(deadline=None)
@given(st.sets(st.integers(0, 4), min_size=1), st.permutations(range(5)))
def test_of_few_candidates_the_smallest_set_is_found(needed: set[int], order: list[int]) -> None:
    candidates = [f"stage{number}" for number in order]
    assert set(minimal(candidates, lambda kept: {f"stage{n}" for n in needed} <= set(kept))) == {
        f"stage{number}" for number in needed
    }


def test_of_few_candidates_two_are_found_where_either_of_two_cures() -> None:
    # Either a alone fails, so do b and c; a with b cures, and so does all but a.
    enough = [{"a", "b"}, {"b", "c", "d"}]
    found = minimal(["d", "c", "b", "a"], lambda kept: any(one <= set(kept) for one in enough))
    assert set(found) == {"a", "b"}


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, unique=True), st.data())
def test_single_drops_leave_what_is_needed(all_of: list[int], data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.sampled_from(all_of), min_size=1))
    found = dropped_singly([str(one) for one in all_of], lambda kept: needed <= {int(one) for one in kept})
    assert {int(one) for one in found} == needed


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(UNITS), min_size=1))
def test_merging_names_the_same_units_by_no_more_places(chosen: set[str]) -> None:
    places = merged(sorted(chosen), UNITS)
    assert {unit for unit in UNITS if any(covers(place, unit) for place in places)} == chosen
    assert len(places) <= len(chosen)


def test_finer_goes_one_step_down_and_leaves_operations() -> None:
    assert finer(["qformer"], UNITS) == ("qformer.1",)
    assert finer(["qformer.1", "decoder.head"], UNITS) == (
        "qformer.1.cross",
        "qformer.1.norm",
        "qformer.1.fc1",
        "decoder.head",
    )
    assert stages(UNITS) == ("encoder", "decoder", "qformer")
