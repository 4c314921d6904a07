"""GPU figures through the real pynvml and a fake driver, healthy and faulty."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
import threading
from typing import Any

import pytest

from optuna_quota._metering import nvml as nvml_module
from optuna_quota._metering.host import forget_gpus
from optuna_quota._metering.nvml import answer_in_time, DriverThread
from tests.metering_tests.conftest import FakeNvml


Nvml = Callable[..., FakeNvml]

GPU = "device {i} GPU-{i}aaa {mig} 80000000000 1000 {mj}\n"


def gpu(i: int = 0, *, mig: int = 0, mj: int = 5000) -> str:
    return GPU.format(i=i, mig=mig, mj=mj)


def warnings_in(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("WARNING")]


def figures_in(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith(("WARNING", "INFO"))]


# A trial that is sampled twice and whose processes hold 3 GB on one GPU, 1 GB on another.
MEASURED = f"""
start = int(time.time() * 1e6)
gpus = {gpu(0) + gpu(1)!r}
mine = f"process 0 {{me}} 3000000000\\nprocess 1 {{me}} 1000000000\\n"
say(gpus + mine)
monitor = loop.monitor((1, 1))
loop.tick()
later = gpus.replace(" 5000", " 65000")
samples = f"sample 0 {{me}} {{start + 2000000}} 50\\nsample 0 {{me}} {{start + 4000000}} 100\\n"
time.sleep(0.3)
say(later + mine + samples)
usage = monitor.close()
"""


def test_memory_time_and_energy_by_process_over_all_devices(nvml: Nvml) -> None:
    out = nvml().run(MEASURED + "show(usage)")
    memory, seconds, joules = figures_in(out)[0].split()
    assert float(memory) == 4e9
    # 2 s at 50% and 2 s at 100%, less the moments before the reader was opened.
    assert 2.5 < float(seconds) <= 3.0
    assert float(joules) >= 120.0
    assert warnings_in(out) == []


@pytest.mark.parametrize(
    ("visible", "memory"),
    [("0", 3e9), ("1", 1e9), ("GPU-1", 1e9), ("1,0", 4e9), ("0,7,1", 3e9)],
)
def test_only_what_cuda_shows_is_counted(nvml: Nvml, visible: str, memory: float) -> None:
    out = nvml().run(MEASURED + "show(usage)", CUDA_VISIBLE_DEVICES=visible)
    assert float(figures_in(out)[0].split()[0]) == memory


def test_a_child_of_the_trial_counts(nvml: Nvml) -> None:
    code = f"""
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    say({gpu()!r} + f"process 0 {{child.pid}} 500\\nprocess 0 {{os.getppid()}} 70000\\n")
    monitor = loop.monitor((1, 1))
    usage = monitor.close()
    child.kill(); child.wait()
    print(usage.gpu_memory)
    """
    assert figures_in(nvml().run(code)) == ["500.0"]


def test_a_gpu_memory_limit_is_a_breach(nvml: Nvml) -> None:
    code = f"""
    say({gpu()!r} + f"process 0 {{me}} 3000000000\\n")
    monitor = loop.monitor((1, 1), limits=Limits(gpu_memory="2GB"))
    loop.tick()
    print(monitor.breach.resource, monitor.breach.observed)
    """
    assert figures_in(nvml().run(code)) == ["gpu_memory 3000000000.0"]


def test_a_trial_that_is_not_on_the_gpu_has_no_figures_rather_than_zeros(nvml: Nvml) -> None:
    out = nvml().run("monitor = loop.monitor((1, 1)); loop.tick(); show(monitor.close())", gpu())
    assert figures_in(out) == ["None None None"]
    assert warnings_in(out) == []


LIMITED = "loop.monitor((1, 1), limits=Limits(gpu_memory=9e9, gpu_time=99))"
ONCE = f"""
for i in range(3):
    monitor = {LIMITED}
    loop.tick()
    time.sleep(0.06)
    loop.tick()
    show(monitor.close())
