"""Perceptual losses."""

from fastperc.losses.lpips import LPIPS, LPIPSTarget
from fastperc.losses.perceptual import FeatureLoss, PerceptualLoss, PerceptualTerms, PixelLoss

__all__ = ["LPIPS", "FeatureLoss", "LPIPSTarget", "PerceptualLoss", "PerceptualTerms", "PixelLoss"]
