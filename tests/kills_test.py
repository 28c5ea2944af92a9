import json
import shutil

import pytest

from tests import kills

pytestmark = pytest.mark.slow  # `make kills` is the same, longer


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
  output = tmp_path_factory.mktemp("kills")
  harness = kills.Harness(output)
  assert harness.run(3) == ""
  return output, harness


def test_killed_runs_come_to_the_end_of_one_that_was_let_be(harness):
  output, harness = harness
  assert sum(harness.kills.values()) == 3 and harness.runs > 0
  again = kills.Harness(output)
  assert again.run(3) == "" and str(again) == str(harness)


def test_faults_are_found(harness, tmp_path):
  output, _ = harness
  record = json.loads((output / "kills.jsonl").read_text().split("\n")[0])
  expected = record["outcome"]
  folder = shutil.copytree(output / "whole", tmp_path / "copy")
  assert kills.fault_of(folder, expected) == ""
  (folder / "run" / "scores.jsonl").write_text(
    '{"step": 8, "kimg": 0.064, "scores": {"fd": 1.0}, "protocol": {}}'
  )
  assert kills.fault_of(folder, expected).startswith("scores is ")
  (folder / "run" / "scores.jsonl").unlink()
  (folder / "run" / "grid.partial").touch()
  assert "grid.partial is left" in kills.fault_of(folder, expected)
  shutil.rmtree(folder / "run" / "checkpoints" / "8")
  assert "of step 6, not" in kills.fault_of(folder, expected)
