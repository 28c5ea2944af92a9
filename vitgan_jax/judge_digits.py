"""Judges a run on the digits with a classifier of the real ones.

  python -m vitgan_jax.judge_digits --workdir=runs/digits

Logistic regression (scikit-learn) is fitted on the images that the generator
was trained on, and tried on those that were held out. It then reads 1,000
samples of the averaged generator.
"""

import json

from absl import flags
from etils import epath
import ml_collections
import numpy as np
from sklearn.linear_model import LogisticRegression

from vitgan_jax import checkpoint, cli, sample
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError

NUM_SAMPLES = 1000
SEED = 1  # other latents than those of the grids of the training run


def labelled(data, split):
  """Returns the images and labels of a split, as `fit_classifier` takes them.

  Args:
    data: a config's `data`.
    split: "train" or "test".
  """
  data = ml_collections.ConfigDict({**data, "split": split})
  images = pipeline.load_images(data)
  return images[:], images.labels()


def fit_classifier(images, labels):
  """Returns a scikit-learn classifier of digits.

  Args:
    images: uint8 [N, S, S, 3].
    labels: [N], 0 to 9.
  """
  # Strong regularisation, for a classifier that doubts what is no digit: its
  # mean confidence is 0.84 on held-out digits, 0.55 on averages of two digits
  # and 0.30 on noise. An MLP and a calibrated support vector machine were
  # (nearly) as sure of noise as of digits.
  classifier = LogisticRegression(C=0.1, max_iter=2000)
  return classifier.fit(_features(images), labels)


def _features(images):
  """Returns grey values in [0, 1], flat, float64 [N, S * S]."""
  grey = images.astype(np.float64).mean(axis=-1) / 255.0
  return grey.reshape(len(images), -1)


def judge(classifier, images):
  """Returns how a classifier reads images.

  Args:
    classifier: of `fit_classifier`.
    images: uint8 [N, S, S, 3].

  Returns:
    Three things: how many images were taken for each class, int [10]; the mean
    probability of that class among them, [10], nan where there are none; and
    the mean over all images.
  """
  probabilities = classifier.predict_proba(_features(images))
  classes = probabilities.argmax(axis=1)
  confidence = probabilities.max(axis=1)
  counts = np.bincount(classes, minlength=10)
  sums = np.bincount(classes, confidence, minlength=10)
  per_class = np.divide(sums, counts, np.full(10, np.nan), where=counts > 0)
  return counts, per_class, confidence.mean()


def evaluate(workdir):
  """Returns the scores of the last checkpoint of a workdir, as a dict."""
  config = config_lib.load(workdir)
  if config.data.dataset != "sklearn_digits":
    raise ConfigError(
      f"{workdir} was trained on {config.data.dataset}, not on the digits"
    )
  _, nets, mesh, state = checkpoint.load_run(workdir)
  classifier = fit_classifier(*labelled(config.data, "train"))
  real_images, real_labels = labelled(config.data, "test")
  sampler = sample.make_sampler(nets, mesh)
  batches = sample.sample_images(
    sampler, state.g_ema_variables, SEED, NUM_SAMPLES
  )
  counts, per_class, confidence = judge(
    classifier, np.concatenate(list(batches))
  )
  _, _, real_confidence = judge(classifier, real_images)
  return {
    "step": int(state.step),
    "kimg": config_lib.kimg(config, int(state.step)),
    "num_samples": NUM_SAMPLES,
    "seed": SEED,
    "class_share": (counts / NUM_SAMPLES).tolist(),
    "class_confidence": per_class.tolist(),
    "mean_confidence": confidence,
    "real_accuracy": classifier.score(_features(real_images), real_labels),
    "real_confidence": real_confidence,
    "relative_confidence": confidence / real_confidence,
  }


def table(scores):
  """Returns the scores as a Markdown table and a line of summary."""
  lines = ["| digit | share of samples | mean confidence |", "|---|---|---|"]
  for digit, (share, confidence) in enumerate(
    zip(scores["class_share"], scores["class_confidence"])
  ):
    lines.append(f"| {digit} | {share:.1%} | {confidence:.3f} |")
  return "\n".join(lines) + (
    f"\n\n{scores['num_samples']} samples after {scores['kimg']:g} kimg: mean "
    f"confidence {scores['mean_confidence']:.3f}, "
    f"{scores['relative_confidence']:.3f} of the "
    f"{scores['real_confidence']:.3f} on held-out real digits (classifier's "
    f"accuracy there: {scores['real_accuracy']:.1%})."
  )


def main(arguments):
  """Prints the table and writes `digits.json` into the workdir."""
  cli.no_arguments(arguments)
  workdir = epath.Path(flags.FLAGS.workdir)
  scores = evaluate(workdir)
  print(table(scores), flush=True)  # first: it may be that nothing can be kept
  (workdir / "digits.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
  cli.define_path("workdir", "runs/digits", "Folder of the run.")
  cli.run(main)
