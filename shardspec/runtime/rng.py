"""Random values that are a function of (seed, name, stream, element index) alone, bit for bit.

What an element gets depends neither on the shard that it is drawn in nor on the device: everything is
built from integer operations and single IEEE operations that are rounded exactly (add, mul, div, sqrt),
each its own torch call. torch.log and torch.erfinv are not used: their vector bodies and scalar tails
differ in the last bit.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@attrs.frozen
class Key:
    """One stream of values: the 64-bit Philox key, and the two counter words above the index."""

    words: tuple[int, int]
    counter: tuple[int, int]


def stream_key(seed: int, name: str, stream: int = 0) -> Key:
    """Return the key of the stream-th draw that is made for the tensor `name`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=12).digest()
    word0, word1, word2 = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
    return Key((word0, word1), (stream, word2))


def uniform(key: Key, index: Tensor) -> Tensor:
    """Return float64 values in [0, 1), multiples of 2^-53, for the elements at int64 `index`, any shape."""
    return _by_chunks(index, lambda part: _bits53(key, part).double().mul_(2.0**-53))


def normal(key: Key, index: Tensor) -> Tensor:
    """Return standard normal float64 values for the elements at int64 `index`, any shape."""
    return _by_chunks(index, lambda part: ndtri(_open_uniform(key, part)))


def philox(key: Key, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox4x32-10 at counter (index low, index high, *key.counter).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The words are held in int64,
    where products wrap but keep their 64 bits; only the words that are multiplied next are masked.
    """
    words: tuple[Any, ...] = (index & _MASK, index >> 32, *key.counter)
    word0, word1, word2, word3 = words
    key0, key1 = key.words
    for _ in range(10):
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57
        word0, word1 = (product1 >> 32 ^ word1 ^ key0) & _MASK, product1
        word2, word3 = (product0 >> 32 ^ word3 ^ key1) & _MASK, product0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return word0, word1 & _MASK, word2, word3 & _MASK


def ndtri(p: Tensor) -> Tensor:
    """Return the inverse of the standard normal distribution function at float64 `p` in [0, 1].

    Wichura, algorithm AS 241 (PPND16), Applied Statistics 37 (1988): relative error about 1e-16.
    """
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * (_polynomial(_A, r) / _polynomial(_B, r))
    outer = q.abs().gt_(0.425).flatten().nonzero().squeeze(1)
    z.flatten().index_copy_(0, outer, _ndtri_outer(p.flatten()[outer]))
    return z


def erfinv(x: Tensor) -> Tensor:
    """Return the inverse error function of float64 `x`: ndtri((x + 1) / 2) / sqrt(2)."""
    return ndtri((x + 1.0) * 0.5) * math.sqrt(0.5)


def ndtr(x: float) -> float:
    """Return the standard normal distribution function of a Python number."""
    return 0.5 * math.erfc(-x * math.sqrt(0.5))


def chunk_size(device: torch.device) -> int:
    """Return how many elements to draw at once: on a CPU the temporaries should stay in its cache."""
    return 1 << 16 if device.type == "cpu" else 1 << 22


def _ndtri_outer(p: Tensor) -> Tensor:
    """AS 241 for |p - 0.5| > 0.425."""
    tail = torch.minimum(p, 1.0 - p)
    r = _log(tail).neg_().sqrt_()
    near = _polynomial(_C, r - 1.6) / _polynomial(_D, r - 1.6)
    far = _polynomial(_E, r - 5.0) / _polynomial(_F, r - 5.0)
    z = torch.where(r <= 5.0, near, far)
    z = torch.where(tail > 0, z, torch.where(tail == 0, math.inf, math.nan))
    return torch.where(p < 0.5, -z, z)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float64 `x`: x = 2^e m with m near 1, log m = 2 atanh(s)."""
    bits = x.view(torch.int64)
    # Adding the complement of sqrt(1/2)'s mantissa carries into the exponent where m would exceed sqrt(2).
    exponent = (bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD) >> 52) - 1023
    m = (bits - (exponent << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial([2.0 / (2 * k + 1) for k in range(12)], s * s)
    return series * s + exponent.double() * math.log(2.0)


def _open_uniform(key: Key, index: Tensor) -> Tensor:
    """Odd multiples of 2^-53: 0 and 1 are left out, and p and 1 - p are equally likely."""
    return (_bits53(key, index) | 1).double().mul_(2.0**-53)


def _bits53(key: Key, index: Tensor) -> Tensor:
    high, low, _, _ = philox(key, index)
    return (high << 21) | (low >> 11)


def _by_chunks(index: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    flat, out = index.flatten(), torch.empty(index.numel(), dtype=torch.float64, device=index.device)
    size = chunk_size(index.device)
    for start in range(0, flat.numel(), size):
        out[start : start + size] = draw(flat[start : start + size])
    return out.reshape(index.shape)


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """Horner's rule, constant term first; mul and add stay apart, for a fused one would round once."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value.mul_(x).add_(coefficient)
    return value


# AS 241's PPND16, constant term first: A/B in the middle, C/D in the tails, E/F far out.
# fmt: off
_A = [
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
    1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
    3.3430575583588128105e4, 2.5090809287301226727e3,
]
_B = [
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2,
    5.3941960214247511077e3, 2.1213794301586595867e4, 3.9307895800092710610e4,
    2.8729085735721942674e4, 5.2264952788528545610e3,
]
_C = [
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
    3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
    2.27238449892691845833e-2, 7.74545014278341407640e-4,
]
_D = [
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0,
    6.89767334985100004550e-1, 1.48103976427480074590e-1, 1.51986665636164571966e-2,
    5.47593808499534494600e-4, 1.05075007164441684324e-9,
]
_E = [
    6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
    2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
    2.71155556874348757815e-5, 2.01033439929228813265e-7,
]
_F = [
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
    1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
    1.42151175831644588870e-7, 2.04426310338993978564e-15,
]
# fmt: on
