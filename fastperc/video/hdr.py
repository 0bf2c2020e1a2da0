"""Makes HDR frames (PQ or HLG, BT.2020) ordinary 8-bit RGB (BT.709)."""

from __future__ import annotations

import numpy as np

PQ, HLG = 16, 18  # FFmpeg's numbers of the transfer characteristics
TRANSFERS = {PQ: "PQ", HLG: "HLG"}
WHITE = 203.0  # cd/m²: what HDR films show as white paper (ITU-R BT.2408)
PEAK = 1000.0  # cd/m²: the display that HLG is shown on
KNEE = 0.5  # of white: what is darker keeps its light
GAMMA = 2.4  # of an SDR display (ITU-R BT.1886)
TO_BT709 = np.array(  # linear BT.2020 → linear BT.709 (ITU-R BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020


class ToneMap:
    """Makes 16-bit RGB of an HDR film 8-bit RGB for an ordinary screen.

    What is darker than half of white keeps its light; what is brighter is compressed, each pixel by its largest
    channel, so that hues stay.

    Args:
        transfer: ``PQ`` or ``HLG``.
    """

    def __init__(self, transfer: int) -> None:
        codes = np.arange(1 << 16, dtype=np.float64) / 65535
        self.hlg = transfer == HLG
        # HLG gives the light of the scene, from 0 to 1; PQ the light of the display, here in units of white.
        self.light = (_hlg_light(codes) if self.hlg else _pq_light(codes) / WHITE).astype(np.float32)
        steps = np.arange(4097, dtype=np.float64) / 4096
        self.levels = (255 * steps ** (1 / GAMMA) + 0.5).astype(np.uint8)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels``, uint16 [H, W, 3] over the full range, as uint8 of the same shape."""
        light = self.light[pixels]
        if self.hlg:  # on the display, which makes bright places brighter (ITU-R BT.2100)
            luminance = np.maximum(light @ LUMINANCE, 1e-6)[..., None]
            light = light * luminance**0.2 * (PEAK / WHITE)
        largest = np.maximum(light.max(axis=2, keepdims=True), 1e-6)
        rest = 1 - KNEE
        compressed = np.where(largest <= KNEE, largest, 1 - rest * np.exp(-(largest - KNEE) / rest))
        light = (light * (compressed / largest)) @ TO_BT709.T
        return self.levels[(light.clip(0, 1) * 4096 + 0.5).astype(np.int32)]


def _pq_light(codes: np.ndarray) -> np.ndarray:
    """The light in cd/m² of codes from 0 to 1 (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = codes ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg_light(codes: np.ndarray) -> np.ndarray:
    """The light of the scene, from 0 to 1, of codes from 0 to 1 (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
