"""How well ``footprints.torch_training`` knows the memory of trainings that were never run.

    python benchmarks/torch_footprint.py [--quick] [--trials N] [--device cuda]
    python benchmarks/torch_footprint.py --recorded

Ten architectures are trained for three steps at random points in isolated trials on the CPU, or,
in larger batches, on a GPU. The peak of each trial is compared with the footprint, and with the
rule of thumb of 16 bytes a parameter (its value, its gradient and two states of Adam) on the same
base. Then what eight trials teach is compared on the others: the footprint that they correct, and
one learned without it. Takes about a quarter of an hour, on a GPU two minutes. With
``--recorded``, footprints are compared with peaks that were measured on an H200, without a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
import csv
from dataclasses import dataclass
import itertools
import json
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
import torch
from torch import nn
from torch.nn import functional

from optuna_quota import Footprint, footprints, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._footprint.observations import Observation, read_observation
from optuna_quota._footprint.user_given import FootprintCalibrator, UserFootprint


N_KNOWN = 8
RECORDED = Path(__file__).parent / "tables/torch_h200.csv"
Params = Mapping[str, Any]


def wide(low: int, high: int) -> IntDistribution:
    return IntDistribution(low, high, log=True)


@dataclass(frozen=True)
class Architecture:
    """A model, its batches and its optimizer, over a search space."""

    space: dict[str, IntDistribution]
    build: Callable[[Params], nn.Module]
    batch: Callable[[Params], Any]
    optimizer: Any


def labels(count: int) -> torch.Tensor:
    return torch.randint(10, (count,))


def perceptron(params: Params) -> nn.Module:
    width = params["width"]
    layers: list[nn.Module] = [nn.Linear(512, width), nn.ReLU()]
    for _ in range(params["depth"]):
        layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.layers(x))


def residual(params: Params) -> nn.Module:
    channels = params["channels"]
    blocks = [Residual(channels) for _ in range(params["blocks"])]
    first = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(
        *first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


class Recurrent(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 128)
        self.lstm = nn.LSTM(128, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, size)
        layer = nn.TransformerEncoderLayer(size, 4, 4 * size, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(size, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(dim=1))


def autoencoder(params: Params) -> nn.Module:
    c = params["channels"]
    return nn.Sequential(
        *(nn.Conv2d(3, c, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.GELU(), nn.Flatten()),
        *(nn.Linear(2 * c * 256, params["code"]), nn.Linear(params["code"], 2 * c * 256)),
        *(nn.Unflatten(1, (2 * c, 16, 16)), nn.ConvTranspose2d(2 * c, c, 4, 2, 1), nn.GELU()),
        nn.ConvTranspose2d(c, 3, 4, 2, 1),
    )


def sentences(shortest: int, longest: int, low: int, high: int) -> dict[str, IntDistribution]:
    return {"length": wide(shortest, longest), "batch": wide(low, high)}


def words(params: Params) -> Any:
    return torch.randint(5000, (params["batch"], params["length"])), labels(params["batch"])


def images(params: Params) -> Any:
    x = torch.rand(params["batch"], 3, 64, 64)
    return x, x


class Graph(nn.Module):
    """Embedded nodes that take the sum of their neighbours' messages."""

    def __init__(self, nodes: int, size: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(nodes, size)
        self.layers = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(layers))
        self.head = nn.Linear(size, 10)

    def forward(self, edges: torch.Tensor) -> torch.Tensor:
        x = self.embedding.weight
        for layer in self.layers:
            messages = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            x = functional.relu(layer(torch.cat([x, messages], dim=1)))
        return self.head(x)


def edges(params: Params) -> Any:
    return torch.randint(params["nodes"], (2, 4 * params["nodes"])), labels(params["nodes"])


