"""Disassemble the kernel, and fail if any code needs a feature of the processor that isn't checked before it runs.

    python tests/guard/foreign.py    # after compiler.py, as `make guard` does

The code of an object may use the features in its CELLSTACK_NEEDS (CMakeLists.txt), for which kernel/dispatch.cpp asks
the processor, and those of every x86-64 processor; no other object may share its functions, as the linker would keep
one copy for all processors. The linked module may contain what its objects contain and nothing else.

Then the kernel's tests run as on older processors: for each instruction set of this processor but the largest, with a
copy of the module in which every instruction that needs more than this set is replaced by `ud2`, which all processors
refuse, and the sets with such instructions are hidden.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from iced_x86 import CpuidFeature, Decoder, Formatter, FormatterSyntax, Instruction

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "compiler"
TRAPPED = HERE.parents[1] / "build" / "foreign" / "_kernel.so"
NAMES = {value: name for name, value in vars(CpuidFeature).items() if isinstance(value, int)}
# Of every processor of x86-64; and without effect where it doesn't exist (CET_IBT), or asked for (XSAVE: platform.h).
FIRST = ["INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "X64", "CMOV", "CX8", "FPU", "MMX", "SSE", "SSE2"]
LATER = ["CET_IBT", "CPUID", "FXSR", "MULTIBYTENOP", "PAUSE", "RDTSC", "SYSCALL", "XSAVE"]
EVERYWHERE = frozenset([*FIRST, *LATER])
# What the names in CELLSTACK_NEEDS permit.
PERMITTED = {
    "avx2": {"AVX", "AVX2"},
    "fma": {"FMA"},
    "avx512f": {"AVX512F"},
    "avx512vl": {"AVX512VL"},
    "avx512dq": {"AVX512DQ"},
    "avx512bw": {"AVX512BW"},
    "avx512vnni": {"AVX512_VNNI"},
    "avx512bf16": {"AVX512_BF16"},
}
UD2, INT3 = b"\x0f\x0b", b"\xcc"


@dataclass
class Code:
    """What the code of an object or module contains: how often each feature is needed, and an example of each."""

    needs: str  # features that are checked before it runs, separated by commas
    features: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)  # functions of which a linker keeps one copy of several objects

    def foreign(self) -> set[str]:
        """Return the features that nothing has checked."""
        return set(self.features) - permitted(self.needs)


def permitted(needs: str) -> set[str]:
    return set(EVERYWHERE).union(*(PERMITTED[name] for name in needs.split(",") if name))


def instructions(elf: ELFFile) -> Iterator[tuple[str, int, Instruction]]:
    """Yield each instruction with its section and its offset in the file."""
    for section in elf.iter_sections():
        if section["sh_type"] == "SHT_PROGBITS" and section["sh_flags"] & 4:  # executable
            for instruction in Decoder(64, section.data(), ip=0):
                yield section.name, section["sh_offset"] + instruction.ip, instruction


def features_of(instruction: Instruction) -> set[str]:
    return {"invalid"} if instruction.is_invalid else {NAMES[feature] for feature in instruction.cpuid_features()}


def code_of(path: Path, needs: str) -> Code:
    """Disassemble a file."""
    code, formatter = Code(needs), Formatter(FormatterSyntax.INTEL)
    with path.open("rb") as file:
        elf = ELFFile(file)
        for section, _, instruction in instructions(elf):
            for feature in features_of(instruction) - EVERYWHERE:
                code.features[feature] += 1
                if feature not in code.examples:
                    code.examples[feature] = f"{formatter.format(instruction)} at {section}+{instruction.ip:#x}"
        for table in elf.iter_sections():
            if isinstance(table, SymbolTableSection):
                code.shared += [
                    symbol.name
                    for symbol in table.iter_symbols()
                    if symbol["st_info"]["type"] == "STT_FUNC"
                    and symbol["st_info"]["bind"] == "STB_WEAK"
                    and symbol["st_shndx"] != "SHN_UNDEF"
                ]
    return code


def needs_of(command: str) -> str | None:
    """Return the features that a compiler's command declares; None for code that every processor runs."""
    found = re.search(r'CELLSTACK_NEEDS=\\?"([\w,]*)', command)
    return found and found[1]


