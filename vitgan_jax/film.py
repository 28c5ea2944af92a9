r"""Films of a run: a walk among its latents, directions, styles, its training.

  python -m vitgan_jax.film --workdir=runs/faces --output=latents.mp4
  python -m vitgan_jax.film --workdir=runs/faces --output=directions.webp \
    --of=directions --rows=6 --columns=4 --truncation=0.7

--of=latents: each cell of a grid goes around through latents of its own.
--of=directions: row i moves its samples along principal direction i of w, by
  two standard deviations to either side (GANSpace).
--of=mixing: a cell has the w of its row in the first half of the generator's
  layers, that of its column in the others; the first row and column are these
  unmixed. As FILE.png it is a still.
--of=training: the grids of samples that the run wrote, with its kimg.

All but the last are closed: they can run in a circle. MP4 needs imageio-ffmpeg:
pip install -e '.[film]'
"""

import contextlib
import itertools
import subprocess

from absl import flags
from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

from vitgan_jax import cli, files, pictures
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError, import_extra

KINDS = ("latents", "directions", "mixing", "training")
SUFFIXES = (".mp4", ".webp", ".gif")
_STILL = ".png"
_SIDE = 512  # least pixels of a frame
_SMOOTHING = 1.0  # seconds, of the walk among latents
_REACH = 2.0  # standard deviations along a direction
_MAX_GIF_FPS = 50  # of more, viewers make ten
_OF_GENERATORS = ("rows", "columns", "seed", "truncation", "classes")


class Painter:
  """Draws images of a workdir's last checkpoint, of latents or of w."""

  def __init__(self, workdir, seed, count, truncation=1.0, classes=None):
    """Loads the checkpoint.

    Args:
      workdir: of a training run.
      seed: of what the generator draws at random, the same in all frames.
      count: of images that are seen at a time.
      truncation: psi; see `sample.make_sampler`.
      classes: names or numbers; image i is of number i modulo how many they
        are. None is all in turn.

    Raises:
      ConfigError: if the folder is no workdir, or has no checkpoint or no such
        class.
    """
    import jax

    from vitgan_jax import checkpoint, sample
    from vitgan_jax.models import networks
    from vitgan_jax.pixels import to_uint8

    sample.check_seed(seed)
    classes = sample.find_classes_of(workdir, classes)
    devices = jax.local_devices()[:1]
    _, self.nets, _, state = checkpoint.load_run(workdir, devices)
    self.generator = networks.plain(self.nets.generator)
    self.variables = state.g_ema_variables
    labels = sample.labels_of(self.generator, np.arange(count), classes)
    cut = None
    if truncation != 1.0:
      cut = truncation, sample.mean_w(self.nets, self.variables)

    @jax.jit
    def w_of(variables, latents):
      w = self.generator.apply(
        variables, latents, labels, method=sample.mapping
      )
      return sample.truncate(w, labels, cut)

    @jax.jit
    def paint(variables, w):
      keys, _ = sample.keys_of(seed, np.arange(len(w)))
      return to_uint8(
        self.generator.apply(variables, w, keys, method="synthesize")
      )

    self._w_of, self._paint = w_of, paint

  def w_of(self, latents):
    """Returns w [count, ...], truncated, of latents [count, Z]."""
    return np.asarray(self._w_of(self.variables, latents))

  def paint(self, w):
    """Returns images uint8 [N, S, S, 3] of w [N, W] or [N, L, W]."""
    return np.asarray(self._paint(self.variables, w))


def of_latents(painter, latents, columns):
  """Yields frames of latents [frames, rows * columns, Z]."""
  for latents_of_frame in latents:
    images = painter.paint(painter.w_of(latents_of_frame))
    yield pictures.image_grid(images, columns)


def of_directions(painter, latents, directions, num_frames):
  """Yields frames in which w moves along directions; a row each.

  Args:
    painter: Painter.
    latents: [columns, Z], of the samples.
    directions: [rows, ...] of w; as long as a standard deviation.
    num_frames: there, back, to the other side, and back.
  """
  w = painter.w_of(latents)
  for phase in np.linspace(0, 2 * np.pi, num_frames, endpoint=False):
    shift = np.float32(_REACH * np.sin(phase)) * directions
    moved = (w + shift[:, None]).reshape(-1, *w.shape[1:])
    yield pictures.image_grid(painter.paint(moved), len(w))


