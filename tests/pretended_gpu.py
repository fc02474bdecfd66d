"""A CUDA device that is not there: tensors say "cuda", and their numbers lie in CPU tensors.

    with pretended_gpu() as gpu:
        model = Transformer.from_config(config, device="cuda")
        samples = generate(model, prompts, 4, 32)
    assert gpu.waits.total() < 20, gpu.report()

What a GPU refuses, operands on two devices, raises here too. What a GPU's speed depends on is
counted: kernels by operation, host waits by the line that causes them, and which attention kernel
PyTorch 2.13 takes for which shapes. Numbers are those of the CPU, bit for bit. Left out: time,
memory, streams, and all kernels but the one device's.

How it works: a PretendedTensor is a wrapper whose C++ device is "meta", so that PyTorch's Python
dispatch decides everything. A dispatch mode sees each operation and runs it on the inner CPU
tensors. Three things need more: "cuda" in a call of Tensor.to or torch.tensor would reach C++
code that has no CUDA; attention and RMSNorm are one kernel each on CUDA, but several operations
for a tensor on "meta"; and torch.cuda itself is replaced by stubs.
"""

import contextlib
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint.filesystem as checkpoint_files
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parent.parent)
HERE = str(Path(__file__).resolve())
GIB = 2**30
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
# Operations that launch no kernel.
VIEWS = {
    *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "lift_fresh", "narrow"),
    *("permute", "reshape", "_reshape_alias", "select", "set_", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"),
    *("_unsafe_view", "view", "view_as", "is_same_size", "empty", "empty_like"),
    *("empty_strided", "new_empty", "new_empty_strided", "resize_"),
}
# Operations whose result, or its shape, the host has to wait for.
WAITS = {
    *("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"),
    *("repeat_interleave", "unique_consecutive", "unique_dim", "_unique2"),
}
HOST_RESULTS = {"_local_scalar_dense", "equal", "is_nonzero"}


class Gpu:
    """What happened since the start, or the last reset()."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.kernels = Counter()  # operation -> launches
        self.waits = Counter()  # "file:line what" -> times that the host waited
        self.attentions = Counter()  # (kernel, query shape, key shape) -> calls
        self.padded_masks = 0  # attention masks that PyTorch copies into wider ones

    def wait(self, what):
        self.waits[f"{caller()} {what}"] += 1

    def report(self):
        return "\n".join(f"{count:5} {line}" for line, count in self.waits.most_common())


def caller():
    """file:line of the innermost line of the repository that is not in this file."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        # A virtual environment may lie in the repository, with torch in it.
        if name.startswith(ROOT) and name != HERE and "site-packages" not in name:
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def on_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


class PretendedTensor(torch.Tensor):
    """`numbers` is the CPU tensor; shape, strides and dtype are the same."""

    gpu = None  # set while a pretended_gpu() is open

    @staticmethod
    def __new__(cls, numbers):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=META,
        )
        tensor.numbers = numbers
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"PretendedTensor({self.numbers})"

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        return PretendedTensor(self.numbers.clone())

    @classmethod
    def __torch_dispatch__(cls, func, classes, args=(), kwargs=None):
        return run(cls.gpu, func, args, kwargs or {})


