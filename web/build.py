"""Assemble the npm package in `dist/`: the modules, the page's engine, the compiled kernel, and its size."""

import gzip
import re
import shutil
import sys
from pathlib import Path

WEB = Path(__file__).parent
ENGINE = WEB.parent / "src" / "cellstack" / "inspect" / "page" / "engine"
MOST_BYTES = 400_000
"""Of the whole package, compressed."""


def needed(module: Path, engine: Path) -> set[Path]:
    """Return the module and all that it imports."""
    found: set[Path] = set()
    left = [module]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        names = re.findall(r'from "\./([^"]+)"', path.read_text())
        left += [engine / name[7:] if name.startswith("engine/") else path.parent / name for name in names]
    return found


def assemble(kernel: Path, dist: Path) -> None:
    """Write the package.

    Args:
        kernel: the compiled `cellstack.wasm`.
        dist: the folder, which is replaced.
    """
    shutil.rmtree(dist, ignore_errors=True)
    (dist / "engine").mkdir(parents=True)
    for path in needed(WEB / "src" / "index.js", ENGINE):
        shutil.copy(path, dist / "engine" if path.parent == ENGINE else dist)
    for path in (WEB / "src" / "index.d.ts", WEB / "package.json", WEB / "README.md", WEB.parent / "LICENSE", kernel):
        shutil.copy(path, dist)
    files = [path for path in dist.rglob("*") if path.is_file()]
    size = sum(len(gzip.compress(path.read_bytes(), 9)) for path in files)
    print(f"{dist}: {len(files)} files, {size // 1000} kB compressed")
    if size > MOST_BYTES:
        sys.exit(f"expected at most {MOST_BYTES // 1000} kB")


if __name__ == "__main__":
    assemble(Path(sys.argv[1]), WEB / "dist")