def of_mixing(painter, latents, rows, columns):
  """Yields frames of latents [frames, rows + columns, Z], each with each.

  The sources stand in the first column and in the first row.
  """
  num_styles = painter.generator.num_styles
  is_of_row = (np.arange(num_styles) < num_styles // 2)[:, None]
  for latents_of_frame in latents:
    w = np.repeat(painter.w_of(latents_of_frame)[:, None], num_styles, axis=1)
    of_row, of_column = w[:rows, None], w[None, rows:]
    mixed = np.where(is_of_row, of_row, of_column)
    images = painter.paint(np.concatenate([w, mixed.reshape(-1, *w.shape[1:])]))
    size = images.shape[1]
    table = np.zeros((rows + 1, columns + 1, size, size, 3), np.uint8)
    table[1:, 0], table[0, 1:] = images[:rows], images[rows : rows + columns]
    table[1:, 1:] = images[rows + columns :].reshape(
      rows, columns, size, size, 3
    )
    yield pictures.image_grid(table.reshape(-1, size, size, 3), columns + 1)


def of_training(workdir, num_frames):
  """Yields the grids of samples that a run wrote, each for as many frames.

  Below each is how many kimg the run had seen.

  Raises:
    ConfigError: if the folder is no workdir, or has no samples.
  """
  config = config_lib.load(workdir)
  paths = (epath.Path(workdir) / "samples").glob("*.png")
  paths = sorted(
    (x for x in paths if x.stem.isdigit()), key=lambda x: int(x.stem)
  )
  grids = []
  for path in paths:
    try:
      with path.open("rb") as file, Image.open(file) as image:
        image.load()
    except (OSError, UnidentifiedImageError):
      files.tell(f"{path} is damaged: it is left out")
      continue
    size = image.size  # that of the last: a resumed run may draw other ones
    grids.append((path, config_lib.kimg(config, int(path.stem))))
  if not grids:
    raise ConfigError(
      f"there are no grids in {workdir}/samples yet: --of=training needs a run "
      "that wrote some"
    )

  def frames():
    for i in range(num_frames):
      path, kimg = grids[i * len(grids) // num_frames]
      with path.open("rb") as file, Image.open(file) as image:
        image = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
        yield captioned(image, f"{kimg:,.0f} kimg")

  return frames()


def captioned(image, text):
  """Returns a PIL image with a line of text below it, uint8 [H, W, 3]."""
  height = max(16, image.height // 20)
  picture = Image.new("RGB", (image.width, image.height + 2 * height))
  picture.paste(image)
  ImageDraw.Draw(picture).text(
    (height // 2, image.height + height),
    text,
    fill="white",
    font=ImageFont.load_default(height),
    anchor="lm",
  )
  return np.asarray(picture)


def write(path, frames, num_frames, fps):
  """Writes a film, or the one frame of a still; nothing if it cannot be whole.

  Frames are enlarged by whole pixels to at least 512, and get a black line at
  the right or below where they would be odd, which MP4 does not take.

  Args:
    path: pathlib.Path, whose ending says the format.
    frames: iterable of uint8 [H, W, 3], all of a size.
    num_frames: how many.
    fps: frames a second. GIF has them in hundredths of a second, WebP in
      thousandths, rounded.

  Raises:
    ConfigError: if there is nothing to write MP4 with.
  """
  progress = tqdm(frames, "Drawing", num_frames, unit=" frames")
  enlarged = (_even(pictures.enlarge(x, _SIDE)) for x in progress)
  files.check_writable(path.parent, "--output", "; give another --output")
  with files.whole(path) as partial:
    if path.suffix == ".mp4":
      _write_mp4(partial, enlarged, fps)
      return
    first, *rest = map(Image.fromarray, enlarged)
    options = {"format": path.suffix[1:].upper()}
    if path.suffix != _STILL:
      unit = 10 if path.suffix == ".gif" else 1
      options |= {
        "save_all": True,
        "append_images": rest,
        "duration": unit * round(1000 / unit / fps),
        "loop": 0,  # for ever
      }
    if path.suffix == ".webp":
      options["quality"] = 90
    first.save(partial, **options)


def _even(frame):
  height, width, _ = frame.shape
  return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)))


def _ffmpeg():
  """Returns the path of the program; raises a ConfigError without it."""
  remedy = "pip install -e '.[film]', or give --output=FILE.webp"
  return import_extra("imageio_ffmpeg", "MP4", remedy).get_ffmpeg_exe()


def _write_mp4(path, frames, fps):
  """Writes H.264, as browsers play it."""
  first = next(frames)
  height, width, _ = first.shape
  command = [_ffmpeg(), "-y", "-loglevel", "error"]
  command += ["-f", "rawvideo", "-pix_fmt", "rgb24"]
  command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
  command += ["-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"]
  command += ["-movflags", "+faststart", "-f", "mp4", str(path)]
  # imageio_ffmpeg.write_frames would fork, which JAX warns of.
  with subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,  # Ctrl-C is for this process
  ) as process:
    with contextlib.suppress(BrokenPipeError):  # it says why
      for frame in itertools.chain([first], frames):
        process.stdin.write(frame.tobytes())
    _, errors = process.communicate()
  if process.returncode:
    reason = errors.decode(errors="replace").strip().splitlines()
    raise ConfigError(f"ffmpeg cannot write {path}: {' '.join(reason[-1:])}")


