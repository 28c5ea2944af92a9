r"""Decodes, crops and resizes a dataset once, into uint8 arrays on disk.

  python -m vitgan_jax.data.prepare --config=configs/celeba64.py
  python -m vitgan_jax.data.prepare --config=configs/folder.py \
    --config.data.path=photos.zip --config.data.image_size=128

Training does the same by itself where nothing is prepared. A run that is cut
off goes on where it was. What is there already is checked against its
checksums.
"""

import json
import os
import re
import shutil

from absl import flags
from ml_collections import config_flags
import numpy as np
from tqdm import tqdm

from vitgan_jax import cli, files, pictures
from vitgan_jax import config as config_lib
from vitgan_jax.data import archives, decode, shards, sources
from vitgan_jax.data.paths import data_dir
from vitgan_jax.data.source import count
from vitgan_jax.errors import ConfigError, storage_fault

# A shard is what a kill may lose. A reader keeps all of them open, and may have
# 1,024 files open on most systems.
_MIN_SHARD_IMAGES = 2048
_MAX_SHARDS = 256

_UNUSED = "unused.json"  # {kind: names}, where there is any
# Of a card, as far as it is read; see `files.has_form`.
_CARD = {
  **dict.fromkeys(("dataset", "source", "licence", "split", "filter"), str),
  "image_size": int,
  "num_images": int,
  "shards": [{"file": str, "num_images": int, "sha256": str}],
  "skipped": [str],
}


def prepared_path(data):
  """Returns the folder of the prepared images of a config's `data`.

  Where nothing is at data.path any more, it is the last that was prepared from
  there; which is said, as nothing can be compared.

  Raises:
    ConfigError: if data.path is given and nothing is there, nor prepared.
  """
  folder = data_dir(data) / "vitgan_jax"
  name = [data.dataset, data.split, str(data.image_size)]
  if data.crop:
    name.append("x".join(map(str, data.crop)))
  name = re.sub(r"[^\w.=+-]", "_", "-".join(name))
  if not data.path:
    return folder / name
  known = folder / ".fingerprints"
  if not os.path.exists(files.expand(data.path)) and (
    found := _prepared_from(data.path, folder, name)
  ):
    print(
      f"Nothing is at {data.path} to compare with: {found}, which was prepared "
      "from it, is taken",
      flush=True,
    )
    return found
  # Other images under the same path are another dataset.
  return folder / f"{name}-{archives.fingerprint(data.path, known)}"


def _prepared_from(source, folder, name):
  """Returns what was prepared last from a source, or None."""
  pattern = re.compile(re.escape(name) + "-[0-9a-f]{12}")  # of no crop, either
  made = [
    path
    for path in folder.glob(f"{name}-*")
    if pattern.fullmatch(path.name) and read_card(path)["source"] == source
  ]
  return max(made, key=os.path.getmtime, default=None)


def read_card(path):
  """Returns the card of a prepared folder, a dict.

  Raises:
    ConfigError: if it is damaged.
  """
  try:
    card = files.parse_json((path / "card.json").read_text())
  except (OSError, ValueError) as error:
    raise damaged(path, "card.json") from error
  if not files.has_form(card, _CARD) or not files.has_form(
    card.get("classes", []), [str]
  ):
    raise damaged(path, "card.json")
  return card


def damaged(path, file):
  """Returns the ConfigError for a prepared folder with a damaged file."""
  return ConfigError(
    f"{path / file} is damaged: delete {path} and prepare the dataset again"
  )


def prepare(data):
  """Makes the prepared images of a config's `data`, if they are not there.

  Args:
    data: the config's `data`.

  Returns:
    Their folder. It holds `images-00000.npy`, ..., uint8 [n, S, S, 3];
    `labels.npy`, int32, where the source has classes; `card.json`, with source,
    crop, filter, licence, counts, checksums, and what was skipped;
    `unused.json`, {kind: names} of what was not used, if any; and
    `contact_sheet.png`.

  Raises:
    ConfigError: if the dataset cannot be had, too many of its images are
      corrupt, or the disk is full.
  """
  path = prepared_path(data)
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.hold(path.parent, "config.data.data_dir", wait=True):
      if not path.exists():  # another process may have been at it
        _prepare(data, path)
  except OSError as error:
    raise ConfigError(
      f"cannot prepare {data.dataset} in {path.parent}: "
      f"{storage_fault(error)}. Make room, or give another disk as "
      "config.data.data_dir; what is done is kept"
    ) from error
  return path


