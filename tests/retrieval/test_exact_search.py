"""All backends give one answer, to the bit: that of the definition, ties by id."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from dist_dml.errors import UsageError
from dist_dml.parallel.native_calls import native_address, native_call
from dist_dml.retrieval.candidate_search import CandidateSearch, TorchScores
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.exact_values import pair_values
from dist_dml.retrieval.faiss_scores import FaissScores
from dist_dml.retrieval.gallery_search import GallerySearch, SearchSettings, open_gallery
from dist_dml.retrieval.native_neighbours import NativeSearch, native_library
from dist_dml.retrieval.neighbours import exact_neighbours
from dist_dml.retrieval.score_bounds import ScoreProblem

KINDS = ("bfloat16", "float32", "parts", "torch", "torch_parts", "faiss", "faiss_limited")
MEBIBYTE = 2**20


def library() -> ctypes.CDLL:
    found = native_library()
    assert not isinstance(found, str), found
    return found


def search_of(kind: str, gallery: np.ndarray, ids: np.ndarray, squares: bool) -> GallerySearch:
    if kind in ("bfloat16", "float32"):
        return NativeSearch(library(), gallery, ids, squares, 64 * MEBIBYTE, kind)
    if kind == "parts":
        search = NativeSearch(library(), gallery, ids, squares, 4096)
        assert search.in_parts or len(gallery) <= 256
        return search
    if kind == "torch_parts":
        problem = problem_of(gallery, ids, squares)
        return CandidateSearch(problem, TorchScores(problem, 4096), 2**18)
    if kind == "faiss_limited":
        problem = problem_of(gallery, ids, squares)
        return CandidateSearch(problem, FaissScores(problem, largest_k=70), MEBIBYTE)
    return open_gallery(gallery, ids, squares, SearchSettings(kind))


def problem_of(gallery: np.ndarray, ids: np.ndarray, squares: bool) -> ScoreProblem:
    rows, numbers = torch.from_numpy(gallery), torch.from_numpy(ids)
    return ScoreProblem.of(rows, numbers, squares, torch.float32)


def brute_force(queries, gallery, query_ids, ids, k, squares):
    """By sorting (value, id) of whole rows; exact for vectors of small integers."""
    a, b = queries.astype(np.float64), gallery.astype(np.float64)
    values = ((a[:, None] - b[None]) ** 2).sum(axis=2) if squares else a @ b.T
    keys = values if squares else -values
    positions = np.full((len(a), k), -1)
    found = np.full((len(a), k), np.inf if squares else -np.inf)
    for row, key in enumerate(keys):
        order = np.lexsort((ids, key))
        if query_ids is not None:
            order = order[ids[order] != query_ids[row]]
        order = order[:k]
        positions[row, : len(order)], found[row, : len(order)] = order, values[row, order]
    return positions, found


@pytest.mark.parametrize("squares", [False, True], ids=["inner", "squares"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_orders_hundreds_of_ties_like_the_definition(kind, squares):
    """Small integers: all values are exact, and most neighbours share theirs with others."""
    rng = np.random.default_rng(3)
    gallery = rng.integers(-2, 3, (600, 6)).astype(np.float32)
    ids = rng.permutation(2000)[:600].astype(np.int64)
    queries = np.concatenate([gallery[:90], rng.integers(-3, 4, (20, 6)).astype(np.float32)])
    own = np.concatenate([ids[:90], np.arange(5000, 5020)])
    search = search_of(kind, gallery, ids, squares)
    for k in (1, 7, 100, 599, 640):
        expected = brute_force(queries, gallery, own, ids, k, squares)
        positions, values = search.nearest(queries, own, k)
        np.testing.assert_array_equal(positions, expected[0])
        np.testing.assert_array_equal(values, expected[1])
    expected = brute_force(queries, gallery, None, ids, 5, squares)
    np.testing.assert_array_equal(search.nearest(queries, None, 5)[0], expected[0])


def spaces() -> dict[str, np.ndarray]:
    """Galleries in which candidates are hard to tell apart, or numbers hard to hold."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((700, 33)).astype(np.float32)
    near = plain[:1] + 1e-5 * plain
    outlier = plain.copy()
    outlier[5] *= 1e4
    many_far = plain.copy()
    many_far[:100] *= 1e3
    return {
        "plain": plain,
        "copies": np.repeat(plain[:70], 10, axis=0),
        "one point": np.ones((300, 5), np.float32),
        "zeros": np.zeros((300, 5), np.float32),
        "far from the origin": plain * 1e-3 + 7,
        "within a rounding error": near.astype(np.float32),
        "one outlier": outlier,
        "many outliers": many_far,
        "huge": plain * np.float32(1e30),
        "tiny": plain * np.float32(1e-30),
        "subnormal": plain * np.float32(1e-40),
        "one wide": rng.standard_normal((300, 1)).astype(np.float32),
    }


