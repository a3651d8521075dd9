"""Search of class weights: exact, from an index, and the step at which a new index answers."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.retrieval import class_index
from dist_dml.retrieval.class_index import ClassIndex, ExactClassIndex, build_class_index

C, D = 4000, 16


def clustered(seed: int, num_classes: int = C) -> Tensor:
    """Weights of different lengths in clusters of about 10."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes // 10, D, generator=generator)
    chosen = torch.randint(len(centres), (num_classes,), generator=generator)
    weight = centres[chosen] + 0.3 * torch.randn(num_classes, D, generator=generator)
    return weight * (0.5 + torch.rand(num_classes, 1, generator=generator))


def dense(weight: Tensor, vectors: Tensor, cosine: bool) -> Tensor:
    """All scores in float64."""
    weight, vectors = weight.double(), vectors.double()
    if cosine:
        weight, vectors = F.normalize(weight, dim=1), F.normalize(vectors, dim=1)
    return vectors @ weight.T


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_search_equals_sorting_all_scores(
    cosine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_index, "_TILE_SCORES", 9 * 700)  # Tiles that do not divide C.
    weight, vectors = clustered(1).to(dtype), torch.randn(9, D)
    scores, ids = ExactClassIndex(weight, cosine).search(vectors, 20)
    expected = dense(weight, vectors, cosine).topk(20, dim=1)
    torch.testing.assert_close(scores.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, expected.indices)


def test_the_exact_search_sees_weights_as_they_are() -> None:
    weight = clustered(1)
    index = ExactClassIndex(weight, True)
    with torch.no_grad():
        weight.copy_(clustered(2))
    index.advance(1, weight)
    assert index.search(weight[:5], 1)[1].flatten().tolist() == [0, 1, 2, 3, 4]
    index.close()


def test_fewer_classes_than_neighbours_leave_places_empty() -> None:
    weight = clustered(1)[:45].contiguous()
    for index in (ExactClassIndex(weight, True), ClassIndex(weight, True, 10)):
        scores, ids = index.search(weight[:2], 60)
        assert (ids[:, 45:] == -1).all()
        assert (scores[:, 45:] == -math.inf).all()
        assert ids[:, :45].sort(dim=1).values.tolist() == [list(range(45))] * 2
        index.close()


@pytest.mark.parametrize("cosine", [True, False])
def test_an_index_of_all_lists_is_exact_up_to_eight_bits(cosine: bool) -> None:
    weight, vectors = clustered(1), clustered(3)[:50]
    index = ClassIndex(weight, cosine, 10, num_probes=C)
    scores, ids = index.search(vectors, 10)
    every = dense(weight, vectors, cosine)
    # A number is off by at most 2^-8 of its feature's range, which is about 2 for cosines.
    length = 1.0 if cosine else float(vectors.norm(dim=1).max())
    reach = float((F.normalize(weight, dim=1) if cosine else weight).abs().max())
    allowed = 2 * reach * 2**-8 * math.sqrt(D) * length
    torch.testing.assert_close(scores.double(), every.gather(1, ids), rtol=0, atol=allowed)
    best = every.topk(10, dim=1).values
    assert (scores.double() - best).abs().max() < allowed
    assert (scores.diff(dim=1) <= 0).all()
    index.close()


def test_some_lists_find_most_neighbours_of_clustered_weights() -> None:
    weight = clustered(1)
    index = ClassIndex(weight, True, 10, num_probes=8)
    _, ids = index.search(weight[:200], 5)
    best = dense(weight, weight[:200], True).topk(5, dim=1).indices
    share = (ids[:, :, None] == best[:, None, :]).any(1).double().mean()
    assert share > 0.9
    index.close()


def answers(index: ClassIndex, weight: Tensor, steps: range, pause: float = 0.0) -> list[Tensor]:
    """What each step finds; the weights become others at every step, in place."""
    found = []
    for step in steps:
        with torch.no_grad():
            weight.copy_(clustered(step))
        index.advance(step, weight)
        found.append(index.search(clustered(1000)[:8], 5)[1])
        with torch.no_grad():
            weight.zero_()  # Whoever reads the weights later than ordered finds nothing.
        time.sleep(pause)
    return found


def built_of(step: int) -> Tensor:
    """What an index of the weights of `step` finds."""
    index = ClassIndex(clustered(step), True, 10)
    found = index.search(clustered(1000)[:8], 5)[1]
    index.close()
    return found


def test_a_new_index_answers_from_a_fixed_step_on() -> None:
    # Orders at 3 (the start), 4, 8 and 12; handed over 2 steps later.
    weight = clustered(3)
    index = ClassIndex(weight, True, rebuild_steps=4, step=3)
    found = answers(index, weight, range(3, 14))
    index.close()
    expected = [3] * 3 + [4] * 4 + [8] * 4
    for step, (ids, source) in enumerate(zip(found, expected, strict=True), start=3):
        assert torch.equal(ids, built_of(source)), f"step {step} was not answered by {source}"
    assert not torch.equal(built_of(3), built_of(4))


def test_the_answers_do_not_depend_on_how_fast_a_build_is() -> None:
    runs = []
    for pause in (0.0, 0.05):
        weight = clustered(0)
        index = ClassIndex(weight, True, rebuild_steps=3)
        runs.append(answers(index, weight, range(8), pause))
        index.close()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_step_may_rebuild() -> None:
    weight = clustered(0)
    index = ClassIndex(weight, True, rebuild_steps=1)
    found = answers(index, weight, range(1, 4))
    index.close()
    for ids, source in zip(found, (0, 1, 2), strict=True):
        assert torch.equal(ids, built_of(source))


def test_the_old_index_serves_while_a_build_runs() -> None:
    weight = clustered(0, 60_000)
    queries = weight[:4].clone()
    index = ClassIndex(weight, True, rebuild_steps=100)
    before = index.search(queries, 5)[1]
    index.advance(100, clustered(1, 60_000))
    building = index._pending
    assert building is not None
    searches = 0
    while not building.done():
        assert torch.equal(index.search(queries, 5)[1], before)
        searches += 1
    assert searches > 3  # A build that held Python's lock would let one through at most.
    index.advance(149, weight)
    assert torch.equal(index.search(queries, 5)[1], before)
    index.advance(150, weight)
    assert not torch.equal(index.search(queries, 5)[1], before)
    index.close()


def test_a_failed_build_is_raised_at_the_hand_over() -> None:
    weight = clustered(0)
    index = ClassIndex(weight, False, rebuild_steps=2)
    index.advance(2, torch.full_like(weight, math.nan))
    with pytest.raises(RuntimeError, match="NaN"):
        index.advance(3, weight)
    index.close()


def test_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    index = ClassIndex(clustered(0), True, rebuild_steps=2)
    index.advance(2, clustered(1))
    (own,) = set(threading.enumerate()) - before
    assert own.name.startswith("class-index")
    index.close()
    assert not own.is_alive()


def test_few_classes_are_searched_exactly_and_many_by_an_index() -> None:
    few, many = clustered(0), torch.randn(class_index.EXACT_CLASSES["cpu"] + 1, 2)
    assert isinstance(build_class_index(few, True, 10, 0), ExactClassIndex)
    index = build_class_index(many, True, 10, 0)
    assert isinstance(index, ClassIndex)
    index.close()
    with pytest.raises(UsageError, match="rebuild_steps"):
        ClassIndex(few, True, 0)
