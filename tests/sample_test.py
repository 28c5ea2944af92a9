import pathlib
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import runs
from vitgan_jax import checkpoint, partitioning, pictures, sample
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_float, to_uint8

CONFIG = digits.get_config("smoke")
NETS = networks.build(CONFIG)


@pytest.fixture(scope="module")
def variables(digits_run):
  return jax.device_get(digits_run.state.g_ema_variables)


@pytest.fixture(scope="module")
def expected(variables):
  """Returns the samples 0 to 39 of seed 0, drawn one latent at a time."""
  key = jax.random.key(0)
  latents = [
    jax.random.normal(jax.random.fold_in(key, i), (32,)) for i in range(40)
  ]
  images = jax.jit(NETS.generator.apply)(variables, np.stack(latents))
  images = np.clip(np.asarray(images, np.float64), -1, 1)
  return np.floor((images + 1) / 2 * 255 + 0.5).astype(np.uint8)


def draw(
  variables,
  num_samples,
  seed=0,
  batch_size=2,
  num_devices=8,
  nets=NETS,
  classes=None,
):
  """Returns (samples, sizes of the batches they came in)."""
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample, "BATCH_SIZE", batch_size)
    sampler = sample.make_sampler(nets, mesh)
    batches = list(
      sample.sample_images(sampler, variables, seed, num_samples, classes)
    )
  return np.concatenate(batches), [len(batch) for batch in batches]


@pytest.fixture(scope="module")
def forty(variables):
  images, sizes = draw(variables, 40)
  assert sizes == [16, 16, 8]
  return images


def assert_same_images(images, expected):
  """Asserts that images differ by no more than the rounding to uint8."""
  difference = np.abs(images.astype(int) - expected)
  assert difference.max() <= 1 and difference.mean() < 0.01


def test_samples_do_not_depend_on_how_many_are_drawn(variables, forty):
  images, sizes = draw(variables, 21)
  assert sizes == [16, 5]
  np.testing.assert_array_equal(images, forty[:21])


@pytest.mark.parametrize("batch_size, num_devices", [(3, 8), (5, 1), (40, 1)])
def test_samples_do_not_depend_on_the_batch(
  variables, forty, batch_size, num_devices
):
  images, sizes = draw(variables, 40, 0, batch_size, num_devices)
  assert sizes[0] == min(40, batch_size * num_devices)
  assert_same_images(images, forty)


def test_sample_is_of_the_latent_that_its_seed_and_number_give(forty, expected):
  assert_same_images(forty, expected)


def test_run_trained_by_kernels_is_sampled_where_there_are_none(
  variables, forty
):
  nets = NETS._replace(implementation="pallas")
  images, _ = draw(variables, 16, nets=nets)
  np.testing.assert_array_equal(images, forty[:16])


class Painter(nn.Module):
  """A generator that paints a class, a latent and a number of its own."""

  latent_dim: int = 2
  num_classes: int = 3

  def mapping(self, latents, labels):
    return jnp.concatenate([labels[:, None], latents], axis=1)

  def synthesize(self, w, keys=None, train=False):
    noise = jax.vmap(jax.random.uniform)(keys)
    pixels = [w[:, 0] / 127.5 - 1.0, jnp.tanh(w[:, 1]), noise]
    return jnp.stack(pixels, axis=-1)[:, None, None]


PAINTERS = networks.Networks(Painter(), None, "auto")


def test_sample_has_its_class_and_its_noise_in_any_batch():
  images, _ = draw({}, 20, nets=PAINTERS)
  np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(20) % 3)
  assert len(set(images[:, 0, 0, 2])) > 10
  others, _ = draw({}, 20, 0, batch_size=7, num_devices=1, nets=PAINTERS)
  np.testing.assert_array_equal(others, images)


def test_classes_that_are_asked_for_come_in_turn_with_the_same_latents():
  images, _ = draw({}, 20, nets=PAINTERS)
  asked, _ = draw({}, 20, nets=PAINTERS, classes=[2, 0])
  np.testing.assert_array_equal(asked[:, 0, 0, 0], [2, 0] * 10)
  np.testing.assert_array_equal(asked[..., 1:], images[..., 1:])
  interpolate = sample.make_interpolator(
    PAINTERS, partitioning.create_mesh(), rows=3, columns=2
  )
  rows = np.asarray(interpolate({}, 0, None, [2, 0]))
  np.testing.assert_array_equal(
    rows[..., 0].squeeze(), [[2, 2], [0, 0], [2, 2]]
  )