def film(
  workdir,
  output,
  of="latents",
  seconds=10.0,
  fps=30,
  rows=4,
  columns=6,
  seed=0,
  truncation=1.0,
  classes=None,
):
  """Writes a film of a run; see the module.

  Args:
    workdir: of a training run.
    output: file, of which the ending says the format.
    of: one of `KINDS`.
    seconds: its length.
    fps: frames a second.
    rows: of its grid; with "directions", how many of them, with "mixing", how
      many sources of the first layers.
    columns: of its grid; samples and sources likewise.
    seed: of the latents.
    truncation: psi; see `sample.make_sampler`.
    classes: names or numbers, as texts; latent i is of number i modulo how many
      they are. None is all in turn.

  Raises:
    ConfigError: if something of these cannot be.
  """
  path = files.local(output, "--output")
  num_frames = max(1, round(seconds * fps))
  if path.suffix == _STILL and of == "mixing":
    num_frames = 1
  elif path.suffix not in SUFFIXES:
    raise ConfigError(
      f"--output={output} must end in {', '.join(SUFFIXES)}, or, with "
      f"--of=mixing, in {_STILL}"
    )
  if path.suffix == ".gif" and fps > _MAX_GIF_FPS:
    raise ConfigError(
      f"--fps={fps} is too fast for a GIF: give {_MAX_GIF_FPS} at most, or "
      "--output=FILE.webp"
    )
  if path.suffix == ".mp4":
    _ffmpeg()  # before anything is drawn
  if of == "training":
    write(path, of_training(workdir, num_frames), num_frames, fps)
  else:
    counts = {
      "latents": rows * columns,
      "directions": columns,
      "mixing": rows + columns,
    }
    painter = Painter(workdir, seed, counts[of], truncation, classes)
    frames = _frames(painter, of, num_frames, fps, rows, columns, seed)
    write(path, frames, num_frames, fps)
  print(f"{path} has {num_frames} frames of {workdir}")


def _frames(painter, of, num_frames, fps, rows, columns, seed):
  """Returns the frames of what a generator draws; see `film`."""
  from vitgan_jax import latent_space

  def loops(count):
    latent_dim = painter.generator.latent_dim
    sigma = _SMOOTHING * fps
    return latent_space.loops(seed, num_frames, count, latent_dim, sigma)

  if of == "latents":
    return of_latents(painter, loops(rows * columns), columns)
  if of == "mixing":
    if getattr(painter.generator, "num_styles", 1) == 1:
      raise ConfigError(
        "--of=mixing is for generators whose layers can each take a w of their "
        "own, and those of this run cannot: give --of=latents"
      )
    return of_mixing(painter, loops(rows + columns), rows, columns)
  if not latent_space.has_mapping_network(painter.nets, painter.variables):
    raise ConfigError(
      "--of=directions is for generators with a mapping network, and that of "
      "this run has none: give --of=latents"
    )
  directions = latent_space.directions(painter.nets, painter.variables, rows)
  if len(directions) < rows:
    raise ConfigError(
      f"--rows={rows} with --of=directions must be {len(directions)} at most: "
      "w of this run has no more"
    )
  return of_directions(painter, loops(columns)[0], directions, num_frames)


def main(arguments):
  """Writes the film."""
  cli.no_arguments(arguments)
  values = flags.FLAGS
  if values.output is None:
    raise ConfigError(
      f"--output=FILE{'|'.join(SUFFIXES)} is required; see --help"
    )
  if values.of == "training":
    given = [name for name in _OF_GENERATORS if values[name].present]
    if given:
      raise ConfigError(
        f"--{given[0]} is not for --of=training, which shows the grids that "
        "the run wrote; see --help"
      )
  film(
    values.workdir,
    values.output,
    values.of,
    values.seconds,
    values.fps,
    values.rows,
    values.columns,
    values.seed,
    values.truncation,
    values.classes,
  )


if __name__ == "__main__":
  cli.define_path("workdir", "runs/digits", "Folder of the run.")
  cli.define_path("output", None, "The file: FILE.mp4, FILE.webp or FILE.gif.")
  flags.DEFINE_enum("of", "latents", KINDS, "What the film shows; see above.")
  flags.DEFINE_float("seconds", 10.0, "Its length.", lower_bound=0.0)
  flags.DEFINE_integer("fps", 30, "Frames a second.", lower_bound=1)
  flags.DEFINE_integer(
    "rows",
    4,
    "Rows of the grid; with --of=directions, directions; with --of=mixing, "
    "sources of the first layers.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "columns",
    6,
    "Columns of the grid; with --of=directions, samples; with --of=mixing, "
    "sources of the last layers.",
    lower_bound=1,
  )
  flags.DEFINE_integer("seed", 0, "Of the latents.")
  flags.DEFINE_float(
    "truncation",
    1.0,
    "Share of w's distance from its mean that is left; 1 is as trained.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_list(
    "classes",
    None,
    "Of a run with classes, names or numbers: latent i is of number i modulo "
    "how many they are. Default all of the run's, in turn.",
  )
  cli.run(main)
