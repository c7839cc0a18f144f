"""Installs what the package needs with the given extras, without the package: it is compiled meanwhile.

pip would install the dependencies before it compiles the package.
"""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def dependencies(project, extras):
    """Return the requirements of pyproject.toml, where `cellstack[…]` stands for those of other extras."""
    found = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            one = Requirement(line)
            found += dependencies(project, one.extras) if one.name == project["name"] else [line]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    needs = dependencies(tomllib.loads(text)["project"], sys.argv[1:])
    sys.exit(subprocess.run([sys.executable, "-m", "pip", "install", "-q", *needs]).returncode)
