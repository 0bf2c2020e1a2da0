"""The operations as functions; each is also a PyTorch operator in ``torch.ops.fastperc``."""

from fastperc.ops.tv_loss import tv_loss

__all__ = ["tv_loss"]
