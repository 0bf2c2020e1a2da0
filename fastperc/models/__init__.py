"""The paper's networks."""

from fastperc.models.super_resolution import SRCNN, SuperResolutionNet
from fastperc.models.transform_net import TransformNet
from fastperc.models.vgg import VGG16Features, VGGFeatures

__all__ = ["SRCNN", "SuperResolutionNet", "TransformNet", "VGG16Features", "VGGFeatures"]
