"""A real JupyterLab driven by a headless Chromium: open a notebook, run all cells, read pictures
and controls from the page itself.

Three races it minds: Run All clicked while the kernel is still being attached is dropped (so the
server's session list is asked first and
the click repeated); stored execution counts look like finished cells (so a blanked copy is opened);
the news dialog covers the page (so it is switched off in the settings folder).
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false", "checkForUpdates": False
    }, "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


def blanked_copy(notebook: Path, folder: Path) -> Path:
    """The notebook without outputs and counts, in a folder of its own."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    target = folder / notebook.name
    target.write_text(json.dumps(book), encoding="utf-8")
    return target


@contextlib.contextmanager
def jupyterlab(root: Path, extra_path: str = ""):
    """A server on a free port with settings of its own. Yields (port, token)."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    token = secrets.token_hex(16)
    settings = root / ".settings"
    for name, values in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(values))
    environment = {
        **os.environ, "JUPYTER_CONFIG_DIR": str(root / ".config"),
        "JUPYTER_RUNTIME_DIR": str(root / ".runtime"), "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / ".workspaces"),
        "IPYTHONDIR": str(root / ".ipython"),
        "PYTHONPATH": os.pathsep.join(part
                                      for part in (extra_path, os.environ.get("PYTHONPATH", ""))
                                      if part),
    }
    command = [
        sys.executable, *("-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
                          f"--IdentityProvider.token={token}"),
        *(f"--ServerApp.root_dir={root}", "--ServerApp.allow_root=True",
          "--LabApp.extension_manager=readonly"),
    ]
    with (open(root / "lab.log", "w") as log,
          subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
          as server,
          ):
        try:
            _until(lambda: _get(port, token, "status") is not None, 300, "JupyterLab did not start",
                   server, root / "lab.log")
            yield port, token
        finally:
            server.terminate()


def _get(port, token, what):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{what}?token={token}",
                                    timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def _until(holds, seconds, complaint, server=None, log=None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return
        if server is not None and server.poll() is not None:
            break
        time.sleep(0.3)
    raise AssertionError(complaint + (f": {log.read_text()[-800:]}" if log else ""))


class Page:
    """One notebook in the browser. errors: page errors; external: requests that left this
    machine."""
    def __init__(self, page, port, token):
        self.page, self.port, self.token = page, port, token
        self.errors, self.external = [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)[:300]))
        page.on("request", self._note)

    def _note(self, request):
        if re.match(r"(https?|wss?)://(?!127\.0\.0\.1)", request.url):
            self.external.append(request.url)

    def open(self, name):
        """Open a notebook and wait until its kernel is attached and idle."""
        self.page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset")
        self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook").wait_for(
            timeout=120_000)

        def attached():
            sessions = _get(self.port, self.token, "sessions")
            return bool(sessions) and sessions[0]["kernel"][
                "execution_state"] == "idle" and sessions[0]["kernel"]["connections"]

        _until(attached, 300, "the kernel was never idle")
        self.page.wait_for_timeout(1000)

    def prompts(self):
        """What stands before each code cell: ``[*]:`` while it runs."""
        return self.page.evaluate(
            "() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell "
            ".jp-InputPrompt')].map(e => e.textContent || '')"
        )

    def run_all(self, seconds=600):
        """Run > Run All Cells, again if the click was dropped, and wait for the last cell."""
        for _ in range(4):
            self.page.locator("#jp-MainMenu .lm-MenuBar-item", has_text="Run").first.click()
            self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
            end = time.monotonic() + 6
            while time.monotonic() < end:
                dialog = self.page.locator(".jp-Dialog button.jp-mod-accept")
                if dialog.count():
                    dialog.first.click()
                    self.page.wait_for_timeout(2000)
                    break
                if any(re.search(r"\d|\*", prompt) for prompt in self.prompts()):
                    _until(lambda: not any("*" in prompt for prompt in self.prompts()), seconds,
                           "the cells did not finish")
                    return
                self.page.wait_for_timeout(200)
        raise AssertionError("Run All Cells never started")

    def failures(self):
        """Error outputs of cells."""
        return self.page.locator(
            "[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()

    def plots(self):
        """Title and y values of every live plotly picture, read from the browser, not from the
        kernel."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.jupyter-widgets .js-plotly-plot')].map(g => {
                const title = (g.layout && g.layout.title) || '';
                const round = v => +Number(v).toFixed(4);
                return {title: title.text || title,
                        y: (g._fullData || []).map(t => Array.from(t.y || []).map(round))}})""")

    def changed(self, before, seconds=90):
        """Wait until the pictures are not those of ``before``; returns them."""
        _until(lambda: self.plots() != before, seconds, "the picture did not change")
        self.page.wait_for_timeout(500)
        return self.plots()
