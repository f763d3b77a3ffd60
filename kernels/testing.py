"""Compile a Triton kernel for a GPU that need not be there; count registers and instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

SHARED_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}


class Usage(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread; registers that spill lie there.
        local: Bytes of local memory per thread beside the stack.
        shared: Bytes per block.
        matrix: Instructions for the matrix units, in PTX.
        newest: Those of them that came with sm_90 or later.
    """

    registers: int
    stack: int
    local: int
    shared: int
    matrix: int
    newest: int


def compile_ahead(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    arch: int,
) -> Usage:
    """Compile a Triton kernel for `arch` (compute capability × 10) as for the usual call.

    Args:
        kernel: The function under @triton.jit.
        types: Triton's type of each argument that is no constant; one that ends in "!" is known to
            be divisible by 16, as aligned pointers and widths are at run time.
        constants: The constexpr arguments.
        options: Launch options.
        arch: 80, 86, 90, 100 or 120.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: types[n].rstrip("!") if n in types else "constexpr" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][-1] == "!"}
    source = ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        said = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    ptx = compiled.asm["ptx"]
    newest = len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", ptx))
    return Usage(
        registers=_number(r"REG:(\d+)", said),
        stack=_number(r"STACK:(\d+)", said),
        local=_number(r"LOCAL:(\d+)", said),
        shared=compiled.metadata.shared,
        matrix=newest + len(re.findall(r"\bmma\.sync\b", ptx)),
        newest=newest,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout
