"""A CUDA device for machines without one: its tensors say they are on cuda:0, and their numbers lie on the CPU.

Inside `fake_cuda()` torch believes in one GPU. As on a real one, an operation raises if its tensors are on two devices,
if a generator of the CPU is to fill a tensor of the GPU, or if a tensor is read by NumPy before it was copied to the
CPU. Operations that a real one makes of floating-point atomics, which give other bits each time, raise as well.
`Waits` counts, by line of the package, what makes the host wait for the device: reading a number, operations whose
result's size depends on data, and copies between host and device that are not asynchronous.

How to see this: tensors of the device are a subclass of Tensor. Every operation on them, and (by a mode) every
operation that makes one, ends in `_run`, which unpacks them, computes on the CPU, and packs the result. To C++ they are
on "meta", the only device besides the CPU that every build of torch knows. Sparse products are those of the plain
reference: Triton's kernels have tests of their own (test_triton.py).
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
META = torch.device("meta")

COPIES = {"copy_", "_to_copy", "lift_fresh", "lift_fresh_copy"}
"""Operations that may meet tensors of two devices."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations on the device that take indices of the CPU."""
READS_A_NUMBER = {"_local_scalar_dense", "equal", "is_nonzero"}
ATOMIC_SUMS = {"index_add", "index_add_", "scatter_add", "scatter_add_"}
SIZE_DEPENDS_ON_DATA = {"nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive"}


class OnCuda(torch.Tensor):
    """A tensor of the device that is not there."""

    numbers: torch.Tensor
    """What it holds, on the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnCuda":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=META,
        )
        made.numbers = numbers
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCuda({self.numbers})"

    def tolist(self) -> Any:
        _waits.note("tolist")
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def cpu(self, *_: Any) -> torch.Tensor:
        return self.to("cpu")

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin a tensor of cuda:0, only dense tensors of the CPU can be pinned")

    def __deepcopy__(self, _: Any) -> torch.Tensor:
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if getattr(self, "_is_param", False) else copy

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()


class Waits:
    """How often the host waited for the device, by line of the package and operation."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.refused = False
        """Whether waiting raises, as it does while a graph is captured."""

    def note(self, what: str) -> None:
        """Count one more."""
        place = f"{_line_of_the_package()}: {what}"
        if self.refused:
            raise RuntimeError(f"operation not permitted when stream is capturing ({place})")
        self.places[place] += 1

    @property
    def n(self) -> int:
        """All of them together."""
        return self.places.total()


_waits = Waits()


