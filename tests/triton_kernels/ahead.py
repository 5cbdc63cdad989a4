# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels compiled ahead of time on a machine without a GPU, and what can be read from the result.

`recording()` takes the place of the launcher: an op called on tensors of the meta device leaves its launches
in a list instead of running them. `compile_for` specialises a launch as Triton's own JIT would on the
hardware (types, divisibility by 16, ones, constants) and compiles it; `Result.problems()` lists what a kernel
must not have: spills, serialised or missing matrix instructions, more shared memory than there is, images
read a few bytes at a time.

`report.py` prints a table of all of this.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from patching import replaced
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


def _parse_one_at_a_time() -> None:
    """Kernels compile in threads; CPython 3.11 counts the depth of syntax trees for all threads together."""
    owner = next(cls for cls in JITFunction.__mro__ if "parse" in vars(cls))
    parse, lock = owner.parse, threading.RLock()

    def alone(self):
        with lock:
            return parse(self)

    owner.parse = alone


_parse_one_at_a_time()

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what later versions do anyway, and 3.9 asks about

KB = 1024
LARGE = 2048  # elements of a tile whose accesses matter
MANY = 8  # narrow accesses of a thread at one place
MATRIX_DTYPES = ("f16", "bf16", "tf32")


@dataclass(frozen=True)
class Target:
    """What is compiled for. `shared` is the most shared memory of one block, which nobody else checks."""

    name: str
    gpu: GPUTarget
    shared: int
    tuned: bool = False  # every candidate has to fit; elsewhere tuning passes over those that do not
    wide: int = 16  # bytes a thread moves at once when an image is read as fast as it can be
    most_stages: int = 8


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * KB),
        Target("sm_90a", GPUTarget("cuda", 90, 32), 227 * KB, tuned=True),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KB, wide=8, most_stages=2),
    )
}


