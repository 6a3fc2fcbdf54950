import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset import quantizer as quantizing
from functa.storage.functaset.quantizer import Quantizer, calibrate, clip_limit, refuse_clipping
from functa.storage.functaset.zarr_bytes import ArraySpec, encode, new_document

SHAPES = st.tuples(st.integers(1, 6), *[st.integers(1, 3)] * 3)


@st.composite
def latents(draw: st.DrawFn) -> np.ndarray:
    """[n, s, s, c] of any scale from 1e-36 to 1e36, about any middle, some of one value."""
    spread = draw(hnp.arrays(np.float64, draw(SHAPES), elements=st.floats(-1, 1)))
    if draw(st.booleans()):
        spread = np.broadcast_to(spread[:1], spread.shape)
    middle = draw(st.sampled_from([0.0, 1.0, -30.0]))
    return ((middle + spread) * 10.0 ** draw(st.integers(-36, 36))).astype(np.float32)


LATENTS = latents()


def tolerance(quantizer: Quantizer) -> np.ndarray:
    """Half a bin, and the rounding of float32 at these magnitudes."""
    top = np.abs(quantizer.low) + quantizer.step * 2**quantizer.bits
    return quantizer.step / 2 + 4 * np.spacing(top.astype(np.float32))


@given(
    LATENTS,
    st.integers(1, 8),
    st.sampled_from(["minmax", "quantile", "sigma"]),
    st.sampled_from(["scalar", "channel", "element"]),
)
def test_inside_the_range_the_error_is_at_most_half_a_bin_and_outside_is_counted(
    z: np.ndarray, bits: int, ranges: str, granularity: str
) -> None:
    config = QuantizationConfig(bits=bits, range=ranges, granularity=granularity)
    quantizer = calibrate(config, z)
    assert quantizer is not None
    codes, clipped = quantizer.encode(z)
    assert codes.dtype == np.uint8
    assert codes.max() < 2**bits
    high = quantizer.low.astype(np.float64) + quantizer.step.astype(np.float64) * 2**bits
    edge = 1e-9 * (high - quantizer.low)  # nearer than that to an end of the range, rounding decides
    outside = (z < quantizer.low + edge) | (z > high - edge)
    assert ((z < quantizer.low - edge) | (z > high + edge)).sum() <= clipped <= outside.sum()
    error = np.abs(quantizer.decode(codes).astype(np.float64) - z)
    assert (error <= np.where(outside, np.inf, tolerance(quantizer))).all()
    again, _ = quantizer.encode(quantizer.decode(codes))
    assert np.abs(again.astype(int) - codes).max() <= 1


@given(LATENTS)
def test_minmax_clips_nothing_that_it_was_calibrated_on(z: np.ndarray) -> None:
    quantizer = calibrate(QuantizationConfig(bits=8), z)
    assert quantizer is not None
    assert quantizer.encode(z)[1] == 0


def test_what_lies_outside_takes_the_nearest_bin_and_never_wraps() -> None:
    quantizer = Quantizer(8, np.full((1, 1, 1), -1, np.float32), np.full((1, 1, 1), 2 / 256, np.float32))
    codes, clipped = quantizer.encode(np.array([-1e9, -1.01, -1, 0, 1, 1.01, 1e9]).reshape(-1, 1, 1, 1))
    assert codes.ravel().tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert clipped == 4


def test_a_dimension_that_does_not_vary_comes_back() -> None:
    z = np.zeros((4, 1, 1, 3), np.float32) + np.array([0, 0.5, -300], np.float32)
    quantizer = calibrate(QuantizationConfig(bits=4), z)
    assert quantizer is not None
    codes, clipped = quantizer.encode(z)
    assert clipped == 0
    np.testing.assert_allclose(quantizer.decode(codes), z, rtol=1e-4, atol=1e-6)
    ends = quantizer.low[..., None] + quantizer.step[..., None] * np.arange(17, dtype=np.float32)
    assert (np.diff(ends) > 0).all()  # its bins differ in float32


