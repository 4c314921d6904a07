"""Which GPU memory is a trial's: by process, else by device; on a fake driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.metering_tests.conftest import FakeNvml


Nvml = Callable[..., FakeNvml]

GB = 1_000_000_000
# A pid that no process of this machine has: dead, hidden, or of another PID namespace.
HOST_PID = 4190000

# A trial in a process of its own that begins and ends when the script says so.
TRIAL = """
import subprocess
GB = 1_000_000_000

def device(i, used, mj=0, mig=0, total=80 * GB):
    return f"device {i} GPU-{i} {mig} {int(total)} {int(used)} {int(mj)}\\n"

class Trial:
    def __init__(self, number=0, gpu=None, **limits):
        self.monitor = loop.monitor((1, number), limits=Limits(**limits), here=False)
        if gpu is not None:
            self.monitor.environment = {"CUDA_VISIBLE_DEVICES": gpu}
        self.monitor.detach()
        self.process = subprocess.Popen(["sleep", "60"])
        self.pid = self.process.pid
    def begin(self):
        self.monitor.attach(self.pid)
        loop.tick()
        return self
    def look(self):
        time.sleep(0.13)  # another trial's reading is good for 0.125 s
        return self.monitor.sample(fully=True)
    def end(self):
        self.process.kill()
        self.process.wait()
        usage = self.monitor.close()
        gpu = self.monitor.gpu
        print(gpu and gpu.source, usage.gpu_memory, usage.gpu_time, usage.energy)
        return usage
"""


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith(("WARNING", "INFO"))]


def warnings(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("WARNING")]


@pytest.fixture
def run(nvml: Nvml) -> Callable[..., str]:
    def run_beside(code: str, *flags: str, **environment: str) -> str:
        return nvml(*flags).run(TRIAL + code, **environment)

    return run_beside


Run = Callable[..., str]


@pytest.mark.parametrize(
    "foreign",
    [
        f"process 0 {HOST_PID} 1000\n",
        f"ghost 0 {HOST_PID} 1000000000\n",
        f"ghost 0 {HOST_PID} -1\n",
        "process 0 1 1000000000\n",
    ],
)
def test_foreign_processes_are_no_reason_to_stop_measuring(run: Run, foreign: str) -> None:
    out = run(
        f"""
say(device(0, GB) + {foreign!r})
trial = Trial(gpu_memory=2 * GB)
trial.begin()
say(device(0, 4 * GB) + {foreign!r} + f"process 0 {{trial.pid}} {{3 * GB}}\\n")
trial.look()
print(trial.monitor.breach.resource, trial.monitor.breach.observed)
say(device(0, GB))
trial.end()
"""
    )
    assert lines(out)[0] == "gpu_memory 3000000000.0"
    assert lines(out)[1].startswith("process 3000000000.0 0.0 ")
    assert warnings(out) == []


@pytest.mark.parametrize(
    "state",
    [
        f"device(0, GB) + 'ghost 0 {HOST_PID} 1000000000\\n'",
        "device(0, 60 * GB)",
        f"device(0, 60 * GB) + 'ghost 0 {HOST_PID} -1\\n'",
    ],
)
def test_a_trial_on_no_gpu_has_no_figures_despite_foreign_processes(run: Run, state: str) -> None:
    out = run(f"say({state})\ntrial = Trial(gpu_memory=GB).begin()\ntrial.look()\ntrial.end()\n")
    assert lines(out) == ["None None None None"]
    assert warnings(out) == []


def test_foreign_processes_that_come_and_go_are_not_counted(run: Run) -> None:
    out = run(
        f"""
shown = subprocess.Popen(["sleep", "60"])
hidden = "ghost 0 {HOST_PID} "
say(device(0, 3 * GB) + hidden + f"{{3 * GB}}\\n")
trial = Trial(gpu_memory=GB).begin()
say(device(0, 30 * GB) + hidden + f"{{20 * GB}}\\n" + f"process 0 {{shown.pid}} {{10 * GB}}\\n")
trial.look()
say(device(0, 0))
trial.look()
trial.end()
shown.kill()
"""
    )
    assert lines(out) == ["None None None None"]
    assert warnings(out) == []


def test_in_a_container_the_growth_of_the_devices_is_measured(run: Run) -> None:
    out = run(
        f"""
