"""The network that PyTorch's example, gordicaleksa and rrmina share, in plain PyTorch under any names."""

from __future__ import annotations

import torch
from torch import nn


def padded_conv(x, conv, stride=1):
    """A convolution behind a reflected border."""
    p = conv.kernel_size[0] // 2
    return nn.functional.conv2d(nn.functional.pad(x, (p,) * 4, mode="reflect"), conv.weight, conv.bias, stride)


class PyTorchNet(nn.Module):
    """The layers that three repositories share, in a row: convolutions and norms by index."""

    def __init__(self, width=4, batch=False, transposed=False):
        super().__init__()
        w, norm = width, nn.BatchNorm2d if batch else lambda c: nn.InstanceNorm2d(c, affine=True)
        channels = [(3, w, 9), (w, 2 * w, 3), (2 * w, 4 * w, 3), *[(4 * w, 4 * w, 3)] * 10]
        channels += [(4 * w, 2 * w, 3), (2 * w, w, 3), (w, 3, 9)]
        self.convs = nn.ModuleList(nn.Conv2d(*sizes) for sizes in channels)
        self.norms = nn.ModuleList(norm(c_out) for _, c_out, _ in channels[:-1])
        self.transposed = transposed
        if transposed:
            for i in (13, 14):
                self.convs[i] = nn.ConvTranspose2d(*channels[i], 2, 1, 1)
        with torch.no_grad():
            self.convs[15].weight.mul_(20)  # pictures of many levels
            for i, tensor in enumerate([*self.norms.parameters(), *self.norms.buffers()]):
                if tensor.is_floating_point():
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=torch.Generator().manual_seed(i)))
        self.eval()

    def forward(self, x):
        for i in range(3):
            x = self.norms[i](padded_conv(x, self.convs[i], 1 if i == 0 else 2)).relu()
        for i in range(3, 13, 2):
            y = self.norms[i](padded_conv(x, self.convs[i])).relu()
            x = x + self.norms[i + 1](padded_conv(y, self.convs[i + 1]))
        for i in (13, 14):
            if self.transposed:
                x = self.convs[i](x)
            else:
                x = padded_conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"), self.convs[i])
            x = self.norms[i](x).relu()
        return padded_conv(x, self.convs[15])

    def state(self, conv_names, norm_names):
        """The state_dict under other names, one for each convolution and norm."""
        pairs = [*zip(conv_names, self.convs), *zip(norm_names, self.norms)]
        return {f"{name}.{key}": tensor for name, part in pairs for key, tensor in part.state_dict().items()}


BLOCKS = [(i, j) for i in range(5) for j in (1, 2)]
EXAMPLE_NORMS = ["in1", "in2", "in3", *(f"res{i + 1}.in{j}" for i, j in BLOCKS), "in4", "in5"]
EXAMPLE = [*(f"conv{i}.conv2d" for i in (1, 2, 3)), *(f"res{i + 1}.conv{j}.conv2d" for i, j in BLOCKS)]
DECONVS = [f"deconv{i}.conv2d" for i in (1, 2, 3)]
