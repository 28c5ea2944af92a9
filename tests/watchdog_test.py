import math

import pytest

from vitgan_jax import watchdog

HEALTHY = {  # as runs of the lab book have them
  "auc/clean": 0.7,
  "auc/augmented": 0.65,
  "diversity/std_over_latents": 0.45,
  "diversity/std_over_images": 0.5,
  "borders/step_ratio": 1.3,
  "borders/step_ratio_real": 1.06,
  "attention/entropy_min": 0.6,
  "sigma/growth_max": 5.0,
  "gradients/d": 0.1,
  "gradients/g": 0.02,
}
NAMES = [
  "blind",
  "won",
  "collapse",
  "patches",
  "attention",
  "sigma",
  "exploding",
]


def judge(dog, count, **changes):
  scalars = {**HEALTHY, **changes}
  return [dog.judge(step, scalars) for step in range(count)][-1]


def test_healthy_run_is_left_in_peace(capsys):
  verdict = judge(watchdog.Watchdog(), 100)
  assert verdict == {f"watchdog/{name}": 0.0 for name in NAMES}
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("blind", {"auc/clean": 0.52, "auc/augmented": 0.5}, "generated ones in 5"),
    ("won", {"auc/augmented": 0.99}, "generated ones in 9"),
    (
      "collapse",
      {"diversity/std_over_latents": 0.05},
      "times as much as images",
    ),
    ("patches", {"borders/step_ratio": 5.0}, "2.1 times as steep"),
    ("attention", {"attention/entropy_min": 0.01}, "of uniform"),
    ("sigma", {"sigma/growth_max": 40.0}, "times as large as it was"),
    ("exploding", {"gradients/g": 4.0}, "gradients/g is 200 times"),
    ("exploding", {"gradients/d": 20.0}, "gradients/d is 200 times"),
  ],
)
def test_each_fault_is_said_once_and_again_when_it_comes_back(
  name, changes, words, capsys
):
  dog = watchdog.Watchdog()
  judge(dog, 20)
  assert judge(dog, 1, **changes)[f"watchdog/{name}"] == (name == "exploding")
  verdict = judge(dog, 9, **changes)
  assert [k for k, v in verdict.items() if v] == [f"watchdog/{name}"]
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line and "usually help" in line
  assert not any(judge(dog, 20).values())
  judge(dog, 9, **changes)
  assert words in capsys.readouterr().err


def test_a_mean_is_judged_and_not_one_grid(capsys):
  dog = watchdog.Watchdog()
  for step in range(40):  # as 64 images scatter about 0.6
    auc = 0.6 + 0.1 * math.sin(step)
    dog.judge(step, {**HEALTHY, "auc/clean": auc, "auc/augmented": auc})
  assert not capsys.readouterr().err


def test_images_that_are_all_alike_are_no_fault_of_the_run():
  """As of one image, which a run is to learn by heart."""
  verdict = judge(
    watchdog.Watchdog(),
    20,
    **{"diversity/std_over_images": 0.0, "borders/step_ratio_real": 0.0},
  )
  assert verdict.keys() == {
    f"watchdog/{x}" for x in NAMES if x not in ("collapse", "patches")
  }


def test_nothing_is_judged_too_early_or_without_its_scalars(capsys):
  bad = {"auc/clean": 0.5, "auc/augmented": 0.5}
  assert judge(watchdog.Watchdog(), 7, **bad) == {}
  lacking = ("sigma/", "attention/", "borders/")
  others = {k: v for k, v in HEALTHY.items() if not k.startswith(lacking)}
  dog = watchdog.Watchdog()
  verdict = [dog.judge(step, others) for step in range(20)][-1]
  assert verdict.keys() == {
    f"watchdog/{name}" for name in ("blind", "won", "collapse", "exploding")
  }
  assert not capsys.readouterr().err
