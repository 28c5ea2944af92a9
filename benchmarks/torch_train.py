"""The training step of `torch_vitgan`: DiffAugment, losses, Adam, average."""

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks import torch_vitgan


def draw_augmentation(batch, size, strengths):
  """Draws as `diff_augment.draw` does; the same dict, of tensors.

  Args:
    batch: B.
    size: S, pixels along a side.
    strengths: `config.augment`.
  """
  s = strengths
  per_image = (batch, 1, 1, 1)

  def applied(*shape):
    return torch.rand(shape) < s.probability

  def uniform(shape, limit):
    return (2.0 * torch.rand(shape) - 1.0) * limit

  draws = {}
  if s.brightness or s.saturation or s.contrast:
    limits = (s.brightness, s.saturation, s.contrast)
    draws["color"] = tuple(
      applied(*per_image) * uniform(per_image, x) for x in limits
    )
  if s.translation or s.scaling:
    zoom = 1.0 + applied(batch, 1) * uniform((batch, 1), s.scaling)
    limit = round(size * s.translation)
    shift = torch.randint(-limit, limit + 1, (batch, 2)) * applied(batch, 1)
    draws["geometry"] = (zoom, shift + 0.5 * size * (1.0 - zoom))
  if s.cutout:
    side = round(size * s.cutout)
    start = torch.randint(0, size + 1 - side % 2, (2, batch, 1)) - side // 2
    position = torch.arange(size)
    rows, columns = (position >= start) & (position < start + side)
    inside = rows[:, :, None] & columns[:, None] & applied(batch, 1, 1)
    draws["cutout"] = (inside,)
  return draws


def augment(draws, images):
  """Returns images [B, 3, S, S], augmented as the draws say."""
  if "color" in draws:
    brightness, saturation, contrast = draws["color"]
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, 1.0 + saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, 1.0 + contrast)
  if "geometry" in draws:
    zoom, offset = draws["geometry"]
    size = images.shape[-1]
    # The output over [-1, 1] to the input likewise; (y, x) to (x, y).
    shift = (1.0 - 2.0 * offset.flip(-1) / size) / zoom - 1.0
    theta = torch.cat(
      [torch.diag_embed(1.0 / zoom.expand(-1, 2)), shift[:, :, None]], dim=-1
    )
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(
      images, grid, padding_mode="border", align_corners=False
    )
    images = images * (grid.abs() <= 1.0).all(dim=-1)[:, None]
  if "cutout" in draws:
    (inside,) = draws["cutout"]
    images = images.masked_fill(inside[:, None], 0.0)
  return images


class Trainer:
  """Both networks as they train, and the generator's moving average.

  Attributes:
    generator, generator_ema, discriminator: the modules.
    g_optimizer, d_optimizer: Adam.
    steps: taken so far.
  """

  def __init__(self, config, state, compile_function=lambda function: function):
    """Starts from a GANState of ours, but for the moments of Adam.

    Args:
      config: of `configs/`.
      state: GANState.
      compile_function: applied to both losses and to the draws.

    Raises:
      ConfigError: if the config has other switches than the default ones.
    """
    torch_vitgan.check(config)
    self._config = config
    self.generator = torch_vitgan.Generator(config)
    self.generator_ema = torch_vitgan.Generator(config).requires_grad_(False)
    self.discriminator = torch_vitgan.Discriminator(config)
    for module, params, spectral in (
      (self.generator, state.g_params, None),
      (self.generator_ema, state.g_ema_params, None),
      (self.discriminator, state.d_params, state.d_model_state["spectral"]),
    ):
      torch_vitgan.load_from_jax(module, params, spectral)
    self.g_optimizer, self.d_optimizer = (
      torch.optim.Adam(
        network.parameters(),
        lr=adam.learning_rate,
        betas=(adam.b1, adam.b2),
        eps=adam.eps,
        fused=True,
      )
      for network, adam in (
        (self.generator, config.g_optimizer),
        (self.discriminator, config.d_optimizer),
      )
    )
    self.steps = int(state.step)
    self._average = list(self.generator_ema.parameters())
    self._averaged = list(self.generator.parameters())
    self._draw = compile_function(self._draw)
    self._d_loss = compile_function(self._d_loss)
    self._g_loss = compile_function(self._g_loss)

  def step(self, images, draws=None):
    """Takes one step, of the discriminator and then of the generator.

    Args:
      images: uint8 [B, S, S, 3], real.
      draws: None, or what `_draw` returns.

    Returns:
      The metrics of our step but for the generator's moving averages.
    """
    flipped, d_draws, g_draws = self._draw() if draws is None else draws
    d_loss, metrics = self._d_loss(images, flipped, *d_draws)
    self.d_optimizer.zero_grad()
    d_loss.backward()
    self.d_optimizer.step()
    # As constants, the discriminator's parameters cost no gradient.
    self.discriminator.requires_grad_(False).eval()
    g_loss = self._g_loss(*g_draws)
    self.g_optimizer.zero_grad()
    g_loss.backward()
    self.g_optimizer.step()
    self.discriminator.requires_grad_(True).train()
    torch._foreach_lerp_(self._average, self._averaged, 1.0 - self._decay())
    self.steps += 1
    return {**metrics, "loss/g": g_loss.detach()}

  def _draw(self):
    """Returns (flipped, (latents, two augmentations), (latents, one))."""
    config = self._config
    batch = config.batch_size
    flipped = None
    if config.data.flip:
      flipped = torch.rand(batch, 1, 1, 1) < 0.5

    def latents():
      return torch.randn(batch, config.generator.latent_dim)

    def augmentation():
      return draw_augmentation(batch, config.data.image_size, config.augment)

    return (
      flipped,
      (latents(), augmentation(), augmentation()),
      (latents(), augmentation()),
    )

  def _d_loss(self, images, flipped, latents, real_draws, fake_draws):
    real = images.permute(0, 3, 1, 2).float() * (2.0 / 255.0) - 1.0
    if flipped is not None:
      real = torch.where(flipped, real.flip(-1), real)
    with torch.no_grad():
      fake = self.generator(latents)
    batches = [augment(real_draws, real), augment(fake_draws, fake)]
    weight = self._config.loss.bcr_weight
    if weight:
      batches += [real, fake]
    # One pass, which updates u once.
    logits = self.discriminator(torch.cat(batches)).chunk(len(batches))
    loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
    metrics = {
      "loss/d": loss.detach(),
      "scores/real": logits[0].detach().mean(),
      "scores/fake": logits[1].detach().mean(),
    }
    if weight:
      penalty = F.mse_loss(logits[0], logits[2])
      penalty = penalty + F.mse_loss(logits[1], logits[3])
      metrics["penalty/bcr"] = penalty.detach()
      loss = loss + weight * penalty
    return loss, metrics

  def _g_loss(self, latents, draws):
    logits = self.discriminator(augment(draws, self.generator(latents)))
    return F.softplus(-logits).mean()

  def _decay(self):
    ema, batch = self._config.ema, self._config.batch_size
    half_life = 1000.0 * ema.half_life_kimg
    if ema.ramp_up:
      half_life = min(half_life, ema.ramp_up * self.steps * batch)
    return 0.5 ** (batch / max(half_life, 1e-8))