def _line_of_the_package() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/saerelay/")
        if folder:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _wants_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: check its devices, count its waits, compute on the CPU."""
    flat, _ = tree_flatten((args, kwargs))
    on_cuda = [t for t in flat if isinstance(t, OnCuda)]
    on_cpu = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnCuda)]
    assert not any(t.is_meta for t in on_cpu), f"{func} got a tensor that holds nothing"
    name = func._schema.name.split("::")[1]
    asked = kwargs.get("device")
    if on_cuda:
        _check_devices(name, args, on_cpu)
        if name in ATOMIC_SUMS and args[0].is_floating_point():
            _check_repeatable(name, index=_unpacked(args[2]))
    generator = kwargs.get("generator")
    if generator is not None and (on_cuda or _wants_cuda(asked)):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({_line_of_the_package()})")
    _count_waits(name, args, kwargs, on_cuda, on_cpu)

    if _recording is not None:
        _recording.keep_what_is_written(func, args, kwargs)
    call_args, call_kwargs = tree_map(_unpacked, (args, kwargs))
    if asked is not None:
        call_kwargs["device"] = CPU
    result = func(*call_args, **call_kwargs)
    is_on_cuda = _wants_cuda(asked) if asked is not None else bool(on_cuda)
    packed = {id(t.numbers): t for t in on_cuda}  # what an operation returns in place stays the same tensor

    def pack(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in packed:
            return packed[id(value)]
        return OnCuda(value) if is_on_cuda else value

    outcome = tree_map(pack, result)
    if _recording is not None and on_cuda:
        _recording.operations.append(lambda: _again(func, call_args, call_kwargs, result))
    return outcome


def _unpacked(value: Any) -> Any:
    return value.numbers if isinstance(value, OnCuda) else value


def _check_devices(name: str, args: tuple, on_cpu: list[torch.Tensor]) -> None:
    """Raise where an operation on tensors of the device meets tensors of the CPU, other than single numbers."""
    if name in COPIES:
        return
    strangers = [t for t in on_cpu if t.dim() > 0 or name == "_fused_adam_"]
    if name in INDEXING and isinstance(args[0], OnCuda):
        strangers = [t for t in strangers if not any(t is index for index in args[1])]
    if strangers:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu ({_line_of_the_package()})"
        )


def _check_repeatable(name: str, index: torch.Tensor) -> None:
    """Raise where several terms are added to one place; the reference stands for kernels that sort them first."""
    place = _line_of_the_package()
    if index.unique().numel() < index.numel() and "kernels/reference.py" not in place:
        raise RuntimeError(f"{name} adds with atomics where indices repeat: other bits each time ({place})")


def _count_waits(name: str, args: tuple, kwargs: dict[str, Any], on_cuda: list, on_cpu: list) -> None:
    """Count an operation that makes the host wait."""
    if _is_synchronous_copy(name, args, kwargs, on_cuda, on_cpu):
        _waits.note("copy between host and device")
    if not on_cuda:
        return
    if name in READS_A_NUMBER | SIZE_DEPENDS_ON_DATA:
        _waits.note(name)
    if name in ("masked_fill", "masked_fill_") and isinstance(args[2], torch.Tensor):
        _waits.note(f"{name} with a tensor, whose number is read")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _waits.note(name)
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _waits.note("index by a mask")
        if any(not isinstance(index, OnCuda) for index in indices):
            _waits.note("indices copied to the device")


def _is_synchronous_copy(name: str, args: tuple, kwargs: dict[str, Any], on_cuda: list, on_cpu: list) -> bool:
    is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    crosses = name == "copy_" and len(on_cuda) == 1 and len(on_cpu) == 1
    if name == "_to_copy" and kwargs.get("device") is not None and (on_cuda or on_cpu):
        crosses = bool(on_cuda) != _wants_cuda(kwargs["device"])
    return crosses and not is_asynchronous


# --- CUDA graphs: what was recorded is computed again into the same tensors ---------------------

_recording: "Graph | None" = None


def _again(func: Any, args: tuple, kwargs: dict[str, Any], before: Any) -> None:
    fresh, _ = tree_flatten(func(*args, **kwargs))
    for old, new in zip(tree_flatten(before)[0], fresh, strict=True):
        if isinstance(old, torch.Tensor) and old is not new and old.numel():
            old.copy_(new)


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors that were written to while it was recorded, and what was in them."""

    def replay(self) -> None:
        for operation in self.operations:
            operation()

    def pool(self) -> None: ...

    def keep_what_is_written(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember what an operation that is recorded overwrites."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in tree_flatten(given)[0]:
                if isinstance(tensor, OnCuda):
                    self.before.append((tensor.numbers, tensor.numbers.clone()))


@contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    """`torch.cuda.graph`: waiting is refused, and when it is over nothing has been computed."""
    global _recording
    _recording = graph
    _waits.refused = True
    try:
        yield
    finally:
        _recording = None
        _waits.refused = False
        for tensor, numbers in reversed(graph.before):
            tensor.copy_(numbers)
        graph.before.clear()


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


# --- the device ---------------------------------------------------------------------------------


_absent = False
"""Whether modes look away: transformers uses "meta" itself while it loads a model."""


def _without_device(function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        global _absent
        before, _absent = _absent, True
        try:
            return function(*args, **kwargs)
        finally:
            _absent = before

    return call


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _absent:
            return func(*args, **(kwargs or {}))
        with self:  # in inference mode, operations that are made of others arrive whole
            parts = func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}) if parts is NotImplemented else parts


class _Devices(TorchFunctionMode):
    """Where "cuda" is asked for, C++ reads "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _absent or getattr(func, "__name__", "") == "device":
            return func(*args, **(kwargs or {}))
        named = {key: _as_meta(value) for key, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and named.get("device") == META:
            named.pop("device")
            return func(*args, **named).to(META)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _with_tensors_for_lists(args[1]), *args[2:])
        return func(*map(_as_meta, args), **named)


def _with_tensors_for_lists(index: Any) -> Any:
    """An index whose lists are tensors of the CPU: C++ would make tensors of meta of them, which hold nothing."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors_for_lists, index))
    return torch.tensor(index, dtype=torch.long) if isinstance(index, list) else index


def _as_meta(value: Any) -> Any:
    is_name = isinstance(value, str) and value.split(":")[0] == "cuda"
    is_device = isinstance(value, torch.device) and value.type == "cuda"
    return META if is_name or is_device else value


@contextmanager
def fake_cuda() -> Iterator[Waits]:
    """Let torch, and this package, find one GPU while the block lasts."""
    from transformers import PreTrainedModel

    from saerelay.lm import facts
    from saerelay.sae import kernels
    from saerelay.sae.kernels import reference

    properties = SimpleNamespace(name="fake", total_memory=80 * 2**30, major=9, minor=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": None,
            "device_count": 1,
            "is_available": True,
            "is_bf16_supported": True,
            "synchronize": None,
            "empty_cache": None,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_name": "fake",
            "get_device_capability": (9, 0),
        }.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        for name in ("Stream", "current_stream", "set_stream"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
        patch.setitem(sys.modules, "saerelay.sae.kernels.triton", reference)
        patch.setattr(kernels, "triton", reference, raising=False)
        patch.setattr(facts, "model_skeleton", _without_device(facts.model_skeleton))
        patch.setattr(facts, "probe_skeleton", _without_device(facts.probe_skeleton))
        load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(_without_device(load)))
        _waits.places.clear()
        with _Operations(), _Devices():
            yield _waits
