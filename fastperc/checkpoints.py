"""Networks on disk: fastperc's ``.safetensors`` files, training checkpoints, and fast_neural_style's state_dicts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastperc._version import __version__
from fastperc.devices import find_device
from fastperc.errors import InputError
from fastperc.files import NotOnlyTensors, PathLike, read_tensors, write_tensors
from fastperc.hub import SCHEME, Address
from fastperc.models import SRCNN, SuperResolutionNet, TransformNet
from fastperc.models.common import WRAPPER_NAMES, unwrapped
from fastperc.weights import STYLES, SUPER_RESOLUTION

NETWORKS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (TransformNet, SuperResolutionNet, SRCNN)}
# Prefixes of the names of a training checkpoint's other tensors: the optimizer's, and the network of mean weights.
OPTIMIZER, AVERAGE = "optimizer.", "average."
IN_PYTHON = "load the weights in Python and call fastperc.freeze, or write an archive by torch.export.save"
MAX_NUMBER = 1 << 16  # in the config of a network


def save(
    net: nn.Module,
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    training: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    average: nn.Module | None = None,
) -> None:
    """Writes ``net`` as a ``.safetensors`` file, atomically.

    The file's metadata holds ``fastperc`` (the version), ``network`` (the class), ``config`` (the arguments that
    rebuild it) and ``training`` (how it was trained). The last two are JSON.

    Args:
        net: one of fastperc's networks; what torch.compile, DataParallel and the like wrap is saved without them.
        path: the file to write.
        dtype: dtype in which weights are stored; running statistics keep theirs. Default: their own.
        training: any JSON-serialisable mapping.
        optimizer: its state is stored too, so that training can resume.
        average: a network of the same shape, whose tensors are stored too: the mean of the weights so far.

    Raises:
        TypeError: another kind of network, or one whose layers were exchanged: :func:`load` could not rebuild it.
        ValueError: the network is on the meta device.
        FloatingPointError: a weight is not finite, or not in ``dtype``. An existing file stays as it was.
        OSError: the system refuses to write the file.
    """
    net = unwrapped(net)
    if NETWORKS.get(type(net).__name__) is not type(net):
        raise TypeError(f"save takes {', '.join(NETWORKS)}, got {type(net).__name__}; save others by torch.save")
    weights = {WRAPPER_NAMES.sub("", name): tensor for name, tensor in net.state_dict().items()}
    _check_can_be_rebuilt(net, weights)
    if damaged_name := first_not_finite(weights):
        raise FloatingPointError(f"the network's {damaged_name} has values that are not finite, so it is not saved")
    tensors = {
        name: tensor.to(dtype) if dtype is not None and _stored_in(dtype, name, tensor) else tensor
        for name, tensor in weights.items()
    }
    if large_name := first_not_finite(tensors):
        raise FloatingPointError(f"the network's {large_name} has values that do not fit in {dtype}; it is not saved")
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in state.items()}
    if average is not None:
        tensors |= {f"{AVERAGE}{name}": tensor for name, tensor in average.state_dict().items()}
    metadata = dict(
        fastperc=__version__,
        network=type(net).__name__,
        config=json.dumps(net.config),
        training=json.dumps(training or {}),
    )
    write_tensors(path, tensors, metadata)


def _check_can_be_rebuilt(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises a ``TypeError`` or a ``ValueError`` unless ``weights`` are what the network's ``config`` builds."""
    with torch.device("meta"):
        expected = type(net)(**net.config).state_dict()  # type: ignore[arg-type]
    differing = [name for name in {**expected, **weights} if _shape(expected, name) != _shape(weights, name)]
    if differing:
        raise TypeError(
            f"layers of this {type(net).__name__} were exchanged (see {differing[0]}), so load could not rebuild it; "
            f"save its state_dict() by torch.save"
        )
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("the network is on the meta device, which holds no weights; load them before saving")


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _stored_in(dtype: torch.dtype, name: str, tensor: Tensor) -> bool:
    """Whether ``tensor`` is stored in ``dtype``: half precision may not hold a variance."""
    statistic = name.endswith(("running_mean", "running_var"))
    return tensor.is_floating_point() and not (statistic and dtype.itemsize < tensor.dtype.itemsize)


def load(name_or_path: PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a network, in eval mode and float32, from a file, the Hugging Face Hub, or by the name of one that ships.

    Reads fastperc's ``.safetensors`` files and state_dicts of PyTorch's fast_neural_style example at any width. Old
    state_dicts with ``running_mean`` keys and those saved from ``DataParallel`` work too.

    Args:
        name_or_path: such as ``"great_wave"``, ``"runs/mine/model.safetensors"`` or
            ``"hf://owner/name/model.safetensors@revision"``, see :class:`fastperc.hub.Address`.
        device: the device to load it on.

    Raises:
        InputError: no such file or name, a damaged file, another architecture, weights that are not finite, no such
            device; a file on the hub that cannot be downloaded.
    """
    target = torch.device("meta") if str(device) == "meta" else find_device(str(device))
    on_hub = isinstance(name_or_path, str) and name_or_path.startswith(SCHEME)
    path = Address.parse(str(name_or_path)).download() if on_hub else Path(name_or_path)
    if not path.exists():
        path = (STYLES | SUPER_RESOLUTION).get(str(name_or_path), path)
    try:
        tensors, metadata = read_tensors(path)
    except NotOnlyTensors as error:
        raise InputError(f"{error}; for another network {IN_PYTHON}") from None
    if "network" in metadata:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith((OPTIMIZER, AVERAGE))}
        net = _build(path, metadata, tensors)
    else:
        net, tensors = _from_example(path, tensors)
    load_weights(net, tensors, path)
    return net.eval().to(target)


def load_training(
    path: PathLike, net: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Loads a training checkpoint's weights into ``net``, its moments into ``optimizer``, and the mean of its weights
    into ``average`` if one is given, bit for bit.

    Raises:
        InputError: the file cannot be read, or belongs to another network.
    """
    tensors, _ = read_tensors(path)
    means = {name.removeprefix(AVERAGE): tensors.pop(name) for name in list(tensors) if name.startswith(AVERAGE)}
    parameters = dict(enumerate(net.parameters()))
    state: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(OPTIMIZER)]:
        index, _, key = name.removeprefix(OPTIMIZER).partition(".")
        parameter = parameters.get(int(index)) if index.isdecimal() else None
        if parameter is None:
            raise InputError(f"{path}: {name} belongs to no parameter of this network")
        value = tensors.pop(name)
        if value.shape == parameter.shape:  # a moment has the memory format of its parameter
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(index), {})[key] = value
    load_weights(net, tensors, path)
    if average is not None:
        load_weights(average, means, path)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def read_training(path: PathLike) -> dict[str, Any]:
    """The ``training`` metadata of a file that :func:`save` wrote; empty if it has none.

    Raises:
        InputError: the file cannot be read, or its metadata is damaged.
    """
    _, metadata = read_tensors(path)
    try:
        return dict(json.loads(metadata.get("training", "{}")))
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: its training metadata is damaged") from None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None."""
    return next((name for name, tensor in tensors.items() if not _all_finite(tensor)), None)


