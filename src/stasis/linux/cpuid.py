# SPDX-License-Identifier: Apache-2.0
"""What only the CPUID instruction tells: where the processor keeps each component of an XSAVE area.

The offsets differ between makers (AMD has no MPX, so everything behind AVX lies elsewhere than at Intel).
"""

import ctypes
import functools
import mmap
import struct

__all__ = ["cpuid", "xsave_components"]

# push rbx; mov eax, edi; mov ecx, esi; mov r8, rdx; cpuid; mov [r8], eax; mov [r8+4], ebx; mov [r8+8], ecx;
# mov [r8+12], edx; pop rbx; ret
_CODE = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")

LEAF_XSAVE = 0xD  # Intel SDM volume 1, 13.2: sub-leaf n is component n, EAX its size and EBX its offset
HIGHEST_COMPONENT = 62


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX. OSError where the system allows no new executable memory."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_CODE)
        held = ctypes.c_char.from_buffer(page)
        function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(held))
        result = ctypes.create_string_buffer(16)
        function(leaf, subleaf, ctypes.addressof(result))
        del held
    eax, ebx, ecx, edx = struct.unpack("<4I", result.raw)
    return eax, ebx, ecx, edx


@functools.cache
def xsave_components() -> dict[int, tuple[int, int]]:
    """(offset, size) in bytes of every component that this processor has and the kernel may use, from number 2 on."""
    low, _, _, high = cpuid(LEAF_XSAVE)
    supported = low | high << 32
    found = {}
    for number in range(2, HIGHEST_COMPONENT + 1):
        if supported >> number & 1:
            size, offset, _, _ = cpuid(LEAF_XSAVE, number)
            found[number] = offset, size
    return found
