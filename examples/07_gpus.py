"""GPU memory and GPU time: the same words, where there is an NVIDIA GPU.

A network is trained on the GPU in isolated trials whose GPU memory is limited. Without a GPU, or
without PyTorch, the example says so and stops.

Run it with ``python examples/07_gpus.py`` on a machine with an NVIDIA GPU and PyTorch; it prints
each trial's peak GPU memory and how it ended.
"""

from __future__ import annotations

import optuna

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the loss of a wide network after some steps."""
    import torch

    width = trial.suggest_int("width", 256, 32_768, log=True)
    layers = [torch.nn.Linear(256, width), torch.nn.ReLU(), torch.nn.Linear(width, width)]
    model = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, 1)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(1024, 256, device="cuda")
    loss = torch.tensor(0.0)
    for _ in range(50):
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Run the study and print what each trial held on the GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        print("This example needs PyTorch.")
        return
    if not torch.cuda.is_available():
        print("This example needs an NVIDIA GPU; `optuna-quota doctor` tells what is found.")
        return
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(gpu_time="10min", trial_time="10min")),
        pruner=QuotaPruner(limits=Limits(gpu_memory="4GiB", wall_time="1min")),
    )
    study.optimize(isolated(objective), n_trials=15)
    print(trial_table(study)[["number", "params_width", "gpu_memory", "gpu_time", "outcome"]])


if __name__ == "__main__":
    main()
