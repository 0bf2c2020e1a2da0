"""The operations as functions; each is also a PyTorch operator in ``torch.ops.fastperc``."""

from fastperc.ops.gram_loss import gram_loss
from fastperc.ops.tv_loss import tv_loss
from fastperc.ops.vgg_loss import vgg_features, vgg_loss

__all__ = ["gram_loss", "tv_loss", "vgg_features", "vgg_loss"]
