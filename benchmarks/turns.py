"""Times functions in turns: what else a machine does meets all alike."""

import time

import numpy as np


def median_seconds(functions, seconds):
  """Returns how long each of some functions takes, and how often each ran.

  In its turn each is called twice, and the second call counts: the first one
  pays for the memory and the caches that the function before it had.

  Args:
    functions: called without arguments, once before the clock starts, then in
      turns, at least three times.
    seconds: that each runs for, at least.

  Returns:
    (a list of medians in seconds, the number of rounds).
  """
  for function in functions:
    function()  # compiles, or fills caches
  rounds = []
  while len(rounds) < 3 or np.sum(rounds, axis=0).min() < seconds:
    rounds.append([_second_time_of(function) for function in functions])
  return np.median(rounds, axis=0).tolist(), len(rounds)


def _second_time_of(function):
  function()
  return time_of(function)


def time_of(function, *args):
  """Returns the seconds that a call takes."""
  start = time.perf_counter()
  function(*args)
  return time.perf_counter() - start