@pytest.mark.parametrize("squares", [False, True], ids=["inner", "squares"])
@pytest.mark.parametrize("space", sorted(spaces()))
def test_all_backends_agree_to_the_bit_in_hard_spaces(space, squares):
    gallery = spaces()[space]
    ids = np.random.default_rng(1).permutation(len(gallery)).astype(np.int64)
    queries, own = gallery[:60], ids[:60]
    first = None
    for kind in KINDS:
        found = search_of(kind, gallery, ids, squares).nearest(queries, own, 9)
        first = found if first is None else first
        np.testing.assert_array_equal(found[0], first[0], err_msg=kind)
        np.testing.assert_array_equal(found[1], first[1], err_msg=kind)
    assert first is not None
    positions, values = first
    assert (ids[positions] != own[:, None]).all()
    rows = np.repeat(np.arange(60), len(gallery))
    every = pair_values(
        torch.from_numpy(queries[rows]), torch.from_numpy(np.tile(gallery, (60, 1))), squares
    )
    keys = (every if squares else -every).reshape(60, -1).numpy()
    keys[np.arange(60), np.arange(60)] = np.inf
    np.testing.assert_array_equal(np.sort(keys, axis=1)[:, :9], values if squares else -values)


@pytest.mark.parametrize("squares", [False, True], ids=["inner", "squares"])
def test_values_are_the_same_bits_in_cpp_and_torch_and_right_to_1e15(squares):
    rng = np.random.default_rng(2)
    for width in (1, 31, 32, 33, 200):
        a, b = (torch.from_numpy(rng.standard_normal((50, width)).astype(np.float32)) for _ in "ab")
        values = torch.empty(50, dtype=torch.float64)
        pointers = native_address(a), native_address(b), 50, width, squares, native_address(values)
        assert native_call(library(), "dist_dml_pair_values", *pointers) == ""
        assert torch.equal(values, pair_values(a, b, squares))
        wide = [x.numpy().astype(np.longdouble) for x in (a, b)]
        true = ((wide[0] - wide[1]) ** 2 if squares else wide[0] * wide[1]).sum(axis=1)
        scale = 1 + np.abs(wide[0] * wide[1]).sum(axis=1).astype(np.float64)
        assert (np.abs(values.numpy() - true.astype(np.float64)) < 1e-15 * scale * 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", ["plain", "far from the origin", "one outlier", "huge"])
def test_scores_are_never_further_off_than_the_bound_says(space, dtype):
    gallery = spaces()[space]
    rows, ids = torch.from_numpy(gallery), torch.arange(len(gallery))
    for squares in (False, True):
        problem = ScoreProblem.of(rows, ids, squares, dtype)
        moved, twice_error = problem.move(rows[:80])
        # bfloat16 products are exact in float32, whose sums are what the processor's are.
        computed = moved.float() @ problem.moved.float().T + problem.bias
        wide = gallery.astype(np.longdouble)
        mean, scale = problem.mean.numpy().astype(np.longdouble), np.longdouble(problem.scale)
        items = (wide - mean) * scale
        bias = -(items**2).sum(axis=1) / 2 if squares else items @ (mean * scale)
        true = items[:80] @ items.T + bias
        near = np.setdiff1d(np.arange(len(gallery)), problem.far.numpy())
        assert len(near) == len(gallery) - (space == "one outlier")
        error = np.abs(computed.numpy().astype(np.longdouble) - true)[:, near].max(axis=1)
        assert (error.astype(np.float64) <= twice_error.numpy() / 2).all()
        if dtype == torch.bfloat16:  # The bound is no wild guess either.
            assert error.max() * 40 > twice_error.min() / 2


def test_one_outlier_costs_no_query_its_candidates():
    """Its norm alone would make every bound useless, and all values be computed."""
    gallery = spaces()["one outlier"]
    ids = np.arange(len(gallery))
    search = NativeSearch(library(), gallery, ids, True, 64 * MEBIBYTE, "float32")
    search.nearest(gallery, ids, 9)
    assert set(search._kept) == {(0, "float32")}  # No pass over all values.


def test_an_answer_does_not_depend_on_block_threads_or_memory():
    rng = np.random.default_rng(5)
    vectors, ids = rng.standard_normal((900, 24)).astype(np.float32), np.arange(900)
    whole = exact_neighbours(vectors, vectors, 11, DISTANCES["l2"], ids, ids)
    threads = torch.get_num_threads()
    try:
        for num_threads, memory in ((1, 2**30), (3, 2**16), (2, 2**20)):
            torch.set_num_threads(num_threads)
            settings = SearchSettings(memory_bytes=memory)
            found = exact_neighbours(vectors, vectors, 11, DISTANCES["l2"], ids, ids, settings)
            np.testing.assert_array_equal(found[0], whole[0])
            np.testing.assert_array_equal(found[1], whole[1])
    finally:
        torch.set_num_threads(threads)


def test_without_a_compiler_faiss_searches_and_native_says_why_it_cannot(monkeypatch):
    vectors, ids = np.eye(4, dtype=np.float32), np.arange(4)
    expected = exact_neighbours(vectors, vectors, 2, DISTANCES["cosine"], ids, ids)
    monkeypatch.setenv("DIST_DML_NATIVE", "0")
    found = exact_neighbours(vectors, vectors, 2, DISTANCES["cosine"], ids, ids)
    np.testing.assert_array_equal(found[0], expected[0])
    search = open_gallery(vectors, ids, False)
    assert isinstance(search, CandidateSearch)
    assert isinstance(search._source, FaissScores)
    with pytest.raises(UsageError, match=r"search_backend=native cannot be had: .*NATIVE=0"):
        open_gallery(vectors, ids, False, SearchSettings("native"))
    with pytest.raises(UsageError, match="'cuda' is unknown; use auto"):
        open_gallery(vectors, ids, False, SearchSettings("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_faiss_on_a_gpu_is_refused_where_there_is_none():
    vectors, ids = np.eye(4, dtype=np.float32), np.arange(4)
    with pytest.raises(UsageError, match="faiss_gpu needs the package faiss-gpu"):
        open_gallery(vectors, ids, False, SearchSettings("faiss_gpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("squares", [False, True], ids=["inner", "squares"])
@pytest.mark.parametrize("space", sorted(spaces()))
def test_a_gpu_gives_the_same_bits(space, squares):
    gallery = spaces()[space]
    ids = np.arange(len(gallery))
    here = open_gallery(gallery, ids, squares).nearest(gallery, ids, 9)
    settings = SearchSettings(device=torch.device("cuda"))
    there = open_gallery(gallery, ids, squares, settings).nearest(gallery, ids, 9)
    np.testing.assert_array_equal(there[0], here[0])
    np.testing.assert_array_equal(there[1], here[1])