def map_tensors(function, value):
    """value with function(tensor) for each tensor in its lists and dicts."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(function, x) for x in value])
    if isinstance(value, dict):
        return {key: map_tensors(function, x) for key, x in value.items()}
    return value


def wrap(x):
    return x if isinstance(x, PretendedTensor) else PretendedTensor(x)


def unwrap(x):
    return x.numbers if isinstance(x, PretendedTensor) else x


class Dispatch(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, classes, args=(), kwargs=None):
        return run(self.gpu, func, args, kwargs or {})


def run(gpu, func, args, kwargs):
    """One operation: copies, factories, operations on the CPU, and those on the GPU."""
    name = func._schema.name.split("::")[1]
    tensors = []
    map_tensors(tensors.append, [args, kwargs])
    pretended = [x for x in tensors if isinstance(x, PretendedTensor)]
    if name == "_to_copy":
        return run_copy(gpu, func, args[0], kwargs)
    if name == "copy_" and pretended:
        target, source = args[:2]
        if isinstance(target, PretendedTensor) == isinstance(source, PretendedTensor):
            gpu.kernels[name] += 1
        elif not getattr(source, "pinned", False):
            gpu.wait("copy_ between devices")
        unwrap(target).copy_(unwrap(source))
        return target
    if not pretended:
        device = torch.device(kwargs.get("device") or "cpu").type
        # C++ makes the 0 of torch.where(mask, x, 0.0) on the wrapper's own device.
        if device != "cuda" and not (device == "meta" and name == "scalar_tensor"):
            return func(*args, **kwargs)
        if name not in VIEWS:
            gpu.kernels[name] += 1
        return wrap(func(*args, **(kwargs | {"device": "cpu"})))
    others = [x for x in tensors if not isinstance(x, PretendedTensor) and x.ndim > 0]
    if others and not (name == "index" and isinstance(args[0], PretendedTensor)):
        shapes = [tuple(x.shape) for x in others]
        raise RuntimeError(
            f"{func} at {caller()}: operands on cuda and on {others[0].device}: {shapes}"
        )
    count(gpu, func, name, args, others)
    if "device" in kwargs:
        kwargs = kwargs | {"device": "cpu"}
    result = func(*map_tensors(unwrap, args), **map_tensors(unwrap, kwargs))
    if name in HOST_RESULTS:
        return result
    # What an operation changed in place comes back as the wrapper that it came in.
    known = {id(x.numbers): x for x in pretended}
    return map_tensors(lambda x: known[id(x)] if id(x) in known else wrap(x), result)


def run_copy(gpu, func, source, kwargs):
    """Tensor.to and its like, within a device or from one to the other."""
    device = kwargs.get("device")
    to_gpu = isinstance(source, PretendedTensor) if device is None else on_gpu(device)
    options = {key: value for key, value in kwargs.items() if key != "device"}
    if isinstance(source, PretendedTensor):
        if to_gpu:
            gpu.kernels["_to_copy"] += 1
            return wrap(func(source.numbers, **options))
        gpu.wait("copy to the host")
        return func(source.numbers, **options)
    if not to_gpu:
        return func(source, **kwargs)
    if not (getattr(source, "pinned", False) and kwargs.get("non_blocking")):
        gpu.wait("copy to the GPU from memory that is not pinned")
    return wrap(func(source, **options))


def count(gpu, func, name, args, cpu_indices):
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            gpu.wait("index by booleans")
        if cpu_indices:
            gpu.wait("index from the CPU")
    by_number = name == "repeat_interleave" and "self_int" in func._overloadname
    if name in WAITS and not by_number:
        gpu.wait(name)
    if name not in VIEWS:
        gpu.kernels[name] += 1


class _OneKernel(torch.autograd.Function):
    """A function of tensors that is one kernel on CUDA, and `backward_kernels` for its gradient."""

    @staticmethod
    def forward(ctx, name, backward_kernels, function, *tensors):
        gpu = PretendedTensor.gpu
        gpu.kernels[name] += 1
        ctx.save_for_backward(*tensors)
        ctx.rest = (name, backward_kernels, function)
        return wrap(function(*[x.numbers for x in tensors]))

    @staticmethod
    def backward(ctx, grad):
        name, backward_kernels, function = ctx.rest
        PretendedTensor.gpu.kernels[f"{name} backward"] += backward_kernels
        with torch.enable_grad():
            inputs = [x.numbers.detach().requires_grad_() for x in ctx.saved_tensors]
            grads = torch.autograd.grad(function(*inputs), inputs, grad.numbers)
        return None, None, None, *map(wrap, grads)


def attention_kernel(q, k, masked, grouped):
    """The kernel that PyTorch 2.13 takes, from its sdp_utils.cpp, cuDNN's switched off."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and not masked and q.shape[-1] <= 256:
        return "flash"
    repeated = grouped and q.shape[1] != k.shape[1]  # the efficient kernel knows no grouped heads
    aligned = q.shape[-1] % (8 if half else 4) == 0
    if q.dtype != torch.float64 and not repeated and aligned:
        return "efficient"
    return "math"


