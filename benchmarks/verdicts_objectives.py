"""The objectives of ``verdicts.py``: training as people write it, 150 to 500 MiB, 1 to 3 s each.

Each is a function of what its ``prepare`` returned. ``prepare`` runs first, in the process of the
study, as the top of a script would: it writes the files that the objective reads, starts a server
or makes the data that the objective carries. ``modules`` are what such a script has imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import importlib
import importlib.util
import multiprocessing
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any
import warnings

import numpy as np


MIB = 2**20
Run = Callable[[Any], float]


@dataclass(frozen=True)
class Objective:
    """A named objective.

    Attributes:
        name: What the table shows.
        run: Returns the value, given what ``prepare`` returned.
        modules: Imported by the study before its first trial; skipped where one is missing.
        prepare: Runs in the study's process, given a folder that all runs share.
    """

    name: str
    run: Run
    modules: tuple[str, ...]
    prepare: Callable[[Path], Any]

    def missing(self) -> list[str]:
        """Return the packages that aren't installed."""
        packages = sorted({name.partition(".")[0] for name in self.modules})
        return [name for name in packages if importlib.util.find_spec(name) is None]

    def load(self) -> None:
        """Import the modules."""
        for name in self.modules:
            importlib.import_module(name)


@dataclass(frozen=True)
class Task:
    """An objective in whatever process a tool starts for it: notes that process's id first."""

    name: str
    prepared: Any
    note: Path

    def __call__(self) -> float:
        """Return the value of the objective."""
        warnings.simplefilter("ignore")
        # A child of forkserver would start its own by forkserver, where they share nothing: what
        # an objective needs is not to depend on who runs it.
        multiprocessing.set_start_method("fork", force=True)
        partial = self.note.with_suffix(".new")
        partial.write_text(str(os.getpid()))
        partial.rename(self.note)  # atomic: a reader finds the whole number
        return float(OBJECTIVES[self.name].run(self.prepared))


OBJECTIVES: dict[str, Objective] = {}


def _nothing(folder: Path) -> None:
    return None


def objective(
    name: str, *modules: str, prepare: Callable[[Path], Any] = _nothing
) -> Callable[[Run], Run]:
    """Register a function as an objective."""

    def register(run: Run) -> Run:
        OBJECTIVES[name] = Objective(name, run, modules, prepare)
        return run

    return register


def _write_once(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.exists():
        partial = path.with_suffix(".new")
        write(partial)
        partial.rename(path)
    return path


def _regress(rows: int, seed: int = 0, seconds: float = 0.6) -> float:
    """Fit least squares to ``rows`` rows of 512 bytes; go on for some seconds, as epochs would."""
    rng = np.random.default_rng(seed)
    x = rng.random((rows, 64))
    deadline = time.monotonic() + seconds
    while True:
        target = x[:, 0] + 0.1 * rng.standard_normal(rows)
        weights = np.linalg.solve(x.T @ x, x.T @ target)
        loss = float(np.mean((x @ weights - target) ** 2))
        if time.monotonic() >= deadline:
            return loss


ROWS_A_MIB = MIB // 512


# Arrays and data frames.


@objective("numpy array", "numpy")
def numpy_array(prepared: None) -> float:
    return _regress(300 * ROWS_A_MIB)


@objective("pandas sort and group", "pandas")
def pandas_frame(prepared: None) -> float:
    import pandas as pd

    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.random(1_000_000) for i in range(15)}
    frame = pd.DataFrame({"key": rng.integers(100, size=1_000_000), **columns})
    means = frame.sort_values("x0").groupby("key").mean()
    return float(means.to_numpy().mean())


def _carry(folder: Path) -> np.ndarray:
    return np.random.default_rng(0).random((150 * ROWS_A_MIB, 64))


