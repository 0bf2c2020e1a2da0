"""Writes Torch7's binary serialisation, and the networks of jcjohnson/fast-neural-style in it."""

from __future__ import annotations

import struct

import torch


class Nn:
    """A torch object whose fields are stored as a table."""

    def __init__(self, name, **fields):
        self.name, self.fields = name, fields


class Writer:
    """Writes objects as ``torch.save`` of Torch7 does; an object that comes again is written as its number."""

    def __init__(self):
        self.parts, self.numbers, self.kept = [], {}, []

    def pack(self, kinds, *values):
        self.parts.append(struct.pack(f"<{kinds}", *values))

    def text(self, text):
        data = text.encode()
        self.pack("i", len(data))
        self.parts.append(data)

    def numbered(self, kind, key):
        """Writes the head of a table or a torch object; returns whether its content must follow."""
        self.pack("i", kind)
        new = key not in self.numbers
        self.pack("i", self.numbers.setdefault(key, len(self.numbers) + 1))
        return new

    def write(self, value):
        if value is None:
            self.pack("i", 0)
        elif isinstance(value, bool):
            self.pack("ii", 5, value)
        elif isinstance(value, (int, float)):
            self.pack("id", 1, value)
        elif isinstance(value, str):
            self.pack("i", 2)
            self.text(value)
        elif isinstance(value, torch.Tensor):
            self.tensor(value)
        elif isinstance(value, Nn):
            self.kept.append(value)
            if self.numbered(4, id(value)):
                self.text("V 1")
                self.text(value.name)
                self.write(value.fields)
        else:
            table = value if isinstance(value, dict) else dict(enumerate(value, start=1))
            self.kept.append(value)
            if self.numbered(3, id(value)):
                self.pack("i", len(table))
                for key, item in table.items():
                    self.write(key)
                    self.write(item)

    def tensor(self, tensor):
        kind = {torch.float32: "Float", torch.float64: "Double", torch.int64: "Long"}[tensor.dtype]
        self.kept.append(tensor)
        if not self.numbered(4, id(tensor)):
            return
        self.text("V 1")
        self.text(f"torch.{kind}Tensor")
        if not tensor.numel():  # Torch7's empty tensors have no dimensions and no storage
            self.pack("iqi", 0, 1, 0)
            return
        self.pack(f"i{tensor.dim()}q", tensor.dim(), *tensor.shape)
        self.pack(f"{tensor.dim()}qq", *tensor.stride(), tensor.storage_offset() + 1)
        storage = tensor.untyped_storage()
        if self.numbered(4, ("storage", storage.data_ptr())):
            self.text("V 1")
            self.text(f"torch.{kind}Storage")
            values = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,))
            self.pack("q", len(values))
            self.parts.append(values.numpy().tobytes())


def saved(value, path):
    writer = Writer()
    writer.write(value)
    path.write_bytes(b"".join(writer.parts))
    return path


