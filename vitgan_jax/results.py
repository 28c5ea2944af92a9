r"""A table, curves and a sheet of samples of many runs.

  python -m vitgan_jax.results runs/cifar16-systems --output=results/systems

Each folder is that of a sweep, with a workdir for each of its runs, or a
workdir itself. What the pages are made of is copied beside them, so that

  python -m vitgan_jax.results results/systems

makes the same pages again. With --sweep=configs/sweeps/systems.py a run of the
sweep that was never started is on the page, too, and what others have published
of the systems (the sweep's PUBLISHED).

Runs that differ in their seed alone share a row, of means and standard
deviations. Scores by different protocols are never in one table.
"""

import collections
import dataclasses
import json
import pathlib
import re
import runpy
import shutil
import statistics

from absl import flags
from matplotlib.figure import Figure
import ml_collections
import numpy as np
from PIL import Image, ImageDraw

from vitgan_jax import cli, files, pictures
from vitgan_jax.config import MAY_CHANGE, flatten, later_fields, without_paths
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds

# What is copied of a workdir.
_KEPT = ("config.json", "metrics.jsonl", "scores.jsonl", "grid.png")
# Of a line of scores.jsonl, as far as it is on a page.
_SCORES = files.SCORES | {
  "kimg": files.NUMBER,
  "protocol": {
    **dict.fromkeys(("network", "dataset", "split", "images_sha256"), str),
    **dict.fromkeys(("num_fake", "num_real", "seed", "image_size"), int),
  },
}
_SAME = 0.01  # kimg, and minutes, that differ by less count as equal
# Beside the distance, the first of a record.
_COLUMNS = ("precision", "recall", "density", "coverage")
_SIDE = 384  # pixels of a grid on the sheet
_CLASSES_NOTE = (
  "`classes` is the effective number of classes, exp of the entropy of their "
  "shares: each sample counts for the class most frequent among its five "
  "nearest real images."
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says of its run.

  Attributes:
    name: of its folder.
    folder: the workdir.
    config: {dotted field: value}; None if there is none.
    records: of scores.jsonl, oldest first.
    log: [(kimg, minutes of training until then)], rising.
  """

  name: str
  folder: pathlib.Path
  config: dict | None = None
  records: tuple = ()
  log: tuple = ()

  @property
  def state(self):
    """Says how far the run is; "" at its end."""
    if self.config is None:
      started = (self.folder / "log.txt").exists()
      return "failed before its first step" if started else "not started"
    reached = self.log[-1][0] if self.log else 0
    total = self.config["total_kimg"]
    if reached < total * (1 - _SAME):
      return f"ended at {reached:g} of {total:g} kimg"
    return "" if self.records else "not scored"

  def minutes(self, kimg):
    """Returns the minutes of training until `kimg`; NaN where not logged."""
    if not self.log:
      return float("nan")
    return float(np.interp(kimg, *zip((0.0, 0.0), *self.log)))


def read_run(folder):
  """Returns the Run of a folder, which need not be a workdir."""
  folder = pathlib.Path(folder)
  try:
    config = files.parse_json((folder / "config.json").read_text())
  except (OSError, ValueError):
    config = None
  if not files.has_form(config, {"total_kimg": files.NUMBER}):
    return Run(folder.name, folder)
  config = flatten(config)
  config |= later_fields(config)
  for name in kinds.idle_fields(config):
    config.pop(name, None)
  records = files.read_records(folder / "scores.jsonl", _SCORES)
  rates = {  # of steps that were logged again, after a restart, the later
    x["kimg"]: x.get("images_per_sec")
    for x in files.read_records(folder / "metrics.jsonl", files.METRICS)
    if "kimg" in x  # others are measured on the samples
  }
  log, minutes, before = [], 0.0, 0.0
  known = [rate for rate in rates.values() if rate]
  for kimg, rate in sorted(rates.items()):
    # The first, without a rate, has the compilation.
    rate = rate or (known[0] if known else float("nan"))
    minutes += (kimg - before) * 1000 / rate / 60
    before = kimg
    log.append((kimg, minutes))
  return Run(folder.name, folder, config, tuple(records), tuple(log))


def find_runs(folders, names=()):
  """Returns the Runs of folders, each a workdir or a folder of workdirs.

  Args:
    folders: of them.
    names: of runs that should be there; those that are not come last.

  Raises:
    ConfigError: if there is none, or two have one name.
  """
  found = {}
  for folder in folders:
    folder = files.local(folder, "FOLDER").resolve()  # "." has no name
    # A run's own folders, as `best`, are none.
    inner = [folder]
    if not _is_run(folder):
      inner = [x for x in folder.glob("*") if _is_run(x)]
    if not inner:
      raise ConfigError(
        f"{folder} is no workdir, and has none in it: there is no config.json. "
        "Give the folder of a sweep or of a run"
      )
    for path in sorted(inner, key=lambda x: pictures.natural_key(x.name)):
      if path.name in found:
        raise ConfigError(
          f"two runs have the name {path.name}, {found[path.name].folder} and "
          f"{path}: rename the folder of one"
        )
      found[path.name] = read_run(path)
  order = {name: i for i, name in enumerate(names)}
  runs = sorted(found.values(), key=lambda x: order.get(x.name, len(order)))
  missing = [x for x in names if x not in found]
  return runs + [Run(x, pathlib.Path(folders[0]) / x) for x in missing]


def _is_run(folder):
  return any((folder / name).exists() for name in ("config.json", "log.txt"))


def _of_row(config):
  """Returns the fields of a config that runs of one row have in common."""
  return {
    field: value
    for field, value in config.items()
    if field != "seed" and field not in MAY_CHANGE
  }


def group(runs):
  """Returns {row: its Runs}: those that differ in their seed alone.

  A row has the name of its runs, without "seed=1" and the like.
  """
  rows = collections.defaultdict(list)
  for run in runs:
    common = _of_row(run.config or {"": run.name})
    rows[json.dumps(common, sort_keys=True)].append(run)
  named = {}
  for members in rows.values():
    name = members[0].name
    if len(members) > 1:
      name = re.sub(r"[-_,.]?seed[=_-]?\d+", "", name).strip("-_,.") or "runs"
    if name in named:
      name = members[0].name
    named[name] = members
  return named


def by_protocol(runs):
  """Returns the records of each protocol, the commonest first.

  Returns:
    [(protocol, {run name: {kimg: record}})].
  """
  found = collections.defaultdict(lambda: collections.defaultdict(dict))
  for run in runs:
    for record in run.records:
      distance = next(iter(record["scores"]))
      key = json.dumps([record["protocol"], distance], sort_keys=True)
      found[key][run.name][record["kimg"]] = record
  ordered = sorted(found.items(), key=lambda x: -sum(map(len, x[1].values())))
  return [(json.loads(key)[0], dict(records)) for key, records in ordered]


def choose(rows, records):
  """Returns {heading: {row: [(Run, record)]}}: what tables compare.

  The last scores of all; and, where those are of unequal length, the scores at
  equal images, and after equal minutes of training, as far as there are any.

  Args:
    rows: of `group`.
    records: {run name: {kimg: record}}, by one protocol.
  """
  scored = {
    row: [run for run in runs if run.name in records]
    for row, runs in rows.items()
  }
  scored = {row: runs for row, runs in scored.items() if runs}
  everyone = [run for runs in scored.values() for run in runs]

  def pick(select):
    return {
      row: [(run, records[run.name][select(run)]) for run in runs]
      for row, runs in scored.items()
    }

  def last(run):
    return max(records[run.name])

  def nearest(run, kimg):
    return min(records[run.name], key=lambda x: abs(x - kimg))

  chosen = {}
  ends = [last(run) for run in everyone]
  if max(ends) > min(ends) * (1 + _SAME):
    common = [
      kimg
      for kimg in records[everyone[int(np.argmin(ends))].name]
      if all(abs(nearest(x, kimg) / kimg - 1) <= _SAME for x in everyone)
    ]
    if common:
      kimg = max(common)
      heading = f"At equal images: {kimg:.0f} thousand"
      chosen[heading] = pick(lambda run: nearest(run, kimg))
    minutes = min(run.minutes(last(run)) for run in everyone)
    within = {
      run.name: [
        kimg
        for kimg in records[run.name]
        if run.minutes(kimg) <= minutes * (1 + _SAME)
      ]
      for run in everyone
    }
    if all(within.values()):
      heading = f"After equal time: {minutes:.0f} minutes of training"
      chosen[heading] = pick(lambda run: max(within[run.name]))
  chosen["The last scores of each run"] = pick(last)
  return chosen


def table(chosen):
  """Returns a Markdown table of one choice, the best distance first."""
  records = [record for pairs in chosen.values() for _, record in pairs]
  scores = records[0]["scores"]
  distance = next(iter(scores))
  names = [distance] + [
    name for prefix in _COLUMNS for name in scores if name.startswith(prefix)
  ]
  columns = {name: lambda r, name=name: r["scores"][name] for name in names}
  columns |= {
    heading: read
    for heading, read in _CLASS_COLUMNS.items()
    if any(read(record) is not None for record in records)
  }

  def cells(row, pairs):
    found = [row, f"{len(pairs)}"]
    found.append(f"{np.mean([r['kimg'] for _, r in pairs]):.0f}")
    found.append(f"{np.mean([run.minutes(r['kimg']) for run, r in pairs]):.0f}")
    for heading, read in columns.items():
      known = [x for _, r in pairs if (x := read(r)) is not None]
      digits = 1 if heading in (distance, "classes") else 3
      found.append(_spread(known, digits) if known else "")
    return found

  order = sorted(
    chosen, key=lambda x: np.mean([r["scores"][distance] for _, r in chosen[x]])
  )
  lines = [["run", "seeds", "kimg", "minutes", *columns]]
  lines.append(["---"] * len(lines[0]))
  lines += [cells(row, chosen[row]) for row in order]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _effective_classes(record):
  """Returns exp(H) of the shares of classes; None where there are none.

  That is how many classes, all of one size, have as much entropy H.
  """
  shares = record.get("class_share")
  if not files.has_form(shares, {...: files.NUMBER}):
    return None
  p = np.array([x for x in shares.values() if x > 0])
  return float(np.exp(-np.sum(p * np.log(p))))


def _of_their_class(record):
  """Returns the share of samples that a classifier takes for their class."""
  agreement = record.get("class_agreement")
  is_known = files.has_form(agreement, {"fake": files.NUMBER})
  return agreement["fake"] if is_known else None


# Of data with classes, and of networks that are told them.
_CLASS_COLUMNS = {
  "classes": _effective_classes,
  "of their class": _of_their_class,
}


def _spread(values, digits):
  """Returns "1.2", or "1.2 ± 0.1", mean and deviation of several."""
  text = f"{np.mean(values):.{digits}f}"
  if len(values) > 1:
    text += f" ± {statistics.stdev(values):.{digits}f}"
  return text


def differences(rows):
  """Returns Markdown lines: what each row has that the first has not.

  Of the fields of networks, which differ by kind, those that both have.
  """
  configs = {
    row: runs[0].config for row, runs in rows.items() if runs[0].config
  }
  first, *others = configs
  lines = [f"- `{first}`: the reference; of others, what differs from it"]
  for row in others:
    changed = [
      f"`{field}={value}`"
      for field, value in _of_row(configs[row]).items()
      if value != configs[first].get(field, value)
    ]
    lines.append(f"- `{row}`: {', '.join(changed) or 'no field of the first'}")
  return "\n".join(lines)


def draw_curves(path, rows, protocol_records):
  """Draws the distance of each row against images and against minutes.

  Where a row has several seeds, the band is from the lowest to the highest.

  Args:
    path: of the picture.
    rows: of `group`.
    protocol_records: {run name: {kimg: record}}, by one protocol.
  """
  figure = Figure(figsize=(12, 4.5))
  axes = figure.subplots(1, 2, sharey=True)
  name = ""
  for number, (row, runs) in enumerate(rows.items()):
    points = collections.defaultdict(list)
    for run in runs:
      for kimg, record in protocol_records.get(run.name, {}).items():
        name, value = next(iter(record["scores"].items()))
        points[round(kimg)].append((value, run.minutes(kimg)))
    if not points:
      continue
    kimg = sorted(points)
    values = [[value for value, _ in points[k]] for k in kimg]
    minutes = [np.mean([m for _, m in points[k]]) for k in kimg]
    style = dict(color=f"C{number % 10}")
    line = ("o-", "s--", "^:")[number // 10 % 3]  # there are ten colours
    for axis, x in zip(axes, (kimg, minutes)):
      axis.plot(x, [*map(np.mean, values)], line, label=row, ms=4, **style)
      axis.fill_between(
        x, [*map(min, values)], [*map(max, values)], alpha=0.2, **style
      )
  for axis, label in zip(axes, ("kimg", "minutes of training")):
    axis.set_xlabel(label)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
  axes[0].set_ylabel(name)
  axes[1].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=80, metadata={"Software": None})


def draw_sheet(path, rows):
  """Draws the samples of a run of each row, in the same latents, side by side.

  Args:
    path: of the picture.
    rows: of `group`.

  Returns:
    Whether there were any.
  """
  cells = []
  for row, runs in rows.items():
    grids = [run.folder / "grid.png" for run in runs]
    grid = next((x for x in grids if x.exists()), None)
    if grid is None:
      continue
    cell = Image.new("RGB", (_SIDE + 8, _SIDE + 24), "white")
    ImageDraw.Draw(cell).text((4, 4), row, "black", font_size=14)
    with Image.open(grid) as image:
      image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
      cell.paste(image, (4, 22))
    cells.append(cell)
  if not cells:
    return False
  width, height = cells[0].size
  columns = min(3, len(cells))
  size = columns * width, -(-len(cells) // columns) * height
  sheet = Image.new("RGB", size, "white")
  for i, cell in enumerate(cells):
    sheet.paste(cell, (i % columns * width, i // columns * height))
  sheet.save(path)
  return True


def write(runs, output, command, published=None):
  """Writes README.md, curves and samples of runs, and what they are made of.

  Args:
    runs: of `find_runs`.
    output: the folder.
    command: that makes the page again, for its end.
    published: {run: text}, what others report; or None.

  Returns:
    The text of README.md.

  Raises:
    ConfigError: if no run has a config.
  """
  rows = group(runs)
  if all(run.config is None for run in runs):
    raise ConfigError("none of the runs has begun: there is nothing to show")
  output.mkdir(parents=True, exist_ok=True)
  parts = [f"# {output.name}"]
  for number, (protocol, records) in enumerate(by_protocol(runs)):
    parts += [f"## {files.describe_protocol(protocol)}"]
    if protocol["network"].startswith("efficientnet"):
      parts += ["`fd_...` is no FID, and compares with this table alone."]
    found = [x for run in records.values() for x in run.values()]
    if any(_effective_classes(x) is not None for x in found):
      parts += [_CLASSES_NOTE]
    for heading, chosen in choose(rows, records).items():
      parts += [f"### {heading}", table(chosen)]
    suffix = f"{number + 1}" if number else ""
    draw_curves(output / f"scores{suffix}.png", rows, records)
    parts += [f"![The distance in the course of training](scores{suffix}.png)"]
  if draw_sheet(output / "samples.png", rows):
    parts += ["## Samples", "![Samples, of the same latents](samples.png)"]
  states = [f"- `{run.name}`: {run.state}" for run in runs if run.state]
  if states:
    parts += ["## Missing, unfinished or not scored", "\n".join(states)]
  parts += ["## What differs", differences(rows)]
  if published:
    lines = [f"- `{name}`: {text}" for name, text in published.items()]
    parts += ["## Published, of full size", "\n".join(lines)]
  parts += [f"Made by `{command}`."]
  text = "\n\n".join(parts) + "\n"
  for run in runs:
    if run.config:
      _keep(run.folder, output / run.name)
  with files.whole(output / "README.md") as path:
    path.write_text(text)
  return text


def _keep(workdir, folder):
  """Copies what the pages are made of, without where a machine keeps things."""
  if workdir.resolve() == folder.resolve():
    return
  folder.mkdir(exist_ok=True)
  for name in _KEPT:
    if (workdir / name).exists():
      shutil.copyfile(workdir / name, folder / name)
  config = json.loads((workdir / "config.json").read_text())
  config = without_paths(ml_collections.ConfigDict(config))
  text = config.to_json(indent=2, sort_keys=True)
  (folder / "config.json").write_text(text + "\n")


def main(arguments):
  """Writes the pages of the folders."""
  if not arguments:
    raise ConfigError(
      "usage: python -m vitgan_jax.results FOLDER... [--output=DIR] "
      "[--sweep=FILE]; see --help"
    )
  folders = [files.expand(x) for x in arguments]
  output = files.local(flags.FLAGS.output or folders[0], "--output")
  names, published, command = (), None, f"python -m vitgan_jax.results {output}"
  if flags.FLAGS.sweep:
    from launch import units

    names = [name for name, _ in units.read(flags.FLAGS.sweep)]
    published = runpy.run_path(flags.FLAGS.sweep).get("PUBLISHED")
    command += f" --sweep={flags.FLAGS.sweep}"
  print(write(find_runs(folders, names), output, command, published))
  print(f"The pages are in {output}")


if __name__ == "__main__":
  cli.define_path(
    "output", None, "Folder of the pages; default the first one given."
  )
  cli.define_path("sweep", None, "File of the sweep that the runs are of.")
  cli.run(main)
