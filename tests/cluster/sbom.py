"""`python sbom.py NAME VERSION PIP DPKG > FILE`: what is in an image, as a CycloneDX 1.6 document.

PIP is what `pip list --format json` says in the image, DPKG what `dpkg-query -W -f
'${Package}\\t${Version}\\t${Architecture}\\n'` does. Runs in the environment that tests/cluster/tools.sh makes, and
imports nothing of Ergon. The document is checked against CycloneDX's own schema before it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def urls(pip: Path, dpkg: Path) -> Iterator[PackageURL]:
    """Every package, by the name under which the world knows it."""
    for package in json.loads(pip.read_text(encoding="utf-8")):
        yield PackageURL("pypi", name=package["name"].lower().replace("_", "-"), version=package["version"])
    for line in dpkg.read_text(encoding="utf-8").splitlines():
        name, version, architecture = line.split("\t")
        yield PackageURL("deb", "debian", name, version, qualifiers={"arch": architecture})


def document(name: str, version: str, packages: Iterator[PackageURL]) -> str:
    """The document's JSON. Raises ValueError where it breaks CycloneDX's schema."""
    image = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref="image")
    bom = Bom()
    bom.metadata.component = image
    components = [
        Component(name=url.name, version=url.version, purl=url, bom_ref=url.to_string(), type=ComponentType.LIBRARY)
        for url in packages
    ]
    bom.components.update(components)
    bom.register_dependency(image, components)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the document breaks the schema: {fault}")
    return text


if __name__ == "__main__":
    sys.stdout.write(document(sys.argv[1], sys.argv[2], urls(Path(sys.argv[3]), Path(sys.argv[4]))) + "\n")
