import os

import numpy as np
import pytest

from tests import soak


def test_summary_is_of_what_comes_after_the_start():
  rng = np.random.default_rng(0)
  records = [
    {
      "seconds": float(second),
      # It grows by 30 MB an hour; more at first, while it compiles.
      "memory": 1000 + second / 120 - 500 * (second < 1000) + rng.normal(),
      "files": 20 + (second > 5000),
      "threads": 15,
      "programs": 40 + (second > 1000) + 2 * (second > 4000),
      "scores": second // 1000,
    }
    for second in range(0, 7200, 10)
  ]
  found = soak.summary(records)
  assert found["hours"] == pytest.approx(4790 / 3600)
  assert found["memory_slope"] == pytest.approx(30, abs=1)
  assert found["memory"] == pytest.approx((1022, 1058), abs=1)
  assert found["files"] == (20, 21) and found["threads"] == (15, 15)
  assert found["programs"] == 2
  # What is slow is at its start for longer.
  late = [{**x, "scores": x["seconds"] // 2500} for x in records]
  assert soak.summary(late)["hours"] == pytest.approx(2190 / 3600)
  with pytest.raises(ValueError, match="not scored 2 times"):
    soak.summary([{**x, "scores": 1} for x in records])
  with pytest.raises(ValueError, match="not scored 2 times"):
    soak.summary([])


def test_look_is_at_a_process(tmp_path):
  log = tmp_path / "log.txt"
  log.write_text("Finished XLA compilation of jit(f) in 0.1 sec\n")
  scores = tmp_path / "scores.jsonl"
  before = soak.look(os.getpid(), log, scores)
  assert before["programs"] == 1 and before["threads"] >= 1
  assert before["scores"] == 0
  scores.write_text("{}\n{}\n")
  ballast = np.ones(2**26)  # 512 MB
  with open(log) as file:
    after = soak.look(os.getpid(), log, scores)
  assert after["scores"] == 2
  assert after["files"] == before["files"] + 1, file
  assert 450 < after["memory"] - before["memory"] < 600
  del ballast