@dataclass(frozen=True)
class Launch:
    """One call of the launcher: everything that decides about the code, and the grid."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    label: str = ""
    untuned: bool = True  # the tile that runs where nothing was measured, so that it has to fit

    @property
    def constants(self) -> dict[str, Any]:
        return {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}

    @property
    def dtype(self) -> str:
        """Of the first tensor, the image."""
        tensors = [a for a in self.arguments.values() if isinstance(a, torch.Tensor)]
        return str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"

    @property
    def configuration(self) -> str:
        blocks = [f"{k.lower()}={v}" for k, v in self.constants.items() if k.startswith(("BLOCK", "GROUP"))]
        return " ".join([*blocks, f"warps={self.num_warps}", f"stages={self.num_stages}"])


@contextmanager
def recording(label: str = "", *, every: bool = False) -> Iterator[list[Launch]]:
    """The launches of everything called inside, none made; `every`: of all candidates for the tiles."""
    # every module that launches has to be there before it is looked through
    from dcd_kernels.backends.triton import entry, tuning  # noqa: F401
    from dcd_kernels.backends.triton import launch as launcher

    launches: list[Launch] = []

    def record(kernel, grid, arguments, num_warps, num_stages):
        launch = Launch(kernel, tuple(grid), dict(arguments), num_warps, num_stages, label, not trying)
        launches.append(launch)

    trying = False

    def choose(kernel, key, candidates, run):
        nonlocal trying
        trying = True
        for candidate in candidates[1:] if every else ():
            run(candidate)
        trying = False
        return candidates[0]

    with replaced(launcher.launch, record), replaced(tuning.choose, choose):
        yield launches


@dataclass(frozen=True)
class Access:
    """Instructions of one width that a source line makes one thread execute."""

    kind: str  # 'load' or 'store'
    place: tuple[str, int]  # file and line
    width: int  # bytes
    count: int


@dataclass(frozen=True)
class Dot:
    """A tl.dot after layouts were given to it."""

    m: int
    n: int
    k: int
    dtype: str
    wgmma: bool
    matrix: bool  # in a layout of matrix instructions, not of plain multiply-adds
    precision: str

    def __str__(self) -> str:
        how = "wgmma" if self.wgmma else "mma" if self.matrix else "fma"
        return f"{self.m}x{self.n}x{self.k}:{self.dtype}:{how}"


@dataclass
class Result:
    """What the compiler made of a launch."""

    launch: Launch
    target: Target
    shared: int
    asm: dict[str, Any]
    log: str = ""  # of ptxas -v
    seconds: float = 0.0
    dots: list[Dot] = field(default_factory=list)

    def _logged(self, pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, self.log))

    @cached_property
    def code(self) -> str:
        return self.asm["amdgcn"] if "amdgcn" in self.asm else self.asm["ptx"]

    @cached_property
    def registers(self) -> int:
        if "amdgcn" in self.asm:
            return self._metadata("vgpr_count")
        return self._logged(r"Used (\d+) registers")

    @cached_property
    def spills(self) -> int:
        """Bytes (NVIDIA: stack frame, which spilled values make; AMD: registers) that do not stay on chip."""
        if "amdgcn" in self.asm:
            return self._metadata("vgpr_spill_count") + self._metadata("private_segment_fixed_size")
        return max(self._logged(r"(\d+) bytes stack frame"), self._logged(r"(\d+) bytes spill"))

    def _metadata(self, name: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{name}: +(\d+)", self.asm["amdgcn"]))

    @cached_property
    def warnings(self) -> list[str]:
        """C75xx: wgmma that ptxas had to serialise, still wgmma in the PTX."""
        return sorted(set(re.findall(r"C75\d\d[^\n]*", self.log)))

    @cached_property
    def matrix(self) -> Counter[str]:
        names = re.findall(r"\b(wgmma\.mma_async|mma\.sync|v_mfma|v_smfmac)", self.code)
        return Counter("mfma" if name.startswith("v_") else name.split(".")[0] for name in names)

    @cached_property
    def accesses(self) -> list[Access]:
        files = dict(re.findall(r"^\s*\.file\s+(\d+) (.*)$", self.code, re.MULTILINE))
        names = {number: re.findall(r'([^"/]+)"', text)[-1] for number, text in files.items()}
        found: Counter[tuple] = Counter()
        place = ("", 0)
        for text in self.code.splitlines():
            if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text):
                place = names.get(at[1], ""), int(at[2])
            elif access := _access(text):
                found[access[0], place, access[1]] += 1
        return [Access(kind, at, width, count) for (kind, at, width), count in sorted(found.items())]

    def moved(self, kind: str, *, wide: bool) -> int:
        """Bytes that one pass over the code moves in accesses of full width, or in narrower ones."""
        chosen = [a for a in self.accesses if a.kind == kind and (a.width >= self.target.wide) == wide]
        return sum(a.width * a.count for a in chosen)

    def narrow(self, kind: str) -> list[Access]:
        """Tiles of images and weights that are moved in many small pieces.

        Vectors do not count, threads share their elements; nor do the few numbers of a sample's Φ.
        """
        tiles = _tile_accesses(self.asm["ttgir"])
        return [
            a
            for a in self.accesses
            if a.kind == kind and a.width < self.target.wide and a.count > MANY and a.place in tiles
        ]

    @property
    def _needs_reordering(self) -> bool:
        """wgmma takes TF32 only with the reduced axis contiguous: sums over pixels reorder what they load."""
        return self.launch.kernel.fn.__name__ == "pixel_sums" and any(
            dot.dtype == "tf32" and dot.wgmma for dot in self.dots
        )

    def problems(self, *, wide: bool = False) -> list[str]:
        """What is wrong, in words; `wide`: the shapes allow 16 bytes at a time for every image."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled at {self.registers} registers")
        found += [f"ptxas: {warning}" for warning in self.warnings]
        if self.shared > self.target.shared and (self.launch.untuned or self.target.tuned):
            found.append(f"{self.shared} bytes of shared memory, {self.target.name} has {self.target.shared}")
        for dot in self.dots:
            if dot.dtype in MATRIX_DTYPES and not dot.matrix:
                found.append(f"no matrix instruction for {dot}")
            if self.target.name == "sm_90a" and wants_wgmma(dot, self.launch.num_warps) and not dot.wgmma:
                found.append(f"no wgmma for {dot}")
        if any(dot.dtype in MATRIX_DTYPES for dot in self.dots) and not self.matrix:
            found.append("dots, and no matrix instruction in the code")
        if wide and not self._needs_reordering:
            # gfx942 stores from the layout of its matrix instructions, which is narrow for contiguous images
            for kind in ("load", "store") if self.target.gpu.backend == "cuda" else ("load",):
                scattered = [
                    f"{a.count} of {a.width} bytes at {a.place[0]}:{a.place[1]}" for a in self.narrow(kind)
                ]
                if scattered:
                    found.append(f"narrow {kind}s: {', '.join(scattered)}")
        return found


def wants_wgmma(dot: Dot, num_warps: int) -> bool:
    return dot.dtype in MATRIX_DTYPES and dot.m >= 64 and dot.n >= 16 and num_warps % 4 == 0


_UNITS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}


def _access(text: str) -> tuple[str, int] | None:
    """(kind, bytes a thread) of an access to global memory."""
    if found := re.search(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)\b(?=,|;)", text):
        return "load", int(found[1], 0)
    if "cp.async.bulk" in text and "global" in text:
        return ("load" if ".shared" in text.split(".global")[0] else "store"), 16
    if found := re.search(r"\b(ld|st)\.(?:\w+\.)*?global\S*?(?:\.v(\d))?\.[busf](\d+)\b", text):
        return {"ld": "load", "st": "store"}[found[1]], int(found[2] or 1) * int(found[3]) // 8
    if found := re.search(r"\b(?:global|buffer)_(load|store)_(?:lds_)?(\w+)", text):
        unit = next((size for name, size in _UNITS.items() if found[2].startswith(name)), None)
        return (found[1], unit) if unit else None
    return None