@objective("data carried by the objective", "numpy", prepare=_carry)
def carried(prepared: np.ndarray) -> float:
    scaled = (prepared - prepared.mean(axis=0)) / prepared.std(axis=0)
    loss = 0.0
    for column in range(8):
        weights = np.linalg.solve(scaled.T @ scaled + np.eye(64), scaled.T @ scaled[:, column])
        loss += float(np.mean((scaled @ weights) ** 2))
    return loss


@objective("replay buffer, lazily filled", "numpy")
def replay_buffer(prepared: None) -> float:
    rng = np.random.default_rng(0)
    buffer = np.zeros((100_000, 4, 84, 84), dtype=np.uint8)  # 2.6 GiB, of which a tenth is filled
    rewards = np.zeros(100_000, dtype=np.float32)
    for step in range(10_000):
        buffer[step] = rng.integers(256, size=(4, 84, 84), dtype=np.uint8)
        rewards[step] = buffer[step, 0, 0, 0]
    total = 0.0
    for _ in range(200):
        batch = buffer[rng.integers(10_000, size=64)]
        total += float(batch.mean())
    return total / 200


def _write_rows(path: Path) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(10):
            rng.random((60 * ROWS_A_MIB, 64)).tofile(file)


def _rows_on_disk(folder: Path) -> Path:
    return _write_once(folder / "rows.bin", _write_rows)


@objective("mapped data set (np.memmap)", "numpy", prepare=_rows_on_disk)
def mapped_data(prepared: Path) -> float:
    rows = np.memmap(prepared, dtype=np.float64, mode="r").reshape(-1, 64)  # 600 MiB
    norms = np.concatenate([np.square(part).sum(axis=1) for part in np.array_split(rows, 60)])
    chosen = rows[np.argsort(norms)[: 200 * ROWS_A_MIB]]  # a copy, in random order
    loss = 0.0
    for column in range(8):
        loss += float(np.linalg.solve(chosen.T @ chosen, chosen.T @ chosen[:, column]).sum())
    return loss


# scikit-learn and boosting.


@objective("random forest, n_jobs=-1", "sklearn.ensemble")
def random_forest(prepared: None) -> float:
    from sklearn.ensemble import RandomForestRegressor

    rng = np.random.default_rng(0)
    x = rng.random((60_000, 10))
    y = x[:, 0] + rng.random(len(x))
    model = RandomForestRegressor(40, max_features=1, n_jobs=-1, random_state=0).fit(x, y)
    return float(model.score(x[:20_000], y[:20_000]))


@objective("cross_val_score, n_jobs=2", "sklearn.kernel_ridge", "sklearn.model_selection")
def cross_validation(prepared: None) -> float:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.model_selection import cross_val_score

    rng = np.random.default_rng(0)
    x = rng.random((2_700, 20))
    y = np.sin(x.sum(axis=1)) + 0.1 * rng.random(len(x))
    # Two workers of joblib, each with a kernel matrix of 2,160 x 2,160; a fit that fails is nan.
    scores = cross_val_score(KernelRidge(kernel="rbf"), x, y, cv=5, n_jobs=2)
    return float(np.mean(scores))


@objective("LightGBM, 8 threads", "lightgbm")
def boost_lightgbm(prepared: None) -> float:
    import lightgbm as lgb

    rng = np.random.default_rng(0)
    x = rng.random((300_000, 64))
    y = x[:, 0] * x[:, 1] + 0.1 * rng.random(len(x))
    params = {"objective": "l2", "num_threads": 8, "verbosity": -1, "num_leaves": 31}
    booster = lgb.train(params, lgb.Dataset(x, y), num_boost_round=8)
    return float(np.mean((booster.predict(x[:50_000]) - y[:50_000]) ** 2))


