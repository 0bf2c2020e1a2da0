"""The providers that compute an operation in a benchmark: eager PyTorch, fastperc, and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from io import BytesIO
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastperc import ConvBNReLU, ResidualBlock
from fastperc.engine.plan import steps_of

Function = Callable[..., Any]


def unchanged(function: Function) -> Function:
    """``function`` itself."""
    return function


def compiled(mode: str | None = None) -> Callable[[Function], Function]:
    """Applies ``torch.compile`` with static shapes."""

    def compile_function(function: Function) -> Function:
        torch.compiler.reset()
        compiled_function = torch.compile(function, mode=mode, dynamic=False)

        def step(*inputs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the step before may be overwritten
            return compiled_function(*inputs)

        return step

    return compile_function


def with_constant_weights(step: Function) -> Function:
    """Compiles ``step`` with weights as constants, so that batch norms are folded and weights packed for oneDNN.

    As an option of ``torch.compile`` this would come too late, since tracing already asks for it.
    """
    from torch._inductor import config

    with config.patch(freezing=True):
        step()
    return step


def as_cuda_graph(step: Function) -> Function:
    """``step`` as the replay of a CUDA graph: the GPU's time without Python's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # before the capture, libraries choose algorithms and kernels compile
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def folded(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """A copy of ``module`` in eval mode, in NHWC, with each batch norm folded into the convolution before it."""
    module = deepcopy(module)
    for layer in [*module.modules()]:
        for name, norm in [*layer.named_children()]:
            if isinstance(norm, nn.BatchNorm2d) and "norm" in name:  # norm, norm1, norm2 follow conv, conv1, conv2
                conv = getattr(layer, name.replace("norm", "conv"))
                fused = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
                setattr(layer, name.replace("norm", "conv"), fused)
                setattr(layer, name, nn.Identity())
    if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):  # in a network with other names
        module = fuse(module)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class CudnnLayer(nn.Module):
    """A layer's folded convolutions. One call of cuDNN does a convolution, its ReLU and any addition in between."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        like = next(layer.parameters())
        self.steps = [step.to(like.device, like.dtype) for step in steps_of(layer)]
        self.weights = [step.weight.contiguous(memory_format=torch.channels_last) for step in self.steps]

    def forward(self, x: Tensor) -> Tensor:
        skipped = x  # the input of the step before
        for step, weight in zip(self.steps, self.weights):
            geometry = [step.stride] * 2, [step.padding] * 2, [1, 1], 1
            if step.activation is None:
                y = F.conv2d(x, weight, step.bias, *geometry[:2])
                y = y + skipped if step.skip else y
            elif step.skip:
                y = torch.cudnn_convolution_add_relu(x, weight, skipped, 1.0, step.bias, *geometry)
            else:
                y = torch.cudnn_convolution_relu(x, weight, step.bias, *geometry)
            skipped, x = x, y
        return x


def cudnn_fused(module: nn.Module, *inputs: Tensor) -> nn.Module | None:
    """``module`` folded, with a :class:`CudnnLayer` for each layer that it can serve; ``None`` if it can serve none."""

    def replaced(layer: nn.Module) -> nn.Module:
        if isinstance(layer, (ConvBNReLU, ResidualBlock)):
            steps = [*steps_of(layer)]
            same_size = all(step.padding == step.kernel // 2 for step in steps)  # else the skip would need a crop
            if same_size and all(step.norm is None and step.padding_mode == "zeros" for step in steps):
                return CudnnLayer(layer)
        for name, child in layer.named_children():
            setattr(layer, name, replaced(child))
        return layer

    module = replaced(deepcopy(module))
    return folded(module) if any(isinstance(layer, CudnnLayer) for layer in module.modules()) else None


def onnx_model(module: nn.Module, image: Tensor) -> bytes:
    """``module`` folded, in float32, exported to ONNX for the shape of ``image``."""
    program = torch.onnx.export(folded(module).float(), (image.float(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime(module: nn.Module, image: Tensor) -> Function | None:
    """``module`` in an ONNX Runtime session; ``None`` in bfloat16, which it does not have on a CPU."""
    if image.dtype != torch.float32:
        return None
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(onnx_model(module, image), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def openvino(module: nn.Module, image: Tensor) -> Function:
    """``module`` compiled by OpenVINO; it takes and returns float32 and computes in the dtype of ``image``."""
    from openvino import Core

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[image.dtype],
    }
    core = Core()
    model = core.compile_model(core.read_model(BytesIO(onnx_model(module, image))), "CPU", settings)
    return lambda image: torch.from_numpy(model(image.float().numpy())[0])


# Which cases a provider serves. A video is many calls with copies between, which no graph or compiler takes as one.
def every_case(case: Any) -> bool:
    """All cases."""
    return True


def no_video(case: Any) -> bool:
    """Cases of one call."""
    return case.direction != "video"


def inference_or_video(case: Any) -> bool:
    """Cases with constant weights."""
    return case.infers


def inference(case: Any) -> bool:
    """Cases of one call with constant weights."""
    return case.direction == "inference"


def network_inference(case: Any) -> bool:
    """Whole networks in one call: a single layer would be timed with the conversion to another library and back."""
    return case.direction == "inference" and case.operation in ("inference", "gallery")


def compiled_call(case: Any) -> bool:
    """Cases of one call that torch.compile is tried on."""
    return no_video(case) and case.compiled


def compiled_inference(case: Any) -> bool:
    """Those with constant weights."""
    return inference(case) and case.compiled


class Provider(NamedTuple):
    """Who computes a case, and how.

    In inference ``prepare`` turns the module into another that computes the same; it returns ``None`` if it cannot.
    ``wrap_call`` wraps the operation, ``wrap_step`` everything that is timed: operation, backward and optimizer.
    """

    name: str
    fused: bool  # whether it runs the case's fused function, or its reference
    prepare: Callable[..., Function | None] | None = None  # takes the module and the inputs; not timed
    wrap_call: Callable[[Function], Function] = unchanged
    wrap_step: Callable[[Function], Function] = unchanged
    devices: tuple[str, ...] = ("cpu", "cuda")
    serves: Callable[[Any], bool] = no_video  # whether it runs a case
    needs: tuple[str, ...] = ()  # packages; without them the provider is left out

    @property
    def is_other_library(self) -> bool:
        """Whether it is neither fastperc nor eager PyTorch."""
        return not self.fused and self.name != "reference"

    def is_for(self, case: Any, device: str) -> bool:
        """Whether it runs ``case`` on ``device``."""
        if device not in self.devices or not self.serves(case) or (self.fused and case.fused is None):
            return False
        return all(map(find_spec, self.needs))


ONNX = ("onnx", "onnxscript")
GPU = ("cuda",)
CPU = ("cpu",)

# In this order for each case: if time runs out, those that compile the longest are left over.
PROVIDERS = (
    Provider("reference", False, serves=every_case),
    Provider("fused", True, serves=every_case),
    Provider("fused-graph", True, wrap_step=as_cuda_graph, devices=GPU),
    Provider("graph", False, wrap_step=as_cuda_graph, devices=GPU),  # the fair baseline: eager without its launches
    Provider("folded", False, folded, serves=inference_or_video),
    Provider("folded-graph", False, folded, wrap_step=as_cuda_graph, devices=GPU, serves=inference),
    Provider("cudnn-fused", False, cudnn_fused, wrap_step=as_cuda_graph, devices=GPU, serves=inference),
    Provider("onnxruntime", False, onnxruntime, devices=CPU, serves=network_inference, needs=(*ONNX, "onnxruntime")),
    Provider("openvino", False, openvino, devices=CPU, serves=network_inference, needs=(*ONNX, "openvino")),
    Provider("compile", False, wrap_call=compiled(), serves=compiled_call),
    Provider(
        "compile-freezing",
        False,
        wrap_call=compiled(),
        wrap_step=with_constant_weights,
        devices=CPU,
        serves=compiled_inference,
    ),
    Provider("max-autotune", False, folded, wrap_call=compiled("max-autotune"), devices=GPU, serves=compiled_call),
)
