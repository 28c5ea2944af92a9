"""Tests of the page with its real server, and with a real browser."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import signal
import sys
import types
import urllib.parse
import urllib.request

import jax
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import runs
from vitgan_jax import demo, partitioning, pictures, sample
from vitgan_jax.models import networks

needs_gradio = pytest.mark.skipif(
  importlib.util.find_spec("gradio") is None,
  reason="gradio is not installed: pip install -e '.[demo]'",
)
_MODULE = ("-m", "vitgan_jax.demo")


def assert_alike(picture, expected):
  """A pixel may be rounded to its neighbour, on another number of devices."""
  difference = picture.astype(int) - expected
  assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.01


@pytest.fixture(scope="module")
def drawn(digits_run):
  """Returns the function of the page: (seed, psi) to (grid, strip)."""
  return demo.Pictures(digits_run.workdir).draw


def test_grid_is_of_the_samples_that_sampling_writes(drawn, digits_run):
  mesh = partitioning.create_mesh()
  sampler = sample.make_sampler(networks.build(digits_run.config), mesh)
  images = np.asarray(sampler(digits_run.state.g_ema_variables, 3, 0))[:64]
  grid, _ = drawn(3, 1.0)
  assert_alike(grid, pictures.image_grid(images))


def test_both_sliders_change_both_pictures(drawn):
  shown = [drawn(*values) for values in [(0, 1.0), (0, 0.5), (1, 1.0)]]
  for pictures_of_one_kind in zip(*shown):
    assert len({picture.tobytes() for picture in pictures_of_one_kind}) == 3
  grid, strip = shown[0]
  assert grid.shape == (8 * 17 - 1, 8 * 17 - 1, 3)
  assert strip.shape == (16, 12 * 17 - 1, 3)


def test_directions_shift_w_by_their_deviations(digits_run, drawn):
  directions = drawn.__self__.directions
  lengths = np.linalg.norm(directions, axis=1)
  assert len(directions) == 4 and (np.diff(lengths) <= 0).all()
  # Against w of the same latents, moved by hand.
  generator = networks.build(digits_run.config).generator
  variables = digits_run.state.g_ema_variables
  key = jax.random.key(2)
  latents = [
    jax.random.normal(jax.random.fold_in(key, i), (32,)) for i in range(64)
  ]

  def images(generator, latents):
    w = generator.mapping(latents)
    return generator.synthesize(w + 1.5 * directions[0] - 2 * directions[3])

  expected = generator.apply(variables, np.stack(latents), method=images)
  expected = np.rint(np.clip(expected * 127.5 + 127.5, 0, 255))
  grid, strip = drawn(2, 1.0, None, (1.5, 0.0, 0.0, -2.0))
  assert_alike(grid, pictures.image_grid(expected))
  assert (strip != drawn(2, 1.0)[1]).any()


@pytest.mark.parametrize(
  "broken, what, words",
  [
    (False, "nothing", "is not a workdir of a run"),
    (False, "no checkpoint", "no checkpoint in"),
    (True, "run", "pip install -e '.[demo]'"),
  ],
)
def test_what_is_missing_is_told_in_one_line(
  broken, what, words, digits_run, tmp_path, monkeypatch
):
  # A stand-in: these are told whether gradio is installed or not.
  gradio = None if broken else types.ModuleType("gradio")
  monkeypatch.setitem(sys.modules, "gradio", gradio)
  workdir = tmp_path / "run"
  if what != "nothing":
    shutil.copytree(digits_run.workdir, workdir)
  if what == "no checkpoint":
    shutil.rmtree(workdir / "checkpoints")
  before = runs.snapshot(tmp_path)
  line = runs.refusal("vitgan_jax.demo", f"--workdir={workdir}", cwd=tmp_path)
  assert words in line and runs.snapshot(tmp_path) == before


@contextlib.contextmanager
def serving(workdir, cwd, *flags):
  """Yields the address of a served demo; asserts that it ends quietly."""
  with runs.start_main(
    f"--workdir={workdir}",
    *flags,
    cwd=cwd,
    program=_MODULE,
    TMPDIR=str(cwd),
    JAX_NUM_CPU_DEVICES="1",
  ) as process:
    try:
      line = process.stdout.readline()
      address = re.search(r"http://\S+", line)
      assert address, line + process.stderr.read()
      yield address[0].rstrip("/")
      process.send_signal(signal.SIGTERM)
      _, errors = process.communicate(timeout=60)
    finally:
      process.kill()
  assert "Traceback" not in errors, errors
  assert not list(cwd.glob("vitgan_jax_demo_*"))  # its pictures are gone


@pytest.fixture(scope="module")
def address(digits_run, tmp_path_factory):
  cwd = tmp_path_factory.mktemp("served")
  with serving(digits_run.workdir, cwd) as address:
    yield address


def call(address, *arguments):
  """Calls the page's function as a browser does; returns its PNGs."""
  url = f"{address}/gradio_api/call/draw"
  request = urllib.request.Request(
    url,
    json.dumps({"data": arguments}).encode(),
    {"Content-Type": "application/json"},
  )
  with urllib.request.urlopen(request, timeout=60) as reply:
    event = json.load(reply)["event_id"]
  with urllib.request.urlopen(f"{url}/{event}", timeout=60) as reply:
    lines = reply.read().decode().splitlines()
  assert lines[0] == "event: complete", lines
  files = json.loads(lines[1].removeprefix("data: "))
  images = []
  for file in files:
    with urllib.request.urlopen(file["url"], timeout=60) as reply:
      images.append(reply.read())
  return images


