"""A page that draws samples of a run as you move its sliders.

  python -m vitgan_jax.demo --workdir=runs/digits

It shows the last checkpoint at http://127.0.0.1:7860, to this machine alone;
give another interface and port by

  python -m vitgan_jax.demo --workdir=runs/faces --host=0.0.0.0 --port=8080

Needs gradio: pip install -e '.[demo]'
"""

import os
import pathlib
import random
import signal
import tempfile

from absl import flags
from etils import epath

from vitgan_jax import cli
from vitgan_jax.errors import ConfigError, import_extra

_MAX_SEED = 9999
_NUM_BETWEEN = 12  # pictures of the interpolation strip
_NUM_DIRECTIONS = 4  # sliders
_REACH = 3  # standard deviations, to either side
_ALL = -1  # what the page calls all classes in turn
_HOUR = 3600  # seconds that the pictures of a page are kept


class Pictures:
  """Draws what the page shows, of a workdir's last checkpoint."""

  def __init__(self, workdir):
    """Loads the checkpoint.

    Raises:
      ConfigError: if the folder is no workdir, or has no checkpoint.
    """
    # Late: --help and a wrong flag need not wait for JAX.
    import jax
    import numpy as np

    from vitgan_jax import checkpoint, config, latent_space, sample

    # One device: its batch is the grid.
    devices = jax.local_devices()[:1]
    _, nets, mesh, state = checkpoint.load_run(workdir, devices)
    self.step = int(state.step)
    self._classes = np.arange(nets.generator.num_classes)
    # What the page calls them; none without classes.
    self.class_names = config.class_names(workdir) or list(
      map(str, self._classes)
    )
    self._variables = state.g_ema_variables
    # One standard deviation each; none where w is the latent itself.
    self.directions = (
      latent_space.directions(nets, self._variables, _NUM_DIRECTIONS)
      if latent_space.has_mapping_network(nets, self._variables)
      else np.zeros((0, 1))
    )
    self._mean_w = sample.mean_w(nets, self._variables)
    self._sampler = sample.make_sampler(nets, mesh)
    self._interpolate = sample.make_interpolator(
      nets, mesh, rows=1, columns=_NUM_BETWEEN
    )

  def draw(self, seed, psi, label=None, moves=()):
    """Returns (grid, strip) of a seed, uint8 [H, W, 3].

    Args:
      seed: of the latents.
      psi: share of w's distance from its mean that is left; see
        `sample.make_sampler`.
      label: the class, or None for all in turn, a row each.
      moves: standard deviations along each of the first `directions`.
    """
    import numpy as np

    from vitgan_jax import pictures

    arguments = (self._variables, int(seed))
    truncation = (float(psi), self._mean_w)
    classes = self._classes if self.class_names else None
    if label is not None:
      # As many as all of them: one program draws both.
      classes = np.full_like(classes, label)
    shift = np.tensordot(moves, self.directions[: len(moves)], 1)
    common = truncation, classes, np.float32(shift)
    samples = np.asarray(self._sampler(*arguments, 0, *common))
    between = np.asarray(self._interpolate(*arguments, *common))[0]
    labels = None if classes is None else np.resize(classes, len(samples))
    return (
      pictures.class_grid(samples, labels),
      pictures.image_grid(between, columns=_NUM_BETWEEN),
    )


