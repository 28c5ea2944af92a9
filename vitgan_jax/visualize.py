"""Pictures of a training run: its curves, and what its discriminator does.

  python -m vitgan_jax.visualize --workdir=runs/digits

draws into the workdir, or --output: curves.png; and, if there is a checkpoint,
attention.png and sigma.png of the last one.
"""

import collections

from absl import flags
from etils import epath
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from vitgan_jax import cli, files, pictures
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError

NUM_ROWS = 8  # images on a picture of attention maps
_SIDE = 64  # least pixels of an image there

_PANELS = {
  "Losses": ("loss/d", "loss/g"),
  "Logits of D": ("scores/real", "scores/fake"),
  "Generator: std": (
    "diversity/std_over_latents",
    "diversity/std_of_mean_image",
  ),
  "D: area under the ROC curve": ("auc/clean", "auc/augmented"),
  "Steps at patch borders / inside": (
    "borders/step_ratio",
    "borders/step_ratio_real",
  ),
  "Attention entropy / log N": (
    "attention/entropy_mean",
    "attention/entropy_min",
    "attention/g_entropy_mean",
    "attention/g_entropy_min",
  ),
  "Kernels of D: growth of sigma": ("sigma/growth_max",),
  "Kernels of D: stable rank / rank": ("sigma/stable_rank_min",),
}
_COLUMNS = 4


