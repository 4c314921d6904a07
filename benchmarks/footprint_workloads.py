"""Measures the tables in ``benchmarks/tables`` that the footprint models are judged on.

    python benchmarks/footprint_workloads.py [--only WORKLOAD] [--trials N] [--seconds N]

Each workload is an objective as people write it, its libraries imported before the study. Points
are drawn at random and each trial runs in a process of its own, with one thread. A table holds
the distributions of the parameters in its first line, then one trial a line; an inactive parameter
is null. ``--seconds`` ends each workload early and adds the trials to those that the table has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
import importlib
import json
import os
import time
from typing import Any
import warnings

from footprint_tables import RESOURCES, TABLES
import numpy as np
import optuna
from optuna.distributions import distribution_to_json

from optuna_quota import isolated, Limits, QuotaPruner, trial_table


THREADS = 1


def _classes(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import make_classification

    x, y = make_classification(
        rows,
        columns,
        n_informative=max(columns // 2, 2),
        n_redundant=0,
        n_classes=3,
        n_clusters_per_class=1,
        flip_y=0.05,
        random_state=seed,
    )
    return x, y


def hist_boosting(trial: optuna.Trial) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier

    x, y = _classes(
        trial.suggest_int("rows", 500, 10_000, log=True), trial.suggest_int("columns", 4, 48)
    )
    model = HistGradientBoostingClassifier(
        max_iter=trial.suggest_int("max_iter", 5, 40, log=True),
        max_leaf_nodes=trial.suggest_int("max_leaf_nodes", 4, 32, log=True),
        learning_rate=trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        max_bins=trial.suggest_int("max_bins", 16, 255, log=True),
        early_stopping=trial.suggest_categorical("early_stopping", [False, True]),
        n_iter_no_change=5,
    )
    return float(1 - model.fit(x, y).score(x, y))


def xgboost(trial: optuna.Trial) -> float:
    from xgboost import XGBClassifier

    x, y = _classes(
        trial.suggest_int("rows", 500, 10_000, log=True), trial.suggest_int("columns", 4, 32)
    )
    method = trial.suggest_categorical("tree_method", ["hist", "approx", "exact"])
    bins = trial.suggest_int("max_bin", 16, 512, log=True) if method != "exact" else None
    model = XGBClassifier(
        n_estimators=trial.suggest_int("n_estimators", 5, 40, log=True),
        max_depth=trial.suggest_int("max_depth", 2, 8),
        subsample=trial.suggest_float("subsample", 0.4, 1.0),
        learning_rate=trial.suggest_float("learning_rate", 0.01, 0.5, log=True),
        tree_method=method,
        max_bin=bins,
        n_jobs=THREADS,
    )
    return float(1 - model.fit(x, y).score(x, y))


def kernels(trial: optuna.Trial) -> float:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.svm import SVC

    rows = trial.suggest_int("rows", 300, 4_000, log=True)
    x, y = _classes(rows, trial.suggest_int("columns", 4, 100, log=True))
    kernel = trial.suggest_categorical("kernel", ["linear", "poly", "rbf"])
    options: dict[str, Any] = {"kernel": kernel}
    if kernel != "linear":
        options["gamma"] = trial.suggest_float("gamma", 1e-3, 1.0, log=True)
    if kernel == "poly":
        options["degree"] = trial.suggest_int("degree", 2, 5)
    if trial.suggest_categorical("model", ["svc", "ridge"]) == "svc":
        C = trial.suggest_float("C", 1e-2, 1e2, log=True)
        model = SVC(C=C, max_iter=20_000, **options).fit(x[::2], y[::2])
        return float(1 - model.score(x[1::2], y[1::2]))
    alpha = trial.suggest_float("alpha", 1e-3, 10.0, log=True)
    ridge = KernelRidge(alpha=alpha, **options).fit(x[::2], y[::2])
    return float(np.mean((ridge.predict(x[1::2]) - y[1::2]) ** 2))


def neighbours(trial: optuna.Trial) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    rows = trial.suggest_int("rows", 1_000, 40_000, log=True)
    columns = trial.suggest_int("columns", 2, 32, log=True)
    queries = trial.suggest_int("queries", 200, 4_000, log=True)
    x, y = _classes(rows + queries, columns)
    algorithm = trial.suggest_categorical("algorithm", ["brute", "kd_tree", "ball_tree"])
    leaf = trial.suggest_int("leaf_size", 5, 100, log=True) if algorithm != "brute" else 30
    model = KNeighborsClassifier(
        trial.suggest_int("n_neighbors", 1, 200, log=True),
        algorithm=algorithm,
        leaf_size=leaf,
        weights=trial.suggest_categorical("weights", ["uniform", "distance"]),
        n_jobs=THREADS,
    )
    return float(1 - model.fit(x[:rows], y[:rows]).score(x[rows:], y[rows:]))


def convolutions(trial: optuna.Trial) -> float:
    import torch
    from torch import nn

    torch.set_num_threads(THREADS)
    side = trial.suggest_categorical("side", [12, 16, 24, 32])
    batch = trial.suggest_int("batch_size", 8, 96, log=True)
    channels = trial.suggest_int("channels", 4, 32, log=True)
    kernel = trial.suggest_categorical("kernel_size", [3, 5, 7])
    norm = trial.suggest_categorical("batch_norm", [False, True])
    layers: list[nn.Module] = []
    width = 3
    for depth in range(trial.suggest_int("blocks", 1, 4)):
        layers.append(nn.Conv2d(width, channels, kernel, padding=kernel // 2))
        layers += [nn.BatchNorm2d(channels)] * norm + [nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (depth % 2)
        width = channels
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
    )
    name = trial.suggest_categorical("optimizer", ["SGD", "Adam"])
    rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    optimizer = getattr(torch.optim, name)(network.parameters(), lr=rate)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    for _ in range(trial.suggest_int("steps", 2, 8)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def sequences(trial: optuna.Trial) -> float:
    import torch
    from torch import nn

    torch.set_num_threads(THREADS)
    cell = trial.suggest_categorical("cell", ["GRU", "LSTM"])
    hidden = trial.suggest_int("hidden", 8, 192, log=True)
    embedding = nn.Embedding(
        trial.suggest_int("vocabulary", 500, 20_000, log=True),
        trial.suggest_int("embedding", 8, 128, log=True),
    )
    both = trial.suggest_categorical("bidirectional", [False, True])
    network = getattr(nn, cell)(
        embedding.embedding_dim,
        hidden,
        trial.suggest_int("layers", 1, 3),
        batch_first=True,
        bidirectional=both,
    )
    head = nn.Linear(hidden * (1 + both), 2)
    parts = nn.ModuleList([embedding, network, head])
    optimizer = torch.optim.Adam(
        parts.parameters(), trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    )
    shape = trial.suggest_int("batch_size", 4, 64, log=True), trial.suggest_int("length", 8, 64)
    words = torch.randint(embedding.num_embeddings, shape)
    labels = torch.randint(2, shape[:1])
    for _ in range(trial.suggest_int("steps", 2, 6)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(network(embedding(words))[0].mean(dim=1)), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def sparse_text(trial: optuna.Trial) -> float:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, SGDClassifier

    documents = trial.suggest_int("documents", 200, 3_000, log=True)
    length = trial.suggest_int("words", 20, 120, log=True)
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=documents)
    words = np.minimum(rng.zipf(1.3, (documents, length)), 20_000) + 7 * y[:, None]
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    ngrams = (1, trial.suggest_int("ngrams", 1, 3))
    if trial.suggest_categorical("vectorizer", ["tfidf", "hashing"]) == "tfidf":
        share = trial.suggest_float("max_features", 0.05, 1.0, log=True)
        features = TfidfVectorizer(ngram_range=ngrams, max_features=int(share * 50_000) + 1)
    else:
        bits = trial.suggest_int("bits", 12, 20)
        features = HashingVectorizer(ngram_range=ngrams, n_features=2**bits)
    x = features.fit_transform(texts)
    penalty = trial.suggest_float("penalty", 1e-6, 1e-2, log=True)
    model: Any
    if trial.suggest_categorical("model", ["logistic", "sgd"]) == "logistic":
        solver = trial.suggest_categorical("solver", ["lbfgs", "liblinear"])
        model = LogisticRegression(C=1e-3 / penalty, solver=solver, max_iter=50)
    else:
        epochs = trial.suggest_int("epochs", 2, 30, log=True)
        model = SGDClassifier(alpha=penalty, max_iter=epochs, tol=None)
    return float(1 - model.fit(x, y).score(x, y))


def pipeline(trial: optuna.Trial) -> float:
    from sklearn.decomposition import PCA
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    x, y = _classes(
        trial.suggest_int("rows", 500, 6_000, log=True), trial.suggest_int("columns", 6, 24)
    )
    steps: list[Any] = [StandardScaler()]
    kind = trial.suggest_categorical("features", ["as is", "polynomial", "pca"])
    if kind == "polynomial":
        only = trial.suggest_categorical("interaction_only", [False, True])
        steps.append(PolynomialFeatures(2, interaction_only=only))
    elif kind == "pca":
        steps.append(PCA(trial.suggest_float("variance", 0.5, 0.99)))
    choice = trial.suggest_categorical("model", ["linear", "trees", "network"])
    if choice == "linear":
        C = trial.suggest_float("C", 1e-3, 10.0, log=True)
        steps.append(LogisticRegression(C=C, max_iter=60))
    elif choice == "trees":
        trees = trial.suggest_int("n_estimators", 10, 100, log=True)
        leaf = trial.suggest_int("min_samples_leaf", 1, 50, log=True)
        steps.append(ExtraTreesClassifier(trees, min_samples_leaf=leaf, n_jobs=THREADS))
    else:
        width = trial.suggest_int("width", 8, 512, log=True)
        layers = trial.suggest_int("layers", 1, 3)
        batch = trial.suggest_int("batch_size", 32, 512, log=True)
        steps.append(MLPClassifier((width,) * layers, batch_size=batch, max_iter=5))
    return float(1 - make_pipeline(*steps).fit(x, y).score(x, y))


@dataclass(frozen=True)
class Measured:
    """An objective, and the modules that its script has imported."""

    run: Callable[[optuna.Trial], float]
    modules: tuple[str, ...]


WORKLOADS = {
    "hist_boosting": Measured(hist_boosting, ("sklearn.ensemble", "sklearn.datasets")),
    "xgboost": Measured(xgboost, ("xgboost", "sklearn.datasets")),
    "kernels": Measured(kernels, ("sklearn.kernel_ridge", "sklearn.svm", "sklearn.datasets")),
    "neighbours": Measured(neighbours, ("sklearn.neighbors", "sklearn.datasets")),
    "convolutions": Measured(convolutions, ("torch", "torch._dynamo")),
    "sequences": Measured(sequences, ("torch", "torch._dynamo")),
    "sparse_text": Measured(
        sparse_text, ("sklearn.feature_extraction.text", "sklearn.linear_model")
    ),
    "pipeline": Measured(
        pipeline,
        (
            "sklearn.decomposition",
            "sklearn.ensemble",
            "sklearn.neural_network",
            "sklearn.pipeline",
            "sklearn.datasets",
        ),
    ),
}


def measure(name: str, n_trials: int, seconds: float | None) -> None:
    path = TABLES / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ["{}"]
    space, rows = json.loads(lines[0]), lines[1:]
    if len(rows) >= n_trials:
        return
    workload = WORKLOADS[name]
    for module in workload.modules:
        importlib.import_module(module)
    # The sampler of a continued table draws other points than before.
    sampler = optuna.samplers.RandomSampler(seed=len(rows))
    # Nothing is stopped: the limits are there to isolate.
    pruner = QuotaPruner(limits=Limits(memory="2GiB", wall_time="60s"))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(
        isolated(workload.run), n_trials=n_trials - len(rows), timeout=seconds, catch=(Exception,)
    )
    used = trial_table(study).set_index("number")
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        for key, distribution in trial.distributions.items():
            space[key] = json.loads(distribution_to_json(distribution))
        amounts = [float(f"{used.loc[trial.number, each]:.5g}") for each in RESOURCES]
        rows.append(json.dumps([{k: _short(v) for k, v in trial.params.items()}, *amounts]))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([json.dumps(space), *rows]) + "\n")
    print(f"{name}: {len(rows)} trials", flush=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(WORKLOADS))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(THREADS)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    started = time.perf_counter()
    for name in [arguments.only] if arguments.only else WORKLOADS:
        measure(name, arguments.trials, arguments.seconds)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
