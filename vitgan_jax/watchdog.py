"""Says in a line what goes wrong in the training of a GAN.

Losses hide it: they are those of a game. Limits lie between what healthy runs
and deliberately broken ones showed; docs/training.md has both.
"""

import collections
import statistics
import sys
from typing import Any, NamedTuple

_NUM_GRIDS = 8  # whose mean is judged: AUC of 64 images has an error of 0.05


class Rule(NamedTuple):
  """One thing that goes wrong.

  Attributes:
    name: of its scalar, `watchdog/<name>`.
    measure: of the scalars of a grid to a number; a KeyError if they lack it.
    is_bad: of the mean of that number.
    line: of the mean to what is said.
  """

  name: str
  measure: Any
  is_bad: Any
  line: str


RULES = (
  Rule(
    "blind",
    lambda x: (x["auc/clean"] + x["auc/augmented"]) / 2,
    lambda mean: mean < 0.53,
    "D is blind: it puts real images above generated ones in {:.0%} of pairs, "
    "chance 50%. A lower rate of G, less consistency or gradient penalty, or "
    "finer patches of D usually help",
  ),
  Rule(
    "won",
    lambda x: x["auc/augmented"],
    lambda mean: mean > 0.97,
    "D has won: it puts augmented real images above generated ones in {:.0%} "
    "of pairs. More augmentation, consistency or gradient penalty, or a lower "
    "rate of D usually help",
  ),
  Rule(
    "collapse",
    lambda x: x["diversity/std_over_latents"] / x["diversity/std_over_images"],
    lambda mean: mean < 0.5,
    "samples are alike: they vary {:.2f} times as much as images. Lower rates "
    "from an earlier checkpoint, or more augmentation, usually help",
  ),
  Rule(
    "patches",
    lambda x: x["borders/step_ratio"] / x["borders/step_ratio_real"],
    lambda mean: mean > 2.0,
    "samples fall into patches: steps across their borders are {:.1f} times as "
    "steep as in images. Lower rates of G, or finer patches of D, usually help",
  ),
  Rule(
    "attention",
    lambda x: x["attention/entropy_min"],
    lambda mean: mean < 0.1,
    "attention of D has collapsed in a block: its entropy is {:.3f} of uniform "
    "attention's. A lower rate or qk_gain of D usually helps",
  ),
  Rule(
    "sigma",
    lambda x: x["sigma/growth_max"],
    lambda mean: mean > 20.0,
    "a kernel of D is {:.0f} times as large as it was. A lower rate of D "
    "usually helps",
  ),
)
# Of the norm of gradients over its median so far; both are measured each grid.
_GRADIENTS = ("gradients/d", "gradients/g")
_EXPLODING = 25.0


class Watchdog:
  """Judges the scalars of each grid; speaks when a fault is new."""

  def __init__(self):
    """Knows nothing yet; a run that goes on is judged anew."""
    self._seen = collections.defaultdict(
      lambda: collections.deque(maxlen=_NUM_GRIDS)
    )
    self._norms = collections.defaultdict(list)
    self._known = set()

  def judge(self, step, scalars):
    """Returns {"watchdog/<name>": 1.0 or 0.0} of what can be judged by now.

    Args:
      step: of the grid, for the line.
      scalars: of `diagnostics`, and the metrics of the training.
    """
    lines = {}
    for rule in RULES:
      seen = self._seen[rule.name]
      try:
        seen.append(rule.measure(scalars))
      except (KeyError, ZeroDivisionError):  # the latter of images all alike
        continue
      if len(seen) == seen.maxlen:
        mean = statistics.fmean(seen)
        lines[rule.name] = rule.is_bad(mean) and rule.line.format(mean)
    for name in _GRADIENTS:
      norms = self._norms[name]
      if len(norms) >= _NUM_GRIDS:
        growth = scalars[name] / (statistics.median(norms) or 1.0)
        lines["exploding"] = lines.get("exploding") or (
          growth > _EXPLODING
          and f"{name} is {growth:.0f} times its median so far. Lower rates or "
          "a clip_norm usually help"
        )
      norms.append(scalars[name])
    for name, line in lines.items():
      if line and name not in self._known:
        print(f"Step {step}: {line}", file=sys.stderr, flush=True)
      (self._known.add if line else self._known.discard)(name)
    return {f"watchdog/{name}": float(bool(x)) for name, x in lines.items()}