def cuda_stubs(gpu):
    """(object, attribute, what takes its place) of torch.cuda."""
    return [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "synchronize", lambda *_: gpu.wait("synchronize")),
        (torch.cuda, "mem_get_info", lambda *_: (80 * GIB, 80 * GIB)),
        (torch.cuda, "max_memory_allocated", lambda *_: GIB),
        (torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        (torch.cuda, "get_device_name", lambda *_: "a pretended GPU"),
        (torch.cuda, "Event", lambda **_: Event(gpu)),
    ]


def replacements(gpu):
    """The same of everything else that is more than single operations."""
    attention = F.scaled_dot_product_attention
    rms_norm = F.rms_norm
    to = torch.Tensor.to
    make_tensor = torch.tensor
    make_as_tensor = torch.as_tensor

    def pretended_attention(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if not isinstance(q, PretendedTensor):
            return attention(q, k, v, attn_mask, dropout_p, **options)
        kernel = attention_kernel(q, k, attn_mask is not None, enable_gqa)
        gpu.attentions[kernel, tuple(q.shape), tuple(k.shape)] += 1
        if attn_mask is not None and any(stride % 16 for stride in attn_mask.stride()[:-1]):
            gpu.padded_masks += 1
            gpu.kernels["padding of a mask"] += 2
        if kernel == "math":
            gpu.kernels["math attention"] += 8

        def function(q, k, v):
            out = attention(q, k, v, unwrap(attn_mask), dropout_p, **options)
            # CUDA's kernels lay their result out by token, not by head.
            return out.transpose(1, 2).contiguous().transpose(1, 2)

        return _OneKernel.apply(f"{kernel} attention", 3, function, q, k, v)

    def pretended_rms_norm(x, shape, weight=None, eps=None):
        if not isinstance(x, PretendedTensor):
            return rms_norm(x, shape, weight, eps)
        return _OneKernel.apply("rms_norm", 3, lambda x, w: rms_norm(x, shape, w, eps), x, weight)

    def place(value):
        is_device = isinstance(value, (str, torch.device))
        return META if is_device and torch.device(value).type == "cuda" else value

    def pretended_to(self, *args, **kwargs):
        return to(self, *map(place, args), **{key: place(value) for key, value in kwargs.items()})

    def pretended_tensor(data, *, dtype=None, device=None, requires_grad=False):
        tensor = make_tensor(data, dtype=dtype)
        tensor = tensor if device is None else tensor.to(device)
        return tensor.requires_grad_(requires_grad)

    def pretended_as_tensor(data, dtype=None, device=None):
        if isinstance(data, torch.Tensor):
            return data.to(dtype=dtype or data.dtype, device=device or data.device)
        return make_as_tensor(data, dtype=dtype).to(device or "cpu")

    def serial_loader(resolve, **_):  # that of a GPU copies on a stream of its own
        return checkpoint_files._SerialCpuLoader(resolve)

    def pin_memory(self, *_):
        pinned = self.clone()
        pinned.pinned = True
        return pinned

    return [
        (F, "scaled_dot_product_attention", pretended_attention),
        (F, "rms_norm", pretended_rms_norm),
        (torch.Tensor, "to", pretended_to),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch, "tensor", pretended_tensor),
        (torch, "as_tensor", pretended_as_tensor),
        (checkpoint_files, "_OverlappingCpuLoader", serial_loader),
    ]


class Event:
    """In place of torch.cuda.Event: work is done when it is asked for."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.moment = time.perf_counter()

    def synchronize(self):
        self.gpu.wait("an event")

    def elapsed_time(self, end):
        return 1000 * (end.moment - self.moment)


@contextlib.contextmanager
def pretended_gpu():
    """Everything inside may use the device "cuda". -> Gpu, the counts."""
    gpu = Gpu()
    only_cpu = torch._C._only_lift_cpu_tensors()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor would build on another device
    with contextlib.ExitStack() as stack:
        for owner, name, new in cuda_stubs(gpu) + replacements(gpu):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(mock.patch.object(PretendedTensor, "gpu", gpu))
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_cpu)
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, cudnn)
        stack.enter_context(Dispatch(gpu))
        yield gpu
