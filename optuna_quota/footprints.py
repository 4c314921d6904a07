"""Footprints that are known before the first trial, for ``QuotaSampler(footprint=…)``.

:func:`torch_training` takes one training step of torch with fake tensors, which have shapes but no
data (``pip install 'optuna-quota[torch]'``). As any function that a user states, it is corrected
by the study's own trials, once there are eight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
import contextlib
from dataclasses import dataclass
import functools
from importlib.util import find_spec
import logging
import os
import platform
import threading
from typing import Any, Literal, TYPE_CHECKING
import warnings

from optuna_quota._footprint.allocators import cuda_peak, glibc_peak, TrainingBlocks
from optuna_quota._footprint.held_storages import held_storages, kernels_of_cuda, size_of
from optuna_quota._isolation.isolated import isolated
from optuna_quota._metering.monitored_tree import open_tree
from optuna_quota._resources import format_amount
from optuna_quota._units import parse_bytes
from optuna_quota._usage import Usage, usage_from_amounts


if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer


__all__ = ["TorchTraining", "TrainingMemory", "torch_training"]

_logger = logging.getLogger("optuna.quota.footprint")

# What a process holds on a GPU beside what torch's allocator has, in bytes: the CUDA context and
# loaded kernels. On an H200 518 MiB, 610 with torch, 740 to 758 with cuBLAS and cuDNN.
_CUDA_CONTEXT = 750 * 2**20
# Any of them ends the growth of glibc's thresholds, so that it gives blocks back; as tunables they
# are glibc.malloc.mmap_threshold and so on.
_THRESHOLDS = ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD", "MMAP_MAX")
# Torch's modes are those of a thread, but what they cache is not.
_tracing = threading.Lock()


def torch_training(
    build: Callable[[Mapping[str, Any]], Module],
    batch: Callable[[Mapping[str, Any]], Any],
    optimizer: Callable[..., Optimizer],
    *,
    loss: Callable[[Module, Any], Tensor] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    base: float | str | None = None,
) -> TorchTraining:
    """Return the memory of a training with torch as a footprint, without running it.

    One training step is taken at each point that is judged: forward, loss, backward and step of
    the optimizer, with fake tensors, which take neither memory nor a GPU. The most that its
    tensors hold at one moment is the footprint. It is assumed that gradients are freed before the
    forward pass (``zero_grad``), and that nothing else is held on the device.

    Example:

        .. code-block:: python

            def build(params):
                return torch.nn.Sequential(
                    torch.nn.Linear(784, params["width"]),
                    torch.nn.ReLU(),
                    torch.nn.Linear(params["width"], 10),
                )

            def batch(params):
                return torch.empty(params["batch"], 784), torch.zeros(params["batch"]).long()

            sampler = QuotaSampler(
                quota=Quota(memory="8GiB"),
                footprint=footprints.torch_training(build, batch, torch.optim.Adam),
            )

    A point at which the step can't be taken is not judged before the study's own trials show what
    it takes, and a warning says why, once: where the control flow depends on data (``if
    x.sum() > 0``, ``x.item()``), or a function fails.

    Args:
        build: Makes the model of a point, on the CPU, whatever the device of the trials.
        batch: Makes a batch as the training loop takes it, likewise. Only shapes and types matter.
        optimizer: An optimizer class, or a function from params and model to an optimizer, such as
            ``lambda params, model: SGD(model.parameters(), lr=0.1, momentum=params["momentum"])``.
        loss: Computes the loss of a model and a batch, to be minimized. By default a batch is
            ``(inputs, targets)``; the loss of targets that are whole numbers is the cross-entropy,
            of others the mean squared error.
        device: Where the trials train: ``"cpu"`` for ``memory``, ``"cuda"`` for ``gpu_memory``.
        base: What a trial holds beside the tensors of its training step: a size in bytes or text
            such as "300MiB". By default, on the CPU, what an isolated trial holds that carries
            these functions and the data they refer to, measured once; a trial in process holds
            what the study's process does. On a GPU 750 MiB, which CUDA, cuBLAS and cuDNN took on
            an H200.

    Returns:
        A function from params to a :class:`~optuna_quota.Usage`, for ``QuotaSampler`` or
        :func:`~optuna_quota.project`; see :meth:`TorchTraining.memory` for the parts.

    Raises:
        ImportError: If torch is not installed.
        ValueError: If ``device`` is unknown, or ``base`` is no positive size.
        TypeError: If an argument that is to be called can't be.
    """
    loss = _supervised_loss if loss is None else loss
    called = {"build": build, "batch": batch, "optimizer": optimizer, "loss": loss}
    for name, function in called.items():
        if not callable(function):
            raise TypeError(f"`{name}` must be callable but got {function!r}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda' but got {device!r}.")
    if find_spec("torch") is None:
        raise ImportError("Torch is not installed: pip install 'optuna-quota[torch]'.")
    step = _Step(build, batch, optimizer, loss, foreach=device == "cuda")
    size = None if base is None else parse_bytes(base, "base")
    if device == "cuda":
        return TorchTraining(step, "gpu_memory", _CUDA_CONTEXT if size is None else size)
    return TorchTraining(step, "memory", size)


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of one training step, in bytes.

    Attributes:
        parameters: Parameters and buffers of the model.
        gradients: All gradients.
        optimizer_state: What the optimizer keeps from step to step.
        activations: What the forward pass leaves for the backward pass, and the batch.
        peak: The most that is held at one moment. Less than the sum of these where activations
            are freed before the last gradient is there; more where a single operation takes much.
        heap: What the C library keeps of freed blocks in addition: glibc those of up to 32 MiB, on
            the CPU, unless ``MALLOC_MMAP_THRESHOLD_`` or another of its thresholds is set when
            Python starts. Its heap is followed through the step's blocks, over four steps; for
            plain stacks of convolutions this comes out too high, by a quarter of all. On a GPU
            what torch's allocator keeps of them in its segments, and the workspaces of cuBLAS.
    """

    parameters: float
    gradients: float
    optimizer_state: float
    activations: float
    peak: float
    heap: float = 0.0

    def __str__(self) -> str:
        parts = (
            f"{n.replace('_', ' ')} {format_amount('memory', v)}" for n, v in vars(self).items()
        )
        return ", ".join(parts)


