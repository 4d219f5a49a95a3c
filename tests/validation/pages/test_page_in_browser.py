"""The page in Debian's chromium: what is seen, loaded, said on the console, printed, reached.

The browser is driven through the DevTools protocol on a pipe (``--remote-debugging-pipe``): JSON
messages ended by a zero byte, which needs no library.
"""

import base64
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfmq.validation.pages.page import render_page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# The browser reads commands from descriptor 3 and writes answers to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60
WIDTHS = (1280, 400)

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"no {CHROMIUM}; .ci/run installs it"
)


class Browser:
    """A running chromium and one of its tabs."""

    def __init__(self, profile: Path) -> None:
        commands, self._send = os.pipe()
        self._receive, answers = os.pipe()
        ends = [str(commands), str(answers)]
        words = [sys.executable, "-c", START, *ends, str(CHROMIUM), *FLAGS]
        words.append(f"--user-data-dir={profile}")
        self._process = subprocess.Popen(
            words,
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(profile)},
        )
        os.close(commands)
        os.close(answers)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens meanwhile goes to ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") != self._number:
                self.events.append(found)
                continue
            assert "error" not in found, f"{method}: {found}"
            return dict(found["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], SECONDS)
            assert ready, f"chromium says nothing for {SECONDS} s"
            part = os.read(self._receive, 1 << 20)
            assert part, "chromium ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path) -> None:
        """Load a file and wait until it is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + SECONDS
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            assert time.monotonic() < deadline
            self.events.append(self._next())

    def show(self, width: int, scheme: str = "light", media: str = "") -> None:
        """Set the window's width, the colour scheme and the medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def press(self, key: str) -> None:
        """A key down and up."""
        number = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=number,
                **text,
            )

    def close(self) -> None:
        """End the browser."""
        os.close(self._send)  # which is its sign to end
        self._process.wait(SECONDS)
        os.close(self._receive)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(browser, report, tmp_path_factory) -> Browser:
    """The browser with the page of all formats and engines in it."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(report), "utf-8")
    browser.show(1280)
    browser.open(path)
    return browser


def test_nothing_is_loaded_and_the_console_is_silent(page):
    requests = [
        e["params"]["request"]["url"]
        for e in page.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [page.ask("location.href")]
    said = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert not [e for e in page.events if e.get("method") in said]


# Colours of a picture by thirds of its height: how many, and how much the most common one covers.
COLOURS = """(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const third = Math.floor(image.height / 3);
  return [0, 1, 2].map(i => {
    const counts = new Map();
    const data = new Uint32Array(
      context.getImageData(0, i * third, image.width, third).data.buffer);
    for (const pixel of data) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
    return [counts.size, Math.max(...counts.values()) / data.length];
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_picture_is_not_blank(page, width, scheme):
    page.show(width, scheme)
    for colours, share in page.ask(COLOURS % base64.b64encode(page.picture()).decode()):
        assert colours > 50
        assert 0.3 < share < 0.97
    ground = page.ask("getComputedStyle(document.body).backgroundColor")
    levels = [int(v) for v in ground.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(levels) < 3 * 60) == (scheme == "dark")


@pytest.mark.parametrize("width", [*WIDTHS, 320])
def test_the_page_is_as_wide_as_the_window(page, width):
    page.show(width)
    assert page.ask("document.documentElement.scrollWidth") <= width


# Text that its background hides: contrast below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parse(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((parse(colour)[3] ?? 1) > 0.99) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("title, script")) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) faint.push([walker.currentNode.data.trim(), ratio]);
  }
  return faint;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page, scheme):
    page.show(1280, scheme)
    page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.ask(FAINT) == []
    page.ask("document.querySelectorAll('details').forEach(d => d.open = false)")


# Labels of a drawing that lie on each other or outside it.
COLLISIONS = """[...document.querySelectorAll("svg[role=img]")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")]
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  const outside = texts.filter(([, r]) =>
    r.left < frame.left - 1 || r.right > frame.right + 1 || r.bottom > frame.bottom + 1);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  const over = texts.flatMap(([name, r], i) =>
    texts.slice(i + 1).filter(([, q]) => meet(r, q)).map(([other]) => name + " / " + other));
  return [...outside.map(([name]) => name), ...over];
})"""


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_do_not_collide(page, width):
    page.show(width)
    assert page.ask(COLLISIONS) == []


def test_the_keyboard_reaches_everything(page):
    page.show(1280)
    page.open(Path(page.ask("decodeURI(location.pathname)")))
    page.press("Tab")
    assert page.ask("document.activeElement.className") == "skip"
    assert page.ask("document.activeElement.getBoundingClientRect().left") >= 0
    wanted = page.ask(
        "[...document.querySelectorAll('a, summary, .scroll')]"
        ".filter(e => !e.closest('details') || e.matches('summary')).length"
    )
    seen = 1
    while page.ask("document.activeElement !== document.body") and seen <= wanted:
        style = page.ask("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", page.ask("document.activeElement.outerHTML.slice(0, 200)")
        page.press("Tab")
        seen += 1
    assert seen == wanted + 1
    page.open(Path(page.ask("decodeURI(location.pathname)")))
    page.press("Tab")
    page.press("Enter")
    assert page.ask("[location.hash, document.activeElement.id]") == ["#parity", "parity"]


def test_it_prints(page):
    sheet = 690  # CSS pixels between the margins of A4, which is narrower than Letter
    page.show(sheet, media="print")
    assert page.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.ask("document.documentElement.scrollWidth") <= sheet
    cut = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    assert max(page.ask(cut)) <= sheet
    printed = page.call("Page.printToPDF", printBackground=True)
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 12
