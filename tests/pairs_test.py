"""Each generator goes the whole way of a run with each discriminator."""

import contextlib
import io

import pytest

from configs import digits
from tests import runs, tiny, toy_features
from vitgan_jax import checkpoint, evaluate, sample, visualize
from vitgan_jax.metrics import features


@pytest.mark.parametrize(
  "argument, overrides, shown",
  [
    (
      "g=stylegan2,d=stylegan2",
      {
        # What compiles soon.
        "data.image_size": 8,
        "loss.bcr_weight": 0.0,
        "loss.r1_gamma": 0.0,
      },
      [],
    ),
    pytest.param(
      "g=stylegan2,d=stylegan2",
      {
        "data.num_classes": 10,
        "loss.path_length_weight": 2.0,
        # On one device, so that there are neighbours to compare.
        "discriminator.group_size": 4,
      },
      [],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "g=stylegan2", {}, ["attention", "sigma"], marks=pytest.mark.slow
    ),
    pytest.param(
      "d=stylegan2",
      {"generator.patch_decoder": "conv", "loss.bcr_anchor": "augmented"},
      [],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "g=biggan,d=biggan",
      {
        "generator.channels": (8, 8, 8),
        "data.num_classes": 10,
        "loss.adversarial": "hinge",
        "loss.bcr_weight": 0.0,
        "d_steps": 2,
        "steps_per_call": 1,
      },
      ["sigma"],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "g=transgan,d=transgan",
      {
        "generator.depths": (1, 1),
        "loss.adversarial": "wasserstein",
        "loss.bcr_weight": 0.0,
        "loss.gp_weight": 10.0,
      },
      [],
      marks=pytest.mark.slow,
    ),
    pytest.param("g=cips", {}, ["attention", "sigma"], marks=pytest.mark.slow),
    pytest.param(
      "g=ganformer", {}, ["attention", "sigma"], marks=pytest.mark.slow
    ),
    pytest.param(
      "g=gat,d=gat",
      {"loss.adversarial": "rpgan"},
      ["attention"],
      marks=pytest.mark.slow,
    ),
  ],
)
@pytest.mark.parametrize(
  "num_devices", [1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_pair_trains_resumes_and_is_sampled_scored_and_drawn(
  argument, overrides, shown, num_devices, tmp_path, monkeypatch
):
  config = digits.get_config(f"smoke,{argument}")
  config.update_from_flattened_dict(overrides)
  if num_devices > 1 and "discriminator.group_size" in overrides:
    config.discriminator.group_size = 1
  config.total_kimg = 0.032
  runs.train_quietly(config, tmp_path / "run", num_devices)
  config.total_kimg = 0.064
  run = runs.train_quietly(config, tmp_path / "run", num_devices)
  assert f"Resuming at step {4 // config.d_steps}:" in run.output
  assert int(run.state.step) == 8 // config.d_steps
  tiny.assert_bit_equal(checkpoint.load_run(run.workdir).state, run.state)
  monkeypatch.setattr(
    features, "load_network", lambda name, weights="": toy_features.tiny()
  )
  monkeypatch.setattr(sample, "BATCH_SIZE", 2)
  with contextlib.redirect_stdout(io.StringIO()) as output:
    sample.sample(run.workdir, 20, 0, tmp_path / "samples")
    evaluate.evaluate(run.workdir, num_samples=1000)
  num_files = 21 + bool(config.data.num_classes)
  assert len(list((tmp_path / "samples").iterdir())) == num_files
  assert f"Scores of step {run.state.step}" in output.getvalue()
  drawn = [path.stem for path in visualize.draw(run.workdir)]
  assert drawn == ["curves", *shown]
