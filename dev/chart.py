"""The chart's copy of the CRD: `python -m dev.chart sync` writes it, `python -m dev.chart check` compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CRD = ROOT / "crds" / "derp.network_derpregions.yaml"
TEMPLATE = ROOT / "charts" / "derp-operator" / "templates" / "crd.yaml"

_HEAD = """\
{{- /* Generated from crds/ by `python -m dev.chart sync`. */ -}}
{{- if .Values.crds.install }}
"""
_METADATA = """\
metadata:
  labels:
    {{- include "derp-operator.labels" . | nindent 4 }}
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""
_FOOT = "{{- end }}\n"


def template(crd: str) -> str:
    """The CRD as a template: a part of the chart so that upgrades reach it, which Helm's own crds/ folder prevents."""
    body = crd[crd.index("apiVersion:") :]
    if "{{" in body:
        raise ValueError("the CRD contains {{, which Helm would take for a template")
    return _HEAD + body.replace("metadata:\n", _METADATA, 1) + _FOOT


def main(arguments: Sequence[str]) -> int:
    wanted = template(CRD.read_text())
    match arguments:
        case ["sync"]:
            TEMPLATE.write_text(wanted)
            return 0
        case ["check"]:
            if TEMPLATE.exists() and TEMPLATE.read_text() == wanted:
                return 0
            print(f"{TEMPLATE.relative_to(ROOT)} is not made from the CRD in crds/: run `python -m dev.chart sync`")
            return 1
    print("usage: python -m dev.chart (sync | check)")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
