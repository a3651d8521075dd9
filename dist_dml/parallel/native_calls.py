"""Calling the CPU kernels: structures as C++ has them, pointers, and what went wrong in words."""

from __future__ import annotations

import ctypes

from torch import Tensor

_MESSAGE_BYTES = 1024


class NativeStructure(ctypes.Structure):
    """Names and types are those of a struct of the same name in `native/`."""


def native_fields(names: str) -> list[tuple[str, type]]:
    """`*name` is a pointer, `.name` a double, `name` a 64-bit integer."""
    kinds: dict[str, type] = {"*": ctypes.c_void_p, ".": ctypes.c_double}
    return [(name.lstrip("*."), kinds.get(name[0], ctypes.c_int64)) for name in names.split()]


def native_address(tensor: Tensor | None) -> int | None:
    """Of the first number; the caller keeps the tensor alive."""
    if tensor is None:
        return None
    assert tensor.device.type == "cpu", f"the CPU kernels got a tensor on {tensor.device}"
    assert tensor.is_contiguous(), f"the CPU kernels got a strided tensor of {tensor.shape}"
    return tensor.data_ptr()


def native_call(library: ctypes.CDLL, name: str, *arguments: NativeStructure | int | None) -> str:
    """Call a kernel: structures by reference, integers with 64 bits, addresses as they are.

    Returns:
        What went wrong, on one line; empty where nothing did.
    """
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    given = [
        ctypes.byref(one) if isinstance(one, NativeStructure) else ctypes.c_int64(one or 0)
        for one in arguments
    ]
    if getattr(library, name)(*given, message, ctypes.c_int64(_MESSAGE_BYTES)):
        return " ".join(message.value.decode(errors="replace").split()) or "for no known reason"
    return ""