"""
OWN = "process 0 {pid} 3000000000\n"
HEALTHY = "say(STATE.replace('{pid}', str(me)))\n"


@pytest.mark.parametrize(
    ("state", "figures", "warning"),
    [
        (None, "None None None", "driver is not loaded"),
        ("fail nvmlInitWithFlags 18\n" + gpu(), "None None None", "version is not the driver's"),
        ("fail nvmlInitWithFlags 999\n" + gpu(), "None None None", "driver failed"),
        ("", "None None None", "no GPU"),
        (gpu() + "fail nvmlDeviceGetComputeRunningProcesses_v3 3\n", "None None None", "support"),
        (gpu() + "fail nvmlDeviceGetComputeRunningProcesses_v3 4\n", "None None None", "permit"),
        (gpu() + "process 0 {pid} -1\n", "None", "does not report it by process"),
        (gpu() + OWN + "fail nvmlDeviceGetProcessUtilization 3\n", "3000000000.0 None", "time"),
        (gpu() + OWN + "fail nvmlDeviceGetTotalEnergyConsumption 3\n", "3000000000.0", "nergy"),
        (gpu(mig=1) + "process 0 {pid} -1\n", "None None None", "MIG"),
        (gpu(mig=1) + "instance 0 0\nprocess 100 {pid} 77\n", "77.0 None None", "MIG"),
    ],
)
def test_a_faulty_driver_means_none_and_one_warning(
    nvml: Nvml, state: str | None, figures: str, warning: str
) -> None:
    code = f"STATE = {state!r}\n"
    code += "os.unlink(os.environ['FAKE_NVML'])\n" if state is None else HEALTHY
    # Without the instances' function, as an old driver, a MIG device is read as a whole.
    flags = ("-DWITHOUT_INSTANCES",) if state and "instance" not in state else ()
    out = nvml(*flags).run(code + ONCE)
    assert len(figures_in(out)) == 3
    assert all(line.startswith(figures) for line in figures_in(out)), out
    assert len(warnings_in(out)) == 1, out
    assert warning in warnings_in(out)[0]
    assert "not measured" in warnings_in(out)[0]


def test_a_driver_that_fails_during_a_trial_leaves_no_figure(nvml: Nvml) -> None:
    code = f"""
    say({gpu()!r} + f"process 0 {{me}} 3000000000\\n")
    monitor = {LIMITED}
    loop.tick()
    before = monitor.usage()
    say("fail nvmlDeviceGetComputeRunningProcesses_v3 15\\n" + {gpu()!r})
    deadline = time.monotonic() + 20
    while monitor.usage().gpu_memory is not None and time.monotonic() < deadline:
        time.sleep(0.02)
        loop.tick()
    show(before)
    show(monitor.close())
    next = {LIMITED}
    loop.tick()
    show(next.close())
    """
    out = nvml().run(code)
    assert figures_in(out)[0].startswith("3000000000.0 0")
    assert figures_in(out)[1:] == ["None None None"] * 2
    assert len(warnings_in(out)) == 1
    assert "lost" in warnings_in(out)[0]


def test_an_old_driver_without_the_functions(nvml: Nvml) -> None:
    out = nvml("-DWITHOUT_PROCESSES").run(f"say({gpu()!r})\n" + ONCE)
    assert figures_in(out) == ["None None None"] * 3
    assert len(warnings_in(out)) == 1
    assert "too old" in warnings_in(out)[0]


def test_cuda_shows_nothing(nvml: Nvml) -> None:
    out = nvml().run(MEASURED + "show(usage)", CUDA_VISIBLE_DEVICES="")
    assert figures_in(out) == ["None None None"]


def test_no_driver_is_one_warning_and_cached(nvml: Nvml) -> None:
    code = (
        "import sys\n"
        + ONCE
        + "print('pynvml' in sys.modules)\n"
        + "from optuna_quota._metering.nvml import open_devices\n"
        + "print(open_devices.cache_info().misses)\n"
    )
    out = nvml().run(code, has_driver=False)
    if "None None None" not in out:
        pytest.skip("this machine has an NVIDIA driver")
    assert figures_in(out) == ["None None None"] * 3 + ["False", "1"]
    assert len(warnings_in(out)) == 1
    assert "GPU memory and GPU time are not measured" in warnings_in(out)[0]


def test_energy_is_shared_by_how_busy_each_kept_the_device(nvml: Nvml) -> None:
    code = f"""
    import subprocess
    other = os.getppid()
    start = int(time.time() * 1e6)
    both = f"process 0 {{me}} 1\\nprocess 0 {{other}} 1\\n"
    say({gpu(mj=0)!r} + both)
    monitor = loop.monitor((1, 1))
    loop.tick()
    time.sleep(0.3)
    say({gpu(mj=100000)!r} + both + f"sample 0 {{me}} {{start + 1000000}} 25\\n"
        + f"sample 0 {{other}} {{start + 1000000}} 75\\n")
    print(monitor.close().energy)
    """
    assert float(figures_in(nvml().run(code))[0]) == pytest.approx(25.0)


HANGS = f"""
from optuna_quota._doctor import _check_gpus_here
from optuna_quota._metering.nvml import answer_in_time, GpuError, NvmlDevice, open_devices

say({gpu()!r} + "hang nvmlDeviceGetMemoryInfo\\n")
device = open_devices()[0][0]
for seconds in (0.2, 30.0):
    try:
        answer_in_time(device.memory, seconds)
    except GpuError as error:
        print(error)
print(_check_gpus_here()[0].fix)
say({gpu()!r})
for _ in range(100):
    try:
        print(answer_in_time(device.memory))
        break
    except GpuError:
        time.sleep(0.05)
print(_check_gpus_here()[0].state)
"""


def test_a_driver_that_hangs_is_not_asked_again_until_it_has_answered(nvml: Nvml) -> None:
    out = nvml().run(HANGS).splitlines()
    assert out[:2] == ["the driver hangs"] * 2
    assert out[2].startswith("Reset the GPU")
    assert out[3:] == ["(1000, 80000000000)", "ok"]


def test_an_answer_that_comes_as_its_time_ends_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class JustAnswered(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            found = super().result(10)
            if timeout:
                raise TimeoutError
            return found

    monkeypatch.setattr(nvml_module, "Future", JustAnswered)
    driver = DriverThread()
    driver.start()
    assert driver.ask(lambda: 5, 1.0) == 5


def test_one_thread_queries_the_driver_for_all_threads() -> None:
    forget_gpus()
    together = threading.Barrier(8)
    answered_by: list[int] = []

    def ask() -> None:
        together.wait()
        answered_by.append(answer_in_time(threading.get_ident))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answered_by) == 8
    assert len(set(answered_by)) == 1
