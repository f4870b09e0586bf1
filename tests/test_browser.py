"""Both notebooks in a real JupyterLab in a real browser: `pytest -m browser --screenshots FOLDER`.

Needs the package playwright and a Chromium (CHROMIUM names it where it is not in the usual place).
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        with playwright.chromium.launch(executable_path=path, args=options) as chromium:
            yield chromium


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what a user has, without outputs."""
    folder = tmp_path_factory.mktemp("project")
    for file in [*ROOT.glob("*.py"), *(ROOT / name for name in NOTEBOOKS)]:
        shutil.copy(file, folder)
    clear = ["nbconvert", "--clear-output", "--inplace", *NOTEBOOKS]
    subprocess.run([sys.executable, "-m", *clear], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(project):
    """The address of a JupyterLab in the project's copy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=t"]
    environ = {**os.environ, "PROFILE": "quick", "CHECKPOINT_DIR": str(project / "kept")}
    command = [sys.executable, "-m", "jupyterlab", *options]
    process = subprocess.Popen(
        command, cwd=project, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            ask(address, "status")
            break
        except OSError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(30)


def ask(address, what):
    with urllib.request.urlopen(f"{address}/api/{what}?token=t", timeout=10) as answer:
        return json.load(answer)


def screenshot(page, request, name):
    folder = request.config.getoption("screenshots")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_start_to_end_in_jupyterlab(name, browser, server, project, request):
    from playwright import sync_api

    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.goto(f"{server}/lab/tree/{name}?token=t&reset")
    page.locator(".jp-Notebook").first.wait_for(timeout=60_000)
    page.locator(".jp-Toolbar-kernelStatus[data-status=idle], [data-status=idle]").first.wait_for(
        timeout=60_000
    )
    dialog = page.locator(".jp-Dialog .jp-mod-accept").first
    queued = page.locator(".jp-InputPrompt", has_text="[*]").first
    for _ in range(5):  # a click that comes before the page has found its kernel is lost
        with contextlib.suppress(sync_api.TimeoutError):
            if dialog.is_visible():  # or asks for one, which may come late
                dialog.click()
            for item in ("Run", "Run All Cells"):
                page.get_by_role("menuitem", name=item, exact=True).click(timeout=10_000)
            queued.wait_for(timeout=10_000)
            break
    idle, since = 0, time.monotonic()
    while idle < 5 and time.monotonic() - since < 600:  # five looks in a row
        time.sleep(2)
        busy = [k for k in ask(server, "kernels") if k["execution_state"] != "idle"]
        idle = 0 if busy or not ask(server, "kernels") else idle + 1
    assert idle == 5
    screenshot(page, request, f"{name}-end")
    page.keyboard.press("Control+s")
    time.sleep(3)
    cells = json.loads((project / name).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    page.close()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_report_shows_every_picture(name, browser, tmp_path, request):
    """The committed outputs as HTML, opened from the disk."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", tmp_path]
    subprocess.run([*command, ROOT / name], check=True, capture_output=True)
    page = browser.new_page(viewport={"width": 1100, "height": 1600})
    page.goto((tmp_path / name).with_suffix(".html").as_uri(), wait_until="domcontentloaded")
    pictures = page.locator(".jp-RenderedImage img")
    assert pictures.count() >= 8
    widths = [pictures.nth(n).evaluate("image => image.naturalWidth") for n in range(8)]
    assert min(widths) > 100
    screenshot(page, request, f"{name}-report")
    page.close()