def draw_curves(workdir, output=None):
  """Draws `metrics.jsonl` of a workdir into `curves.png`.

  Args:
    workdir: of the run.
    output: folder of the picture; None is the workdir.

  Returns:
    Its path; None where nothing was logged.

  Raises:
    ConfigError: if the folder is not a workdir.
  """
  workdir = epath.Path(workdir)
  config = config_lib.load(workdir)
  curves = collections.defaultdict(dict)
  for scalars in files.read_records(workdir / "metrics.jsonl", files.METRICS):
    kimg = config_lib.kimg(config, scalars.pop("step"))
    for name, value in scalars.items():
      # A resumed run logs some steps again; the later value is the run's.
      curves[name][kimg] = value
  # Not each kind of network has each of them.
  panels = {
    title: logged
    for title, names in _PANELS.items()
    if (logged := [name for name in names if name in curves])
  }
  if not panels:
    return None
  rows = -(-len(panels) // _COLUMNS)
  figure = Figure(figsize=(14, 3 * rows))
  axes = figure.subplots(rows, _COLUMNS).flat
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  for axis, (title, names) in zip(axes, panels.items()):
    for name in names:
      kimg = sorted(curves[name])
      values = [curves[name][k] for k in kimg]
      axis.plot(kimg, values, label=name.split("/")[1])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("kimg")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
  figure.tight_layout()
  path = epath.Path(output or workdir) / "curves.png"
  with path.open("wb") as file:
    figure.savefig(file, dpi=80)
  return path


def attention_picture(images, maps):
  """Draws where the discriminator looks; a row for each image.

  The image itself comes first, then, for each block, the attention of the class
  token laid over it: from dark, none, to bright, the most in this map.

  Args:
    images: uint8 [R, S, S, 3].
    maps: [R, blocks, G, G], of `diagnostics.Intermediates`.

  Returns:
    uint8 [H, W, 3].
  """
  images = pictures.enlarge(images, _SIDE)
  maps = np.asarray(maps)
  patch = images.shape[1] // maps.shape[-1]
  maps = maps / maps.max(axis=(-2, -1), keepdims=True)
  maps = maps.repeat(patch, axis=-2).repeat(patch, axis=-1)
  colours = 255 * matplotlib.colormaps["inferno"](maps)[..., :3]
  overlaid = 0.4 * images[:, None] + 0.6 * colours
  rows = np.concatenate([images[:, None], np.rint(overlaid)], axis=1)
  cells = rows.astype(np.uint8).reshape(-1, *images.shape[1:])
  return pictures.image_grid(cells, columns=rows.shape[1])


def discriminator_pictures(images, shown):
  """Draws what a discriminator shows.

  Args:
    images: uint8 [B, S, S, 3], those that it looked at.
    shown: `diagnostics.Intermediates` of them.

  Returns:
    {"attention", "sigma"}, those that there are: uint8 [H, W, 3].
  """
  drawn = {}
  if shown.attention is not None:
    maps = np.asarray(shown.attention)
    drawn["attention"] = attention_picture(images[:NUM_ROWS], maps[:NUM_ROWS])
  if shown.growth:
    drawn["sigma"] = sigma_picture(shown.growth)
  return drawn


def sigma_picture(growth):
  """Draws how far each kernel of the discriminator has grown.

  Args:
    growth: {kernel: sigma(W) / sigma(W_init)}, of `diagnostics.Intermediates`.

  Returns:
    uint8 [H, W, 3].
  """
  names = sorted(growth, key=pictures.natural_key)
  values = [float(growth[name]) for name in names]
  figure = Figure(figsize=(7, 1 + 0.22 * len(names)), dpi=80)
  axis = figure.subplots()
  bars = axis.barh(names, values, color="tab:blue")
  axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
  axis.axvline(1.0, color="black", linewidth=1)
  axis.invert_yaxis()  # the first kernel above
  axis.margins(x=0.12, y=0.01)
  axis.set_title("sigma(W) / sigma(W_init)", fontsize=10)
  axis.tick_params(labelsize=8)
  figure.tight_layout()
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_discriminator(workdir, output=None):
  """Draws `attention.png` and `sigma.png` of a workdir's last checkpoint.

  The images that it looks at are the run's samples: a workdir is enough.

  Args:
    workdir: of the run.
    output: folder of the pictures; None is the workdir.

  Returns:
    The paths of the pictures, of what the discriminator shows.

  Raises:
    ConfigError: if the folder is not a workdir, or has no checkpoint.
  """
  # Late: --help and the curves need not wait for JAX.
  from vitgan_jax import checkpoint, sample
  from vitgan_jax.diagnostics import make_diagnostics

  config, nets, mesh, state = checkpoint.load_run(workdir)
  sampler = sample.make_sampler(nets, mesh)
  samples = np.asarray(sampler(state.g_ema_variables, 0, 0))[:NUM_ROWS]
  latents = np.zeros((NUM_ROWS, nets.generator.latent_dim))
  labels = sample.labels_of(nets.generator, np.arange(NUM_ROWS))
  diagnostics = make_diagnostics(config, nets, mesh)
  _, shown = diagnostics(state, samples, latents, labels)
  drawn = discriminator_pictures(samples, shown)
  paths = []
  for name, picture in drawn.items():
    paths.append(epath.Path(output or workdir) / f"{name}.png")
    pictures.write_png(paths[-1], picture)
  return paths


def draw(workdir, output=None):
  """Draws all pictures of a workdir; returns their paths.

  Before the first checkpoint these are the curves alone; of `best`, which has
  no log, all but the curves.

  Args:
    workdir: of the run.
    output: folder of the pictures; None is the workdir.

  Raises:
    ConfigError: if the folder is not a workdir, has nothing to draw, or the
      other cannot be written.
  """
  config_lib.load(workdir)  # before a folder is made
  folder = epath.Path(output or workdir)
  files.check_writable(folder, "--output", "; give another --output")
  curves = draw_curves(workdir, folder)
  if files.numbers_in(epath.Path(workdir) / "checkpoints"):
    return [curves] * bool(curves) + draw_discriminator(workdir, folder)
  if not curves:
    raise ConfigError(
      f"there is nothing to draw in {workdir} yet: nothing was logged, and no "
      "checkpoint saved"
    )
  return [curves]


def main(arguments):
  """Draws the pictures of --workdir."""
  cli.no_arguments(arguments)
  paths = draw(flags.FLAGS.workdir, flags.FLAGS.output)
  print("The run's pictures are", ", ".join(map(str, paths)))


if __name__ == "__main__":
  cli.define_path("workdir", "runs/digits", "Folder of the run.")
  cli.define_path("output", None, "Folder of the pictures; default --workdir.")
  cli.run(main)
