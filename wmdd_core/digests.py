"""Canonical text of settings and its digest: the one way to say that two things are made alike.

Standard library only, since the graph needs it before any job starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal settings give equal text.

    A rule passes its settings as one such parameter: Snakemake compares the parameters of a rule as a set
    of values without names, so separate parameters that swap their values would go unnoticed.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def lineage_name(rule: str, wildcards: Mapping) -> str:
    """A rule's key in a lineage; with the teacher's name, since there may be several teachers."""
    return f"{rule} ({wildcards['teacher']})" if "teacher" in wildcards else rule