def test_truncation_is_towards_the_mean_of_the_class():
  mean_w = np.asarray(sample.mean_w(PAINTERS, {}))
  assert mean_w.shape == (3, 3)
  np.testing.assert_array_equal(mean_w[:, 0], [0, 1, 2])
  # A mean of 1,000 is within five of its standard deviations.
  np.testing.assert_allclose(mean_w[:, 1:], 0, atol=5 / 1000**0.5)
  sampler = sample.make_sampler(PAINTERS, partitioning.create_mesh())
  for psi in (0.0, 1.0):
    images = np.asarray(sampler({}, 0, 0, (psi, mean_w), [2, 0]))[:, 0, 0]
    np.testing.assert_array_equal(images[:6, 0], [2, 0] * 3)
    latents = set(images[:, 1].tolist())
    assert len(latents) > 100 if psi else max(latents) - min(latents) < 20


def test_number_is_a_class_whatever_the_names_are():
  """A dataset.json names its classes by numbers of its own."""
  names = ["1", "2", "3"]
  for words, expected in (
    ([0, np.int64(2), 1], [0, 2, 1]),
    (["1", "3"], [0, 2]),  # names, as on the command line
    (["0"], [0]),  # no name
  ):
    np.testing.assert_array_equal(
      sample.find_classes(words, 3, names), expected
    )
  with pytest.raises(ConfigError, match="no class 3:"):
    sample.find_classes([3], 3, names)


@pytest.mark.parametrize(
  "num_classes, count, expected",
  [(0, 64, None), (2, 64, 2), (10, 64, 10), (16, 64, 16), (17, 64, 8)]
  + [(1000, 64, 8), (10, 16, 4), (3, 2, 2)],
)
def test_grid_has_all_classes_or_the_first_ones(num_classes, count, expected):
  classes = sample.grid_classes(Painter(num_classes=num_classes), count)
  if expected is None:
    assert classes is None
  else:
    np.testing.assert_array_equal(classes, range(expected))


def test_interpolation_keeps_class_and_noise_along_a_row():
  mesh = partitioning.create_mesh()
  interpolate = sample.make_interpolator(PAINTERS, mesh, rows=4, columns=5)
  labels, latents, noise = np.moveaxis(
    np.asarray(interpolate({}, 0))[:, :, 0, 0], -1, 0
  )
  np.testing.assert_array_equal(labels, [[0] * 5, [1] * 5, [2] * 5, [0] * 5])
  for row in range(4):
    assert len(set(noise[row])) == 1 < len(set(latents[row]))
  assert len(set(noise[:, 0])) > 1


def test_all_samples_of_all_seeds_differ(variables, forty):
  both = np.concatenate([forty, draw(variables, 40, seed=1)[0]])
  assert len({image.tobytes() for image in both}) == 80


@pytest.mark.parametrize(
  "value, expected",
  [
    (-1.0, 0),
    (1.0, 255),
    (-7.0, 0),
    (3.0, 255),
    (0.0, 128),  # 127.5, and the even neighbour
    (-1 + 0.49 / 127.5, 0),
    (-1 + 0.51 / 127.5, 1),
    (1 - 0.49 / 127.5, 255),
    (1 - 0.51 / 127.5, 254),
  ],
)
def test_pixels_are_clipped_and_rounded(value, expected):
  pixel = to_uint8(np.float32([value]))
  assert pixel.dtype == np.uint8 and int(pixel[0]) == expected


def test_uint8_images_survive_the_way_to_floats_and_back():
  values = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(to_uint8(to_float(values)), values)


def read_pngs(folder):
  """Returns {name: pixels} of the PNGs in a folder."""
  images = {}
  for path in sorted(pathlib.Path(folder).glob("*.png")):
    with Image.open(path) as image:
      images[path.name] = np.asarray(image)
  return images


