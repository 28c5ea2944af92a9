"""The same run on a tenth of the images, a fifth, a half, and all of them.

python -m launch.local --config=configs/cifar10.py \
    --sweep=configs/sweeps/data_sizes.py

has it in the paper's size, --config=configs/cifar16.py in one of which a run of
600 thousand images takes a quarter of an hour of a core. A part is the first
images of a split, of a folder of class folders those of each class.
"""


def sweep(add):
  """Adds a work unit for each share."""
  for percent in (10, 20, 50):
    add({"data.split": f"train[:{percent}%]"}, name=f"images_{percent}")
  add({"data.split": "train"}, name="images_100")
