"""For the tests of fused kernels: compile for a GPU that is not there, and read the result."""

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
        stack: Bytes per thread.
        local: Instructions that load from or store to local memory.
        shared: Bytes per block.
        matrix: Instructions for the matrix units.
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
        code = _tool("nvdisasm", "-c", str(cubin))
    newest = len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)\b", code))
    return Usage(
        registers=_number(r"REG:(\d+)", said),
        stack=_number(r"STACK:(\d+)", said),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        matrix=newest + len(re.findall(r"\bHMMA\b", code)),
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
