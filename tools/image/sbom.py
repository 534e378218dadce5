"""Make a bill of materials of an image's locks into that of the image: compare it, and add Debian's packages.

Usage: python sbom.py ROOT BOM

ROOT: the image's file system; BOM: a CycloneDX file in JSON, which is rewritten. Exit code 1 if the Python packages of
the image are not those of the file.
"""

import argparse
import json
import re
import shlex
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PROJECT = "muse-lightning"


def python_packages(root: Path) -> dict[str, str]:
    """Versions by normalized name of what is in the image's environment."""
    (folder,) = root.glob("opt/muse/lib/python3*/site-packages")
    found = distributions(path=[str(folder)])
    return {re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(): package.version for package in found}


def debian_packages(root: Path) -> list[dict[str, str]]:
    """A component for each installed package; purls by the specification's type "deb"."""
    lines = shlex.split((root / "etc/os-release").read_text(encoding="utf-8"), comments=True)
    release = dict(line.split("=", 1) for line in lines)
    components = []
    for entry in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").strip().split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", entry, flags=re.MULTILINE))
        if fields["Status"] != "install ok installed":
            continue
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/{release['ID']}/{quote(name)}@{quote(version, safe=':')}?arch={fields['Architecture']}"
        purl += f"&distro={release['ID']}-{release['VERSION_ID']}"
        components.append({"bom-ref": purl, "name": name, "purl": purl, "type": "library", "version": version})
    return components


def once(bom: dict[str, Any]) -> None:
    """Keep one component of each package: locks of several extras name the same ones."""
    bom["components"] = list({component["purl"]: component for component in bom["components"]}.values())
    kept = {component["bom-ref"] for component in [bom["metadata"]["component"], *bom["components"]]}
    bom["dependencies"] = [entry for entry in bom["dependencies"] if entry["ref"] in kept]


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the file; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("bom", type=Path)
    options = parser.parse_args(arguments)
    bom: dict[str, Any] = json.loads(options.bom.read_text(encoding="utf-8"))
    once(bom)
    installed = python_packages(options.root)
    bom["metadata"]["component"]["version"] = installed.pop(PROJECT)
    listed = {component["name"]: component["version"] for component in bom["components"]}
    if listed != installed:
        differing = sorted(f"{name} {version}" for name, version in listed.items() ^ installed.items())
        print(f"in the image or in its locks, not in both: {', '.join(differing)}", file=sys.stderr)
        return 1
    of_debian = debian_packages(options.root)
    bom["components"] += of_debian
    options.bom.write_text(json.dumps(bom, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"CycloneDX {bom['specVersion']}: {len(listed)} packages of Python, {len(of_debian)} of Debian")
    return 0


if __name__ == "__main__":
    sys.exit(main())
