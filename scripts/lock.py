"""Resolve what pyproject.toml asks for into the exact versions of requirements/demo.txt and requirements/dev.txt.

Each file is complete, so that it installs with `pip install --no-deps`. dev.txt builds on demo.txt; gpu-compiler.txt
has the part of JAX's CUDA plugin that compiles, in the version of the part that dev.txt has. Run by `make lock`.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = "# Made by `make lock` from pyproject.toml. Complete: installed with --no-deps.\n"
# Only on macOS, where the interpreter that resolves is not: ipykernel asks for it there.
MACOS = "appnope==0.1.4; sys_platform == 'darwin'"


def resolve(requirements: list[str]) -> set[str]:
    """Return the `name==version` pins of `requirements` and what they need, under requirements/constraints.txt."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += ["--only-binary=:all:", "--constraint", str(ROOT / "requirements" / "constraints.txt"), *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {f"{item['metadata']['name'].lower()}=={item['metadata']['version']}" for item in report["install"]}


def write(name: str, lines: list[str]) -> None:
    """Write one lock file."""
    (ROOT / "requirements" / name).write_text(HEADER + "".join(f"{line}\n" for line in lines))


def main() -> None:
    """Write the lock files."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    runtime = pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
    demo = resolve(runtime)
    dev = resolve(runtime + extras["dev"])
    if changed := demo - dev:
        raise SystemExit(f"the dev extra moves {sorted(changed)}: pin them in requirements/constraints.txt")
    write("demo.txt", sorted(demo | set(extras["demo"])))
    write("dev.txt", ["-r demo.txt", *sorted(dev - demo | {MACOS})])
    [plugin] = (pin for pin in dev if pin.startswith("jax-cuda13-plugin=="))
    write("gpu-compiler.txt", [plugin.replace("plugin", "pjrt")])


if __name__ == "__main__":
    main()
