"""``fastperc convert`` of ONNX files: PyTorch's fast_neural_style example of several ages, and other graphs."""

from __future__ import annotations

import random
import sys
import time

import pytest
import torch
from damage import LONGEST, SECONDS, SEED, damaged
from style_nets import PyTorchNet

import fastperc
from fastperc import InputError, conversion

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


class Graph:
    """The example's network as PyTorch exported it for one opset, node by node."""

    def __init__(self, net, opset, names="numbers"):
        self.opset, self.nodes, self.weights, self.count, self.names = opset, [], [], 0, names
        x = "input1"
        for i in range(3):
            x = self.relu(self.norm(self.conv(x, net.convs[i], 1 if i == 0 else 2), net.norms[i]))
        for i in range(3, 13, 2):
            y = self.relu(self.norm(self.conv(x, net.convs[i]), net.norms[i]))
            y = self.norm(self.conv(y, net.convs[i + 1]), net.norms[i + 1])
            x = self.node("Add", y, x)
        for i in (13, 14):
            x = self.relu(self.norm(self.conv(self.upsampled(x), net.convs[i]), net.norms[i]))
        self.conv(x, net.convs[15])
        self.nodes[-1].output[0] = "output1"

    def node(self, kind, *inputs, **attributes):
        self.count += 1
        self.nodes.append(helper.make_node(kind, inputs, [f"value{self.count}"], **attributes))
        return f"value{self.count}"

    def weight(self, value):
        name = f"{self.names}.{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def conv(self, x, conv, stride=1):
        p = conv.kernel_size[0] // 2
        pads = [0, 0, p, p, 0, 0, p, p]
        if self.opset < 11:
            x = self.node("Pad", x, mode="reflect", pads=pads)
        else:
            x = self.node("Pad", x, self.weight(torch.tensor(pads)), mode="reflect")
        sizes = dict(kernel_shape=[2 * p + 1] * 2, strides=[stride] * 2, pads=[0] * 4, dilations=[1, 1], group=1)
        return self.node("Conv", x, self.weight(conv.weight), self.weight(conv.bias), **sizes)

    def norm(self, x, norm):
        return self.node("InstanceNormalization", x, self.weight(norm.weight), self.weight(norm.bias), epsilon=1e-5)

    def relu(self, x):
        return self.node("Relu", x)

    def upsampled(self, x):
        scales = torch.tensor([1.0, 1, 2, 2])
        if self.opset == 8:
            return self.node("Upsample", x, mode="nearest", scales=scales.tolist())
        if self.opset == 9:
            constant = self.node("Constant", value=numpy_helper.from_array(scales.numpy(), "scales"))
            return self.node("Upsample", x, constant, mode="nearest")
        return self.node("Resize", x, "", self.weight(scales), mode="nearest", nearest_mode="floor")

    def save(self, path):
        image = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 24, 24])
            for name in ("input1", "output1")
        ]
        listed = [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in self.weights]
        inputs = [*image[:1], *(listed if self.opset < 10 else [])]  # old exporters listed the weights as inputs
        graph = helper.make_graph(self.nodes, "torch-jit-export", inputs, image[1:], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        onnx.save(model, path)
        return path


def same_picture(net, path):
    converted = conversion.read(path)
    assert converted.kind == "PyTorch's fast_neural_style example as ONNX" and not converted.why_not
    x = torch.rand(2, 3, 32, 44)
    with torch.no_grad():
        assert torch.allclose(converted.net(x), net(255 * x) / 255, atol=1e-4)


@pytest.mark.parametrize("opset", [8, 9, 13])
def test_reads_the_model_zoo(tmp_path, opset):
    net = PyTorchNet()
    same_picture(net, Graph(net, opset).save(tmp_path / "candy.onnx"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_reads_what_pytorch_exports(tmp_path, dynamo):
    pytest.importorskip("onnxscript")
    net, path = PyTorchNet(), tmp_path / "candy.onnx"
    dynamic = dict(dynamic_shapes=({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)) if dynamo else {}
    torch.onnx.export(net, (torch.rand(1, 3, 32, 48),), path, dynamo=dynamo, external_data=False, **dynamic)
    same_picture(net, path)


def test_command(run, here):
    Graph(PyTorchNet(), 9).save(here / "candy.onnx")
    result = run("convert", "candy.onnx", "-o", "candy.safetensors")
    assert result.status == 0 and "example as ONNX: 16 convolutions, 15 instance norms" in result.out, result
    assert fastperc.load("candy.safetensors").config["preset"] == "examples"


def relabelled(graph, old, new, which=0):
    """``graph`` with another operation at the place of the ``which``-th ``old`` one."""
    node = [node for node in graph.nodes if node.op_type == old][which]
    node.op_type = new
    return graph


def with_attribute(graph, kind, which=0, **attributes):
    node = [node for node in graph.nodes if node.op_type == kind][which]
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(*item) for item in attributes.items())])
    return graph


OTHERS = {
    "another activation": (lambda g: relabelled(g, "Relu", "Sigmoid"), "it has Sigmoid where that has Relu"),
    "another norm": (lambda g: relabelled(g, "InstanceNormalization", "LpNormalization", 3), "LpNormalization"),
    "zeros around": (lambda g: with_attribute(g, "Pad", mode="constant"), "another convolution or padding"),
    "a wider border": (lambda g: with_attribute(g, "Pad", pads=[0, 0, 5, 4, 0, 0, 4, 4]), "another convolution"),
    "stride": (lambda g: with_attribute(g, "Conv", strides=[2, 2]), "padding than PyTorch's .* as its stem.conv"),
    "dilation": (lambda g: with_attribute(g, "Conv", 4, dilations=[2, 2]), "as its blocks.0.conv2"),
    "epsilon": (lambda g: with_attribute(g, "InstanceNormalization", epsilon=1e-3), "another epsilon"),
    "linear": (lambda g: with_attribute(g, "Upsample", mode="linear"), "does not enlarge by repeating"),
    "two fewer layers": (lambda g: g.nodes.__delitem__(slice(0, 4)) or g, "it has none where that has Pad"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_another_graph(tmp_path, name):
    change, message = OTHERS[name]
    path = change(Graph(PyTorchNet(), 9)).save(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=message):
        conversion.read(path)


def test_refuses_a_network_that_goes_on(tmp_path):
    graph = Graph(PyTorchNet(), 9)
    graph.nodes[-1].output[0] = "more"
    graph.nodes.append(helper.make_node("Tanh", ["more"], ["output1"]))
    with pytest.raises(InputError, match="goes on after the last convolution"):
        conversion.read(graph.save(tmp_path / "net.onnx"))


def test_does_not_look_for_weights_in_other_files(tmp_path):
    graph = Graph(PyTorchNet(), 9)
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    weight = graph.weights[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    with pytest.raises(InputError, match="keeps its weights in another file"):
        conversion.read(graph.save(tmp_path / "net.onnx"))


def test_refuses_files_that_are_no_graph(tmp_path, refused, here):
    for content in (b"", b"\xff" * 99, b"hello"):
        (here / "net.onnx").write_bytes(content)
        refused("convert", "net.onnx", "-o", "out.safetensors", says="net.onnx: ")


def test_damaged_files_are_refused_or_read(tmp_path):
    """For some seconds, files with random damage. Nothing but an ``InputError`` comes of it, quickly."""
    path = Graph(PyTorchNet(1), 9).save(tmp_path / "net.onnx")
    content, generator, end = path.read_bytes(), random.Random(SEED), time.monotonic() + SECONDS
    while time.monotonic() < end:
        path.write_bytes(damaged(content, generator))
        start = time.monotonic()
        try:
            conversion.read(path)
        except InputError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - start < LONGEST


def test_says_what_to_install(refused, here, monkeypatch):
    Graph(PyTorchNet(), 9).save(here / "candy.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused("convert", "candy.onnx", "-o", "out.safetensors", says="needs onnx: pip install 'fastperc[onnx]'")
