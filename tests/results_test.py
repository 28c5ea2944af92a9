import json
import re
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests import runs as runs_lib
from vitgan_jax import pictures, results
from vitgan_jax.errors import ConfigError

RESULTS = runs_lib.ROOT / "results"
# Those that the command makes have a sheet of samples.
PAGES = sorted(path.parent.name for path in RESULTS.glob("*/samples.png"))
PROTOCOL = {
  "network": "efficientnet-lite0",
  "num_fake": 5000,
  "num_real": 1497,
  "seed": 0,
  "images_sha256": "0123456789abcdef",
  "dataset": "digits",
  "split": "test",
  "image_size": 16,
}


def make(
  folder, distances, *, seed=0, rate=500.0, total=None, grid=True, **own
):
  """Writes a workdir whose scores are {kimg: distance}."""
  folder.mkdir(parents=True)
  protocol = PROTOCOL | own.pop("protocol", {})
  agreement, shares = own.pop("agreement", None), own.pop("shares", None)
  total = total or max(distances)
  config = {"seed": seed, "total_kimg": total, "loss": {"r1_gamma": 0.0}}
  config["loss"] |= own
  (folder / "config.json").write_text(json.dumps(config))
  log = [{"step": 10 * i, "kimg": 100.0 * i} for i in range(1, 5)]
  for line in log[1:]:
    line["images_per_sec"] = rate
  log.insert(2, {"step": 25, "diversity/std_over_latents": 0.4})
  write(folder / "metrics.jsonl", log)
  records = [
    {
      "step": round(kimg),
      "kimg": kimg,
      "scores": {
        "fd_efficientnet5k": distance,
        "fd_efficientnet5k_low": 0.0,
        "precision_efficientnet5k": 0.5,
        "recall_efficientnet5k": distance / 1000,
      },
      "protocol": protocol,
    }
    | ({"class_agreement": {"fake": agreement}} if agreement else {})
    | ({"class_share": dict(zip("abcd", shares))} if shares else {})
    for kimg, distance in distances.items()
  ]
  write(folder / "scores.jsonl", records)
  if grid:
    colour = np.full((40, 40, 3), 60 * seed, np.uint8)
    pictures.write_png(folder / "grid.png", colour)


def change_config(workdir, **fields):
  """Sets fields of the config; returns what it is then."""
  path = workdir / "config.json"
  config = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(config))
  return config


def write(path, records):
  path.write_text("".join(json.dumps(x) + "\n" for x in records))


def pages(folders, output, names=(), published=None):
  found = results.find_runs(folders, names)
  return results.write(found, output, "COMMAND", published)


def table_of(text, heading):
  """Returns {run: cells} of the table below a heading."""
  part = text.split(f"### {heading}")[1].split("\n\n")[1]
  rows = [re.findall(r"\| ([^|]*?) (?=\|)", line) for line in part.split("\n")]
  return {row[0]: row[1:] for row in rows[2:]} | {"columns": rows[0][1:]}


def test_runs_of_one_config_share_a_row_of_means_and_deviations(tmp_path):
  values = (50.0, 54.0, 61.0)
  for seed, value in enumerate(values):
    make(
      tmp_path / f"r1=1,seed={seed}", {400.0: value}, seed=seed, r1_gamma=1.0
    )
  make(tmp_path / "other", {400.0: 70.0})
  text = pages([tmp_path], tmp_path / "out")
  table = table_of(text, "The last scores of each run")
  assert table["columns"][3] == "fd_efficientnet5k"
  assert list(table)[:2] == ["r1=1", "other"]  # the best first
  mean, deviation = np.mean(values), np.std(values, ddof=1)
  assert table["r1=1"][0] == "3"
  assert table["r1=1"][3] == f"{mean:.1f} ± {deviation:.1f}"
  assert table["other"][:4] == ["1", "400", "13", "70.0"]
  assert (
    "`loss.r1_gamma=1.0`" in text and "seed=" not in text.split("What d")[1]
  )


@pytest.mark.parametrize("num_classes, rows", [(0, 1), (10, 2)])
def test_network_that_maps_classes_counts_where_there_are_classes(
  num_classes, rows, tmp_path
):
  for seed in range(2):
    make(tmp_path / f"seed={seed}", {400.0: 50.0}, seed=seed)
    change_config(
      tmp_path / f"seed={seed}",
      data={"num_classes": num_classes},
      discriminator={"kind": "stylegan2", "mapping_depth": 2 + seed},
    )
  table = table_of(pages([tmp_path], tmp_path / "out"), "The last scores of")
  assert len(table) == 1 + rows


def test_run_from_before_a_field_shares_the_row_of_its_default(tmp_path):
  for seed in range(2):
    make(tmp_path / f"seed={seed}", {400.0: 50.0}, seed=seed)
  generator = {"kind": "vitgan"}
  change_config(tmp_path / "seed=0", generator=generator)
  generator["grey"] = False
  change_config(tmp_path / "seed=1", generator=generator, init_from="")
  text = pages([tmp_path], tmp_path / "out")
  table = table_of(text, "The last scores of each run")
  assert table["runs"][0] == "2"