foreign = "ghost 0 77777777 9000000000\\n"
say(device(0, 10 * GB, mj=1000) + foreign)
trial = Trial(gpu_memory=20 * GB).begin()
stamp = int(time.time() * 1e6)
mine = f"ghost 0 {HOST_PID} -1\\nsample 0 {HOST_PID} {{stamp + 1000000}} 50\\n"
say(device(0, 25 * GB, mj=61000) + foreign + mine)
trial.look()
say(device(0, 12 * GB, mj=61000) + foreign + mine)
trial.look()
trial.end()
"""
    )
    source, memory, seconds, joules = lines(out)[0].split()
    assert (source, float(memory)) == ("device", 15e9)
    assert 0.3 < float(seconds) < 1.0
    # All of it by how busy each kept the device, where the trial alone was.
    assert float(joules) == pytest.approx(60.0)
    assert warnings(out) == []


def test_in_a_container_that_shows_nothing_time_and_energy_are_the_devices(run: Run) -> None:
    out = run(
        """
say(device(0, 0, mj=5000) + "busy 0 0\\n")
earliest = time.monotonic()
trial = Trial(gpu_memory=20 * GB).begin()
say(device(0, 2 * GB, mj=65000) + "busy 0 50\\n")
begun = time.monotonic()
for _ in range(3):
    trial.look()
last = time.monotonic()
trial.end()
print(last - begun, time.monotonic() - earliest)
"""
    )
    source, memory, seconds, joules = lines(out)[0].split()
    assert (source, float(memory), float(joules)) == ("device", 2e9, 60.0)
    least, most = map(float, lines(out)[1].split())
    assert 0.4 * least < float(seconds) < 0.6 * most
    assert warnings(out) == []


@pytest.mark.parametrize("beside", ["", f"ghost 0 {HOST_PID} 500000000\n"])
def test_totals_not_reported_by_process_are_the_devices_if_the_trial_is_alone(
    run: Run, beside: str
) -> None:
    out = run(
        f"""
NO_SAMPLES = "fail nvmlDeviceGetProcessUtilization 3\\n"
say(device(0, 0, mj=5000) + NO_SAMPLES + "busy 0 0\\n" + {beside!r})
trial = Trial().begin()
mine = f"process 0 {{trial.pid}} {{2 * GB}}\\n"
say(device(0, 2 * GB, mj=65000) + NO_SAMPLES + "busy 0 50\\n" + mine + {beside!r})
for _ in range(3):
    trial.look()
trial.end()
"""
    )
    source, memory, seconds, joules = lines(out)[0].split()
    assert (source, float(memory)) == ("process", 2e9)
    if beside:
        assert (seconds, joules) == ("None", "None")
        assert len(warnings(out)) == 2
    else:
        assert float(seconds) > 0.1
        assert float(joules) == 60.0
        assert warnings(out) == []


def test_a_limit_that_no_gpu_lets_be_enforced_says_so_before_the_trial(run: Run) -> None:
    out = run(
        """
say(device(0, 0) + "fail nvmlDeviceGetProcessUtilization 3\\n")
trial = Trial(gpu_time=60, gpu_memory=GB)
print("begins")
trial.begin().end()
"""
    )
    assert out.splitlines()[0] == (
        "WARNING GPU time is not measured: the GPU does not support it. "
        "A limit or quota on GPU time can't be enforced here: `optuna-quota doctor` says more."
    )
    assert out.splitlines()[1] == "begins"
    assert len(warnings(out)) == 1


def test_by_device_a_limit_is_a_breach(run: Run) -> None:
    out = run(
        f"""
say(device(0, 50 * GB))
trial = Trial(gpu_memory=2 * GB).begin()
say(device(0, 53 * GB) + "ghost 0 {HOST_PID} {3 * GB}\\n")
trial.look()
print(trial.monitor.breach.resource, trial.monitor.breach.observed)
trial.end()
"""
    )
    assert lines(out)[0] == "gpu_memory 3000000000.0"


def test_known_changes_of_foreign_processes_are_deducted(run: Run) -> None:
    out = run(
        f"""
def state(used, foreign, mine=""):
    say(device(0, used * GB) + f"ghost 0 77777777 {{foreign * GB}}\\n" + mine)
state(10, 10)
trial = Trial().begin()
state(27, 25, "ghost 0 {HOST_PID} -1\\n")
trial.look()
trial.end()
"""
    )
    assert lines(out)[0].startswith("device 2000000000.0 ")


def test_memory_that_others_release_hides_no_later_growth(run: Run) -> None:
    out = run(
        """
