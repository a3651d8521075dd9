"""Compiles the Triton kernels for an H100 or H200 without one, and prints what they take.

    python tests/compile_triton.py

The compiler and the assembler come with triton. Fails where a kernel does not compile or needs more
shared memory than a core has; prints registers' spills, which the assembler leaves in local memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_dml.parallel.triton_backward import backward_kernel
from dist_dml.parallel.triton_blocks import (
    Blocks,
    backward_blocks,
    forward_blocks,
    padded_features,
)
from dist_dml.parallel.triton_kernels import factor_kernel, forward_kernel

SHARED_BYTES = 227 * 1024
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def compiled(name: str, kernel: Any, types: dict[str, str | None], constants: dict[str, Any],
             blocks: Blocks) -> None:  # fmt: skip
    """Compile one kernel for one choice of types and constants."""
    constants = constants | {key: None for key, value in types.items() if value is None}
    source = ASTSource(
        fn=kernel,
        signature={key: types.get(key) or "constexpr" for key in kernel.arg_names},
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, key in enumerate(kernel.arg_names)
            if (types.get(key) or "").startswith("*")
        },
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    done: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = done.metadata.shared
    products = {key: done.asm["ptx"].count(key) for key in ("wgmma.mma_async", "cp.async.cg")}
    print(f"{name}: {blocks}, {shared / 1024:.0f} KiB shared, {products}", flush=True)
    assert shared <= SHARED_BYTES, f"{name} takes {shared} bytes of shared memory"
    if constants.get("OPERAND") == tl.bfloat16:
        assert products["wgmma.mma_async"] > 0, f"{name} does not use Hopper's tensor cores"


def compile_forward(d: int, operand: torch.dtype, weight: torch.dtype, **options: bool) -> None:
    """The forward kernel for rows of d features."""
    blocks = forward_blocks(d, operand, False)
    flags = {"HAS_ACTIVE": False, "HAS_FACTOR": True, "HAS_BIAS": True, "WITH_GAP": False} | options
    types = {
        "rows": POINTERS[operand],
        "columns": "*i32",
        "weight": POINTERS[weight],
        "active": "*i64" if flags["HAS_ACTIVE"] else None,
        "factor": "*fp32" if flags["HAS_FACTOR"] else None,
        "bias": "*fp32" if flags["HAS_BIAS"] else None,
        "partial": "*fp32",
        **dict.fromkeys(("num_rows", "num_classes", "span"), "i32"),
    }
    sizes = {"D": d, "BLOCK_D": blocks.features, "BLOCK_R": blocks.rows, "BLOCK_C": blocks.classes}
    constants = {**sizes, "OPERAND": OPERANDS[operand], **flags}
    compiled(f"forward D={d} {operand} {options}", forward_kernel, types, constants, blocks)


def compile_backward(
    d: int, operand: torch.dtype, weight: torch.dtype, target: str, kind: str = "sgd",
    state: torch.dtype = torch.float32, **options: bool,
) -> None:  # fmt: skip
    """The backward kernel for rows of d features."""
    blocks = backward_blocks(d, operand, False)
    names = ("HAS_ACTIVE", "FILTERED", "NESTEROV", "CLIPPED", "STOCHASTIC", "KAHAN")
    flags = dict.fromkeys(names, False) | {"HAS_MOMENTUM": kind == "sgd"} | options
    update = target == "update"
    types = {
        **dict.fromkeys(("rows", "terms", "bias", "bias_gradient", "left_out_mass"), "*fp32"),
        **dict.fromkeys(("operand_rows", "gradients", "old_weights"), POINTERS[operand]),
        **dict.fromkeys(("columns", "bounds", "left_out_classes"), "*i32"),
        **dict.fromkeys(("first", "num_classes", "num_rows", "num_pulled"), "i32"),
        **dict.fromkeys(("scale", "filter_below"), "fp32"),
        "order": "*i64",
        "weight": POINTERS[weight],
        "active": "*i64" if flags["HAS_ACTIVE"] else None,
        "target": "*fp32" if target in ("write", "add") else None,
        "first_state": POINTERS[state] if update else None,
        "second_state": "*fp32" if kind in ("adam", "adamw") else None,
        "compensation": "*bf16" if flags["KAHAN"] else None,
        "numbers": "*fp32" if update else None,
        "seeds": "*i64" if update else None,
        "apply": "*u8" if update else None,
    }
    always = dict.fromkeys(("COSINE", "HAS_BIAS", "PULLED", "STORE_OLD"), True)
    sizes = {"D": d, "D_PAD": padded_features(d), "BLOCK_R": blocks.rows, "BLOCK_C": blocks.classes}
    choice = {"OPERAND": OPERANDS[operand], "TARGET": target, "KIND": kind}
    constants = {**sizes, **choice, **always, **flags}
    name = f"backward D={d} {operand} {target} {kind} {options}"
    compiled(name, backward_kernel, types, constants, blocks)


if __name__ == "__main__":
    single, half = torch.float32, torch.bfloat16
    for width in (128, 256, 512):
        compile_forward(width, half, half)
    compile_forward(100, half, single, HAS_ACTIVE=True, WITH_GAP=True)
    compile_forward(7, single, single, HAS_FACTOR=False, HAS_BIAS=False)
    compile_backward(128, half, half, "update", STOCHASTIC=True)
    compile_backward(512, half, half, "update", state=half, STOCHASTIC=True)
    compile_backward(128, half, half, "update", "adamw", CLIPPED=True, KAHAN=True)
    compile_backward(40, half, single, "update", "adam", half, FILTERED=True, HAS_ACTIVE=True)
    compile_backward(128, single, single, "update", "adagrad")
    for purpose in ("none", "write", "add"):
        compile_backward(16, half, single, purpose)
    factors = {"weight": "*fp32", "active": None, "factor": "*fp32", "scale": "fp32"}
    chosen = {"D": 512, "D_PAD": 512, "HAS_ACTIVE": False, "BLOCK_C": 16}
    plain = Blocks(0, 16, 512, 4, 1)
    compiled("factors", factor_kernel, factors | {"num_classes": "i32"}, chosen, plain)