class Johnson:
    """A network of jcjohnson's, with random weights that share one storage, and what it computes.

    The residual blocks trim their border under ``reflect-start`` and pad by ``padding`` else; all other convolutions
    pad with zeros, or by reflection under ``reflect``.
    """

    def __init__(self, width=4, norm="instance", padding="reflect-start"):
        self.norm, self.padding = norm, padding
        sizes = [(3, width, 9), (width, 2 * width, 3), (2 * width, 4 * width, 3)]
        sizes += [(4 * width, 4 * width, 3)] * 10 + [(4 * width, 2 * width, 3), (2 * width, width, 3), (width, 3, 9)]
        generator = torch.Generator().manual_seed(3)
        self.flat = torch.randn(sum(i * o * k * k + 3 * o for i, o, k in sizes), generator=generator)
        self.place, self.convs = 0, []
        for i, o, k in sizes:
            transposed = len(self.convs) in (13, 14)
            shape = (i, o, k, k) if transposed else (o, i, k, k)
            scale = 0.01 if not self.convs else 0.5
            weight = self.taken(*shape).mul_(scale / (i * k * k) ** 0.5)
            self.convs.append((weight, self.taken(o).mul_(0.1), self.taken(o).abs_().add_(0.5)))
        self.statistics = [torch.rand(2, len(scale), generator=generator) + 0.5 for *_, scale in self.convs]

    def taken(self, *shape):
        part = self.flat[self.place : self.place + torch.Size(shape).numel()].view(shape)
        self.place += part.numel()
        return part

    def norm_of(self, i):
        bias, scale = self.convs[i][1:]
        if self.norm == "batch":
            mean, variance = self.statistics[i]
            fields = dict(running_mean=mean, running_var=variance, eps=1e-5)
            return Nn("nn.SpatialBatchNormalization", weight=scale, bias=bias, **fields)
        return Nn("nn.InstanceNormalization", weight=scale, bias=bias, eps=1e-5, nOutput=len(bias), prev_N=-1)

    def conv(self, i, stride=1, padding=None):
        weight, bias, _ = self.convs[i]
        k = weight.shape[2]
        p = k // 2 if padding is None else padding
        outputs, inputs = weight.shape[:2]
        fields = dict(nInputPlane=inputs, nOutputPlane=outputs, kW=k, kH=k, dW=stride, dH=stride, padW=p, padH=p)
        if i in (13, 14):
            fields |= dict(nInputPlane=outputs, nOutputPlane=inputs, adjW=1, adjH=1)
        name = "nn.SpatialFullConvolution" if i in (13, 14) else "nn.SpatialConvolution"
        return Nn(name, weight=weight, bias=bias, gradWeight=torch.empty(0), **fields)

    def padded(self, i, stride=1):
        """A convolution whose border is reflected under ``reflect``, and of zeros else."""
        if self.padding != "reflect" or stride == 2:
            return [self.conv(i, stride)]
        p = self.convs[i][0].shape[2] // 2
        return [Nn("nn.SpatialReflectionPadding", pad_l=p, pad_r=p, pad_t=p, pad_b=p), self.conv(i, stride, 0)]

    def module(self):
        relu, modules = Nn("nn.ReLU", inplace=True), []
        if self.padding == "reflect-start":
            modules.append(Nn("nn.SpatialReflectionPadding", pad_l=40, pad_r=40, pad_t=40, pad_b=40))
        for i, stride in ((0, 1), (1, 2), (2, 2)):
            modules += [*self.padded(i, stride), self.norm_of(i), relu]
        for i in range(3, 13, 2):
            trims = self.padding == "reflect-start"
            first, second = ([self.conv(j, 1, 0)] if trims else self.padded(j) for j in (i, i + 1))
            branch = sequential(*first, self.norm_of(i), relu, *second, self.norm_of(i + 1))
            skip = Nn("nn.ShaveImage", size=2) if trims else Nn("nn.Identity")
            modules.append(sequential(Nn("nn.ConcatTable", modules=[branch, skip]), Nn("nn.CAddTable")))
        for i in (13, 14):
            modules += [self.conv(i, 2), self.norm_of(i), relu]
        modules += [*self.padded(15), Nn("nn.Tanh"), Nn("nn.MulConstant", constant_scalar=150.0)]
        return sequential(*modules, Nn("nn.TotalVariation", strength=1e-6))

    def checkpoint(self, **options):
        history = dict(train_loss_history=[3.5, 2.25], style_loss_history={"style-4": [1.0]}, val_loss_history=[])
        return dict(model=self.module(), opt=dict(arch="c9s1-4,d8", preprocessing="vgg", gpu=-1) | options, **history)

    def picture(self, x):
        """RGB in 0–1 to the same, as jcjohnson's scripts compute it."""
        mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
        y, f = 255 * x[:, [2, 1, 0]] - mean, torch.nn.functional
        y = f.pad(y, (40,) * 4, mode="reflect") if self.padding == "reflect-start" else y

        def conv(y, i, stride=1, p=None):
            weight, bias, _ = self.convs[i]
            p = weight.shape[2] // 2 if p is None else p
            if self.padding == "reflect" and stride == 1:
                y, p = f.pad(y, (p,) * 4, mode="reflect"), 0
            return f.conv2d(y, weight, bias, stride, p)

        def norm(y, i):
            bias, scale = (part.view(1, -1, 1, 1) for part in self.convs[i][1:])
            mean, variance = (part.view(1, -1, 1, 1) for part in self.statistics[i])
            if self.norm == "instance":
                mean, variance = y.mean((2, 3), keepdim=True), y.var((2, 3), keepdim=True, correction=0)
            return (y - mean) / (variance + 1e-5).sqrt() * scale + bias

        for i, stride in ((0, 1), (1, 2), (2, 2)):
            y = norm(conv(y, i, stride), i).relu()
        p = 0 if self.padding == "reflect-start" else 1
        for i in range(3, 13, 2):
            branch = norm(conv(norm(conv(y, i, p=p), i).relu(), i + 1, p=p), i + 1)
            y = branch + (y if p else y[..., 2:-2, 2:-2])
        for i in (13, 14):
            weight, bias, _ = self.convs[i]
            y = norm(f.conv_transpose2d(y, weight, bias, 2, 1, 1), i).relu()
        return ((150 * conv(y, 15).tanh() + mean) / 255)[:, [2, 1, 0]]


def sequential(*modules):
    return Nn("nn.Sequential", modules=list(modules), train=False, output=torch.empty(0))