def _prepare(data, path):
  source = sources.open_source(data)
  num_images = count(source.parts(data.split))
  num_shards = min(_MAX_SHARDS, -(-num_images // _MIN_SHARD_IMAGES))
  card = {
    "dataset": source.name,
    "source": str(data.path or source.path),
    "licence": source.licence,
    "split": data.split,
    "image_size": data.image_size,
    "crop": list(data.crop) or "largest centred square",
    "colours": "sRGB; those of other ICC profiles are converted",
    "filter": f"{decode.FILTER.name.lower()}, antialiased",
  }
  partial = path.with_name(path.name + ".partial")
  plan = {**card, "num_images": num_images, "num_shards": num_shards}
  _resume_or_start(partial, plan)
  try:
    records = shards.ShardMaker(source, data, partial, num_shards).run()
  except shards.TooManyCorruptError:
    shutil.rmtree(partial)  # the source must change before it is tried again
    raise
  card["num_images"] = sum(record["num_images"] for record in records)
  card["skipped"] = [x for record in records for x in record.pop("skipped")]
  labels = [x for record in records for x in record.pop("labels")]
  if source.classes:
    card["classes"] = source.classes
    np.save(partial / "labels.npy", np.array(labels, np.int32))
  card["shards"] = records
  unused = {**source.unused, "corrupt": card["skipped"]}
  unused = {kind: names for kind, names in unused.items() if names}
  if unused:
    text = json.dumps(unused, indent=2, ensure_ascii=False)
    (partial / _UNUSED).write_text(text + "\n", "utf-8")
  _write_contact_sheet(partial, card)
  (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
  partial.rename(path)  # a folder of this name is whole
  for file in [path / "plan.json", *path.glob("images-*.json")]:
    file.unlink()
  print(f"Prepared in {path}: {summary(path)}", flush=True)


def summary(path):
  """Returns a line on what was found and used for a prepared folder."""
  card, file = read_card(path), path / _UNUSED
  used, unused = card["num_images"], {"corrupt": card["skipped"]}
  if file.exists():
    try:
      unused = files.parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
      raise damaged(path, _UNUSED) from error
    if not files.has_form(unused, {...: [str]}):
      raise damaged(path, _UNUSED)
  else:  # an older version names the corrupt ones in the card alone
    file = path / "card.json"
  if not any(unused.values()):
    return f"{used:,} found, all of them used"
  kinds = []
  for kind, names in unused.items():
    first = ", ".join(" ".join(name.split()) for name in names[:3])
    kinds.append(f"{len(names):,} {kind} ({first}{', ...' * (len(names) > 3)})")
  found = used + sum(map(len, unused.values()))
  return (
    f"{found:,} found, {used:,} used; not used: {'; '.join(kinds)}; all names "
    f"are in {file}"
  )


def _resume_or_start(partial, plan):
  """Keeps what an earlier run made by the same plan, and nothing else."""
  plan_path = partial / "plan.json"
  try:
    same = files.parse_json(plan_path.read_text()) == plan
  except (OSError, ValueError):
    same = False
  if not same:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    plan_path.write_text(json.dumps(plan))
  for leftover in partial.glob("*.tmp"):
    leftover.unlink()


def _write_contact_sheet(folder, card):
  """Draws 64 images, evenly spread over the shards."""
  indices = np.linspace(0, card["num_images"] - 1, 64).astype(int)
  ends = np.cumsum([shard["num_images"] for shard in card["shards"]])
  images = []
  for index in np.unique(indices):
    k = int(np.searchsorted(ends, index, side="right"))
    shard = np.load(folder / card["shards"][k]["file"], mmap_mode="r")
    images.append(shard[index - ends[k]])  # counted from its end
  grid = pictures.image_grid(np.stack(images))
  pictures.write_png(folder / "contact_sheet.png", grid, min_side=512)


def verify(path):
  """Reads all shards of a prepared folder and compares their checksums.

  Raises:
    ConfigError: says which file is not what was written.
  """
  for shard in tqdm(read_card(path)["shards"], "Verifying", unit=" shards"):
    file = path / shard["file"]
    if not file.exists() or files.sha256(file) != shard["sha256"]:
      raise damaged(path, shard["file"])


def main(arguments):
  """Prepares or verifies, and says what is there."""
  cli.no_arguments(arguments)
  config = flags.FLAGS.config
  if config is None:
    raise ConfigError("--config=configs/<name>.py is required; see --help")
  if flags.FLAGS.data_dir is not None:
    config.data.data_dir = flags.FLAGS.data_dir
  config_lib.validate(config)
  path = prepared_path(config.data)
  if path.exists():
    verify(path)
  else:
    prepare(config.data)
  card = read_card(path)
  for key in ("dataset", "source", "split", "crop", "filter", "licence"):
    print(f"{key:<10}{card[key]}")
  print(f"{'look at':<10}{path / 'contact_sheet.png'}")
  print(f"{'images':<10}{summary(path)}")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/celeba64.py."
  )
  cli.define_path(
    "data_dir", None, "Where datasets live; default config.data.data_dir."
  )
  cli.run(main)