@pytest.fixture(scope="module")
def folder(digits_run, tmp_path_factory):
  """Three samples of the digits run, as the command line writes them.

  It finds no TensorFlow, and gets no config but the workdir's.
  """
  tmp_path = tmp_path_factory.mktemp("samples")
  (tmp_path / "broken").mkdir()
  for module in ("tensorflow", "tensorflow_datasets", "clu"):
    (tmp_path / "broken" / f"{module}.py").write_text("raise SystemError")
  before = runs.snapshot(digits_run.workdir)
  code, output, errors = runs.run_main(
    "--mode=sample",
    f"--workdir={digits_run.workdir}",
    "--num_samples=3",
    "--output=new/folder",
    cwd=tmp_path,
    path=[str(tmp_path / "broken")],
  )
  assert code == 0, errors
  assert output == "3 samples of step 8 are in new/folder\n"
  assert runs.snapshot(digits_run.workdir) == before
  return tmp_path / "new" / "folder"


def test_folder_has_the_samples_and_their_grid(folder):
  images = read_pngs(folder)
  names = ["000000.png", "000001.png", "000002.png", "grid.png"]
  assert sorted(images) == names == sorted(p.name for p in folder.iterdir())
  singles = np.stack([images[name] for name in names[:3]])
  assert singles.shape == (3, 16, 16, 3)
  grid = np.kron(
    pictures.image_grid(singles), np.ones((16, 16, 1), np.uint8)
  )  # two images of 16 pixels a side, enlarged to 512
  np.testing.assert_array_equal(images["grid.png"], grid)


def test_folder_has_the_samples_of_the_averaged_generator(folder, expected):
  images = read_pngs(folder)
  for i in range(3):
    assert_same_images(images[f"{i:06d}.png"], expected[i])


@pytest.fixture
def workdir(digits_run, tmp_path):
  """A copy of the digits run, to write into."""
  return shutil.copytree(digits_run.workdir, tmp_path / "run")


def test_raw_generator_is_not_used(workdir, digits_run, folder, monkeypatch):
  monkeypatch.setattr(sample, "BATCH_SIZE", 2)
  state = digits_run.state
  state = state.replace(
    step=state.step + 1,
    g_params=jax.tree.map(lambda x: x * np.nan, state.g_params),
  )
  with checkpoint.create_manager(workdir) as manager:
    checkpoint.save(manager, state, {})
  sample.sample(workdir, 3, 0, workdir / "new")
  images = read_pngs(workdir / "new")
  for name, image in read_pngs(folder).items():
    assert_same_images(images[name], image)


def test_seed_chooses_the_samples(workdir, folder, monkeypatch):
  monkeypatch.setattr(sample, "BATCH_SIZE", 2)
  sample.sample(workdir, 3, 1, workdir / "new")
  old = {image.tobytes() for image in read_pngs(folder).values()}
  new = {image.tobytes() for image in read_pngs(workdir / "new").values()}
  assert len(old | new) == 8


@pytest.mark.parametrize(
  "num_samples, seed, match", [(0, 0, "num_samples"), (2, 2**40, "seed")]
)
def test_bad_number_is_an_error_and_makes_nothing(
  workdir, num_samples, seed, match
):
  before = runs.snapshot(workdir)
  with pytest.raises(ConfigError, match=match):
    sample.sample(workdir, num_samples, seed, workdir / "new")
  assert runs.snapshot(workdir) == before


@pytest.mark.parametrize("output", ["folder", "file"])
def test_output_that_is_there_is_left_alone(workdir, output):
  (workdir / "folder").mkdir()
  (workdir / "folder" / "mine.txt").write_text("mine")
  (workdir / "file").write_text("mine")
  before = runs.snapshot(workdir)
  with pytest.raises(ConfigError, match=output):
    sample.sample(workdir, 2, 0, workdir / output)
  assert runs.snapshot(workdir) == before


def test_output_that_cannot_be_made_is_an_error_before_it_is_drawn(
  workdir, monkeypatch
):
  (workdir / "file").write_text("mine")
  before = runs.snapshot(workdir)
  monkeypatch.setattr(sample, "make_sampler", None)
  with pytest.raises(ConfigError, match=r"--output=.*/file/new: Not"):
    sample.sample(workdir, 2, 0, workdir / "file" / "new")
  assert runs.snapshot(workdir) == before


def test_workdir_without_checkpoints_is_an_error_and_left_alone(workdir):
  shutil.rmtree(workdir / "checkpoints")
  before = runs.snapshot(workdir)
  with pytest.raises(ConfigError, match="no checkpoint in"):
    sample.sample(workdir, 2, 0, workdir / "new")
  assert runs.snapshot(workdir) == before


