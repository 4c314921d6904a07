"""Tracks the tensor storages of a training step, through operations on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
from typing import Any, Literal, TYPE_CHECKING
import weakref


if TYPE_CHECKING:
    from torch import Tensor


# OneDNN's workspace of an LSTM, which is empty under fake tensors, in multiples of the output: the
# gates in the forward pass, and what the backward pass touches.
_RNN_GATES = 4
_RNN_BACKWARD = 15
# The same for cuDNN, kept for the backward pass; up to twice as much in layers under 200 units.
_CUDNN_GATES = 8
# OneDNN copies inputs and outputs of a convolution into blocks of this many channels.
_CHANNELS = 16
_IMAGE_CHANNELS = (1, 3)


def held_storages(kernels: Literal["onednn", "cudnn"] | None) -> Any:
    """Return a mode that counts the bytes of live storages returned by operations.

    Args:
        kernels: The library whose kernels allocate temporary memory: oneDNN on a CPU, cuDNN on a
            GPU.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    rnn, rnn_backward = aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default
    convolution, convolution_backward = (
        aten.convolution.default,
        aten.convolution_backward.default,
    )
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
    onednn_types = (torch.float32, torch.bfloat16)

    class HeldStorages(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0.0
            self.multiplies = False  # Whether matrices are multiplied
            # Serial numbers and sizes of storages, and with size 0 when they are freed.
            self.calls: list[tuple[int, int]] = []
            self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
            self._serials = itertools.count()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.multiplies |= func in products
            if func is rnn:
                gates = _CUDNN_GATES if kernels == "cudnn" else _RNN_GATES
                self._add(result[3].untyped_storage(), gates * size_of(result[0]))
            elif func is rnn_backward and kernels == "onednn":
                empty = [x for x in args if isinstance(x, torch.Tensor) and x.numel() == 0]
                sizes = (self._known.get(id(x.untyped_storage()), (0,))[0] for x in empty)
                self._work(max(sizes, default=0) * (_RNN_BACKWARD - _RNN_GATES) // _RNN_GATES)
            elif func is convolution and kernels == "cudnn":
                # Copies in the layout that tensor cores need, in one block; where cuDNN chooses
                # another algorithm, it takes up to sixteen times as much.
                self._work(args[0].nbytes + result.nbytes, then=result)
            elif func is convolution_backward and kernels == "cudnn":
                self._work(args[0].nbytes + 2 * args[1].nbytes)
            elif func is convolution and kernels == "onednn":
                inputs, weight = args[:2]
                if inputs.dtype not in onednn_types:
                    self._work(_columns(weight, result, *args[5:7]), then=result)
                elif args[6]:  # transposed: the channels of the copies come last, without blocks
                    self._work(inputs.nbytes, weight.nbytes, result.nbytes, then=result)
                else:
                    self._work(_read(inputs), weight.nbytes, _blocked(result), then=result)
            elif func is convolution_backward and kernels == "onednn":
                gradient, inputs, weight = args[:3]
                taken, given = _read(inputs), _blocked(gradient)
                if args[7]:  # transposed
                    taken, given = _blocked(inputs), _read(gradient)
                if inputs.dtype not in onednn_types:
                    columns = _columns(weight, gradient, *args[6:8])
                    if result[0] is not None:
                        self._work(columns, then=result[0])
                    self._work(columns)
                else:
                    if result[0] is not None:
                        self._work(given, weight.nbytes, _blocked(result[0]), then=result[0])
                    self._work(taken, given, weight.nbytes)
            self.add(result)
            return result

        def _work(self, *sizes: int, then: Any = ()) -> None:
            """Allocate temporary blocks and free them, the last one after ``then`` is added."""
            blocks = [(next(self._serials), size) for size in sizes]
            self.calls += blocks
            self.peak = max(self.peak, self.now + sum(sizes))
            self.calls += [(serial, 0) for serial, _ in blocks[:-1]]
            self.now += sizes[-1]
            self.add(then)
            self.now -= sizes[-1]
            self.calls.append((blocks[-1][0], 0))

        def reset_peaks(self) -> None:
            self.peak = self.now

        def add(self, tensors: Any) -> None:
            for each in tree_leaves(tensors):
                if isinstance(each, torch.Tensor) and each.layout is torch.strided:
                    storage = each.untyped_storage()
                    self._add(storage, storage.nbytes())

        def _add(self, storage: Any, size: int) -> None:
            key = id(storage)
            if key in self._known or not size:
                return
            serial = next(self._serials)

            def free(_: Any) -> None:
                del self._known[key]
                self.now -= size
                self.calls.append((serial, 0))

            self._known[key] = size, weakref.ref(storage, free)
            self.calls.append((serial, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    return HeldStorages()


def kernels_of_cuda() -> Any:
    """Return a mode in which dropout and attention keep for the backward pass what CUDA's keep.

    Dropout keeps one byte for each element. Attention keeps its inputs and output, not the weights
    of each pair of positions, as on a CPU without dropout.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    # Position and name of the argument that is the probability of dropout.
    attention = {
        functional.scaled_dot_product_attention: (4, "dropout_p"),
        functional.multi_head_attention_forward: (10, "dropout_p"),
    }

    class KernelsOfCuda(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func is functional.dropout and not kwargs.get("inplace"):
                return dropout(*args, **kwargs)
            if func in attention and not kwargs.get("need_weights"):
                index, name = attention[func]
                args = (*args[:index], *((0.0,) if args[index:] else ()), *args[index + 1 :])
                kwargs |= {name: 0.0} if name in kwargs else {}
            return func(*args, **kwargs)

    return KernelsOfCuda()


def _blocked(tensor: Tensor) -> int:
    """Return the bytes of a copy in oneDNN's blocks of channels."""
    size, channels = int(tensor.nbytes), int(tensor.shape[1])
    return size // max(1, channels) * (-(-channels // _CHANNELS) * _CHANNELS)


def _read(tensor: Tensor) -> int:
    """Return the bytes of a convolution's copy of its input; images are not copied."""
    return 0 if tensor.shape[1] in _IMAGE_CHANNELS else _blocked(tensor)


def _columns(weight: Tensor, output: Tensor, dilation: Sequence[int], transposed: bool) -> int:
    """Return the bytes of the matrix that a convolution without oneDNN copies its input into.

    It has a column for each position of the output, with all that the kernel covers there.
    Transposed and dilated ones make it for one sample at a time.
    """
    if transposed or max(dilation) > 1 or max(weight.shape[2:]) == 1:
        return 0
    positions = output.numel() // max(1, output.shape[1])
    return int(weight.nbytes) // max(1, int(weight.shape[0])) * int(positions)


def size_of(tensors: Any) -> int:
    """Return the bytes of all tensors in a structure."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = (each for each in tree_leaves(tensors) if isinstance(each, torch.Tensor))
    return sum(x.untyped_storage().nbytes() for x in leaves if x.layout is torch.strided)
