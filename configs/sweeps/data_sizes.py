"""The same run on a tenth of the images, a fifth, a half, and all of them.

python -m launch.local --config=configs/cifar10.py \
    --sweep=configs/sweeps/data_sizes.py

A part is the first images of a split: right for those of TFDS, which are in no
order of classes, and wrong for a folder of class folders.
"""


def sweep(add):
  """Adds a work unit for each share."""
  for percent in (10, 20, 50, 100):
    add({"data.split": f"train[:{percent}%]"}, name=f"images_{percent}")