class TorchTraining:
    """The memory of a training step as a function of params; see :func:`torch_training`."""

    def __init__(
        self, step: _Step, resource: Literal["memory", "gpu_memory"], base: float | None
    ) -> None:
        self._step, self._resource, self._base = step, resource, base
        self._warned = False

    def __call__(self, params: Mapping[str, Any]) -> Usage:
        """Return the usage at a point, without an amount where it can't be computed.

        Raises:
            KeyError: If a function asks for a parameter that is missing.
        """
        try:
            memory = self.memory(params)
        except KeyError:
            raise
        except Exception as error:  # noqa: BLE001 - of the user's functions, or any of torch's
            warned, self._warned = self._warned, True
            if not warned:
                _logger.warning(
                    f"The memory of a training step is unknown at the point {dict(params)!r}: "
                    f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]} Such "
                    "points are judged by the study's own trials; further failures are not "
                    "reported."
                )
            return Usage()
        return usage_from_amounts({self._resource: self.base + memory.peak + memory.heap})

    def memory(self, params: Mapping[str, Any]) -> TrainingMemory:
        """Return the parts of a training step's memory at a point, without the base.

        Raises:
            TypeError: If ``build`` returns no module, or one that was there before.
            Exception: What the functions raise, and what torch does where an operation depends on
                data.
        """
        with _tracing:
            return self._step.take(params)

    @property
    def base(self) -> float:
        """What a trial holds beside its training step, in bytes; measured when first asked for."""
        from optuna.trial import FixedTrial

        if self._base is None:
            trial = isolated(functools.partial(_held_here, self._step))
            # The first trial makes the fork server load modules; the second shares more memory
            # with it than later ones.
            _, *held = [trial(FixedTrial({})) for _ in range(3)]
            self._base = float(max(held))
        return self._base


def _supervised_loss(model: Module, batch: Any) -> Tensor:
    from torch.nn import functional

    inputs, targets = batch
    outputs = model(inputs)
    if targets.is_floating_point():
        return functional.mse_loss(outputs, targets)
    return functional.cross_entropy(outputs, targets)