say(device(0, 30 * GB))
trial = Trial().begin()
say(device(0, 10 * GB))
trial.look()
say(device(0, 14 * GB))
trial.look()
trial.end()
"""
    )
    assert lines(out)[0].startswith("device 4000000000.0 ")


def test_trials_that_share_a_gpu_of_a_container_are_unknown_with_one_sentence(run: Run) -> None:
    out = run(
        f"""
say(device(0, 0))
trials = [Trial(i, gpu_memory=9 * GB).begin() for i in range(2)]
say(device(0, 20 * GB) + "ghost 0 {HOST_PID} {20 * GB}\\n")
for trial in trials:
    trial.look()
    trial.look()
for trial in trials:
    print(trial.monitor.breach)
    trial.end()
"""
    )
    assert lines(out) == ["None", "None None None None"] * 2
    (warning,) = warnings(out)
    assert "container" in warning and "share a GPU" in warning
    assert "limit or quota on GPU memory" in warning


def test_a_trial_about_to_get_another_gpu_disturbs_no_other(run: Run) -> None:
    out = run(
        """
say(device(0, 0) + device(1, 0))
first = Trial(0, gpu="GPU-0").begin()
say(device(0, 3 * GB) + device(1, 0))
first.look()
# As the sampler does: under metering in this process, until its own is started.
monitor = loop.monitor((1, 1), limits=Limits(gpu_memory=9 * GB))
first.look()
monitor.environment = {"CUDA_VISIBLE_DEVICES": "GPU-1"}
monitor.detach()
first.look()
monitor.close()
say(device(0, 5 * GB) + device(1, 0))
first.look()
first.end()
"""
    )
    assert lines(out)[0].startswith("device 5000000000.0 ")
    assert warnings(out) == []


@pytest.mark.slow
def test_another_worker_on_the_gpu_is_noticed(run: Run) -> None:
    out = run(
        """
code = "from optuna_quota._metering import gpu_meter, gpu_reader\\n"
code += f"gpu_reader._PREFIX = {gpu_reader._PREFIX!r}; reader = gpu_meter.gpu_reader()\\n"
code += "reader.claim(1, frozenset(['GPU-0'])); print('there', flush=True); input()"
say(device(0, 0) + device(1, 0))
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
other = subprocess.Popen([sys.executable, "-c", code], **pipes)
other.stdout.readline()
trials = [Trial(i, gpu=f"GPU-{i}").begin() for i in range(2)]
say(device(0, 4 * GB) + device(1, 9 * GB))
for trial in trials:
    trial.look()
for trial in trials:
    trial.end()
other.communicate(b"\\n")
alone = Trial(2).begin()
say(device(0, 5 * GB) + device(1, 9 * GB))
alone.look()
alone.end()
"""
    )
    assert lines(out)[0] == "None None None None"
    assert lines(out)[1].startswith("device 9000000000.0 ")
    assert lines(out)[2].startswith("device 1000000000.0 ")
    (warning,) = warnings(out)
    assert "share a GPU" in warning


def test_in_process_trials_of_a_container_are_measured_by_device(run: Run) -> None:
    out = run(
        """
def state(used):
    say(device(0, 10 * GB + used) + f"ghost 0 4190000 {int(used)}\\n")
say(device(0, 10 * GB))
for peak in (5, 4):
    monitor = loop.monitor((1, peak), limits=Limits(gpu_memory=9 * GB))
    state(peak * GB)
    time.sleep(0.1)
    loop.tick()
    state(GB)
    time.sleep(0.1)
    print(monitor.close().gpu_memory, monitor.gpu.source)
"""
    )
    # The second begins with the 1 GB that the first had left.
    assert lines(out) == ["5000000000.0 device", "3000000000.0 device"]
    assert warnings(out) == []


def test_trials_with_a_gpu_each_are_measured_separately(run: Run) -> None:
    out = run(
        """
say(device(0, 1 * GB) + device(1, 2 * GB))
trials = [Trial(i, gpu=f"GPU-{i}").begin() for i in range(2)]
say(device(0, 4 * GB) + device(1, 9 * GB))
for trial in trials:
    trial.look()
for trial in trials:
    trial.end()