def test_interpolation_goes_along_the_great_circle(variables):
  mesh = partitioning.create_mesh()
  interpolate = sample.make_interpolator(NETS, mesh, rows=3, columns=5)
  images = np.asarray(interpolate(variables, 7))
  assert images.shape == (3, 5, 16, 16, 3) and images.dtype == np.uint8
  ends = np.asarray(
    jax.random.normal(jax.random.key(7), (2, 3, 1, NETS.generator.latent_dim))
  )[:, :, 0]
  for row in range(3):
    a, b = ends[:, row].astype(np.float64)
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for column, t in enumerate([0, 0.25, 0.5, 0.75, 1]):
      z = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
      expected = to_uint8(
        NETS.generator.apply(variables, z[None].astype(np.float32))[0]
      )
      # A pixel may be rounded to its neighbour.
      np.testing.assert_allclose(
        images[row, column].astype(int), expected, atol=1
      )


@pytest.fixture(scope="module")
def mean_w(variables):
  return sample.mean_w(NETS, variables)


@pytest.fixture(scope="module")
def truncated(variables, mean_w):
  """Returns `draw(psi, seed)`, of one batch, and the jitted sampler."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample, "BATCH_SIZE", 2)
    sampler = sample.make_sampler(NETS, partitioning.create_mesh())

  def draw_truncated(psi, seed=0):
    return np.asarray(sampler(variables, seed, 0, (psi, mean_w)))

  return draw_truncated, sampler


def map_in_numpy(params, latents):
  """Returns w of latents, [B, D] both, layer by layer."""
  w = latents / np.sqrt(np.mean(latents**2, axis=-1, keepdims=True))
  lr_multiplier = CONFIG.generator.mapping_lr_multiplier
  for i in range(CONFIG.generator.mapping_depth):
    layer = params["mapping"][f"dense{i}"]
    y = w @ layer["kernel"] / np.sqrt(w.shape[-1]) + layer["bias"]
    y *= lr_multiplier
    w = np.sqrt(2.0) * np.where(y > 0, y, 0.2 * y)
  return w


def test_psi_of_one_gives_the_samples_to_the_last_bit(truncated, forty):
  np.testing.assert_array_equal(truncated[0](1.0), forty[:16])


def test_psi_of_zero_gives_one_image_for_all_latents(truncated):
  draw_truncated, _ = truncated
  images = np.concatenate([draw_truncated(0.0), draw_truncated(0.0, seed=5)])
  assert len({image.tobytes() for image in images}) == 1


def test_mean_w_is_that_of_other_latents(variables, mean_w):
  latents = np.random.default_rng(0).normal(size=(40_000, 32))
  w = map_in_numpy(variables["params"], latents)
  # Means of 10,000 and 40,000 differ by a hundredth of a standard deviation.
  np.testing.assert_allclose(mean_w, w.mean(0), atol=0.06 * w.std(0).mean())


def test_psi_draws_w_towards_its_mean(truncated, variables, mean_w):
  key = jax.random.key(0)
  latents = np.stack(
    [jax.random.normal(jax.random.fold_in(key, i), (32,)) for i in range(16)]
  )
  mean = np.asarray(mean_w, np.float64)
  w = mean + 0.5 * (map_in_numpy(variables["params"], latents) - mean)
  images = jax.jit(
    lambda w: NETS.generator.apply(variables, w, method="synthesize")
  )(w.astype(np.float32))
  assert_same_images(truncated[0](0.5), to_uint8(images).astype(int))


def test_seed_and_psi_compile_nothing_anew(truncated):
  draw_truncated, sampler = truncated
  draw_truncated(0.7, seed=3)
  programs = sampler._cache_size()
  for psi, seed in [(0.1, 4), (0.9, 5), (1.0, 6)]:
    draw_truncated(psi, seed)
  assert sampler._cache_size() == programs


def test_interpolation_is_truncated_likewise(variables, mean_w):
  mesh = partitioning.create_mesh()
  interpolate = sample.make_interpolator(NETS, mesh, rows=1, columns=3)
  plain = np.asarray(interpolate(variables, 7))
  same, mean = (
    np.asarray(interpolate(variables, 7, (psi, mean_w))) for psi in (1.0, 0.0)
  )
  np.testing.assert_array_equal(same, plain)
  assert len({image.tobytes() for image in mean[0]}) == 1
