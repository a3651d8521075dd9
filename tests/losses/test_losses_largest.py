"""The few largest entries of a row, by way of groups, against PyTorch's topk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.losses.largest import largest_entries


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    columns=st.integers(1, 4000),
    count=st.integers(1, 40),
    rows=st.integers(1, 4),
    ties=st.booleans(),
    hidden=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_they_are_topks_values_at_their_own_columns(
    columns: int, count: int, rows: int, ties: bool, hidden: int, seed: int
) -> None:
    tile = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    tile = tile.round() if ties else tile
    tile[:, :hidden] = float("-inf")
    values, places = largest_entries(tile, count)
    kept = min(count, columns)
    wanted = torch.full((rows, count), float("-inf"))
    wanted[:, :kept] = tile.topk(kept, dim=1).values
    assert torch.equal(values, wanted)
    assert torch.equal(tile.gather(1, places[:, :kept]), values[:, :kept])
    # Columns are different ones, so that hiding them hides as many entries.
    assert all(len(row.unique()) == kept for row in places[:, :kept])
    assert ((places >= 0) & (places < columns)).all()


@pytest.mark.parametrize("columns", [16 * 129, 16 * 129 + 15, 16 * 200])
def test_the_largest_may_all_lie_in_one_group_or_in_the_rest(columns: int) -> None:
    # Groups are strided: columns 0, n, 2n ... of n groups are one.
    num_groups = columns // 16
    for special in (torch.arange(16) * num_groups, torch.arange(columns - 16, columns)):
        tile = torch.zeros(2, columns)
        tile[:, special] = torch.arange(1.0, 17)
        values, places = largest_entries(tile, 32)
        assert values[0, :16].tolist() == list(range(16, 0, -1))
        assert torch.equal(places[0, :16], special.flip(0))
