"""Starts a run from the networks of another: transfer learning.

What has the same name and shape there is taken; the rest, as embeddings of
other classes or layers of another size, is as at the start of any run.
Optimisers, and all else of the training state, start anew.
"""

from flax import traverse_util
import jax
import jax.numpy as jnp

from vitgan_jax import checkpoint, files, trained
from vitgan_jax.errors import ConfigError
from vitgan_jax.train_state import (
  init_train_state,
  state_shapes,
  state_shardings,
)

_NUM_LISTED = 8  # names in a line
# Parts of the state, each with its model_state.
_PARTS = {
  "generator": ("g", "g_ema"),
  "discriminator": ("d",),
}


def initial_state(config, nets, mesh):
  """Returns the GANState of step 0, and a line that says what was taken.

  The line is "" without `config.init_from`.

  Args:
    config: of the run that starts.
    nets: its Networks.
    mesh: of the devices.

  Raises:
    ConfigError: if what `config.init_from` names has nothing to take, or
      `freeze` of an optimiser fits no parameters, or all.
  """
  if not config.init_from:
    return init_train_state(config, nets, mesh), ""
  shapes = state_shapes(config, nets, mesh)
  taken, line = _take(config, shapes)

  def replace(state, taken):
    replaced = {
      field: _put(getattr(state, field), values)
      for field, values in taken.items()
    }
    return state.replace(**replaced)

  # The rest is that of any run, to the last bit: of the same program.
  state = init_train_state(config, nets, mesh)
  replace = jax.jit(replace, out_shardings=state_shardings(config, nets, mesh))
  return replace(state, taken), line


def _take(config, shapes):
  """Returns {field of the GANState: {name: array}}, and the line."""
  source_config, step, sources = _open(config)
  taken, kept = {}, []
  for network, variables in sources.items():
    here, there = (x[network].kind for x in (config, source_config))
    if here != there:
      raise ConfigError(
        f"config.init_from={config.init_from} has a {network} of kind "
        f"{there!r}, and config.{network}.kind is {here!r}: give that kind, or "
        "take the other network alone by config.init_networks"
      )
    for part in _PARTS[network]:
      own = _flat(getattr(shapes, f"{part}_params"))
      own_state = _flat(getattr(shapes, f"{part}_model_state"))
      params = _fitting(variables[part]["params"], own)
      state = _fitting(variables[part], own_state)
      missing = own.keys() - params.keys()
      taken[f"{part}_params"] = params
      taken[f"{part}_model_state"] = {
        name: x for name, x in state.items() if _is_whole(name, own, missing)
      }
    if not params:
      raise ConfigError(
        f"no parameter of the {network} of config.init_from="
        f"{config.init_from} has the name and shape of one here: give the same "
        f"fields of config.{network}"
      )
    kept += [f"{network}/{name}" for name in sorted(missing)]
  line = f"Taken from {config.init_from}, step {step}: {' and '.join(sources)}"
  if kept:
    line += f"; as at init: {', '.join(kept[:_NUM_LISTED])}"
  if len(kept) > _NUM_LISTED:
    line += f" and {len(kept) - _NUM_LISTED} more"
  return taken, line


def _open(config):
  """Returns (config, step, {network: {part: variables}}) of a source."""
  path = files.expand(config.init_from, "--config.init_from=FOLDER")
  wanted = config.init_networks
  networks = list(_PARTS) if wanted == "both" else [wanted]
  if trained.is_export(path):
    if "discriminator" in networks:
      raise ConfigError(
        f"config.init_from={path} is an export, which has no discriminator: "
        "give config.init_networks=generator"
      )
    generator = trained.load(path)
    parts = dict.fromkeys(_PARTS["generator"], generator.variables)
    return generator.config, generator.step, {"generator": parts}
  try:
    run = checkpoint.load_run(path)
  except ConfigError as error:
    raise ConfigError(f"config.init_from: {error}") from error
  sources = {
    network: {
      part: jax.device_get(getattr(run.state, f"{part}_variables"))
      for part in _PARTS[network]
    }
    for network in networks
  }
  return run.config, int(run.state.step), sources


def _fitting(source, own):
  """Returns {name: array} of what has the name and shape of one of `own`."""
  source = _flat(source)
  return {
    name: source[name]
    for name, x in own.items()
    if name in source and source[name].shape == x.shape
  }


def _is_whole(name, params, missing):
  """Says whether all parameters are taken that a state belongs to.

  They are those of the module that it lies in, or of the first one around it
  that has some: `spectral/block0/out/norm/u` goes with `block0/out/kernel`.
  """
  _, *modules, _ = name.split("/")
  for depth in range(len(modules), 0, -1):
    prefix = "/".join(modules[:depth]) + "/"
    if any(x.startswith(prefix) for x in params):
      return not any(x.startswith(prefix) for x in missing)
  return True


def _flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def _put(tree, values):
  """Returns a tree with other values at some names."""
  # Copies: donated buffers must not appear twice in one state.
  values = jax.tree.map(jnp.copy, values)
  return traverse_util.unflatten_dict({**_flat(tree), **values}, sep="/")
