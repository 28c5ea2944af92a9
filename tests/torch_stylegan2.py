"""StyleGAN2 in plain torch, with a kernel of its own for each image.

Functions of the parameters, {"conv0": {"style": ...}}, of numpy arrays, and of
images [B, C, H, W].
"""

import jax
import numpy as np
import torch
from torch.nn import functional

_FILTER = torch.outer(*2 * [torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8])


def to_torch(tree):
  return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def to_nchw(images):
  return to_torch(images).permute(0, 3, 1, 2)


def blur(x, padding, gain=1.0):
  kernel = (gain * _FILTER).expand(x.shape[1], 1, 4, 4)
  return functional.conv2d(x, kernel, padding=padding, groups=x.shape[1])


def upsample(x):
  batch, channels, height, width = x.shape
  zeros = torch.zeros(batch, channels, 2 * height, 2 * width)
  zeros[:, :, ::2, ::2] = x
  return blur(functional.pad(zeros, (0, -1, 0, -1)), 2, gain=4.0)


def downsample(x):
  return blur(x, 1)[:, :, ::2, ::2]


def leaky_relu(x):
  return functional.leaky_relu(x, 0.2) * 2**0.5


def dense(params, x, lr_multiplier=1.0):
  kernel = params["kernel"] * (lr_multiplier / len(params["kernel"]) ** 0.5)
  return x @ kernel + params.get("bias", torch.zeros(1)) * lr_multiplier


def convolve(x, kernels, resample=None):
  """Convolves each image with its own kernel [B, out, in, 3, 3]."""
  batch, fan_out, fan_in = kernels.shape[:3]
  x = blur(x, 2) if resample == "down" else x
  x = x.reshape(1, batch * fan_in, *x.shape[2:])
  if resample == "up":
    # torch's transposed convolution turns the kernel over.
    kernels = kernels.flip((3, 4)).transpose(1, 2)
    kernels = kernels.reshape(batch * fan_in, fan_out, 3, 3)
    y = functional.conv_transpose2d(x, kernels, stride=2, groups=batch)
    y = y.reshape(batch, fan_out, *y.shape[2:])
    return blur(y, 1, gain=4.0)
  kernels = kernels.reshape(batch * fan_out, fan_in, 3, 3)
  stride, padding = (2, 0) if resample == "down" else (1, 1)
  y = functional.conv2d(
    x, kernels, stride=stride, padding=padding, groups=batch
  )
  return y.reshape(batch, fan_out, *y.shape[2:])


def scaled(params):
  """Returns the kernel [out, in, 3, 3] of a convolution, and its bias."""
  kernel = params["kernel"].permute(3, 2, 0, 1)
  kernel = kernel / kernel[0].numel() ** 0.5
  return kernel, params["bias"][:, None, None]


def conv(params, x, resample=None):
  kernel, bias = scaled(params)
  return convolve(x, kernel.expand(len(x), *kernel.shape), resample) + bias


def styled_conv(params, x, w, noise=None, resample=None):
  kernel, bias = scaled(params["conv"])
  style = dense(params["style"], w)
  kernels = kernel * style[:, None, :, None, None]
  norm = kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8
  y = convolve(x, kernels / norm.sqrt(), resample)
  if noise is not None:
    y = y + params["noise_scale"] * noise
  return leaky_relu(y + bias)


def to_rgb(params, x, w):
  x = x * dense(params["style"], w)[:, :, None, None]
  return dense(params["rgb"], x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mapping(params, latents, labels=None, lr_multiplier=0.01):
  inputs = [] if latents is None else [latents]
  if labels is not None:
    one_hot = functional.one_hot(
      labels, len(params["class_embedding"]["kernel"])
    )
    inputs.append(dense(params["class_embedding"], one_hot.float()))
  w = [x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt() for x in inputs]
  w = torch.cat(w, dim=1)
  depth = sum(name.startswith("dense") for name in params)
  for i in range(depth):
    w = leaky_relu(dense(params[f"dense{i}"], w, lr_multiplier))
  return w


def generator(params, w, noise=None):
  """Maps w of each layer [B, L, W] and its noise to images."""
  x = params["constant"].permute(2, 0, 1).expand(len(w), -1, -1, -1)
  noise = noise or [None] * w.shape[1]
  image = None
  for i in range(w.shape[1] - 1):
    resample = "up" if i % 2 else None
    x = styled_conv(params[f"conv{i}"], x, w[:, i], noise[i], resample)
    if i % 2 == 0:
      rgb = to_rgb(params[f"rgb{x.shape[-1]}"], x, w[:, i + 1])
      image = rgb if image is None else upsample(image) + rgb
  return image


def minibatch_deviation(x, group_size):
  """Appends the channel, one group after the other."""
  channel = []
  for group in x.split(group_size):
    deviation = (group.var(0, unbiased=False) + 1e-8).sqrt().mean()
    channel.append(deviation.expand(len(group), 1, *x.shape[2:]))
  return torch.cat([x, torch.cat(channel)], dim=1)


def discriminator(params, x, group_size, labels=None):
  """Maps images to logits [B]; with residual branches if it has them."""
  x = dense(params["from_rgb"], x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
  x = leaky_relu(x)
  while x.shape[-1] > 4:
    block = params[f"block{x.shape[-1]}"]
    y = leaky_relu(conv(block["conv0"], x))
    y = leaky_relu(conv(block["conv1"], y, "down"))
    if "branch" in block:
      branch = downsample(x).permute(0, 2, 3, 1)
      branch = dense(block["branch"], branch).permute(0, 3, 1, 2)
      y = (y + branch) / 2**0.5
    x = y
  x = leaky_relu(conv(params["conv"], minibatch_deviation(x, group_size)))
  x = x.permute(0, 2, 3, 1).flatten(1)
  x = dense(params["head_out"], leaky_relu(dense(params["head_in"], x)))
  if labels is None:
    return x[:, 0]
  classes = mapping(params["mapping"], None, labels)
  return (x * classes).sum(1) / x.shape[1] ** 0.5
