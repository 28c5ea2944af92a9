"""Tests of docs/browser in a real browser."""

import functools
import http.server
import shutil
import subprocess
import threading

import numpy as np
import pytest

from tests import runs
from tests.demo_test import start_browser
from tests.export_test import generator_of
from vitgan_jax import export

PAGE = runs.ROOT / "docs" / "browser" / "index.html"
CDN = "https://cdn.jsdelivr.net/npm/"
VERSION = "onnxruntime-web@1.30.0"

_PIXELS = """
const grid = document.getElementById("grid");
const context = grid.getContext("2d");
return [...context.getImageData(0, 0, grid.width, grid.height).data];
"""

_FAIL_ONCE = """
performance.now = () => { delete performance.now; throw Error("no clock"); };
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *unused):
    pass


@pytest.fixture
def address(tmp_path):
  """Serves the page, an export of classes, and the runtime from npm."""
  npm = shutil.which("npm")
  if not npm:
    pytest.skip("no npm, which has the runtime of the page")
  packed = subprocess.run(
    [npm, "install", "--no-audit", "--no-fund", VERSION],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  if packed.returncode:
    pytest.skip(f"npm cannot install {VERSION}: {packed.stderr[-200:]}")
  page = PAGE.read_text()
  assert f"{CDN}{VERSION}/" in page
  page = page.replace(f"{CDN}{VERSION}/", "/node_modules/onnxruntime-web/")
  assert "https:" not in page
  (tmp_path / "index.html").write_text(page)
  handler = functools.partial(_Quiet, directory=tmp_path)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
def test_page_draws_what_its_controls_say(address, tmp_path):
  pytest.importorskip("jax2onnx")
  generator = generator_of("vitgan", 3)
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "generator.onnx").write_bytes(export.to_onnx(generator))
  (folder / "config.json").write_text(generator.config.to_json())
  (folder / "classes.json").write_text('["cat", "dog", "bird"]')
  browser = start_browser()
  try:
    browser.get(f"{address}/?model=model")

    def find(selector):
      return browser.find_element("css selector", selector)

    def drawn():
      """Returns 16 images, once they are drawn anew."""
      runs.wait_until(lambda: "images in" in find("#status").text)
      pixels = np.array(browser.execute_script(_PIXELS), np.uint8)
      pixels = pixels.reshape(4, 16, 4, 16, 4)[..., :3].swapaxes(1, 2)
      browser.execute_script("document.getElementById('status').innerText = ''")
      return pixels.reshape(16, 16, 16, 3)

    first = drawn()
    assert len({image.tobytes() for image in first}) == 16
    assert "sklearn_digits, 16 px, vitgan" in find("#title").text
    assert [
      x.text for x in find("#class").find_elements("tag name", "option")
    ] == ["all in turn", "cat", "dog", "bird"]
    find("#class").send_keys("dog")
    of_class = drawn()
    same = [np.array_equal(a, b) for a, b in zip(first, of_class)]
    assert same == [i % 3 == 1 for i in range(16)]
    find("#seed").send_keys("\ue014")  # the right arrow
    assert not np.array_equal(drawn(), of_class)
    browser.execute_script(_FAIL_ONCE)
    find("#seed").send_keys("\ue012")  # the left arrow
    runs.wait_until(lambda: "no clock" in find("#status").text)
    find("#truncation").send_keys("\ue011")  # home: 0
    images = drawn()
    # All are of the mean w of the class.
    assert np.ptp(images.astype(int), axis=0).max() <= 1
    mean_w = generator.mean_w[1]
    expected = np.asarray(generator.synthesize(mean_w[None]))[0]
    expected = np.clip((expected + 1) * 127.5, 0, 255)
    assert np.abs(images[0] - expected).max() < 1.5
  finally:
    browser.quit()


@pytest.mark.slow
def test_page_without_a_model_says_so(address):
  browser = start_browser()
  try:
    browser.get(address)
    status = browser.find_element("css selector", "#status")
    runs.wait_until(lambda: "config.json cannot be read" in status.text)
  finally:
    browser.quit()
