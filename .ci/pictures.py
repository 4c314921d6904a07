"""Makes the pictures of README and guide anew, from real runs of the examples.

``.github/report.png`` is the top of the HTML report of ``examples/01_quickstart.py``,
``.github/dashboard.png`` the plots and a terminated trial of ``examples/06_dashboard.py`` in
optuna-dashboard. Needs Chromium with its driver, and the extras ``dev`` and ``examples``; takes
about three minutes. Usage: python .ci/pictures.py
"""

from __future__ import annotations

from base64 import b64decode
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
import optuna_dashboard


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import chromium, served, wait_for  # noqa: E402


WIDTH = 1100
TRIAL_HEIGHT = 900
MAX_SIZE = 250_000
PLOTS_DRAWN = """
  const plots = [...document.querySelectorAll('[id^="user-defined-plot:"]')];
  if (plots.filter(p => p.querySelector(".main-svg")).length < 4) return null;
  const boxes = plots.map(p => p.getBoundingClientRect());
  const top = Math.min(...boxes.map(b => b.top)) + scrollY - 10;
  return [top, Math.max(...boxes.map(b => b.bottom)) + scrollY - top];"""
REPORT_DRAWN = """
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.every(p => p.querySelector(".main-svg"))) return null;
  return plots[1].getBoundingClientRect().bottom + 16;"""
TRIAL_DRAWN = """
  const image = document.querySelector('img[src^="/artifacts/"]');
  return image && image.complete && image.naturalWidth;"""

IMAGES_HEIGHT = """
  const heights = [...document.images].map(image => image.naturalHeight);
  return heights.every(height => height) && heights.reduce((a, b) => a + b);"""


def run(example: str, folder: Path) -> None:
    """Run an example in a folder."""
    command = [sys.executable, str(ROOT / "examples" / example)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def picture(driver: Any, top: float, height: float) -> str:
    """Return a PNG of a part of the page, as base64, once two in a row are the same."""
    clip = {"x": 0, "y": top, "width": WIDTH, "height": height, "scale": 1}
    options = {"clip": clip, "captureBeyondViewport": True}
    before = None
    while True:
        found: str = driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        if found == before:
            return found
        before = found


def report(driver: Any, folder: Path) -> str:
    """Return the top of the quickstart's report."""
    run("01_quickstart.py", folder)
    driver.get((folder / "quickstart.html").as_uri())
    return picture(driver, 0, wait_for(driver, REPORT_DRAWN))


def dashboard(driver: Any, folder: Path) -> str:
    """Return the plots of a study, and below them one of its terminated trials."""
    run("06_dashboard.py", folder)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'dashboard.db'}")
    (study,) = optuna.get_all_study_summaries(storage)
    trials = storage.get_all_trials(study._study_id)
    ended = [t for t in trials if t.user_attrs.get("quota:outcome") == "terminated"]
    if not ended:
        sys.exit("No trial of this run was terminated, as all were refused before: run it again.")
    store = FileSystemArtifactStore(str(folder / "dashboard-artifacts"))
    with served(optuna_dashboard.wsgi(storage, artifact_store=store)) as url:
        page = f"{url}/dashboard/studies/{study._study_id}"
        driver.get(page)
        parts = [picture(driver, *wait_for(driver, PLOTS_DRAWN))]
        driver.get(f"{page}/trials?numbers={ended[0].number}")
        wait_for(driver, TRIAL_DRAWN)
        parts.append(picture(driver, 0, TRIAL_HEIGHT))
    images = "".join(f'<img style="display:block" src="data:image/png;base64,{p}">' for p in parts)
    joined = folder / "joined.html"
    joined.write_text(f'<body style="margin:0">{images}')
    driver.get(joined.as_uri())
    return picture(driver, 0, wait_for(driver, IMAGES_HEIGHT))


def main() -> None:
    """Write both pictures."""
    with chromium() as driver, tempfile.TemporaryDirectory() as folder:
        size = {"width": WIDTH, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # With a mouse, toolbars show when it points at a plot.
        mouse = [{"name": name, "value": "hover"} for name in ("hover", "any-hover")]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": mouse})
        for make in (report, dashboard):
            path = ROOT / ".github" / f"{make.__name__}.png"
            path.write_bytes(b64decode(make(driver, Path(folder))))
            assert path.stat().st_size <= MAX_SIZE, f"{path} is large: {path.stat().st_size:,}"


if __name__ == "__main__":
    main()
