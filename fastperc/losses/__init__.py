"""Perceptual losses."""

from fastperc.losses.perceptual import Criteria, FeatureLoss, PerceptualLoss, PerceptualTerms, PixelLoss

__all__ = ["Criteria", "FeatureLoss", "PerceptualLoss", "PerceptualTerms", "PixelLoss"]
