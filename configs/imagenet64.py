"""Class-conditional ViTGAN on ImageNet, 64 x 64.

    python -m vitgan_jax.main --config=configs/imagenet64.py

The 1,281,167 training images of 1,000 classes as Chrabaszcz et al. 2017
resized them (arXiv 1707.08819), which are TFDS's `imagenet_resized/64x64`. Its
host may ask for an account: the zips then go by hand where the message says.

The networks are of the sizes of configs/celeba64.py, with the classes as in
configs/cifar10_cond.py. The paper has no ImageNet, and these sizes were chosen
for data of one kind: more width and larger batches may well pay. Not yet
trained here.

G has 16.6 M parameters, D 10.6 M. The grids of samples have the first eight
classes, a row each.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = celeba64.get_config()
  config.data.dataset = "imagenet_resized/64x64"
  config.data.crop = ()
  config.data.num_classes = 1_000
  return common.apply_argument(config, arg)