class UNet(nn.Module):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        sizes = [channels * 2**level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(sizes))
        self.first = self.block(3, channels)
        self.down = nn.ModuleList(self.block(low, high) for low, high in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(high, low, 2, 2) for low, high in pairs)
        self.joined = nn.ModuleList(self.block(high, low) for low, high in pairs)
        self.last = nn.Conv2d(channels, 3, 1)

    @staticmethod
    def block(low: int, high: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(low, high, 3, padding=1), nn.BatchNorm2d(high), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [self.first(x)]
        for layer in self.down:
            kept.append(layer(functional.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, joined in zip(reversed(self.up), reversed(self.joined), strict=True):
            x = joined(torch.cat([up(x), kept.pop()], dim=1))
        return self.last(x)


class Translation(nn.Module):
    """One GRU after another, with attention; a word's class is asked for at each place."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 128)
        self.encoder = nn.GRU(128, hidden, batch_first=True)
        self.decoder = nn.GRU(128, hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        states, last = self.encoder(x)
        outputs, _ = self.decoder(x, last)
        weights = functional.softmax(outputs @ states.transpose(1, 2), dim=-1)
        return self.head(torch.cat([outputs, weights @ states], dim=2))[:, -1]


def stack(params: Params) -> nn.Module:
    c = params["channels"]
    layers = [
        nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU()) for _ in range(params["depth"])
    ]
    return nn.Sequential(nn.Conv2d(3, c, 3, padding=1), *layers, nn.Conv2d(c, 3, 3, padding=1))


def recommender(params: Params) -> nn.Module:
    size = params["size"]
    layers = [nn.Linear(20 * size, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(nn.Embedding(params["items"], size), nn.Flatten(), *layers)


def momentum(params: Params, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


ARCHITECTURES = {
    "perceptron": Architecture(
        {"width": wide(1000, 3000), "depth": IntDistribution(1, 4), "batch": wide(128, 4096)},
        perceptron,
        lambda p: (torch.randn(p["batch"], 512), labels(p["batch"])),
        torch.optim.Adam,
    ),
    "residual": Architecture(
        {"channels": wide(24, 64), "blocks": IntDistribution(2, 5), "batch": wide(16, 48)},
        residual,
        lambda p: (torch.randn(p["batch"], 3, 32, 32), labels(p["batch"])),
        momentum,
    ),
    "LSTM": Architecture(
        {"hidden": wide(128, 512), "layers": IntDistribution(1, 3), **sentences(64, 192, 32, 128)},
        lambda p: Recurrent(p["hidden"], p["layers"]),
        words,
        torch.optim.Adam,
    ),
    "transformer": Architecture(
        {
            "size": IntDistribution(128, 384, step=32),
            "layers": IntDistribution(2, 5),
            **sentences(64, 192, 8, 24),
        },
        lambda p: Transformer(p["size"], p["layers"]),
        words,
        torch.optim.AdamW,
    ),
    "autoencoder": Architecture(
        {"channels": wide(16, 64), "code": wide(64, 512), "batch": wide(64, 256)},
        autoencoder,
        images,
        torch.optim.Adam,
    ),
    "graph": Architecture(
        {"nodes": wide(20_000, 100_000), "size": wide(32, 128), "layers": IntDistribution(1, 3)},
        lambda p: Graph(p["nodes"], p["size"], p["layers"]),
        edges,
        torch.optim.RMSprop,
    ),
    "U-Net": Architecture(
        {"channels": wide(8, 32), "depth": IntDistribution(2, 4), "batch": wide(8, 32)},
        lambda p: UNet(p["channels"], p["depth"]),
        images,
        torch.optim.Adam,
    ),
    "translation": Architecture(
        {"hidden": wide(128, 512), **sentences(32, 96, 32, 128)},
        lambda p: Translation(p["hidden"]),
        words,
        torch.optim.Adam,
    ),
    "recommender": Architecture(
        {"items": wide(20_000, 200_000), "size": wide(16, 96), "batch": wide(256, 4096)},
        recommender,
        lambda p: (torch.randint(p["items"], (p["batch"], 20)), labels(p["batch"])),
        torch.optim.Adam,
    ),
    "stack": Architecture(
        {"channels": wide(16, 48), "depth": IntDistribution(3, 7), "batch": wide(16, 48)},
        stack,
        images,
        momentum,
    ),
}


# What makes the batches of a GPU larger, and by how much.
LARGER = ("batch", "nodes")
FACTOR = 8


def space_on(device: str, found: Architecture) -> dict[str, IntDistribution]:
    """Return the search space of an architecture on a device."""
    if device == "cpu":
        return found.space
    return {
        name: wide(FACTOR * each.low, FACTOR * each.high) if name in LARGER else each
        for name, each in found.space.items()
    }


def suggest(trial: optuna.Trial, name: str, each: IntDistribution) -> int:
    return trial.suggest_int(name, each.low, each.high, step=each.step, log=each.log)


def objective(name: str, device: str) -> Callable[[optuna.Trial], float]:
    def train(trial: optuna.Trial) -> float:
        found = ARCHITECTURES[name]
        space = space_on(device, found)
        params = {key: suggest(trial, key, each) for key, each in space.items()}
        model = found.build(params).to(device)
        make = found.optimizer
        optimizer = make(params, model) if make is momentum else make(model.parameters())
        loss = torch.tensor(0.0)
        for _ in range(3):
            optimizer.zero_grad()
            inputs, targets = (each.to(device) for each in found.batch(params))
            output = model(inputs)
            whole = not targets.is_floating_point()
            loss = (functional.cross_entropy if whole else functional.mse_loss)(output, targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    return train


def rule_of_thumb(found: Architecture, params: Params) -> float:
    with torch.device("meta"):
        return 16.0 * sum(each.numel() for each in found.build(params).parameters())


def errors(predicted: list[float], truth: list[float]) -> tuple[float, float]:
    """Return the median and the largest relative error, in percent."""
    relative = [100 * abs(p / t - 1) for p, t in zip(predicted, truth, strict=True)]
    return statistics.median(relative), max(relative)


def measured(name: str, n_trials: int, footprint: Any, device: str) -> list[Observation]:
    random = optuna.samplers.RandomSampler(seed=0)
    on_gpu = device == "cuda"
    study = optuna.create_study(
        sampler=QuotaSampler(random, quota=Quota(cpu_time="10h"), footprint=footprint),
        pruner=QuotaPruner(limits=Limits(memory=None if on_gpu else "3GiB")),
    )
    # A GPU has room for several, and says what each of them holds.
    study.optimize(isolated(objective(name, device)), n_trials=n_trials, n_jobs=4 if on_gpu else 1)
    rows = [read_observation(trial) for trial in study.trials]
    return [row for row in rows if row is not None]


def show_recorded() -> None:
    """Compare with the peaks of `tables/torch_h200.csv`, in MiB: of the driver, and of torch."""
    found: dict[str, list[tuple[float, float]]] = {}
    with RECORDED.open(newline="") as file:
        for row in csv.DictReader(file):
            of = ARCHITECTURES[row["architecture"]]
            stated = footprints.torch_training(of.build, of.batch, of.optimizer, device="cuda")
            predicted = stated(json.loads(row["params"])).gpu_memory or 0.0
            pair = predicted / 2**20, float(row["gpu_memory"])
            found.setdefault(row["architecture"], []).append(pair)
    print("GPU memory before any trial, H200: error in %, median (largest), and its sign")
    for name, pairs in found.items():
        middle, worst = errors([p for p, _ in pairs], [t for _, t in pairs])
        signed = statistics.median(100 * (p / t - 1) for p, t in pairs)
        print(f"{name:14} {middle:5.1f} ({worst:3.0f}) {signed:+6.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten trials each")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--recorded", action="store_true", help="compare with recorded peaks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--points", action="store_true", help="print each point")
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES))
    arguments = parser.parse_args()
    device = arguments.device
    resource = "memory" if device == "cpu" else "gpu_memory"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.recorded:
        show_recorded()
        return
    print("peaks in MB; errors in %, median (largest): before any trial, and after eight")
    print("architecture      peaks   footprint  16 B/param.  corrected    learned    ms a point")
    for name in arguments.names:
        found = ARCHITECTURES[name]
        stated = footprints.torch_training(
            found.build, found.batch, found.optimizer, device=device
        )
        rows = measured(name, 10 if arguments.quick else arguments.trials, stated, device)
        truth = [getattr(row.usage, resource) or 0.0 for row in rows]
        base = stated.base
        stated.memory(rows[0].params)
        started = time.process_time()
        predicted = [getattr(stated(row.params), resource) or 0.0 for row in rows]
        milliseconds = 1e3 * (time.process_time() - started) / len(rows)
        thumb = [base + rule_of_thumb(found, row.params) for row in rows]
        if arguments.points:
            for row, true, each in zip(rows, truth, predicted, strict=True):
                print(f"  {true / 1e6:6.0f} {each / 1e6:6.0f} {dict(row.params)}")
                print(f"    {stated.memory(row.params)}")
        learned = Footprint.fit(rows[:N_KNOWN])
        corrected = FootprintCalibrator(UserFootprint(stated)).calibrate(learned, rows[:N_KNOWN])
        rest = rows[N_KNOWN:]
        columns = [
            errors(predicted, truth),
            errors(thumb, truth),
            *(
                errors([each.intervals(r.params)[resource].median for r in rest], truth[N_KNOWN:])
                for each in (corrected, learned)
            ),
        ]
        print(
            f"{name:14} {min(truth) / 1e6:5.0f}-{max(truth) / 1e6:4.0f} "
            + " ".join(f"{middle:5.1f} ({worst:3.0f})" for middle, worst in columns)
            + f" {milliseconds:9.0f}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    np.random.seed(0)
    main()
