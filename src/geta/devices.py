"""What integer kernels of some kinds of hardware want: named profiles, so that nobody has to remember the numbers.

geta.device_profile("avx512-vnni").multiple_of        # 16
geta.QASSO(base, graph, multiple_of="avx512-vnni", ...)
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from geta.errors import ConfigError


@dataclass(frozen=True)
class DeviceProfile:
    """How a network should look so that one kind of hardware runs it well.

    multiple_of:     what number of channels a layer should keep a multiple of.
    weight_bits, activation_bits: the widths whose codes the integer kernels of this hardware multiply; narrower ones are stored in the
                     next of these.
    uint8_weights:   what `CompactModel.export_onnx(uint8_weights=...)` should be: True where products of uint8 and int8 may overflow.
    why, source:     the reason for `multiple_of`, and where it can be read.
    """

    name: str
    multiple_of: int
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    uint8_weights: bool
    why: str
    source: str

    def __str__(self) -> str:
        """One line."""
        widths = [" or ".join(str(bits) for bits in each) for each in (self.weight_bits, self.activation_bits)]
        codes = "uint8" if self.uint8_weights else "int8"
        return (
            f"{self.name}: multiples of {self.multiple_of}, weights of {widths[0]} bits (8 bits as {codes}), activations of {widths[1]} "
            f"bits; {self.why} ({self.source})"
        )


_PROFILES = (
    DeviceProfile(
        "cpu",
        8,
        (8,),
        (8,),
        True,
        "256-bit registers hold 8 floats or 32-bit sums, and ONNX Runtime lays channels out in blocks of 8; without dot-product "
        "instructions products of uint8 and int8 are added in 16 bits, which may overflow",
        "Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW; ONNX Runtime, MlasNchwcGetBlockSize",
    ),
    DeviceProfile(
        "avx512-vnni",
        16,
        (8,),
        (8,),
        False,
        "one VPDPBUSD adds products of four channels into each of the 16 sums of a 512-bit register",
        "Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD",
    ),
    DeviceProfile(
        "arm-dotprod",
        8,
        (8,),
        (8,),
        False,
        "SDOT and UDOT add products of four channels into each of the 4 sums of a 128-bit register; kernels work on pairs of registers",
        "Arm A64 Instruction Set Architecture, SDOT (by element)",
    ),
    DeviceProfile(
        "nvidia-int8",
        32,
        (8,),
        (8,),
        False,
        "the 8-bit layout of tensor cores, NC/32HW32, stores channels in blocks of 32, the last one padded",
        "NVIDIA TensorRT documentation, Data Format Descriptions, kCHW32",
    ),
)
PROFILES: dict[str, DeviceProfile] = {profile.name: profile for profile in _PROFILES}


def device_profile(name: str) -> DeviceProfile:
    """The profile of a kind of hardware. Raises ConfigError for a name that isn't known, with the known ones."""
    found = PROFILES.get(name) if isinstance(name, str) else None
    if found is None:
        near = difflib.get_close_matches(str(name).lower(), PROFILES, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"no device profile is called {name!r}: known are {', '.join(PROFILES)}{hint}")
    return found


def resolve_multiple(multiple_of: int | str, channels: int = 1) -> int:
    """How many groups a family keeps a multiple of: the number itself, or what gives the multiple of channels of this device profile.

    channels: of a group, see `Family.channels`. Heads of 64 channels are aligned to 16 channels however many are kept.

    Raises ConfigError for an unknown name and for what is no whole number of at least 1.
    """
    if isinstance(multiple_of, str):
        wanted = device_profile(multiple_of).multiple_of
        return wanted // math.gcd(wanted, channels)
    if not isinstance(multiple_of, int) or isinstance(multiple_of, bool) or multiple_of < 1:
        raise ConfigError(f"multiple_of is {multiple_of!r}: it must be a whole number, at least 1, or the name of a device profile")
    return multiple_of