"""
    )
    assert lines(out)[0].startswith("device 3000000000.0 ")
    assert lines(out)[1].startswith("device 7000000000.0 ")
    assert warnings(out) == []


def test_once_the_driver_lists_one_trial_the_others_are_on_no_gpu(run: Run) -> None:
    out = run(
        f"""
say(device(0, 0))
trial = Trial(0).begin()
say(device(0, 2 * GB) + f"process 0 {{trial.pid}} {{2 * GB}}\\n")
trial.look()
say(device(0, 0))
trial.end()
trial = Trial(1, gpu_memory=GB).begin()
say(device(0, 9 * GB) + "ghost 0 {HOST_PID} {9 * GB}\\n")
trial.look()
trial.end()
"""
    )
    assert lines(out)[0].startswith("process 2000000000.0")
    assert lines(out)[1] == "None None None None"


def test_a_driver_that_lists_without_bytes_is_read_by_device(run: Run) -> None:
    out = run(
        """
say(device(0, GB))
trial = Trial().begin()
say(device(0, 6 * GB) + f"process 0 {trial.pid} -1\\n")
trial.look()
say(device(0, GB))
trial.end()
"""
    )
    assert lines(out)[0].startswith("device 5000000000.0 ")


def test_a_driver_that_refuses_its_list_is_read_by_device(run: Run) -> None:
    out = run(
        """
refused = "fail nvmlDeviceGetComputeRunningProcesses_v3 4\\n"
say(device(0, GB) + refused)
trial = Trial(gpu_memory=9 * GB).begin()
say(device(0, 6 * GB) + refused)
trial.look()
trial.end()
"""
    )
    assert lines(out)[0].startswith("device 5000000000.0 ")
    (warning,) = warnings(out)
    assert "not measured by process: the driver does not permit it" in warning


def test_a_trial_inherits_no_memory_of_the_previous_one(run: Run) -> None:
    out = run(
        """
state = lambda used: device(0, used) + f"process 0 {me} {int(used)}\\n"
say(state(40 * GB))
first = loop.monitor((1, 1), limits=Limits(gpu_memory=50 * GB))
loop.tick()
first.close()
say(state(GB))
second = loop.monitor((1, 2), limits=Limits(gpu_memory=20 * GB))
loop.tick()
print(second.breach, second.close().gpu_memory)
"""
    )
    assert lines(out) == ["None 1000000000.0"]


def test_no_trial_is_charged_the_energy_of_the_pause_before_it(run: Run) -> None:
    out = run(
        """
say(device(0, 0, mj=0))
Trial(0).begin().end()
say(device(0, 0, mj=9_000_000))
trial = Trial(1)
say(device(0, 0, mj=9_010_000) + f"process 0 {trial.pid} {GB}\\n")
trial.begin().look()
trial.end()
"""
    )
    assert lines(out)[1] == "process 1000000000.0 0.0 10.0"


def test_other_devices_are_read_after_one_is_lost(run: Run) -> None:
    out = run(
        """
gpus = device(0, 0) + device(1, 0)
say(gpus)
trials = [Trial(i, gpu_memory=9 * GB).begin() for i in range(2)]
held = "".join(f"process {i} {trial.pid} {(i + 1) * GB}\\n" for i, trial in enumerate(trials))
say(gpus + held)
for trial in trials:
    trial.look()
say(gpus + held + "lost 0\\n")
for trial in trials:
    trial.look()
say(gpus + held.replace(str(2 * GB), str(5 * GB)) + "lost 0\\n")
for trial in trials:
    trial.look()
for trial in trials:
    trial.end()
"""
    )
    assert lines(out)[0].endswith("None None None")
    assert lines(out)[1].startswith("process 5000000000.0 ")
    (warning,) = warnings(out)
    assert "lost" in warning


@pytest.mark.slow
def test_a_limit_without_a_driver_says_that_it_is_not_enforced(nvml: Nvml) -> None:
    code = """
    import optuna
    from optuna_quota import Quota, QuotaPruner, QuotaSampler
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits({limit})),
    )
    study.optimize(lambda trial: 1.0, n_trials=3)
    """
    limited = nvml().run(code.format(limit="gpu_memory='1GiB'"), has_driver=False)
    (warning,) = warnings(limited)
    assert "no NVIDIA driver was found" in warning
    assert "A limit or quota on GPU memory can't be enforced here" in warning
    unlimited = code.format(limit="memory='8GiB'").replace("WARNING", "INFO")
    assert "GPU" not in nvml().run(unlimited, has_driver=False)