def _tile_accesses(ttgir: str) -> set[tuple[str, int]]:
    """Places of the loads and stores of two-dimensional tiles, larger than a sample's Φ."""
    names = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    found = set()
    for text in ttgir.splitlines():
        op = re.search(
            r"(tt\.load|tt\.store|async_copy_global_to_local|amdg?\w*\.buffer_(load|store)) ", text
        )
        shape = re.search(r"tensor<(\d+)x(\d+)x", text)
        if not op or not shape or int(shape[1]) * int(shape[2]) < LARGE:
            continue
        name = re.search(r"loc\((#loc\d*)\)$", text)
        where = names.get(name[1], "") if name else ""
        while where and not (at := re.match(r'"([^"]*)":(\d+):', where)):
            # a named place, a call (the callee comes first), or several fused into one
            inner = re.search(r"#loc\d*", where)
            where = names.get(inner[0], "") if inner else ""
        if where:
            found.add((at[1].rsplit("/", 1)[-1], int(at[2])))
    return found


def _dots(ttgir: str) -> list[Dot]:
    """Every dot of the module. Tiles that the pipeliner splits along K count as they stand."""
    matrix = set(re.findall(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma)", ttgir, re.MULTILINE))
    found = []
    for text in ttgir.splitlines():
        if not (op := re.search(r"(tt\.dot|ttng\.warp_group_dot) %", text)):
            continue
        shape = re.search(
            r"(\d+)x(\d+)x(\w+).*?\* .*?(\d+)x(\d+)x(\w+).*?-> tensor<\d+x\d+x\w+, (#\w+)", text
        )
        assert shape, text
        precision = re.search(r"inputPrecision = (\w+)", text)
        precision = precision[1] if precision else "ieee"
        wgmma = op[1].startswith("ttng")
        # wgmma has no other product of float32, and is printed without its precision
        is_tf32 = shape[3] == "f32" and (wgmma or precision.startswith("tf32"))
        dtype = "tf32" if is_tf32 else shape[3]
        m, k, n = int(shape[1]), int(shape[2]), int(shape[5])
        found.append(Dot(m, n, k, dtype, wgmma, shape[7] in matrix, precision))
    return found


@cache
def _backend(target: Target):
    return make_backend(target.gpu)


@cache
def _binder(kernel, target: Target):
    return create_function_from_signature(kernel.signature, kernel.params, _backend(target))


def specialise(launch: Launch, target: Target):
    """(options, signature, constants, attributes) that the JIT would compile the launch with."""
    options = {
        "num_warps": launch.num_warps,
        "num_stages": min(launch.num_stages, target.most_stages),
    }
    bound, specialisation, rest = _binder(launch.kernel, target)(**launch.arguments, **options)
    return launch.kernel._pack_args(_backend(target), options, bound, specialisation, rest)


def key(launch: Launch, target: Target) -> str:
    """Launches of one key are one compilation."""
    options, signature, constants, attributes = specialise(launch, target)
    parts = (launch.kernel.cache_key, signature, constants, attributes, options.num_warps, options.num_stages)
    return f"{target.name} {parts}"


_compiled: dict[str, Result] = {}


def compile_for(launch: Launch, target: Target) -> Result:
    """Compiles; from memory or Triton's cache on disk where it was compiled before."""
    name = key(launch, target)
    if name not in _compiled:
        options, signature, constants, attributes = specialise(launch, target)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target.gpu, options=dict(options.__dict__))
        log = _assemble(compiled.asm["ptx"], target) if target.gpu.backend == "cuda" else ""
        dots = _dots(compiled.asm["ttgir"])
        _compiled[name] = Result(launch, target, compiled.metadata.shared, compiled.asm, log, dots=dots)
    return _compiled[name]


def assembler(target: Target) -> Path | None:
    """The ptxas that Triton itself would use for the target."""
    from triton.backends.nvidia import compiler

    try:
        return Path(compiler.get_ptxas(target.gpu.arch).path)
    except RuntimeError:  # not packaged
        return None


def _assemble(ptx: str, target: Target) -> str:
    """What ptxas -v has to say. Triton throws it away. 20 ms a kernel."""
    program = assembler(target)
    if program is None:
        raise RuntimeError("Triton came without ptxas: registers and spills cannot be known")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [program, "-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={target.name}"]
        done = subprocess.run(
            [*command, source, "-o", Path(folder, "kernel.o")], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return done.stderr


COLUMNS = (
    *("kernel", "case", "dtype", "configuration", "target", "regs", "shared", "spill"),
    *("matrix", "dots", "loads", "stores", "problems"),
)


def row(result: Result, *, wide: bool) -> tuple[str, ...]:
    """For `table`. Loads and stores: bytes in wide/narrow accesses, once over the code."""
    moved = {
        kind: f"{result.moved(kind, wide=True)}/{result.moved(kind, wide=False)}"
        for kind in ("load", "store")
    }
    return (
        result.launch.kernel.fn.__name__,
        result.launch.label,
        result.launch.dtype,
        result.launch.configuration,
        result.target.name,
        str(result.registers),
        str(result.shared),
        str(result.spills),
        " ".join(f"{name}:{count}" for name, count in result.matrix.items()) or "-",
        " ".join(f"{count}*{dot}" for dot, count in Counter(map(str, result.dots)).items()) or "-",
        *moved.values(),
        "; ".join(result.problems(wide=wide)) or "-",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    rows = [COLUMNS, *rows]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
