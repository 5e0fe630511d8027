"""A headless Chromium, driven through chromedriver with the standard library: what it draws, says on its console, and asks the network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip

# Seconds: no busy machine takes as long for what takes a moment.
PATIENCE_S = 120.0


def missing() -> str:
    """Why no browser can be had here, or ""."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed (Debian: chromium chromium-driver)" if absent else ""


class Browser:
    """One browser with an empty profile; use as a context manager."""

    def __init__(self, folder: Path, *, javascript: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._root = f"http://127.0.0.1:{port}"
        self._wait()
        options: dict[str, Any] = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        if not javascript:
            options["prefs"] = {"profile.managed_default_content_settings.javascript": 2}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        try:
            self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except Exception:
            self._driver.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._ask("DELETE", f"/session/{self._session}")
        finally:
            self._driver.kill()
            self._driver.wait()

    def open(
        self,
        page: Path,
        width: int = 1280,
        height: int = 1000,
        theme: str = "light",
        media: str = "",
        at: str = "",
        everything: bool = True,
    ) -> None:
        """Load a page from disk and wait until it is drawn. What was logged and asked for before is forgotten.

        at: what follows "#" in its address. everything: figures far from the screen are drawn too.
        """
        self._session_ask("POST", "/url", {"url": "about:blank"})
        self.console()
        self.requests()
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.cdp("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": theme}])
        self._session_ask("POST", "/url", {"url": page.resolve().as_uri() + (f"#{at}" if at else "")})
        drawn = "klab.ready.then(() => klab.plots.all(), () => 0)" if everything else "klab.ready.catch(() => 0)"
        self.run(f"return window.klab ? {drawn} : 0")
        time.sleep(0.3)

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self._session_ask("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script: str) -> Any:
        """The value that a script returns, as soon as it is true in JavaScript; what it returned last where that never happens."""
        until = time.monotonic() + PATIENCE_S
        while not (found := self.run(script)) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._session_ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path) -> bytes:
        """The whole page as a PNG."""
        size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        image = base64.b64decode(self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"])
        path.write_bytes(image)
        return image

    def console(self) -> list[str]:
        """What was logged since the last call, without what a machine that has no GPU says of its WebGL."""
        entries = [f"{entry['level']} {entry['message']}" for entry in self._session_ask("POST", "/se/log", {"type": "browser"})]
        return [entry for entry in entries if not re.search(r"GL Driver Message|software WebGL", entry)]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        entries = self._session_ask("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def _session_ask(self, method: str, path: str, body: Any = None) -> Any:
        return self._ask(method, f"/session/{self._session}{path}", body)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["value"]

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self._driver.poll() is None:
            try:
                if self._ask("GET", "/status")["ready"]:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        self._driver.kill()
        raise TimeoutError("chromedriver does not answer")
