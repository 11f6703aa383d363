"""Parts of copying."""

from hypothesis import given
from hypothesis import strategies as st

from qcowlib.operations.copying import nonzero_blocks


@given(
    st.lists(st.sampled_from([0, 0, 0, 1, 2, 255]), min_size=0, max_size=300),
    st.sampled_from([1, 2, 8, 64]),
)
def test_blocks_that_are_not_zero(data: list[int], block: int) -> None:
    expected = [any(data[at : at + block]) for at in range(0, len(data), block)]
    assert nonzero_blocks(memoryview(bytes(data)), block).tolist() == expected
