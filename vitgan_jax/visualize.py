"""Pictures of a training run.

python -m vitgan_jax.visualize --workdir=runs/digits
"""

import collections
import json

from absl import flags
from etils import epath
import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt

from vitgan_jax import cli
from vitgan_jax import config as config_lib

_PANELS = {
  "Losses": ("loss/d", "loss/g"),
  "Logits of D": ("scores/real", "scores/fake"),
  "Generator: std": (
    "diversity/std_over_latents",
    "diversity/std_of_mean_image",
  ),
  "D's attention entropy / log N": (
    "attention/entropy_mean",
    "attention/entropy_min",
  ),
}


def draw_curves(workdir):
  """Draws `metrics.jsonl` of a workdir into `curves.png`; returns its path.

  Raises:
    ConfigError: if the folder is not a workdir.
  """
  workdir = epath.Path(workdir)
  batch_size = config_lib.load(workdir).batch_size
  curves = collections.defaultdict(dict)
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    scalars = json.loads(line)
    kimg = scalars.pop("step") * batch_size / 1000
    for name, value in scalars.items():
      # A resumed run logs some steps again; the later value is the run's.
      curves[name][kimg] = value
  figure, axes = plt.subplots(1, len(_PANELS), figsize=(14, 3))
  for axis, (title, names) in zip(axes, _PANELS.items()):
    for name in names:
      kimg = sorted(curves[name])
      values = [curves[name][k] for k in kimg]
      axis.plot(kimg, values, label=name.split("/")[1])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("kimg")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
  figure.tight_layout()
  path = workdir / "curves.png"
  with path.open("wb") as file:
    figure.savefig(file, dpi=80)
  plt.close(figure)
  return path


def main(arguments):
  """Draws the curves of --workdir."""
  cli.no_arguments(arguments)
  print(f"The run's curves are in {draw_curves(flags.FLAGS.workdir)}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/digits", "Folder of the run.")
  cli.run(main)
