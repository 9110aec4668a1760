"""Fake CUDA tensors, and a check that fails if an operation on them makes the host wait for the device.

Fake tensors have a device and a shape but no contents, so no GPU is needed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqvae2.priors.toom_cook import make_transforms

CUDA = torch.device("cuda", 0)
_TOLD = torch.device("meta")
# Operations whose result, or the size of it, the host has to know.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "histc", "argwhere"}
COPIES = {"_to_copy", "copy_", "copy", "_pin_memory", "set_", "lift_fresh"}


class HostWaitError(AssertionError):
    """An operation would make the host wait for the device."""


class NoHostWaits(TorchDispatchMode):
    """Raise HostWaitError if an operation on fake CUDA tensors makes the host wait, or mixes in tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # C++ code is told that tensors on the GPU are on the meta device. Otherwise autograd would look for a stream.
        if func is torch.ops.prim.device.default:
            return _TOLD if args[0].fake_device.type == "cuda" else args[0].fake_device
        if kwargs.get("device") == _TOLD:
            kwargs["device"] = CUDA
        if not self.active:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.partition("::")[2]
        if any(each.device.type == "cuda" for each in inputs):
            self._check_inputs(name, inputs, args)
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs, result)
        return result

    def _check_inputs(self, name: str, inputs: list[Tensor], args: Any) -> None:
        if name in READS:
            raise HostWaitError(f"{name} reads a tensor on the device")
        if name.startswith("index"):
            masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
            if masks and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                raise HostWaitError(f"{name} with a boolean mask")
        if name not in COPIES and any(each.device.type == "cpu" and each.ndim for each in inputs):
            raise HostWaitError(f"{name} with a tensor on the CPU")

    def _check_copy(self, name: str, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        if source.device.type == result.device.type:
            return
        if result.device.type == "cpu":
            raise HostWaitError(f"{name} from the device to the host")
        non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if not non_blocking:
            raise HostWaitError(f"{name} from the host to the device that blocks")


@contextmanager
def fake_cuda() -> Iterator[NoHostWaits]:
    """Run the block with fake tensors, under a check that is active once its attribute `active` is set."""
    with ExitStack() as stack:
        # In inference mode, composite operations would arrive in one piece, with the device that C++ code is told.
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", return_value=None))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__exit__", return_value=None))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the choice of another one needs a GPU
        make_transforms.cache_clear()  # fake ones must not stay in the cache either
        stack.callback(make_transforms.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(NoHostWaits())


def move_to_fake_cuda(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on a GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device=CUDA)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CUDA)
