"""Model FLOPs, counted in the jaxpr of a function."""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def model_flops(function, *args):
  """Returns the FLOPs of a function's matrix products and convolutions.

  2 per multiply-add, and nothing for all other operations. A convolution's
  products with padding count; those with the zeros that its input is dilated
  with do not, so that a transposed convolution costs what it is transposed of.
  A loop counts as often as it runs, of the branches of a `cond` the dearest, a
  function under `shard_map` on every device of the mesh, and what
  rematerialisation computes again is counted again.

  Args:
    function: is traced, and does not run.
    *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: if there are products in a `while` loop, whose length is not
      known, or in a Pallas kernel.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  # A `custom_vjp` has gradients of all inputs, wanted or not.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _of_jaxpr(jaxpr)


def _of_jaxpr(jaxpr):
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation):
  name, params = equation.primitive.name, equation.params
  if name in ("dot_general", "conv_general_dilated"):
    left, right = (x.aval.shape for x in equation.invars)
    outputs = equation.outvars[0].aval.size
    dimensions = params["dimension_numbers"]
    if name == "dot_general":
      return 2 * outputs * math.prod(left[i] for i in dimensions[0][0])
    # Of one output, whose inputs are those of one group.
    taps = math.prod(right) // right[dimensions.rhs_spec[0]]
    return 2 * outputs * taps // math.prod(params["lhs_dilation"])
  inner = [_of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
  if name in ("while", "pallas_call") and any(inner):
    raise ValueError(f"the matrix products in a {name} cannot be counted")
  if name == "cond":
    return max(inner)
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "shard_map":
    return params["mesh"].size * sum(inner)
  return sum(inner)
