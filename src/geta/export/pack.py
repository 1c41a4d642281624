"""Bit packing: integers of any width from 2 to 16 bits, one after the other without gaps.

Element `i` of `n` occupies bits `i*b .. i*b + b - 1` of the stream; bit `j` of the stream is bit `j % 8` (least significant
first) of byte `j // 8`. Signed integers are stored as two's complement. Bits after the last element are zero.
"""

from __future__ import annotations

import math

import torch

from geta.errors import CheckpointError, ConfigError

MIN_BITS, MAX_BITS = 2, 16
_CHUNK = 1 << 20  # elements at a time; a multiple of 8, so that every chunk but the last ends at a whole byte


def packed_bytes(elements: int, bits: int) -> int:
    """Return the size in bytes of `elements` packed integers: `ceil(elements * bits / 8)`."""
    return -(-elements * bits // 8)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest integer of `bits` bits.

    Raises ConfigError when `bits` is not an integer from 2 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits = {bits!r}: integers are packed with a whole number of {MIN_BITS} to {MAX_BITS} bits each")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def pack_bits(codes: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Pack integers of any shape into a uint8 tensor [ceil(numel * bits / 8)] (4 bits: half a byte per element).

    Raises ConfigError when `bits` is not in 2 .. 16, `codes` is not an integer tensor, or a code doesn't fit.
    """
    low, high = code_range(bits, signed)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ConfigError(f"pack_bits needs an integer tensor, got {codes.dtype}: quantize it first")
    flat = codes.detach().cpu().reshape(-1)
    if flat.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    if int(flat.min()) < low or int(flat.max()) > high:
        raise ConfigError(
            f"codes span {int(flat.min())} .. {int(flat.max())}, but {bits} {'signed' if signed else 'unsigned'} bits hold "
            f"{low} .. {high}: raise bits or quantize again"
        )
    chunks = [_pack_chunk(flat[start : start + _CHUNK], bits) for start in range(0, flat.numel(), _CHUNK)]
    return torch.cat(chunks)


def unpack_bits(packed: torch.Tensor, bits: int, signed: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the integers that `pack_bits` packed, in the given shape and integer dtype.

    Raises ConfigError when `bits` is not in 2 .. 16 or `dtype` can't hold the codes, CheckpointError when `packed` is not
    a uint8 tensor of exactly the size that `shape` and `bits` need, or when its spare bits are not zero.
    """
    low, high = code_range(bits, signed)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or torch.iinfo(dtype).min > low or torch.iinfo(dtype).max < high:
        raise ConfigError(f"{dtype} can't hold {bits}-bit {'signed' if signed else 'unsigned'} integers: choose a wider integer dtype")
    elements = math.prod(shape)
    expected = packed_bytes(elements, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise CheckpointError(
            f"packed integers are {packed.dtype} {list(packed.shape)}, but shape {list(shape)} at {bits} bits needs uint8 [{expected}]: "
            "the file is damaged"
        )
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    spare = expected * 8 - elements * bits
    if spare and int(packed[-1]) >> (8 - spare):
        raise CheckpointError("the spare bits after the last packed integer are not zero: the file is damaged")
    step = _CHUNK * bits // 8
    flat = torch.empty(elements, dtype=dtype)
    for number, start in enumerate(range(0, expected, step)):
        begin = number * _CHUNK
        count = min(_CHUNK, elements - begin)
        flat[begin : begin + count] = _unpack_chunk(packed[start : start + step], bits, signed, count).to(dtype)
    return flat.reshape(shape)


def pack_signs(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes that are all -1 or +1 (a binary quantizer's) into a uint8 tensor [ceil(numel / 8)]: bit 1 is +1, order as above.

    Raises ConfigError for any other code.
    """
    flat = codes.detach().cpu().reshape(-1)
    if not bool((flat.abs() == 1).all()):
        raise ConfigError("pack_signs needs the codes -1 and +1 alone: use pack_bits for others")
    if flat.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat([_pack_chunk((flat[start : start + _CHUNK] > 0), 1) for start in range(0, flat.numel(), _CHUNK)])


def unpack_signs(packed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the codes that `pack_signs` packed; raises CheckpointError when `packed` is not of the size that `shape` needs."""
    elements = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_bytes(elements, 1):
        raise CheckpointError(
            f"packed signs are {packed.dtype} {list(packed.shape)}, but shape {list(shape)} needs uint8 [{packed_bytes(elements, 1)}]: "
            "the file is damaged"
        )
    spare = packed.numel() * 8 - elements
    if spare and int(packed[-1]) >> (8 - spare):
        raise CheckpointError("the spare bits after the last packed sign are not zero: the file is damaged")
    flat = torch.empty(elements, dtype=dtype)
    for start in range(0, elements, _CHUNK):
        count = min(_CHUNK, elements - start)
        ones = _unpack_chunk(packed[start // 8 : (start + _CHUNK) // 8], 1, False, count)
        flat[start : start + count] = (2 * ones - 1).to(dtype)
    return flat.reshape(shape)


def _pack_chunk(codes: torch.Tensor, bits: int) -> torch.Tensor:
    stream = ((codes.to(torch.int32)[:, None] >> torch.arange(bits, dtype=torch.int32)) & 1).to(torch.uint8).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack_chunk(packed: torch.Tensor, bits: int, signed: bool, count: int) -> torch.Tensor:
    stream = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)[: count * bits].view(count, bits)
    codes = (stream.to(torch.int32) << torch.arange(bits, dtype=torch.int32)).sum(1, dtype=torch.int32)
    return torch.where(codes >> (bits - 1) == 1, codes - (1 << bits), codes) if signed else codes