def test_runs_of_unequal_length_are_compared_at_equal_images_and_time(tmp_path):
  fast = {100.0: 90.0, 200.0: 60.0, 400.0: 40.0}
  make(tmp_path / "fast", fast, rate=1000.0)
  slow = {100.3: 80.0, 200.6: 50.0}
  make(tmp_path / "slow", slow, rate=500.0, r1_gamma=1.0)
  text = pages([tmp_path], tmp_path / "out")
  images = table_of(text, "At equal images: 201 thousand")
  assert (images["fast"][3], images["slow"][3]) == ("60.0", "50.0")
  # 200,600 images at 500 a second; the first 100,000 take as long as others.
  time = table_of(text, "After equal time: 7 minutes")
  assert (time["fast"][3], time["slow"][3]) == ("40.0", "50.0")
  assert time["slow"][2] == f"{200_600 / 500 / 60:.0f}" == time["fast"][2]


def test_logs_that_are_whole_are_not_told_of(tmp_path, capsys):
  make(tmp_path / "a", {400.0: 5.0})
  pages([tmp_path], tmp_path / "out")
  assert not capsys.readouterr().err


def test_best_of_a_run_is_no_run_of_its_own(tmp_path, monkeypatch):
  for name in ("a", "b"):
    make(tmp_path / name, {100.0: 9.0})
    make(tmp_path / name / "best", {100.0: 9.0})
  for folders in ([tmp_path], [tmp_path / "a", tmp_path / "b"]):
    assert [run.name for run in results.find_runs(folders)] == ["a", "b"]
  monkeypatch.chdir(tmp_path / "a")
  assert [run.name for run in results.find_runs(["."])] == ["a"]


def test_runs_of_equal_length_are_compared_once(tmp_path):
  make(tmp_path / "a", {100.0: 9.0, 400.0: 5.0})
  make(tmp_path / "b", {400.3: 6.0}, r1_gamma=1.0)
  assert pages([tmp_path], tmp_path / "out").count("###") == 1


def test_protocols_are_never_in_one_table(tmp_path):
  make(tmp_path / "a", {400.0: 50.0})
  make(tmp_path / "b", {400.0: 40.0}, protocol={"num_fake": 2000}, r1_gamma=1.0)
  make(tmp_path / "c", {400.0: 60.0}, r1_gamma=2.0)
  text = pages([tmp_path], tmp_path / "out")
  first, second = text.split("\n## ")[1:3]
  assert "5,000 samples" in first and "2,000 samples" in second
  assert "| a |" in first and "| c |" in first and "| b |" not in first
  assert "| b |" in second and "| a |" not in second
  assert (tmp_path / "out" / "scores2.png").exists()


def test_what_is_missing_or_failed_is_on_the_page(tmp_path):
  make(tmp_path / "whole", {400.0: 50.0})
  make(tmp_path / "short", {200.0: 50.0}, total=800.0, r1_gamma=1.0)
  make(tmp_path / "unscored", {}, total=400.0, r1_gamma=2.0)
  (tmp_path / "dead").mkdir()
  (tmp_path / "dead" / "log.txt").write_text("error")
  (tmp_path / "notes").mkdir()
  names = ["whole", "never", "short"]
  text = pages([tmp_path], tmp_path / "out", names)
  states = text.split("## Missing, unfinished or not scored")[1].split("##")[0]
  assert states.strip().split("\n") == [
    "- `short`: ended at 400 of 800 kimg",
    "- `dead`: failed before its first step",
    "- `unscored`: not scored",
    "- `never`: not started",
  ]


def test_agreement_with_the_class_has_a_column_where_there_is_one(tmp_path):
  make(tmp_path / "a", {400.0: 50.0})
  make(tmp_path / "b", {400.0: 60.0}, agreement=0.25, r1_gamma=1.0)
  table = table_of(pages([tmp_path], tmp_path / "out"), "The last scores")
  assert table["columns"][-1] == "of their class"
  assert (table["a"][-1], table["b"][-1]) == ("", "0.250")


def test_effective_classes_are_those_of_one_size_with_the_same_entropy(
  tmp_path,
):
  shares = {"even": [0.25] * 4, "two": [0.5, 0.5, 0, 0], "one": [1, 0, 0, 0]}
  for gamma, (name, values) in enumerate(shares.items()):
    make(tmp_path / name, {400.0: 50.0}, shares=values, r1_gamma=gamma)
  make(tmp_path / "without", {400.0: 60.0}, r1_gamma=9.0)
  text = pages([tmp_path], tmp_path / "out")
  table = table_of(text, "The last scores")
  assert table.pop("columns")[-1] == "classes"
  found = {row: cells[-1] for row, cells in table.items()}
  assert found == {"even": "4.0", "two": "2.0", "one": "1.0", "without": ""}
  assert "`classes` is the effective number" in text


