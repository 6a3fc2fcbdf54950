"""Nearest neighbours against brute force, distinct counts against Monte Carlo and the paper, verdicts on extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functa.models.measures import memorization
from functa.models.measures.memorization import (
    compared_again,
    distinct,
    distinct_expected,
    exact_nearest,
    has_usable_bounds,
    is_memorized,
    isolation,
    repeats,
    same_images,
    shortlist,
)


def brute_force(queries: np.ndarray, references: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, distances) [n, count] in float64, of equals the lower row."""
    distances = np.sqrt(((queries[:, None].astype(float) - references[None].astype(float)) ** 2).sum(-1))
    order = np.lexsort((np.broadcast_to(np.arange(len(references)), distances.shape), distances))[:, :count]
    return order, np.take_along_axis(distances, order, 1)


def nearest(queries: Tensor, references: Tensor, part: int, short: int = 24) -> tuple[np.ndarray, np.ndarray]:
    candidates = shortlist(queries, references.split(part), short)
    found = exact_nearest(lambda rows: queries[rows], lambda rows: references[rows], candidates)
    return found.rows.numpy(), found.distances.numpy()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 60), st.integers(1, 70), st.sampled_from([3, 17]))
def test_nearest_are_those_of_brute_force_with_ties_to_the_lower_row(seed: int, n: int, part: int, levels: int) -> None:
    """Images of few grey levels, some of them twice: many distances are equal."""
    random = np.random.default_rng(seed)
    references = (random.integers(0, levels, (n, 6)) / (levels - 1)).astype(np.float32)
    references[n // 2] = references[0]
    queries = np.concatenate([references[:4], random.random((5, 6), dtype=np.float32)])
    rows, distances = nearest(torch.from_numpy(queries), torch.from_numpy(references), part, short=n)
    expected_rows, expected = brute_force(queries, references, 3)
    np.testing.assert_allclose(distances, expected, atol=1e-12)
    np.testing.assert_array_equal(rows, expected_rows)


def test_near_duplicates_far_from_the_origin_are_distinguished() -> None:
    """Differences of a ten-thousandth of a distance, where float32 matmuls alone give anything from 0 to 0.02."""
    generator = torch.Generator().manual_seed(0)
    references = 0.9 + 0.1 * torch.rand(500, 3072, generator=generator)
    references[100:110] = references[7] + 1e-4 * torch.randn(10, 3072, generator=generator)
    queries = torch.cat([references[7:8] + 5e-5 * torch.randn(1, 3072, generator=generator), references[200:203]])
    rows, distances = nearest(queries, references, 128)
    expected_rows, expected = brute_force(queries.numpy(), references.numpy(), 3)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(distances, expected, rtol=1e-9, atol=1e-15)
    assert distances[0, 0] < 0.004 and distances[1, 0] == 0


def test_fewer_references_than_neighbours_are_all_of_them() -> None:
    rows, distances = nearest(torch.zeros(2, 4), torch.eye(2, 4), 1)
    assert rows.tolist() == [[0, 1], [0, 1]] and (distances == 1).all()


def test_comparing_again_is_exact_and_goes_through_the_references_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The vectors are not those that chose the candidates; some distances are equal, row 7 is in all."""
    monkeypatch.setattr(memorization, "EXACT_NUMBERS", 60)  # ten pairs at a time
    random = np.random.default_rng(3)
    references = (random.integers(0, 3, (40, 6)) / 2).astype(np.float32)
    queries = (random.integers(0, 3, (25, 6)) / 2).astype(np.float32)
    candidates = torch.from_numpy(np.stack([random.choice(40, 3, replace=False) for _ in queries]))
    candidates[:, 0] = torch.where((candidates == 7).any(1), candidates[:, 0], 7)
    fetched: list[int] = []

    def fetch(rows: Tensor) -> Tensor:
        fetched.extend(rows.tolist())
        return torch.from_numpy(references)[rows]

    found = compared_again(lambda rows: torch.from_numpy(queries)[rows], fetch, candidates)
    for row, mine in enumerate(candidates.sort(1).values.numpy()):
        order, distances = brute_force(queries[row : row + 1], references[mine], 3)
        np.testing.assert_array_equal(found.rows[row], mine[order[0]])
        np.testing.assert_allclose(found.distances[row], distances[0], atol=1e-12)
    assert fetched == sorted(fetched) and set(fetched) == set(candidates.unique().tolist())
    assert len(fetched) <= len(set(fetched)) + 8  # one more for each of eight edges between parts, not 75


def test_expected_distinct_counts_are_the_papers_and_their_sd_is_not() -> None:
    mean, sd = distinct_expected(5000, 5000)
    assert round(mean) == 3161  # Table 7
    assert mean == pytest.approx(3160.79, abs=0.005) and sd == pytest.approx(22.05, abs=0.005)  # not 34


@pytest.mark.parametrize(("images", "draws"), [(5000, 5000), (64, 200), (100, 7), (2, 2)])
def test_distinct_counts_agree_with_monte_carlo(images: int, draws: int) -> None:
    random, runs = np.random.default_rng(1), 2000
    counts = np.array([distinct(torch.from_numpy(random.integers(0, images, draws))) for _ in range(runs)])
    mean, sd = distinct_expected(images, draws)
    assert abs(counts.mean() - mean) < 4 * sd / runs**0.5
    assert counts.std() == pytest.approx(sd, rel=0.08)


def test_distinct_counts_at_the_ends() -> None:
    assert distinct_expected(1, 10) == (1, 0)
    assert distinct_expected(50, 0) == (0, 0)
    assert distinct_expected(50, 1) == pytest.approx((1, 0), abs=1e-6)
    with pytest.raises(ValueError, match="a class needs at least one image"):
        distinct_expected(0, 10)


def cloud(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))


def share(samples: Tensor) -> tuple[float, bool]:
    """Return the share of samples that repeat, and the verdict; 400 training and 200 unseen images, all Gaussian."""
    training, unseen = cloud(400, 1), cloud(200, 2)
    found = [torch.from_numpy(nearest(each, training, 128)[1]) for each in (samples, unseen)]
    repeating = repeats(*found)
    return repeating.double().mean().item(), is_memorized(repeating)


def test_copies_are_distinguished_from_fresh_images_blurred_ones_and_noise() -> None:
    copies = cloud(400, 1)[::2] + cloud(200, 3, 0.1)
    for of, (low, high), verdict in (
        (copies, (0.95, 1.0), True),
        (cloud(400, 4), (0.0, 0.06), False),
        (cloud(400, 5, 0.3), (0.0, 0.06), False),  # nearer than any image, to all of them
        (cloud(400, 6, 3.0), (0.0, 0.0), False),
        (torch.cat([copies[:60], cloud(140, 7)]), (0.28, 0.34), True),
    ):
        measured, flagged = share(of)
        assert low <= measured <= high and flagged is verdict


@pytest.mark.parametrize("held", [1, 3])
def test_copies_are_not_distinguishable_where_test_images_repeat_training_images(held: int) -> None:
    """Ten of a hundred do, so a sample would have to be nearer than not at all; two of a hundred do no harm."""
    training, unseen, copies = cloud(400, 1), cloud(100, 2), cloud(400, 1)[50:100]
    training = torch.cat([training, *[training[:100]] * (held - 1)])
    for count, possible in ((10, False), (2, True)):
        among = torch.cat([training[:count] + 1e-5, unseen[count:]])
        found = torch.from_numpy(nearest(among, training, 128)[1])
        assert has_usable_bounds(found) is possible
        assert same_images(found).tolist() == [True] * count + [False] * (100 - count)
    if held == 1:
        samples = torch.from_numpy(nearest(copies, training, 128)[1])
        assert repeats(samples, found).all()  # with the bounds of two repeated images


def test_isolation_of_copies_of_copies_is_a_number() -> None:
    assert isolation(torch.tensor([[0.0, 0, 0], [0, 1, 2], [1, 1, 1]], dtype=torch.float64)).tolist() == [1, 0, 1]


def test_two_samples_prove_nothing() -> None:
    assert not is_memorized(torch.tensor([True, True]))
    assert is_memorized(torch.tensor([True, True, True, False]))