def objects(build: Path) -> dict[str, Code]:
    """Disassemble all objects of a build."""
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    paths = [(Path(each["output"]), needs_of(each["command"])) for each in commands]
    found = {str(path): code_of(build / path, needs or "") for path, needs in paths}
    for path, needs in paths:
        if needs is None:
            found[str(path)].shared.clear()  # compiled for every processor: any copy will do
    return found


def problems(found: dict[str, Code], module: Code) -> list[str]:
    """Return a line for each feature that code may not need, and for each function that it may not share."""
    lines = []
    for path, code in found.items():
        for feature in sorted(code.foreign()):
            needs = code.needs or "no feature"
            lines.append(
                f"{path}: {code.features[feature]} instructions need {feature}, such as {code.examples[feature]}; "
                f"{needs} is checked before they run"
            )
        if code.shared:
            lines.append(
                f"{path}: the linker may keep its copy of {code.shared[0]} for all processors: "
                "put the function into an anonymous namespace"
            )
    total = sum((code.features for code in found.values()), Counter())
    for feature, count in module.features.items():
        if count > total[feature]:
            lines.append(f"the module has {count} instructions that need {feature}, and its objects {total[feature]}")
    return lines


def table(found: dict[str, Code]) -> str:
    """Return what each object needs beyond x86-64, as text."""
    plain = [path for path, code in found.items() if not code.features]
    lines = [
        f"{path.removeprefix('CMakeFiles/')}: "
        + ", ".join(f"{feature} {count:,}" for feature, count in sorted(code.features.items()))
        for path, code in found.items()
        if code.features
    ]
    return "\n".join([*lines, f"{len(plain)} other objects: only what every x86-64 processor has"])


def sets_of(found: dict[str, Code]) -> dict[str, str]:
    """Return the features that each instruction set needs."""
    return {re.sub(r".*simd_(\w+)\.dir.*", r"\1", path): code.needs for path, code in found.items() if "simd_" in path}


def trapped(module: Path, sets: dict[str, str], name: str) -> bytes:
    """Return a copy of the module as it is on a processor that has only the features of one of the sets."""
    there = permitted(sets[name])
    data = bytearray(module.read_bytes())
    with module.open("rb") as file:
        for _, at, instruction in instructions(ELFFile(file)):
            if not features_of(instruction) <= there:
                data[at : at + instruction.len] = UD2 + INT3 * (instruction.len - len(UD2))
    for needs in sets.values():
        if not permitted(needs) <= there:
            data = data.replace(
                needs.encode() + b"\0", b"?" + needs.encode()[1:] + b"\0"
            )  # unknown: no processor has it
    return bytes(data)


def run_on_older_processors(module: Path, sets: dict[str, str]) -> bool:
    """Run the kernel's tests with each trapped copy, and return whether all of them pass."""
    environment = os.environ | {"CELLSTACK_KERNEL": str(module), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    script = "import trapped; from cellstack import _kernel; print(*_kernel.isas())"
    listed = subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    older = sorted(listed.stdout.split(), key=lambda name: len(permitted(sets[name])))[:-1]
    good = True
    for name in older:
        TRAPPED.parent.mkdir(parents=True, exist_ok=True)
        TRAPPED.write_bytes(trapped(module, sets, name))
        print(f"the kernel's tests, as on a processor with {sets[name] or 'x86-64'} and no more:", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "trapped", "--noconftest", "-p", "no:cacheprovider", "-q"]
        command += ["-m", "not slow", "-k", "not never_comes", str(HERE.parent / "kernel" / "test_kernel.py")]
        good &= subprocess.run(command, env=environment | {"CELLSTACK_KERNEL": str(TRAPPED)}).returncode == 0
    return good


def main() -> int:
    found = objects(BUILD)
    (module,) = BUILD.glob("_kernel*.so")
    print(table(found))
    lines = problems(found, code_of(module, ""))
    for line in lines:
        print(f"guard: {line}", file=sys.stderr)
    return not (run_on_older_processors(module, sets_of(found)) and not lines)


if __name__ == "__main__":
    sys.exit(main())
