"""Perceptual losses."""

from fastperc.losses.perceptual import FeatureLoss, PerceptualLoss, PerceptualTerms, PixelLoss

__all__ = ["FeatureLoss", "PerceptualLoss", "PerceptualTerms", "PixelLoss"]