@pytest.mark.parametrize(
    ("granularity", "shape"), [("scalar", (1, 1, 1)), ("channel", (1, 1, 3)), ("element", (2, 2, 3))]
)
def test_granularity_decides_how_many_ranges_there_are(granularity: str, shape: tuple[int, ...]) -> None:
    z = np.random.default_rng(0).normal(size=(9, 2, 2, 3))
    quantizer = calibrate(QuantizationConfig(bits=6, granularity=granularity), z)
    assert quantizer is not None
    assert quantizer.low.shape == quantizer.step.shape == shape
    assert quantizer.low.dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"range": "minmax", "margin": 0.25, "granularity": "element"}, "minmax, margin 0.25, per element"),
        ({"range": "sigma", "sigma": 4, "granularity": "channel"}, "mean +- 4 sd, per channel"),
        (
            {"range": "quantile", "quantile": 0.01, "granularity": "scalar"},
            "quantiles 0.01 and 0.99, per scalar",
        ),
    ],
)
def test_the_policy_is_recorded_in_words(settings: dict[str, object], policy: str) -> None:
    quantizer = calibrate(QuantizationConfig(bits=4, **settings), np.zeros((2, 1, 1, 1)))
    assert quantizer is not None
    assert quantizer.policy == policy


def test_ranges_follow_their_policy() -> None:
    z = np.random.default_rng(0).normal(2, 3, size=(200_000, 1, 1, 1))
    ends = {}
    for ranges in ("minmax", "sigma", "quantile"):
        config = QuantizationConfig(bits=8, range=ranges, sigma=4, quantile=0.01, margin=0.25)
        quantizer = calibrate(config, z)
        assert quantizer is not None
        ends[ranges] = [float(quantizer.low.item()), float((quantizer.low + 256 * quantizer.step).item())]
    span = z.max() - z.min()
    assert ends["minmax"] == pytest.approx([z.min() - span / 4, z.max() + span / 4], rel=1e-5)
    assert ends["sigma"] == pytest.approx([2 - 12, 2 + 12], abs=0.2)
    assert ends["quantile"] == pytest.approx([2 - 3 * 2.326, 2 + 3 * 2.326], abs=0.1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["uniform", "laplace", "constant"])
def test_exact_codes_take_their_bits_and_little_more_whatever_they_are(bits: int, kind: str) -> None:
    """Headers, index and checksums included; a shard of 2^15 numbers, the fewest that a full chunk has."""
    generator, shape = np.random.default_rng(bits), (64, 4, 4, 32)
    drawn = {
        "uniform": generator.integers(0, 2**bits, shape),
        "laplace": np.clip(generator.laplace(2**bits / 2, 2**bits / 10, shape), 0, 2**bits - 1),
        "constant": np.full(shape, 2**bits - 1),
    }
    spec = ArraySpec(shape, "uint8", 64, 64, "exact")
    _, data = encode(new_document(spec), spec, drawn[kind].astype(np.uint8))
    assert len(data) * 8 <= (bits + 0.05) * np.prod(shape)


def test_auto_is_for_those_who_can_reconstruct() -> None:
    with pytest.raises(ValueError, match="range=auto is no range"):
        calibrate(QuantizationConfig(bits=8, range="auto"), np.zeros((2, 1, 1, 1)))


def test_32_bits_need_no_quantiser_and_bad_latents_make_none() -> None:
    assert calibrate(QuantizationConfig(), np.zeros((1, 1, 1, 1))) is None
    one_bad = np.array([0.0, 0.5, np.inf]).reshape(3, 1, 1, 1)
    for z in (np.zeros((0, 1, 1, 1)), np.full((2, 1, 1, 1), np.nan), one_bad):
        with pytest.raises(StorageError, match="calibration latents"):
            calibrate(QuantizationConfig(bits=8), z)