@objective("XGBoost, 8 threads", "xgboost")
def boost_xgboost(prepared: None) -> float:
    import xgboost as xgb

    rng = np.random.default_rng(0)
    x = rng.random((250_000, 64), dtype=np.float32)
    y = x[:, 0] * x[:, 1] + 0.1 * rng.random(len(x), dtype=np.float32)
    data = xgb.DMatrix(x, y, nthread=8)
    params = {"nthread": 8, "max_depth": 6, "tree_method": "hist", "verbosity": 0}
    booster = xgb.train(params, data, num_boost_round=4)
    return float(np.mean((booster.predict(data) - y) ** 2))


# Processes and threads of Python.


@objective("multiprocessing.Pool(2)", "numpy")
def pool(prepared: None) -> float:
    with multiprocessing.Pool(2) as workers:
        return float(np.mean(workers.starmap(_regress, [(120 * ROWS_A_MIB, i) for i in range(2)])))


@objective("ProcessPoolExecutor(2)", "numpy")
def executor(prepared: None) -> float:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as workers:
        return float(np.mean(list(workers.map(_regress, [120 * ROWS_A_MIB] * 2, range(2)))))


@objective("joblib, loky", "joblib")
def joblib_loky(prepared: None) -> float:
    from joblib import delayed, Parallel

    calls = (delayed(_regress)(120 * ROWS_A_MIB, i) for i in range(2))
    return float(np.mean(Parallel(n_jobs=2)(calls)))


@objective("joblib, threading", "joblib")
def joblib_threading(prepared: None) -> float:
    from joblib import delayed, Parallel

    calls = (delayed(_regress)(75 * ROWS_A_MIB, i) for i in range(4))
    return float(np.mean(Parallel(n_jobs=4, backend="threading")(calls)))


@objective("64 threads", "numpy")
def threads(prepared: None) -> float:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    together = Barrier(64)

    def fold(seed: int) -> float:
        # No temporary arrays: how many are there at once is up to how threads are scheduled.
        x = np.random.default_rng(seed).random((5 * ROWS_A_MIB, 64))
        together.wait()
        return float(np.mean([x.mean(axis=0).mean() for _ in range(20)]))

    with ThreadPoolExecutor(64) as workers:
        return float(np.mean(list(workers.map(fold, range(64)))))


def _read_shared(name: str, rows: int, out: Any) -> None:
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(name)
    x = np.ndarray((rows, 64), buffer=memory.buf)
    out.put(float(np.mean([x.mean() for _ in range(5)])))
    del x
    memory.close()


