"""What the scripts of checks without a GPU share: kernels compiled ahead of time, and the answer in JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["CAPABILITIES", "Variant", "compile_ahead_of_time", "main"]

CAPABILITIES = (80, 90, 100)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""Constants that are told to the compiler, not to the kernel."""


class Variant(NamedTuple):
    """A kernel as it is compiled once for each GPU."""

    name: str
    kernel: Any
    kinds: dict[str, str]
    """Types of its pointers and long numbers, by name; all other numbers are of 32 bits."""
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    """Numbers, beside all pointers, that are multiples of 16."""


def compile_ahead_of_time(
    packages: Iterable[str], variants: Callable[[], list[Variant]]
) -> dict[str, list[Any]]:
    """Compiles the kernels for each GPU; returns what came out, and which were imported unasked."""
    packages = [f"lightning_compress.ops.{name}" for name in packages]
    for package in packages:
        importlib.import_module(package)
    unasked = [package for package in packages if f"{package}.triton_kernel" in sys.modules]
    found = []
    for capability, variant in itertools.product(CAPABILITIES, variants()):
        compiled = _compiled(capability, variant)
        found.append(
            {
                "name": f"sm_{capability} {variant.name}",
                "capability": capability,
                "ptx": compiled.asm["ptx"],
                "cubin_bytes": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "resources": _resources(compiled.asm["cubin"]),
            }
        )
    return {"kernels": found, "unasked": unasked}


def main(
    interpret: Callable[[], dict[str, list[str]]],
    packages: Iterable[str],
    variants: Callable[[], list[Variant]],
) -> None:
    """Runs what the command line asks for, ``interpret`` or ``compile``, and prints the answer."""
    torch.manual_seed(0)
    checks = {"interpret": interpret, "compile": lambda: compile_ahead_of_time(packages, variants)}
    json.dump(checks[sys.argv[1]](), sys.stdout)


def _compiled(capability: int, variant: Variant) -> Any:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    options = {name: value for name, value in variant.constants.items() if name in OPTIONS}
    constants = {name: value for name, value in variant.constants.items() if name not in OPTIONS}
    signature = {name: "constexpr" if name in constants else variant.kinds.get(name, "i32") for name in names}
    pointers = [name for name, kind in variant.kinds.items() if kind.startswith("*")]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *variant.aligned)},
    )
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory per thread: where spills would go."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.findall(rf"\b{name}:(\d+)", shown)[-1]) for name in ("REG", "STACK", "LOCAL")}