@st.composite
def near_bins(draw: st.DrawFn) -> tuple[Quantizer, np.ndarray]:
    """Return a quantiser, and numbers a few steps of float32 from the borders of its bins, or anywhere."""
    bits, channels = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    finite = st.floats(-1, 1, width=32)
    scale = 10.0 ** draw(st.integers(-44, 37))
    low = (draw(hnp.arrays(np.float32, (1, 1, channels), elements=finite)) * 10.0 ** draw(st.integers(-44, 37))).astype(
        "f"
    )
    step = np.maximum(
        scale * draw(hnp.arrays(np.float32, (1, 1, channels), elements=st.floats(0.125, 1, width=32))), 1e-45
    )
    quantizer = Quantizer(bits, low, step.astype(np.float32))
    number = draw(hnp.arrays(np.float64, (20, 2, 2, channels), elements=st.integers(-2, 2**bits + 2)))
    with np.errstate(all="ignore"):
        z = (low.astype(np.float64) + number * quantizer.step).astype(np.float32)
        z = z + draw(hnp.arrays(np.float32, z.shape, elements=st.integers(-3, 3))) * np.spacing(z)
    wild = draw(hnp.arrays(np.float32, z.shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    return quantizer, np.where(draw(hnp.arrays(bool, z.shape)), wild, np.nan_to_num(z)).astype(np.float32)


@given(near_bins())
def test_codes_are_those_of_double_precision_everywhere(made: tuple[Quantizer, np.ndarray]) -> None:
    quantizer, z = made
    position = (z.astype(np.float64) - quantizer.low) / quantizer.step
    outside = (position < 0) | (position > 2**quantizer.bits)
    codes, clipped = quantizer.encode(z)
    np.testing.assert_array_equal(codes, np.clip(np.floor(position), 0, 2**quantizer.bits - 1))
    np.testing.assert_array_equal(quantizer.outside(z), outside.sum((1, 2, 3)))
    assert clipped == outside.sum()


def test_codes_of_many_latents_are_those_of_double_precision() -> None:
    z = np.random.default_rng(0).normal(size=(96, 16, 16, 32)).astype(np.float32)
    for granularity in ("scalar", "element"):
        quantizer = calibrate(QuantizationConfig(bits=8, granularity=granularity), z[:32] / 2)
        assert quantizer is not None
        position = (z.astype(np.float64) - quantizer.low) / quantizer.step
        codes, clipped = quantizer.encode(z)
        np.testing.assert_array_equal(codes, np.clip(np.floor(position), 0, 255))
        assert clipped == ((position < 0) | (position > 256)).sum() > 0


def test_rows_that_are_not_finite_count_nothing_outside_and_leave_the_others_their_counts() -> None:
    z = np.random.default_rng(0).normal(size=(5, 2, 2, 3)).astype(np.float32)
    quantizer = calibrate(QuantizationConfig(bits=4), z / 2)
    assert quantizer is not None
    expected = [quantizer.encode(row[None])[1] for row in z]
    assert all(expected)
    bad = z.copy()
    bad[1, 0, 1, 2], bad[3, 1, 1, 0] = np.nan, np.inf
    np.testing.assert_array_equal(quantizer.outside(z), expected)
    np.testing.assert_array_equal(quantizer.outside(bad), np.where([True, False, True, False, True], expected, 0))
    assert not quantizer.outside(np.full_like(z, np.nan)).any()


def test_latents_of_double_precision_are_coded_by_it() -> None:
    """Numbers just below a bin's border, which single precision would round up to it."""
    quantizer = Quantizer(8, np.zeros((1, 1, 1), np.float32), np.full((1, 1, 1), 0.25, np.float32))
    border = 0.25 * np.arange(1.0, 256)
    z = np.nextafter(border, 0).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(quantizer.encode(z)[0].ravel(), np.arange(255))
    np.testing.assert_array_equal(quantizer.encode(z.astype(np.float32))[0].ravel(), np.arange(1, 256))


@pytest.mark.parametrize("size", [1, 1000])
def test_only_positions_beside_a_border_are_computed_twice(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    again = np.unravel_index

    def counted(at: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        counts.append(len(at))
        return again(at, shape)

    monkeypatch.setattr(np, "unravel_index", counted)
    z = np.random.default_rng(0).uniform(-size, size, (64, 8, 8, 16)).astype(np.float32)
    quantizer = calibrate(QuantizationConfig(bits=8, granularity="element"), z)
    assert quantizer is not None
    quantizer.encode(z)
    assert sum(counts) == pytest.approx(2 * 2**-12 * z.size, rel=0.5)


@pytest.mark.parametrize(("rows", "numbers"), [(1, 8), (5, 8), (6, 8), (13, 8), (3, 50), (4, 41)])
def test_latents_are_coded_a_few_rows_at_a_time(rows: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "PART", 41)
    z = np.zeros((rows, 1, 1, numbers), np.float32)
    parts = [(part.start, len(found)) for part, found in quantizing._parts(z)]
    most = max(1, 41 // numbers)
    assert parts == [(start, min(most, rows - start)) for start in range(0, rows, most)]


def test_few_rows_may_have_more_of_their_numbers_outside_the_range() -> None:
    assert [clip_limit(0.01, rows) for rows in (0, 1, 100, 10_000)] == pytest.approx([0.05, 0.05, 0.014, 0.0104])
    assert clip_limit(0.3, 1) == 1
    refuse_clipping("shard", 40, 16, 10, 0.125)  # exactly as many as may
    refuse_clipping("shard", 0, 0, 10, 0.01)
    refuse_clipping("shard", 0, 1, 10, 0)
    with pytest.raises(StorageError, match=r"shard: 1.50% of the latent numbers of 100 rows .*, more than 1.40%"):
        refuse_clipping("shard", 15, 100, 10, 0.01)