def _all_finite(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())  # float8 has no isfinite


def _build(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> nn.Module:
    kind = metadata["network"]
    if kind not in NETWORKS:
        raise InputError(f"{path}: holds a {kind}, which fastperc {__version__} does not know; use a newer fastperc")
    try:
        config = json.loads(metadata["config"])
        numbers = [number for value in config.values() for number in (value if isinstance(value, list) else [value])]
        if any(isinstance(number, (int, float)) and not 0 <= number <= MAX_NUMBER for number in numbers):
            raise ValueError(f"a number of {config} is not between 0 and {MAX_NUMBER}")
        with torch.device("meta"):  # takes no memory, whatever the numbers are
            check_shapes(NETWORKS[kind](**config), tensors, path)
        return NETWORKS[kind](**config)
    except InputError:
        raise
    except Exception as error:  # a damaged config can raise anything in the constructors
        raise InputError(f"{path}: its config does not build a {kind} ({type(error).__name__}: {error})") from None


def check_shapes(net: nn.Module, tensors: Mapping[str, Tensor], path: PathLike) -> None:
    """Raises an ``InputError`` unless ``tensors``, of the file ``path``, have the names and shapes of the network's."""
    expected = net.state_dict()
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        differences = [f"lacks {name}" for name in missing[:1]] + [f"has {name}" for name in surplus[:1]]
        raise InputError(f"{path}: not a {type(net).__name__}: it {' and '.join(differences)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{path}: {name} is {list(tensor.shape)}, the network's is {list(expected[name].shape)}")
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            raise InputError(f"{path}: {name} is {tensor.dtype}, the network's is {expected[name].dtype}")


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], path: PathLike) -> None:
    """Loads ``tensors``, of the file ``path``, into the network.

    Raises:
        InputError: other names or shapes than the network's, or values that are not finite.
    """
    check_shapes(net, tensors, path)
    if damaged_name := first_not_finite(tensors):
        raise InputError(f"{path}: {damaged_name} has values that are not finite")
    net.load_state_dict(dict(tensors))


# Layers of PyTorch's fast_neural_style example → layers of TransformNet.
EXAMPLE_LAYERS = {
    **{"conv1.conv2d": "stem.conv", "in1": "stem.norm"},
    **{"conv2.conv2d": "down.0.conv", "in2": "down.0.norm", "conv3.conv2d": "down.1.conv", "in3": "down.1.norm"},
    **{f"res{i + 1}.conv{j}.conv2d": f"blocks.{i}.conv{j}" for i in range(5) for j in (1, 2)},
    **{f"res{i + 1}.in{j}": f"blocks.{i}.norm{j}" for i in range(5) for j in (1, 2)},
    **{"deconv1.conv2d": "up.0.conv", "in4": "up.0.norm", "deconv2.conv2d": "up.1.conv", "in5": "up.1.norm"},
    **{"deconv3.conv2d": "head"},
}
# In 2017 the example had an instance norm of its own, with these names, and an epsilon of 1e-9.
OLD_NAMES = {"scale": "weight", "shift": "bias"}
# Before PyTorch 0.4 instance norms stored these and never used them.
UNUSED_STATISTICS = re.compile(r"in\d\.(running_mean|running_var|num_batches_tracked)$")


def _from_example(path: Path, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    tensors = {WRAPPER_NAMES.sub("", name): tensor for name, tensor in tensors.items()}
    first = tensors.get("conv1.conv2d.weight")
    if first is None and tensors.keys() & {"stem.conv.weight", "conv3.weight"}:
        raise InputError(f"{path}: a state_dict alone does not say which network it is of; write it by fastperc.save")
    if first is None or first.dim() != 4 or not len(first):
        raise InputError(
            f"{path}: neither a network saved by fastperc nor a state_dict of PyTorch's fast_neural_style example "
            f"(its first tensor is {next(iter(tensors), 'missing')}); `fastperc convert` reads those of other "
            f"projects; for another network {IN_PYTHON}"
        )
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not UNUSED_STATISTICS.search(name):
            renamed[f"{EXAMPLE_LAYERS.get(layer, layer)}.{OLD_NAMES.get(kind, kind)}"] = tensor
    with torch.device("meta"):
        check_shapes(TransformNet("examples", width=first.shape[0]), renamed, path)
    return TransformNet("examples", width=first.shape[0]), renamed
