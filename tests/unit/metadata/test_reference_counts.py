"""Counters by host cluster against a plain dictionary."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.errors import ImageStateError
from qcowlib.metadata.reference_counts import MIN_CHUNK_BITS, ReferenceCounts

CHUNK = 1 << MIN_CHUNK_BITS

places = st.one_of(st.integers(0, 300), st.integers(CHUNK - 200, CHUNK + 200), st.integers(0, 40 * CHUNK))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("run"), places, st.integers(0, 500), st.integers(1, 300)),
        st.tuples(st.just("many"), st.lists(places, max_size=60), st.just(0), st.integers(1, 70000)),
    ),
    max_size=8,
)


@given(steps)
def test_counts_are_those_of_a_dictionary(program: list[tuple[str, object, int, int]]) -> None:
    counts = ReferenceCounts()
    model: Counter[int] = Counter()
    for kind, where, length, times in program:
        if kind == "run":
            assert isinstance(where, int)
            counts.add_run(where, where + length, times)
            model.update(dict.fromkeys(range(where, where + length), times))
        else:
            assert isinstance(where, list)
            counts.add(np.array(where, dtype=np.int64), times)
            for cluster in where:
                model[cluster] += times
    asked = sorted({*model, *(cluster + 1 for cluster in model), 7 * CHUNK})
    assert counts.at(np.array(asked, dtype=np.int64)).tolist() == [model[cluster] for cluster in asked]
    for limit in (0, 1, 255, 65535):
        clusters, found = counts.above(limit)
        assert dict(zip(clusters.tolist(), found.tolist(), strict=True)) == {
            cluster: count for cluster, count in model.items() if count > limit
        }
    assert counts.chunks() == sorted({cluster // CHUNK for cluster, count in model.items() if count})


def test_counters_widen_where_they_must_and_only_there() -> None:
    counts = ReferenceCounts()
    for place, times in ((0, 255), (CHUNK, 256), (2 * CHUNK, 1 << 16), (3 * CHUNK, 1 << 32)):
        counts.add_run(place, place + 2, times)
    widths = [chunk.dtype.itemsize for index in range(4) if (chunk := counts.chunk(index)) is not None]
    assert widths == [1, 2, 4, 8]
    assert counts.at(np.array([0, 1, 2, CHUNK, 2 * CHUNK + 1, 3 * CHUNK], dtype=np.int64)).tolist() == [
        255,
        255,
        0,
        256,
        1 << 16,
        1 << 32,
    ]
    counts.add(np.array([1, 1, 1], dtype=np.int64))
    assert counts.at(np.array([0, 1], dtype=np.int64)).tolist() == [255, 258]


def test_an_estimate_that_is_too_high_does_not_widen() -> None:
    counts = ReferenceCounts()
    for place in range(300):
        counts.add_run(place, place + 1)
    chunk = counts.chunk(0)
    assert chunk is not None
    assert chunk.dtype == np.uint8
    assert chunk.max() == 1


def test_a_run_may_be_taken_back() -> None:
    counts = ReferenceCounts()
    counts.add_run(CHUNK - 2, CHUNK + 3, 2)
    counts.remove_run(CHUNK - 1, CHUNK + 1)
    clusters = np.arange(CHUNK - 3, CHUNK + 4, dtype=np.int64)
    assert counts.at(clusters).tolist() == [0, 2, 1, 1, 2, 2, 0]


def test_the_budget_is_kept() -> None:
    counts = ReferenceCounts(budget=2 * CHUNK)
    counts.add_run(0, 1)
    counts.add_run(5 * CHUNK, 5 * CHUNK + 1)
    with pytest.raises(ImageStateError, match="too much memory"):
        counts.add_run(9 * CHUNK, 9 * CHUNK + 1)


def test_a_chunk_holds_a_whole_refcount_block() -> None:
    assert ReferenceCounts(refcount_block_bits=24).chunk_size == 1 << 24
    assert ReferenceCounts(refcount_block_bits=6).chunk_size == CHUNK
