"""The memory of a training step of torch, known before the first trial."""

from __future__ import annotations

from collections.abc import Mapping
import csv
import importlib
import json
import os
from pathlib import Path
import pickle
import statistics
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler
import pytest

from optuna_quota import (
    footprints,
    Limits,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    Usage,
)


Params = Mapping[str, Any]
MIB = 2**20


def build(params: Params) -> Any:
    from torch import nn

    width = params["width"]
    return nn.Sequential(nn.Linear(100, width), nn.ReLU(), nn.Linear(width, width))


def batch(params: Params) -> Any:
    import torch

    return torch.randn(64, 100), torch.zeros(64, params["width"])


def adam(params: Params, model: Any) -> Any:
    import torch

    return torch.optim.Adam(model.parameters(), lr=params.get("rate", 0.1))


def sgd(params: Params, model: Any) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.1)


def check_data(model: Any, batch: Any) -> Any:
    loss = model(batch[0]).mean()
    return loss if loss > 0 else -loss


@pytest.fixture
def torch_on_glibc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    return pytest.importorskip("torch")


def test_arguments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"optuna-quota\[torch\]"):
        footprints.torch_training(build, batch, adam)
    with pytest.raises(ValueError, match="'cpu' or 'cuda' but got 'tpu'"):
        footprints.torch_training(build, batch, adam, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`batch` must be callable"):
        footprints.torch_training(build, 64, adam)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`loss` must be callable"):
        footprints.torch_training(build, batch, adam, loss=0)  # type: ignore[arg-type]


@pytest.mark.integration
def test_all_parts_of_a_step_are_counted() -> None:
    torch = pytest.importorskip("torch")
    state = torch.get_rng_state()
    footprint = footprints.torch_training(build, batch, torch.optim.Adam, base="100MiB")
    found = footprint.memory({"width": 1000})
    weights = 4 * (100 * 1000 + 1000 + 1000 * 1000 + 1000)
    outputs = 4 * 64 * 1000
    assert found.parameters == found.gradients == weights
    assert found.optimizer_state == 2 * weights + 4 * 4  # and the number of steps of each
    # The batch, what ReLU returns, and the output; the mean loss.
    assert found.activations == pytest.approx(4 * 64 * 100 + 3 * outputs, abs=100)
    # While the largest parameter is updated, with a value in between.
    assert 4 * weights < found.peak < 6 * weights
    assert "parameters 4.2 MiB" in str(found)
    usage = pickle.loads(pickle.dumps(footprint))({"width": 1000})
    assert usage == Usage(memory=100 * MIB + found.peak + found.heap)
    assert torch.equal(torch.get_rng_state(), state)
    plain = footprints.torch_training(build, batch, sgd).memory({"width": 1000})
    assert (plain.optimizer_state, plain.gradients) == (0, weights)


@pytest.mark.integration
def test_optimizer_state_of_many_layers_is_that_of_a_real_step() -> None:
    torch = pytest.importorskip("torch")

    def layers(params: Params) -> Any:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    model = layers({})
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    real = sum(v.nbytes for each in optimizer.state.values() for v in each.values())
    for device, resource in (("cpu", "memory"), ("cuda", "gpu_memory")):
        footprint = footprints.torch_training(
            layers,
            lambda _: (torch.zeros(2, 5, 16), torch.zeros(2, 5, 16)),
            torch.optim.AdamW,
            device=device,  # type: ignore[arg-type]
            base=1.0,
        )
        assert footprint.memory({}).optimizer_state == real
        assert list(footprint({}).amounts()) == [resource]
    # As on a GPU, all parameters are updated at once.
    assert footprint.memory({}).peak > 5 * footprint.memory({}).parameters


@pytest.mark.integration
def test_convolutions_take_copies_in_blocks_of_channels() -> None:
    torch = pytest.importorskip("torch")
    size = 4 * 8 * 64 * 64  # of one channel of the batch
    peaks = {
        device: footprints.torch_training(
            lambda _: torch.nn.Conv2d(17, 33, 1, bias=False),
            lambda _: (torch.zeros(8, 17, 64, 64), torch.zeros(8, 33, 64, 64)),
            sgd,
            device=device,  # type: ignore[arg-type]
            base=1.0,
        )
        .memory({})
        .peak
        for device in ("cpu", "cuda")
    }
    # In the backward pass: the batch, the gradient of the output, and copies of the inputs and it.
    assert peaks["cpu"] >= (17 + 33 + 33 + 32 + 48) * size
    # In cuDNN's layout: copies of both, and of the gradient of the inputs.
    assert peaks["cuda"] == pytest.approx((17 + 33 + 33 + 33 + 17 + 17) * size, rel=0.001)


@pytest.mark.integration
def test_on_a_gpu_dropout_and_attention_hold_less() -> None:
    torch = pytest.importorskip("torch")
    n_pairs, n_elements = 2 * 2 * 512 * 512, 2 * 512 * 16

    def activations(**options: float) -> float:
        def layer(_: Params) -> Any:
            return torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, **options)

        def sequences(_: Params) -> Any:
            return torch.zeros(2, 512, 16), torch.zeros(2, 512, 16)

        footprint = footprints.torch_training(layer, sequences, sgd, device="cuda", base=1.0)
        return footprint.memory({}).activations

    # No weights of pairs of positions, and one byte for each element that is dropped or not; the
    # layer has three such places beside its attention.
    with_dropout, without = activations(dropout=0.1), activations(dropout=0.0)
    assert without < n_pairs
    assert 3 * n_elements <= with_dropout - without < 3 * 4 * n_elements + n_elements