def test_what_others_publish_stands_by_itself(tmp_path):
  make(tmp_path / "a", {400.0: 50.0})
  text = pages([tmp_path], tmp_path / "out", published={"a": "FID 3 (there)"})
  assert "- `a`: FID 3 (there)" in text.split("## Published")[1]


@pytest.mark.parametrize("name", PAGES)
def test_page_in_the_repository_is_what_its_command_makes(tmp_path, name):
  (tmp_path / "configs").symlink_to(runs_lib.ROOT / "configs")
  folder = shutil.copytree(RESULTS / name, tmp_path / "results" / name)
  text = (folder / "README.md").read_text()
  command = text.rsplit("Made by `", 1)[1].removesuffix("`.\n")
  arguments = command.removeprefix("python -m vitgan_jax.results ").split()
  (folder / "README.md").unlink()
  code, _, errors = runs_lib.call(
    "vitgan_jax.results", *arguments, cwd=tmp_path
  )
  assert code == 0, errors
  assert (folder / "README.md").read_text() == text


def test_where_a_machine_keeps_things_is_not_kept(tmp_path):
  make(tmp_path / "a", {400.0: 5.0})
  data = {"path": "/home/me/x.zip", "split": "train"}
  config = change_config(tmp_path / "a", data=data)
  pages([tmp_path / "a"], tmp_path / "out")
  kept = json.loads((tmp_path / "out" / "a" / "config.json").read_text())
  assert kept == config | {"data": {"path": "", "split": "train"}}


def test_pages_are_made_again_from_what_is_kept_beside_them(tmp_path):
  make(tmp_path / "runs" / "a", {400.0: 50.0})
  make(tmp_path / "runs" / "b", {200.0: 70.0, 400.0: 60.0}, seed=2)
  output = tmp_path / "results"
  text = pages([tmp_path / "runs"], output)
  before = {x.name: x.read_bytes() for x in output.iterdir() if x.is_file()}
  assert before.keys() == {"README.md", "scores.png", "samples.png"}
  assert pages([output], output) == text
  after = {x.name: x.read_bytes() for x in output.iterdir() if x.is_file()}
  assert after == before


def test_sheet_has_the_samples_of_each_row_in_its_place(tmp_path):
  for seed, name in enumerate("abcd"):
    make(tmp_path / name, {400.0: 1.0}, seed=seed, r1_gamma=float(seed))
  pages([tmp_path], tmp_path / "out")
  with Image.open(tmp_path / "out" / "samples.png") as image:
    sheet = np.asarray(image)
  height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
  for seed in range(4):
    row, column = divmod(seed, 3)
    cell = sheet[row * height :, column * width :]
    assert (cell[30, 10] == 60 * seed).all()
  assert (sheet[height + 30, width + 10] == 255).all()


def test_folders_that_cannot_be_shown_are_refused_in_one_line(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ConfigError, match="no workdir, and has none in it"):
    results.find_runs([tmp_path / "empty"])
  for folder in "ab":
    make(tmp_path / folder / "x", {400.0: 1.0})
  with pytest.raises(ConfigError, match="two runs have the name x"):
    results.find_runs([tmp_path / "a", tmp_path / "b"])
  (tmp_path / "c" / "x").mkdir(parents=True)
  (tmp_path / "c" / "x" / "log.txt").write_text("")
  with pytest.raises(ConfigError, match="none of the runs has begun"):
    pages([tmp_path / "c"], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_pages_are_made_without_jax():
  program = (
    "import sys, vitgan_jax.results; "
    "sys.exit(bool({'jax', 'tensorflow'} & set(sys.modules)))"
  )
  subprocess.run([sys.executable, "-c", program], cwd=runs_lib.ROOT, check=True)


def test_the_command_shows_a_whole_sweep(tmp_path):
  make(tmp_path / "runs" / "vitgan", {400.0: 50.0})
  arguments = [
    str(tmp_path / "runs"),
    f"--output={tmp_path / 'out'}",
    "--sweep=configs/sweeps/systems.py",
  ]
  code, output, errors = runs_lib.call(
    "vitgan_jax.results", *arguments, cwd=runs_lib.ROOT
  )
  assert code == 0, errors
  assert "- `transgan`: not started" in output and "Published" in output
  assert (tmp_path / "out" / "README.md").read_text() in output + "\n"


def test_records_of_another_form_are_left_out(tmp_path):
  make(tmp_path / "run", {100: 50.0, 200: 40.0})
  expected = results.read_run(tmp_path / "run")
  good = json.loads(
    (tmp_path / "run" / "scores.jsonl").read_text().split("\n")[0]
  )
  with open(tmp_path / "run" / "scores.jsonl", "a") as file:
    for damage in (
      {"kimg": "100"},
      {"scores": {}},
      {"scores": {"fd_efficientnet5k": None}},
      {"protocol": 3},
      {"protocol": good["protocol"] | {"num_fake": "many"}},
    ):
      file.write(json.dumps(good | damage) + "\n")
  with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
    file.write('{"step": 9, "kimg": [], "images_per_sec": {}}\n')
  assert results.read_run(tmp_path / "run") == expected