@dataclass(frozen=True)
class _Step:
    """One training step; its functions are the arguments of :func:`torch_training`.

    ``foreach`` is whether the optimizer updates all parameters at once, as it does on a GPU, where
    torch's allocator takes the place of the C library's.
    """

    build: Callable[[Mapping[str, Any]], Module]
    batch: Callable[[Mapping[str, Any]], Any]
    optimizer: Callable[..., Optimizer]
    loss: Callable[[Module, Any], Tensor]
    foreach: bool

    def take(self, params: Mapping[str, Any]) -> TrainingMemory:
        """Take the step with fake tensors."""
        import torch
        from torch._subclasses import fake_tensor

        # Caused by copies of fake parameters, such as the layers of a TransformerEncoder.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        fakes = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        # Copies of layers would each copy it.
        fakes.__deepcopy__ = lambda _: fakes
        mkldnn = torch.backends.mkldnn
        onednn: Any = "onednn" if mkldnn.is_available() and mkldnn.enabled else None
        held = held_storages("cudnn" if self.foreach else onednn)
        kernels = kernels_of_cuda() if self.foreach else contextlib.nullcontext()
        try:
            # The functions may seed: the study's own random numbers must not change.
            with torch.random.fork_rng(devices=()), torch.enable_grad(), fakes, held, kernels:
                return self._take(params, fakes, held)
        except (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
        ) as error:
            raise RuntimeError(
                f"The result of {error.func} depends on data, which a fake tensor doesn't have."
            ) from error

    def _take(self, params: Mapping[str, Any], fakes: Any, held: Any) -> TrainingMemory:
        import torch
        from torch.utils._pytree import tree_map_only

        model = self.build(params)
        if not hasattr(model, "parameters"):
            raise TypeError(f"`build` must return a torch.nn.Module but returned {model!r}.")
        if any(getattr(each, "fake_mode", None) is not fakes for each in model.parameters()):
            raise TypeError(
                "`build` must make a new model with each call but returned parameters that were "
                "there before."
            )
        parameters = held.now
        made = list(held.calls)
        optimizer = self._make_optimizer(params, model)
        state, temporary = _measure_update(optimizer, held, foreach=self.foreach)
        before = held.now
        held.calls.clear()
        # A batch may have real data, from numpy or a dataset.
        batch = tree_map_only(
            torch.Tensor,
            lambda x: x if getattr(x, "fake_mode", None) is fakes else fakes.from_tensor(x),
            self.batch(params),
        )
        held.add(batch)
        held.reset_peaks()
        loss = self.loss(model, batch)
        activations = held.now - before
        loss.backward()
        del loss
        gradients = sum(size_of(p.grad) for p in model.parameters() if p.grad is not None)
        # Most parameters have no optimizer state here.
        peak = max(
            held.peak - before + parameters + state, parameters + state + gradients + temporary
        )
        groups = optimizer.param_groups
        trained = [size_of(x) for g in groups for x in g["params"] if x.requires_grad]
        blocks = TrainingBlocks(made, trained, state, temporary, held.calls)
        if self.foreach:
            taken = cuda_peak(blocks, multiplies=held.multiplies)
        elif _keeps_freed_blocks():
            taken = glibc_peak(blocks)
        else:
            taken = 0
        heap = max(0.0, taken - peak)
        return TrainingMemory(parameters, gradients, state, activations, peak, heap)

    def _make_optimizer(self, params: Mapping[str, Any], model: Module) -> Optimizer:
        make = self.optimizer
        while isinstance(make, functools.partial):
            make = make.func
        if isinstance(make, type):
            return self.optimizer(model.parameters())
        return self.optimizer(params, model)


def _keeps_freed_blocks() -> bool:
    """Return whether ``malloc`` is that of glibc, with its default, growing thresholds."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return (
        platform.libc_ver()[0] == "glibc"
        and "malloc" not in os.environ.get("LD_PRELOAD", "")
        and not any(
            os.environ.get(f"MALLOC_{each}_") or f"glibc.malloc.{each.lower()}=" in tunables
            for each in _THRESHOLDS
        )
    )


def _measure_update(optimizer: Optimizer, held: Any, *, foreach: bool) -> tuple[float, float]:
    """Return the state of an optimizer, and what its step needs in between, in bytes.

    Measured in a first step with one parameter of each shape, and multiplied.
    """
    import torch

    kinds: Counter[Any] = Counter()
    firsts: dict[Any, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        if foreach and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
        for each in group["params"]:
            if each.requires_grad:
                kind = index, each.shape, each.dtype
                firsts.setdefault(kind, each)
                kinds[kind] += 1
    for first in firsts.values():
        first.grad = torch.zeros_like(first)
    held.reset_peaks()
    before = held.now
    optimizer.step()
    added, temporary = held.now - before, held.peak - held.now
    others = sum(
        (kinds[kind] - 1) * size_of(optimizer.state[first]) for kind, first in firsts.items()
    )
    if foreach:
        total = sum(kinds[kind] * size_of(first) for kind, first in firsts.items())
        temporary *= total / max(1, sum(map(size_of, firsts.values())))
    optimizer.zero_grad()
    return added + others, temporary


def _held_here(step: _Step, trial: Any) -> float:
    """Return what a trial's process holds after a training step of a single weight, in bytes.

    It carries ``step``, the user's functions and what they refer to.
    """
    import torch

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    model(torch.zeros(1, 1)).sum().backward()
    optimizer.step()
    tree = open_tree(None)
    try:
        return tree.read(thorough=True).memory or 0.0
    finally:
        tree.close()
