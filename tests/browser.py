"""A headless Chromium driven through WebDriver, for looking at pages as a person does: pointer, keys, sizes, colours.

Debian's packages chromium and chromium-driver; .ci/run installs them. No Python package is needed.
"""

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


def missing() -> list[str]:
    """The programs that are not installed here."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    def __init__(self, address: str) -> None:
        self.base = address
        wanted = {"goog:chromeOptions": {"args": FLAGS}, "goog:loggingPrefs": {"browser": "ALL"}}
        started = self.send("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{started['sessionId']}"

    def send(self, path: str, content: dict[str, Any] | None = None, method: str = "POST") -> Any:
        body = json.dumps(content or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode(errors='replace')[:500]}") from None

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, page: Path, width: int = 1000, dark: bool = False) -> None:
        """Opens a file without a network, in a window so many pixels wide."""
        self.devtools("Network.enable")
        self.devtools("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
                      uploadThroughput=0)
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.devtools("Emulation.setEmulatedMedia",
                      features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.send("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What the script returns."""
        return self.send("/execute/sync", {"script": script, "args": []})

    def point(self, selector: str, across: float, down: float = 0.5) -> None:
        """Moves the pointer to this share of an element's width and height."""
        box = self.run(f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}"
                       "); return e.getBoundingClientRect().toJSON()")
        move = {"type": "pointerMove", "duration": 0, "x": round(box["x"] + across * box["width"]),
                "y": round(box["y"] + down * box["height"])}
        self.send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def press(self, *keys: str) -> None:
        """Keys as WebDriver names them: the characters U+E000 and above."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def complaints(self) -> list[str]:
        """What the console said: errors of scripts, and everything that was refused or asked for outside."""
        return [entry["message"] for entry in self.send("/se/log", {"type": "browser"})]

    def shoot(self, path: Path) -> None:
        """A PNG of the whole page."""
        picture = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        window = Browser("http://127.0.0.1:" + line.rpartition(" ")[2].strip(" .\n"))
        yield window
        window.send("", method="DELETE")
    finally:
        driver.kill()
        driver.wait()
