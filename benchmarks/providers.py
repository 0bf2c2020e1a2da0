"""Who computes an operation in a benchmark; declared once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from io import BytesIO
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastperc import ConvBNReLU, ResidualBlock
from fastperc.engine.plan import steps_of

Step = Callable[..., Any]


def unchanged(step: Step) -> Step:
    return step


def compiled(mode: str | None = None) -> Callable[[Step], Step]:
    """``torch.compile`` for these very shapes."""

    def prepare(call: Step) -> Step:
        torch.compiler.reset()
        function = torch.compile(call, mode=mode, dynamic=False)

        def next_step(*inputs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the step before may be overwritten
            return function(*inputs)

        return next_step

    return prepare


def with_constants(step: Step) -> Step:
    """What ``step`` compiles takes the weights as constants: folds batch norms in and packs them for oneDNN.

    As an option of ``torch.compile`` it would come too late: tracing asks for it already.
    """
    from torch._inductor import config

    with config.patch(freezing=True):
        step()
    return step


def captured(step: Step) -> Step:
    """``step`` as the replay of a CUDA graph: what a GPU needs once nobody waits for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and kernels are compiled before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def folded(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """``module`` in eval mode with each batch norm folded into the convolution before it."""
    module = deepcopy(module)
    for layer in [*module.modules()]:
        for name, norm in [*layer.named_children()]:
            if isinstance(norm, nn.BatchNorm2d):  # norm, norm1 and norm2 follow conv, conv1 and conv2
                conv = getattr(layer, name.replace("norm", "conv"))
                fused = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
                setattr(layer, name.replace("norm", "conv"), fused)
                setattr(layer, name, nn.Identity())
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class CudnnLayer(nn.Module):
    """A layer's folded convolutions, each in one call of cuDNN with its ReLU and, where one follows, the addition."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        like = next(layer.parameters())
        self.steps = [step.to(like.device, like.dtype) for step in steps_of(layer)]
        self.weights = [step.weight.contiguous(memory_format=torch.channels_last) for step in self.steps]

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for step, weight in zip(self.steps, self.weights):
            geometry = [step.stride] * 2, [step.padding] * 2, [1, 1], 1
            if not step.relu:
                y = F.conv2d(x, weight, step.bias, *geometry[:2])
                y = y + before if step.skip else y
            elif step.skip:
                y = torch.cudnn_convolution_add_relu(x, weight, before, 1.0, step.bias, *geometry)
            else:
                y = torch.cudnn_convolution_relu(x, weight, step.bias, *geometry)
            before, x = x, y
        return x


def cudnn_fused(module: nn.Module, *inputs: Tensor) -> nn.Module | None:
    """``module`` folded, with a :class:`CudnnLayer` wherever that can stand; ``None`` if it nowhere can."""

    def fused(layer: nn.Module) -> nn.Module:
        if isinstance(layer, (ConvBNReLU, ResidualBlock)):
            steps = [*steps_of(layer)]
            whole = all(step.padding == step.kernel // 2 for step in steps)  # else the skip would have to be cropped
            if whole and all(step.norm is None and step.padding_mode == "zeros" for step in steps):
                return CudnnLayer(layer)
        for name, child in layer.named_children():
            setattr(layer, name, fused(child))
        return layer

    module = fused(deepcopy(module))
    return folded(module) if any(isinstance(layer, CudnnLayer) for layer in module.modules()) else None


def onnx_model(module: nn.Module, image: Tensor) -> bytes:
    """``module`` folded, in float32, as ONNX for this shape."""
    program = torch.onnx.export(folded(module).float(), (image.float(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime(module: nn.Module, image: Tensor) -> Step | None:
    """Its session for ``module``; on the CPU it has no bfloat16."""
    if image.dtype != torch.float32:
        return None
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(onnx_model(module, image), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def openvino(module: nn.Module, image: Tensor) -> Step:
    """Its compiled ``module``, which takes and gives float32 whatever it computes in."""
    from openvino import Core

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[image.dtype],
    }
    core = Core()
    model = core.compile_model(core.read_model(BytesIO(onnx_model(module, image))), "CPU", settings)
    return lambda image: torch.from_numpy(model(image.float().numpy())[0])


# Which cases a provider serves. A video is many calls, with copies between: none to be captured or compiled as a whole.
def anything(case: Any) -> bool:
    return True


def one_call(case: Any) -> bool:
    return case.direction != "video"


def frozen(case: Any) -> bool:
    return case.infers


def frozen_call(case: Any) -> bool:
    return case.direction == "inference"


def whole_network(case: Any) -> bool:
    """A layer alone would be timed with its way into another library and back."""
    return case.operation == case.direction == "inference"


class Provider(NamedTuple):
    """``prepare`` makes of a module that infers another that does the same, or ``None`` if it has nothing to offer;
    ``call`` wraps the operation, ``step`` the whole of what is timed: operation, backward and optimizer."""

    name: str
    fused: bool  # whether it runs the case's fused callable, or its reference
    prepare: Callable[..., Step | None] | None = None  # of the module and the inputs; not timed
    call: Callable[[Step], Step] = unchanged
    step: Callable[[Step], Step] = unchanged
    devices: tuple[str, ...] = ("cpu", "cuda")
    serves: Callable[[Any], bool] = one_call  # which cases
    needs: tuple[str, ...] = ()  # packages; where one is missing this is left out

    @property
    def peer(self) -> bool:
        """Whether it is somebody else's: neither ours nor plain PyTorch."""
        return not self.fused and self.name != "reference"

    def is_for(self, case: Any, device: str) -> bool:
        """Whether it is to run ``case`` here."""
        if device not in self.devices or not self.serves(case) or (self.fused and case.fused is None):
            return False
        return all(map(find_spec, self.needs))


ONNX = ("onnx", "onnxscript")

# A case runs them in this order: should time run out, what is left is what compiles the longest.
PROVIDERS = (
    Provider("reference", False, serves=anything),  # eager PyTorch
    Provider("fused", True, serves=anything),
    Provider("fused-graph", True, step=captured, devices=("cuda",)),
    Provider("graph", False, step=captured, devices=("cuda",)),  # the honest baseline: eager without its launches
    Provider("folded", False, folded, serves=frozen),
    Provider("folded-graph", False, folded, step=captured, devices=("cuda",), serves=frozen_call),
    Provider("cudnn-fused", False, cudnn_fused, step=captured, devices=("cuda",), serves=frozen_call),
    Provider("onnxruntime", False, onnxruntime, devices=("cpu",), serves=whole_network, needs=(*ONNX, "onnxruntime")),
    Provider("openvino", False, openvino, devices=("cpu",), serves=whole_network, needs=(*ONNX, "openvino")),
    Provider("compile", False, call=compiled()),
    Provider("compile-freezing", False, call=compiled(), step=with_constants, devices=("cpu",), serves=frozen_call),
    Provider("max-autotune", False, folded, call=compiled("max-autotune"), devices=("cuda",)),
)