def assert_shows(png, picture):
  """Asserts that a PNG is a picture, enlarged by whole pixels."""
  pixels = np.asarray(Image.open(io.BytesIO(png)))
  factor = len(pixels) // len(picture)
  assert factor > 1
  assert_alike(pixels[::factor, ::factor], picture)


@needs_gradio
def test_served_pictures_are_those_of_the_sliders(address, drawn):
  for seed, psi in [(0, 1.0), (5, 0.3)]:
    *shown, download = call(address, seed, psi, 0, 0, 0, 0)
    assert download == shown[0]
    for png, picture in zip(shown, drawn(seed, psi)):
      assert_shows(png, picture)


@needs_gradio
@pytest.mark.slow
def test_served_page_draws_the_class_that_is_chosen(tmp_path):
  config = digits.get_config("smoke")
  config.data.num_classes = 10
  run = runs.train_quietly(config, tmp_path / "run")
  drawn = demo.Pictures(run.workdir)
  with serving(run.workdir, tmp_path) as address:
    for value, label in [(-1, None), (7, 7)]:
      png, _, _ = call(address, 0, 1.0, 0, 0, 0, 0, value)
      assert_shows(png, drawn.draw(0, 1.0, label)[0])


@needs_gradio
def test_page_asks_nothing_of_other_hosts_and_sends_no_analytics(address):
  assert address.startswith("http://127.0.0.1:")
  with urllib.request.urlopen(f"{address}/config", timeout=60) as reply:
    config = json.load(reply)
  assert config["analytics_enabled"] is False
  with urllib.request.urlopen(f"{address}/theme.css", timeout=60) as reply:
    css = reply.read().decode()
  assert "url(" in css
  assert not re.search(r"(url\(|@import )[\"']?https?:", css)


@needs_gradio
@pytest.mark.slow
def test_port_that_is_taken_is_told_in_one_line(address, digits_run, tmp_path):
  port = address.rsplit(":", 1)[1]
  code, output, errors = runs.run_main(
    f"--workdir={digits_run.workdir}",
    f"--port={port}",
    cwd=tmp_path,
    program=_MODULE,
    TMPDIR=str(tmp_path),
  )
  (line,) = errors.strip().splitlines()
  assert code == 78 and line.startswith("error: ") and f"--port={port}" in line
  assert not output and not list(tmp_path.iterdir())


def start_browser():
  """Returns a headless Chromium; skips the test where there is none."""
  webdriver = pytest.importorskip(
    "selenium.webdriver",
    reason="no selenium: pip install selenium",
  )
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  driver = shutil.which("chromedriver")
  if not chromium or not driver:
    pytest.skip("no Chromium: apt-get install chromium chromium-driver")
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for flag in (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--window-size=1280,1150",
  ):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
  return webdriver.Chrome(
    options=options, service=webdriver.ChromeService(driver)
  )


@needs_gradio
@pytest.mark.slow
def test_in_a_browser_each_control_changes_the_pictures(address, tmp_path):
  browser = start_browser()
  try:
    browser.get(address)

    def sources():
      """Returns the addresses of both pictures, once they are shown."""
      shown = browser.execute_script(
        "return [...document.querySelectorAll('#grid img, #strip img')]"
        ".filter(x => x.complete && x.naturalWidth).map(x => x.src)"
      )
      return tuple(shown) if len(shown) == 2 else None

    def name():
      """Returns the name of the grid that is shown."""
      url = urllib.parse.unquote((sources() or [""])[0])
      return url.rpartition("/")[2]

    def find(selector):
      return browser.find_element("css selector", selector)

    first = runs.wait_until(sources)
    assert all("seed0-psi1.00" in source for source in first)
    slider = find("#truncation input[type=range]")
    slider.send_keys("\ue012" * 30)  # the left arrow
    runs.wait_until(lambda: "seed0-psi0.70" in name())
    slider = find("#direction1 input[type=range]")
    slider.send_keys("\ue014" * 10)  # the right arrow
    runs.wait_until(lambda: "-+1.0-+0.0" in name())
    find("#dice").click()
    runs.wait_until(lambda: sources() and "seed0-" not in name())
    shown = sources()
    assert "psi0.70" in shown[1]
    contents = [
      urllib.request.urlopen(source, timeout=60).read()
      for source in (*first, *shown)
    ]
    assert len(set(contents)) == 4
    browser.execute_cdp_cmd(
      "Browser.setDownloadBehavior",
      {"behavior": "allow", "downloadPath": str(tmp_path)},
    )
    find("#download").click()
    (path,) = runs.wait_until(lambda: list(tmp_path.glob("*.png")))
    assert path.read_bytes() == contents[2] and path.name == name()
    asked = {
      message["params"]["request"]["url"]
      for entry in browser.get_log("performance")
      if (message := json.loads(entry["message"])["message"])["method"]
      == "Network.requestWillBeSent"
    }
    foreign = [
      url for url in asked if not url.startswith((address, "data:", "blob:"))
    ]
    assert asked and not foreign
  finally:
    browser.quit()