@objective("shared array, four readers", "numpy")
def shared_array(prepared: None) -> float:
    from multiprocessing.shared_memory import SharedMemory

    rows = 250 * ROWS_A_MIB
    memory = SharedMemory(create=True, size=rows * 512)
    try:
        x = np.ndarray((rows, 64), buffer=memory.buf)
        np.random.default_rng(0).random(out=x)
        context = multiprocessing.get_context("fork")
        out: Any = context.SimpleQueue()
        readers = [
            context.Process(target=_read_shared, args=(memory.name, rows, out)) for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        del x
        return float(np.mean([out.get() for _ in readers]))
    finally:
        memory.close()
        memory.unlink()


_servers: list[Any] = []


def _queue_of_a_manager(folder: Path) -> Any:
    manager = multiprocessing.Manager()
    _servers.append(manager)  # ends with its last reference
    queue = manager.Queue()
    for device in range(2):
        queue.put(device)
    return queue


@objective("Manager queue of the script", "numpy", prepare=_queue_of_a_manager)
def manager_queue(prepared: Any) -> float:
    device = prepared.get(timeout=30)
    try:
        return _regress(300 * ROWS_A_MIB, seed=device)
    finally:
        prepared.put(device)


TRAIN = """
import sys, time
import numpy as np
rows, deadline = int(sys.argv[1]), time.monotonic() + 1.0
x = np.random.default_rng(0).random((rows, 64))
while True:
    weights = np.linalg.solve(x.T @ x, x.T @ x[:, 0])
    if time.monotonic() >= deadline:
        break
print(float(np.mean((x @ weights - x[:, 0]) ** 2)))
"""


def _training_script(folder: Path) -> Path:
    return _write_once(folder / "train.py", lambda path: _write_text(path, TRAIN))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


@objective("training script by subprocess.run", "numpy", prepare=_training_script)
def training_script(prepared: Path) -> float:
    command = [sys.executable, str(prepared), str(300 * ROWS_A_MIB)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ran.stdout)


# torch, and what is built on it.


@objective("torch, DataLoader(num_workers=2)", "torch", "torch.utils.data", "torch._dynamo")
def torch_loader(prepared: None) -> float:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x = torch.randn(50_000, 1024)
    data = TensorDataset(x, x[:, 0])
    model = torch.nn.Sequential(torch.nn.Linear(1024, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters())
    loss = torch.zeros(())
    for inputs, targets in DataLoader(data, batch_size=512, shuffle=True, num_workers=2):
        loss = torch.nn.functional.mse_loss(model(inputs).squeeze(1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def _train_shared(model: Any, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(4):
            for parameter in model.parameters():
                parameter.mul_(0.999)


@objective("torch, shared tensors", "torch", "torch.multiprocessing")
def torch_shared(prepared: None) -> float:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(8_000, 8_000)
    model.share_memory()  # as Hogwild training has it
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=_train_shared, args=(model, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return float(model.weight.detach().norm())


def _layers() -> Any:
    import torch

    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(5_000, 5_000, bias=False) for _ in range(5)))


def _write_checkpoint(path: Path) -> None:
    import torch

    model = _layers()
    state = {name: torch.randn(5_000, 5_000) / 70 for name, _ in model.named_parameters()}
    torch.save(state, path)


def _checkpoint(folder: Path) -> Path:
    return _write_once(folder / "checkpoint.pt", _write_checkpoint)


@objective("torch.load(mmap=True)", "torch", prepare=_checkpoint)
def torch_mapped(prepared: Path) -> float:
    import torch

    torch.manual_seed(0)
    model = _layers()
    state = torch.load(prepared, mmap=True, weights_only=True)  # 480 MiB
    model.load_state_dict(state, assign=True)
    x = torch.randn(12_000, 5_000)
    with torch.inference_mode():
        return float(torch.stack([model(x[i : i + 64]).std() for i in range(0, 128, 64)]).mean())


@objective("transformers' Trainer", "transformers", "transformers.trainer", "accelerate")
def transformers_trainer(prepared: None) -> float:
    import tempfile

    import torch
    import transformers

    class Words(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Any]:
            words = torch.randint(30_000, (32,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": words, "labels": torch.tensor(index % 2)}

    config = transformers.BertConfig(
        vocab_size=30_000,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=8,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=transformers.BertForSequenceClassification(config),
            args=arguments,
            train_dataset=Words(),
        )
        return float(trainer.train().training_loss)


@objective("Lightning Trainer", "lightning")
def lightning_trainer(prepared: None) -> float:
    import logging
    import tempfile

    import lightning
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(4_000, 4_000), torch.nn.ReLU(), torch.nn.Linear(4_000, 1)
            )

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layers(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    data = torch.utils.data.TensorDataset(torch.randn(2_000, 4_000))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=6,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=64))
    return float(trainer.callback_metrics.get("loss", 0.0))


@objective("Prophet", "prophet")
def prophet_forecast(prepared: None) -> float:
    import logging

    import pandas as pd
    import prophet

    logging.getLogger("cmdstanpy").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    days = pd.DataFrame({"ds": pd.date_range("2019-01-01", periods=1_000)})
    days["y"] = np.sin(np.arange(1_000) / 58) + 0.1 * rng.standard_normal(1_000)
    model = prophet.Prophet(uncertainty_samples=1_000).fit(days)
    forecast = model.predict(model.make_future_dataframe(10_000))
    return float(forecast["yhat_upper"].mean())
