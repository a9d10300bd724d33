"""A headless Chromium, driven over a pipe with the standard library: opens a page, listens, measures, photographs.

``python tests/browser.py PAGE OUT.png [WIDTH [dark]]`` writes a screenshot of a whole page.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0  # that an answer may take on a busy machine


# Puts two descriptors at 3 and 4, whatever they were, and becomes the program.
_PLACE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 64) for number in sys.argv[1:3]]
for here, there in zip(high, (3, 4)):
    os.dup2(here, there)
    os.close(here)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What happened while a page was open: console messages, exceptions, and every address asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """One tab. Use as a context: the process and its profile are gone afterwards."""

    def __init__(self, program: str) -> None:
        self.seen = Seen()
        self._profile = tempfile.TemporaryDirectory(prefix="fewstep-browser-", ignore_cleanup_errors=True)
        # Chromium reads its commands from descriptor 3 and answers on 4, each message ended by a zero byte.
        out_read, out_write = os.pipe()
        in_read, in_write = os.pipe()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
        own = ("--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PLACE, str(in_read), str(out_write), program, *flags, *quiet, *own],
            pass_fds=(in_read, out_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(in_read)
        os.close(out_write)
        self._commands, self._answers = in_write, out_read
        self._waiting, self._number, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self._session = None
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def open(self, page: Path, width: int, dark: bool, height: int = 900) -> None:
        """Load a file at a window width of so many CSS pixels, in the light or the dark scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        mobile = width < 600
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._wait("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, whole: bool = True) -> bytes:
        """The page as PNG, whole or as far as the window shows it."""
        options = {"captureBeyondViewport": whole, **(self._clip() if whole else {})}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def _clip(self) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
        raise TimeoutError(method)

    def _wait(self, event: str) -> None:
        if any(found["method"] == event for found in self._events):
            return
        for message in self._messages():
            if message.get("method") == event:
                return
        raise TimeoutError(event)

    def _messages(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + SECONDS
        while (left := until - time.monotonic()) > 0:
            while b"\0" in self._waiting:
                first, self._waiting = self._waiting.split(b"\0", 1)
                message = json.loads(first)
                if "method" in message:
                    self._hear(message)
                yield message
            if select.select([self._answers], [], [], left)[0]:
                got = os.read(self._answers, 1 << 20)
                if not got:
                    raise RuntimeError("the browser went away")
                self._waiting += got

    def _hear(self, message: dict[str, Any]) -> None:
        self._events.append(message)
        method, said = message["method"], message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.seen.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.seen.errors.append(str(said["exceptionDetails"].get("text")))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.seen.errors.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.seen.errors.append(str(said["args"]))


def main(page: str, out: str, width: str = "1280", scheme: str = "light") -> None:
    program = find_browser()
    if program is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is on the path")
    with Browser(program) as browser:
        browser.open(Path(page), int(width), scheme == "dark")
        Path(out).write_bytes(browser.screenshot())


if __name__ == "__main__":
    main(*sys.argv[1:])