@pytest.mark.integration
@pytest.mark.parametrize("name", ["perceptron", "residual", "transformer", "autoencoder"])
def test_peaks_that_were_measured_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    of = importlib.import_module("torch_footprint").ARCHITECTURES[name]
    stated = footprints.torch_training(of.build, of.batch, of.optimizer, device="cuda")
    with (benchmarks / "tables" / "torch_h200.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["architecture"] == name]
    errors = [
        abs(
            (stated(json.loads(row["params"])).gpu_memory or 0.0) / MIB / float(row["gpu_memory"])
            - 1
        )
        for row in rows
    ]
    assert statistics.median(errors) < 0.1


@pytest.mark.integration
def test_images_and_transposed_convolutions_take_fewer_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    size = 4 * 8 * 64 * 64  # of one channel of the batch

    def peak(layer: Any, channels: tuple[int, int]) -> float:
        return (
            footprints.torch_training(
                lambda _: layer(*channels, 1, bias=False),
                lambda _: tuple(torch.zeros(8, each, 64, 64) for each in channels),
                sgd,
                base=1.0,
            )
            .memory({})
            .peak
        )

    # The batch, its targets, the gradient of the output and its copy; none of the inputs.
    assert peak(torch.nn.Conv2d, (3, 32)) < (3 + 32 + 32 + 32 + 1) * size
    transposed = peak(torch.nn.ConvTranspose2d, (32, 3))
    assert transposed < peak(torch.nn.Conv2d, (32, 3)) - 8 * size
    copied = peak(torch.nn.Conv2d, (17, 33))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert peak(torch.nn.Conv2d, (17, 33)) < copied - 16 * size


@pytest.mark.integration
def test_convolutions_in_double_precision_copy_what_the_kernel_covers() -> None:
    torch = pytest.importorskip("torch")
    size = 8 * 8 * 64 * 64  # of one channel of the batch

    def peak(kernel: int, dilation: int = 1) -> float:
        padding = dilation * (kernel // 2)
        return (
            footprints.torch_training(
                lambda _: torch.nn.Conv2d(
                    16, 32, kernel, 1, padding, dilation, bias=False, dtype=torch.float64
                ),
                lambda _: tuple(torch.zeros(8, n, 64, 64, dtype=torch.float64) for n in (16, 32)),
                sgd,
                base=1.0,
            )
            .memory({})
            .peak
        )

    # The batch, its targets and the gradient of the output; the copies that oneDNN makes are none.
    assert peak(1) < (16 + 32 + 32 + 32 + 1) * size
    assert peak(3) == pytest.approx((16 + 32 + 32 + 9 * 16) * size, rel=0.01)
    assert peak(3, dilation=2) < 1.1 * peak(1)


@pytest.mark.integration
def test_weights_that_are_replaced_as_the_model_is_made_are_not_held(torch_on_glibc: Any) -> None:
    torch = torch_on_glibc
    weight = 4 * 8000 * 256

    def total(tied: bool) -> float:
        class Words(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(8000, 256)
                if tied:
                    self.head = torch.nn.Linear(256, 8000, bias=False)
                    self.head.weight = self.embedding.weight

            def forward(self, x: Any) -> Any:
                return torch.nn.functional.linear(self.embedding(x), self.embedding.weight)

        memory = footprints.torch_training(
            lambda _: Words(),
            lambda _: (torch.zeros(8).long(), torch.zeros(8).long()),
            torch.optim.SGD,
            base=1.0,
        ).memory({})
        assert memory.parameters == weight
        return memory.peak + memory.heap

    assert total(tied=True) < total(tied=False) + weight / 2


@pytest.mark.integration
def test_the_heap_follows_the_parameters_that_the_optimizer_has(
    torch_on_glibc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = torch_on_glibc
    found: list[Any] = []
    monkeypatch.setattr(footprints, "glibc_peak", lambda blocks: found.append(blocks) or 0)

    def of_the_last_layer(params: Params, model: Any) -> Any:
        return torch.optim.Adam(model[2].parameters())

    footprint = footprints.torch_training(build, batch, of_the_last_layer, base=1.0)
    footprint.memory({"width": 1000})
    (blocks,) = found
    assert blocks.trained == [4 * 1000 * 1000, 4 * 1000]
    assert blocks.state == pytest.approx(2 * sum(blocks.trained), abs=100)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1000000", False),
        ("MALLOC_TRIM_THRESHOLD_", "1000000", False),
        ("MALLOC_TOP_PAD_", "1000000", False),
        ("MALLOC_MMAP_MAX_", "1000", False),
        ("MALLOC_ARENA_MAX", "1", True),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=2:glibc.malloc.top_pad=1000000", False),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1", True),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2", False),
        ("LD_PRELOAD", "/usr/lib/libgomp.so.1", True),
    ],
)
def test_freed_blocks_are_kept_by_glibc_with_its_default_thresholds(
    torch_on_glibc: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, kept: bool
) -> None:
    for each in [each for each in os.environ if "MALLOC_" in each]:
        monkeypatch.delenv(each)
    for each in ("GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    footprint = footprints.torch_training(build, batch, torch_on_glibc.optim.Adam, base=1.0)
    assert (footprint.memory({"width": 1000}).heap > 0) == kept


@pytest.mark.integration
def test_sparse_gradients_are_not_counted() -> None:
    torch = pytest.importorskip("torch")
    memory = footprints.torch_training(
        lambda _: torch.nn.EmbeddingBag(10_000, 64, sparse=True),
        lambda _: (torch.zeros(8, 20).long(), torch.zeros(8).long()),
        sgd,
        base=1.0,
    ).memory({})
    assert memory.gradients == 0
    assert memory.parameters == 4 * 64 * 10_000 <= memory.peak


@pytest.mark.integration
def test_where_a_step_cannot_be_taken_the_study_learns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch = pytest.importorskip("torch")
    optuna.logging.enable_propagation()
    footprint = footprints.torch_training(build, batch, adam, loss=check_data, base=1.0)
    for width in (8, 16):
        assert footprint({"width": width}) == Usage()
    # With propagation, one record may come by two handlers.
    records = {id(r): r for r in caplog.records if r.name == "optuna.quota.footprint"}
    (warning,) = [record.getMessage() for record in records.values()]
    assert "depends on data" in warning and "{'width': 8}" in warning
    with pytest.raises(KeyError):  # a parameter that is not drawn yet
        footprint({"rate": 0.1})
    one = torch.nn.Linear(100, 10)
    with pytest.raises(TypeError, match="a new model with each call"):
        footprints.torch_training(lambda _: one, batch, adam).memory({"width": 10})

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_int("width", 8, 16) / 1

    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=20), footprint=footprint)
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(memory="1GiB")))
    study.optimize(objective, n_trials=10)
    assert len(study.trials) == 10


@pytest.mark.integration
def test_points_over_a_limit_are_replaced_from_the_first_trial_on() -> None:
    torch = pytest.importorskip("torch")
    footprint = footprints.torch_training(build, batch, torch.optim.Adam, base="50MiB")
    widths: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        widths.append(trial.suggest_int("width", 100, 5000))
        return 0.0

    space = {"width": IntDistribution(100, 5000)}
    sampler = QuotaSampler(
        RandomSampler(seed=0),
        quota=Quota(n_trials=9),
        strategy=Strategy(3, search_space=space),
        footprint=footprint,
    )
    study = optuna.create_study(
        sampler=sampler, pruner=QuotaPruner(limits=Limits(memory="250MiB"))
    )
    study.optimize(objective, n_trials=3)
    assert "quota:proposed" in study.trials[0].user_attrs
    assert max(footprint({"width": width}).memory or 0 for width in widths) <= 250 * MIB
