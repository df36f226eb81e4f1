"""Scaled numbers: the range of logarithms with the digits of floats.

A mantissa in [1, 2) and a power of two, an int32. Products neither underflow
nor lose digits as large logarithms do, and need no exp and no log.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Power of two of a scaled 0: less than any other, and sums of few do not wrap.
ZERO_EXPONENT = -(10**8)
# In a sum above this, terms too small for a float do not count.
_SAFE_SUM = 1e-20

# Sums over at most so many starts are matrix products, which are faster on
# CPUs. Longer ones are sums of _LANES partial sums: a single running sum of
# thousands of terms would lose the small ones.
_LONGEST_PRODUCT = 257
_LANES = 32
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Scaled(NamedTuple):
  """mantissa * 2^exponent; 0 has an exponent far below all others."""

  mantissa: jax.Array
  exponent: jax.Array


def _layout(dtype: Any) -> tuple[Any, int, int]:
  """Integers as wide as a float, the bits of its fraction, and its bias."""
  info = jnp.finfo(dtype)
  return jnp.dtype(f'int{info.bits}'), info.nmant, info.maxexp - 1


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
  """Returns 2^exponent as a float; 0 if it is too small for a normal one."""
  int_dtype, fraction_bits, bias = _layout(dtype)
  biased = jnp.clip(exponent, -bias, bias).astype(int_dtype) + bias
  return jax.lax.bitcast_convert_type(biased << fraction_bits, dtype)


def normalise(number: Scaled) -> Scaled:
  """Returns the same number with its mantissa in [1, 2)."""
  dtype = number.mantissa.dtype
  int_dtype, fraction_bits, bias = _layout(dtype)
  bits = jax.lax.bitcast_convert_type(number.mantissa, int_dtype)
  fraction = bits & ((1 << fraction_bits) - 1)
  biased = (bits >> fraction_bits) & (2 * bias + 1)  # Without the sign.
  exponent = biased.astype(jnp.int32) - bias
  return Scaled(
    jax.lax.bitcast_convert_type(fraction | (bias << fraction_bits), dtype),
    number.exponent + exponent,
  )


def times(a: Scaled, b: Scaled) -> Scaled:
  """Returns the product, its mantissa not normalised."""
  return Scaled(a.mantissa * b.mantissa, a.exponent + b.exponent)


def value(number: Scaled) -> jax.Array:
  """Returns it as a float; 0 where it is too small for one."""
  return number.mantissa * power_of_two(number.exponent, number.mantissa.dtype)


def dot(a: Scaled, b: Scaled) -> Scaled:
  """Returns sum_s a(s) b(s), however small all terms are.

  Args:
    a: `[B, S]`.
    b: `[S]` or `[B, S]`.
  """

  def dot(less: jax.Array) -> jax.Array:
    powers = power_of_two(
      a.exponent + b.exponent - less[:, None], a.mantissa.dtype
    )
    return sum_products(a.mantissa * b.mantissa, powers)

  def relative_to_largest() -> Scaled:
    largest = (a.exponent + b.exponent).max(axis=1)
    return normalise(Scaled(dot(largest), largest))

  zero = jnp.zeros(len(a.mantissa), jnp.int32)
  total = dot(zero)
  return jax.lax.cond(
    jnp.all(total > _SAFE_SUM),
    lambda: normalise(Scaled(total, zero)),
    relative_to_largest,
  )


def sum_products(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns sum_s a(s) b(s), `[B, ...]`, for `[B, ..., S]` and `[B, S]`."""
  size = a.shape[-1]
  if size <= _LONGEST_PRODUCT:
    return einsum('b...s,bs->b...', a, b)
  terms = a * jnp.expand_dims(b, range(1, a.ndim - 1))
  padding = [(0, 0)] * (a.ndim - 1) + [(0, -size % _LANES)]
  terms = jnp.pad(terms, padding)
  terms = terms.reshape(*terms.shape[:-1], -1, _LANES)
  return terms.sum(axis=-2).sum(axis=-1)