def build_page(pictures, name, folder):
  """Returns the page, gradio.Blocks.

  Args:
    pictures: Pictures.
    name: of the run, for the title.
    folder: pathlib.Path of a folder for the pictures that can be downloaded.
  """
  import gradio as gr

  from vitgan_jax.pictures import write_png

  def draw(seed, psi, *others):
    moves = others[: len(pictures.directions)]
    label = _ALL if len(others) == len(moves) else others[-1]
    label = None if label == _ALL else label
    for old in folder.glob("*.png"):  # the page has copies
      old.unlink()
    grid, strip = pictures.draw(seed, psi, label, moves)
    stem = f"{name}-step{pictures.step}-seed{int(seed)}-psi{psi:.2f}"
    stem += "" if label is None else f"-class{label}"
    stem += "".join(f"-{x:+.1f}" for x in moves) if any(moves) else ""
    paths = [folder / f"{stem}{suffix}.png" for suffix in ("", "-between")]
    write_png(paths[0], grid, min_side=768)
    write_png(paths[1], strip, min_side=96)
    return str(paths[0]), str(paths[1]), str(paths[0])

  with gr.Blocks(
    title=f"{name}: samples",
    analytics_enabled=False,
    delete_cache=(_HOUR, _HOUR),
  ) as page:
    gr.Markdown(
      f"## {name}\nSamples of the generator's moving average at step "
      f"{pictures.step:,}."
    )
    with gr.Row():
      with gr.Column(scale=2, min_width=280):
        seed = gr.Slider(
          0, _MAX_SEED, value=0, step=1, label="Seed", elem_id="seed"
        )
        dice = gr.Button("Random seed", elem_id="dice")
        psi = gr.Slider(
          0,
          1,
          value=1,
          step=0.01,
          label="Truncation",
          info="1: as trained. Less draws all images towards the mean latent; "
          "at 0 there is no other.",
          elem_id="truncation",
        )
        controls = [seed, psi]
        for i in range(1, len(pictures.directions) + 1):
          controls.append(
            gr.Slider(
              -_REACH,
              _REACH,
              value=0,
              step=0.1,
              label=f"Direction {i} of w, in standard deviations",
              elem_id=f"direction{i}",
            )
          )
        if pictures.class_names:
          choices = [(x, i) for i, x in enumerate(pictures.class_names)]
          controls.append(
            gr.Dropdown(
              [("All, a row each", _ALL), *choices],
              value=_ALL,
              label="Class",
              elem_id="class",
            )
          )
        download = gr.DownloadButton("Download the grid", elem_id="download")
      with gr.Column(scale=5):
        common = dict(
          show_label=False,
          interactive=False,
          buttons=["fullscreen"],
          type="filepath",
        )
        grid = gr.Image(height="72vh", elem_id="grid", **common)
        gr.Markdown("From one latent to another:")
        strip = gr.Image(elem_id="strip", **common)
    dice.click(lambda: random.randint(0, _MAX_SEED), outputs=seed, queue=False)
    gr.on(
      [page.load, *(control.change for control in controls)],
      draw,
      inputs=controls,
      outputs=[grid, strip, download],
      show_progress="hidden",
      trigger_mode="always_last",  # while a slider moves
      api_name="draw",
    )
  return page


def main(arguments):
  """Serves the page until it is interrupted."""
  cli.no_arguments(arguments)
  workdir = epath.Path(flags.FLAGS.workdir)
  with tempfile.TemporaryDirectory(prefix="vitgan_jax_demo_") as folder:
    _import_gradio(folder)
    pictures = Pictures(workdir)
    pictures.draw(0, 1.0)  # compiles, before anybody waits for it
    page = build_page(pictures, workdir.resolve().name, pathlib.Path(folder))
    try:
      _, url, _ = page.launch(
        server_name=flags.FLAGS.host,
        server_port=flags.FLAGS.port,
        allowed_paths=[folder],
        share=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
      )
    except OSError as error:
      raise ConfigError(
        f"cannot serve at --host={flags.FLAGS.host} --port={flags.FLAGS.port}: "
        f"{' '.join(str(error).split())} Give another --host or --port"
      ) from error
    print(
      f"{workdir}, step {pictures.step}, is at {url} (Ctrl-C ends it)",
      flush=True,
    )
    # As Ctrl-C: or the folder would stay.
    for signum in (signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
        signal.signal(signum, signal.default_int_handler)
    page.block_thread()


def _import_gradio(folder):
  """Imports gradio, without analytics; its copies of files go to a folder.

  Raises:
    ConfigError: if it is not installed.
  """
  os.environ.update(
    GRADIO_ANALYTICS_ENABLED="False",  # it would ask for its newest version
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_TEMP_DIR=os.path.join(folder, "copies"),
  )
  import_extra("gradio", "the demo", "pip install -e '.[demo]'")


if __name__ == "__main__":
  cli.define_path("workdir", "runs/digits", "Folder of the run.")
  flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Interface to serve at; the default is seen on this machine alone, 0.0.0.0 "
    "by all that can reach it.",
  )
  flags.DEFINE_integer(
    "port",
    None,
    "Port to serve at; default the first free one from 7860 on.",
    lower_bound=1,
    upper_bound=65535,
  )
  cli.run(main)
