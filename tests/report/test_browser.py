"""The page in a real browser: headless Chromium lays it out in light and dark, wide and narrow."""

import re
import shutil
import struct
import subprocess
import zlib

import pytest
from made_up import make_whole_job

from pipeline.report.page import render

pytestmark = pytest.mark.slow

DARK, LIGHT = 0, 1
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
PROBE = """<script>
const column = document.querySelectorAll("#training .hit")[3];
column.dispatchEvent(new PointerEvent("pointerenter"));
const told = column.closest(".plot").querySelector("output").textContent;
parent.postMessage([innerWidth, document.documentElement.scrollWidth, told].join("|"), "*");
</script></body>"""
# a window cannot be narrower than 500 pixels, a frame can
FRAME = """<!doctype html><iframe src="index.html" style="border: 0; width: {width}px; height: 900px"></iframe><script>
addEventListener("message", (event) => (document.documentElement.dataset.probe = event.data));
</script>"""


def browse(directory, page, width, scheme, *flags, height=1200):
    """Run Chromium on a page; return what it printed."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "this test draws the report in a browser: install one with `apt-get install -y chromium`"
    profile = f"--user-data-dir={directory / 'profile'}"
    wanted = (f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}", profile)
    command = [chromium, *FLAGS, *wanted, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def screenshot(directory, page, width, scheme):
    """Return the colour of the first pixel of a screenshot, and how many different rows of pixels it has."""
    path = directory / f"{width}-{scheme}.png"
    browse(directory, page, width, scheme, f"--screenshot={path}")
    data = path.read_bytes()
    image_width, image_height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (image_width, depth) == (width, 8)
    pixel_bytes = {2: 3, 6: 4}[kind]
    packed, place = b"", 8
    while place < len(data):
        length, chunk = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if chunk == b"IDAT" else b""
        place += 12 + length
    raw = zlib.decompress(packed)
    stride = (
        1 + pixel_bytes * image_width
    )  # a row starts with its filter; the first pixel of all is never changed by it
    rows = {raw[row * stride : (row + 1) * stride] for row in range(image_height)}
    return tuple(raw[1:4]), len(rows)


@pytest.fixture
def page(tmp_path):
    """Give the file of a page that says how it was laid out."""
    job = make_whole_job(tmp_path / "artifacts")
    text = render("A job with a long title that has to break on a narrow screen", job.all)
    path = tmp_path / "index.html"
    path.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    return path


def test_page_is_drawn_in_light_and_dark(tmp_path, page):
    light, light_rows = screenshot(tmp_path, page, 1400, LIGHT)
    dark, dark_rows = screenshot(tmp_path, page, 1400, DARK)
    assert min(light) > 200
    assert max(dark) < 60
    assert light_rows > 200
    assert dark_rows > 200


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_page_is_no_wider_than_the_screen_and_its_charts_answer(tmp_path, page, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    dom = browse(tmp_path, frame, 1600, LIGHT, "--dump-dom", "--virtual-time-budget=5000")
    inner_width, needed_width, told = re.search(r'data-probe="(\d+)\|(\d+)\|([^"]*)"', dom).groups()
    assert int(inner_width) == width
    assert int(needed_width) <= width
    assert "step 4" in told
    assert "each step" in told
