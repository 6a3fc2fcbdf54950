"""Wavelet packets: PyWavelets' own, and the Frechet Wavelet Distance where it is known."""

import numpy as np
import pytest
import torch

from functa.models.measures.metrics import FrechetStatistics, frechet_distance
from functa.models.measures.wavelets import haar_packets, packet_level, packet_numbers


@pytest.mark.parametrize(("level", "channels"), [(1, 3), (2, 1), (3, 2)])
def test_packets_are_those_of_pywavelets(level: int, channels: int) -> None:
    """Packet by packet, up to the order and the sign of a filter, which distances do not see."""
    pywt = pytest.importorskip("pywt")
    images = np.random.default_rng(0).random((2, 16, 24, channels))
    ours = haar_packets(torch.from_numpy(images), level).numpy()
    theirs = []
    for channel in range(channels):
        tree = pywt.WaveletPacket2D(images[..., channel], "haar", mode="periodization", maxlevel=level, axes=(1, 2))
        nodes = sorted(tree.get_level(level), key=lambda node: node.path)
        theirs.append(np.stack([node.data for node in nodes], 1))  # [B, P, h, w]
    peer = np.stack(theirs, -1).reshape(ours.shape)
    for packet in range(4**level):
        gaps = [min(abs(each - sign * peer[:, packet]).max() for sign in (1, -1)) for each in ours.swapaxes(0, 1)]
        assert min(gaps) < 1e-12


def test_packets_lose_nothing_and_are_as_many_as_pixels() -> None:
    images = torch.rand(5, 32, 32, 3, dtype=torch.float64)
    packets = haar_packets(images, 1)
    assert packets.shape == (5, 4, packet_numbers(32, 3))
    torch.testing.assert_close(packets.square().sum((1, 2)), images.square().sum((1, 2, 3)))


def test_brightness_moves_one_packet_alone_by_a_known_distance() -> None:
    """All images brighter by b: each of its D coefficients grows by 2^level b, and it is one of 4^level packets."""
    images, level, brighter = torch.rand(400, 16, 16, 1, dtype=torch.float64), 2, 0.25
    known, moved = (FrechetStatistics().update(haar_packets(x, level)) for x in (images, images + brighter))
    assert frechet_distance(moved, known) == pytest.approx(16 * brighter**2, rel=1e-9)


def test_levels_leave_packets_of_16_pixels_as_the_authors_take_them() -> None:
    assert [packet_level(side) for side in (256, 128, 64, 32, 28, 8, 2)] == [4, 3, 2, 1, 1, 1, 1]
    assert packet_level(70) == 1 and packet_level(9) == 0
    with pytest.raises(ValueError, match="9x9 images are not divisible into 2x2 blocks"):
        haar_packets(torch.zeros(1, 9, 9, 1), 1)
