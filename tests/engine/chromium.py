"""A headless Chromium, driven through its own protocol over two pipes: nothing but the browser is needed, and the mouse is a real one."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 120  # seconds: a browser that says nothing for so long hangs
# A browser listens on file descriptor 3 and answers on 4, wherever the pipes are here.
START = "import fcntl, os, sys; r, w = (fcntl.fcntl(int(a), fcntl.F_DUPFD, 10) for a in sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"


def found() -> str | None:
    """The path of a Chromium or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `complaints` collects whatever it logs or fails to fetch, and what scripts throw."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._numbers = commands, answers, itertools.count(1)
        self._rest, self._session, self._loaded, self.complaints = b"", {}, False, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """What a method of the protocol returns."""
        number = next(self._numbers)
        os.write(self._commands, json.dumps({"id": number, "method": method, "params": params} | self._session).encode() + b"\0")
        while (message := self._message()).get("id") != number:
            self._note(message)
        assert "result" in message, message
        return message["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            more = os.read(self._answers, 1 << 20) if ready else b""
            assert more, "the browser has gone" if ready else "the browser hangs"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, message: dict[str, Any]) -> None:
        event, params = message.get("method"), message.get("params", {})
        self._loaded |= event == "Page.loadEventFired"
        fetched = event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:"))
        if fetched or event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"):
            self.complaints.append(params)

    def open(self, path: pathlib.Path, *, scheme: str = "light", width: int = 1400, height: int = 1000) -> None:
        """Loads a file, and waits until it is there and has been drawn."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.prefer(scheme)
        self._loaded = False
        self("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._note(self._message())
        self.settle()

    def prefer(self, scheme: str) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, of a promise once it is kept."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def settle(self) -> None:
        """Waits for two frames: what was asked for has been drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.settle()

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def screenshot(self, path: pathlib.Path, *, whole: bool = False) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))


@contextlib.contextmanager
def browser(profile: pathlib.Path) -> Iterator[Browser]:
    """A browser of its own, with its profile in an empty directory; ended and waited for at the end."""
    (to_browser, commands), (answers, from_browser) = os.pipe(), os.pipe()
    path = found()
    assert path, f"no browser: none of {', '.join(NAMES)} is there"
    command = [sys.executable, "-ISc", START, str(to_browser), str(from_browser), path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)  # it ends when nobody can command it
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
