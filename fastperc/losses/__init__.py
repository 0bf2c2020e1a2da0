"""Perceptual losses."""

from fastperc.losses.lpips import LPIPS, LPIPSTarget
from fastperc.losses.perceptual import Criteria, FeatureLoss, PerceptualLoss, PerceptualTerms, PixelLoss

__all__ = ["LPIPS", "Criteria", "FeatureLoss", "LPIPSTarget", "PerceptualLoss", "PerceptualTerms", "PixelLoss"]
