"""A simulated GPU: tensors with `device` cuda:0 that compute on the CPU and otherwise behave as on a GPU.

A CPU tensor that meets a GPU tensor raises an error, as on a GPU. Every wait for the device is recorded with
the functions that led to it: reading a value, a copy that blocks, an operation whose result has as many
elements as the values say. The arithmetic is that of the CPU, bit for bit. PyTorch's C++ code sees CPU
tensors, so neither autocast nor torch.compile takes the GPU's path.
"""
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten._unique2.default,
         aten.unique_dim.default, aten.masked_select.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Waits(list):
    """The waits so far, each (operation, the project's functions on the stack, outermost first)."""
    forbidden = False

    def add(self, what: str):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in (ROOT, ROOT / "harness")]
        self.append((what, [f"{Path(f.filename).stem}.{f.name}" for f in frames]))
        if self.forbidden:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def outside(self, *functions: str) -> list:
        """Waits that none of the functions, each module.name, led to."""
        return [wait for wait in self if not set(functions) & set(wait[1])]


waits = Waits()


class GPUTensor(torch.Tensor):
    """Holds a CPU tensor in `held`."""
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device="cpu")

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"GPUTensor({self.held})"

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        waits.add("tolist")
        return self.held.tolist()

    def cpu(self):
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class OnGPU(TorchDispatchMode):
    """Inside it, tensors are made on the simulated GPU where the caller names that device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """One operation: refuses mixed devices, records a wait, computes on the CPU, wraps the result."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, GPUTensor)]
    device = kwargs.get("device")
    to_gpu = bool(on_gpu) or device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        refuse_mixed(func, args, [x for x in tensors if not isinstance(x, GPUTensor) and x.ndim])
        record_wait(func, args, kwargs)
    inner_args, inner = tree_map(lambda x: x.held if isinstance(x, GPUTensor) else x, (args, kwargs))
    inner |= {"device": CPU} if device is not None else {}
    inner |= {"pin_memory": False} if "pin_memory" in inner else {}
    out = func(*inner_args, **inner)
    if func is aten.copy_.default:
        return args[0]
    if not to_gpu:
        return out
    out = tree_map(lambda x: GPUTensor(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu else out


def move(x: torch.Tensor, *args, **options) -> torch.Tensor:
    """Tensor.to; gradients do not pass from one device to the other."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **options)
    to_gpu = isinstance(x, GPUTensor) if device is None else device.type == "cuda"
    if to_gpu == isinstance(x, GPUTensor):
        return plain_to(x, dtype or x.dtype)
    if not non_blocking:
        waits.add(f"copy to {device}")
    held = plain_to(x.detach().held if isinstance(x, GPUTensor) else x.detach(), dtype or x.dtype).clone()
    return GPUTensor(held) if to_gpu else held


plain_to, plain_tensor = torch.Tensor.to, torch.tensor


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def tensor(value, *, device="cpu", **options) -> torch.Tensor:
    return move(plain_tensor(value, **options), device)


plain_group = clip_grad._group_tensors_by_device_and_dtype


def group(tensors):
    """Tensors by device and type for clip_grad_norm_; C++ code does not see the simulated device."""
    groups = plain_group(tensors)
    return {(lists[0][0].device, dtype): (lists, places) for (_, dtype), (lists, places) in groups.items()}


def refuse_mixed(func, args, on_cpu):
    if not on_cpu or func is aten.copy_.default:
        return
    if func in INDEXED and isinstance(args[0], GPUTensor):
        waits.add("an index on the CPU is copied")
        return
    shapes = [tuple(x.shape) for x in on_cpu]
    raise RuntimeError(f"all tensors need to be on the same device: {func}, {shapes} on cpu")


def record_wait(func, args, kwargs):
    waiting = func in READS
    if func in INDEXED:
        waiting = any(x is not None and x.dtype == torch.bool for x in args[1])
    if func is aten.repeat_interleave.Tensor:
        waiting = kwargs.get("output_size") is None
    if func is aten.copy_.default:
        waiting = isinstance(args[0], GPUTensor) != isinstance(args[1], GPUTensor) and not any(args[2:])
    if waiting:
        waits.add(str(func))


@contextlib.contextmanager
def simulated_cuda():
    """Inside it, torch has the simulated GPU. Gives the list of waits, empty at first."""
    def set_sync_debug_mode(mode):
        waits.forbidden = mode == "error"
    replaced = {"_lazy_init": lambda: None, "is_available": lambda: True, "manual_seed_all": lambda _: None,
                "get_device_name": lambda *_: "simulated", "is_bf16_supported": lambda *_, **__: True,
                "synchronize": lambda: waits.add("synchronize"), "set_sync_debug_mode": set_sync_debug_mode}
    waits.clear()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.multiple(torch.cuda, **replaced), OnGPU(), \
                mock.patch.object(torch.Tensor, "to", move), \
                mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", group), \
                mock.patch.multiple(torch, tensor=tensor, Generator=Generator):
            yield waits
    finally:
        waits.forbidden = False
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
