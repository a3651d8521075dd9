"""All scores where values are equal: duplicates, grids, collapsed embeddings."""

import pytest
from full_score_cases import TIES, twin_scores

from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.full_scores import ScoreOptions, score_everything

PLAIN = ScoreOptions(recall_at=(1, 2, 4), verification=False, resamples=0)


@pytest.mark.parametrize("name", ["cosine", "l2"])
@pytest.mark.parametrize("case", TIES)
def test_ties_are_in_the_order_of_the_ids(case: str, name: str) -> None:
    queries, gallery = TIES[case]
    found = score_everything(queries, gallery, DISTANCES[name], PLAIN).scores
    for score, value in twin_scores(queries, gallery, name).items():
        assert found[score] == pytest.approx(value, abs=1e-12), score
