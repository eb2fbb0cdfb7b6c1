"""Identities: plain values that tell one run, or one evaluation, from every other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(identity: Mapping[str, Any]) -> str:
    """A short name for an identity, the same for equal ones."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def difference(there: Any, here: Any, path: str = "") -> str:
    """The first entry in which two identities differ, whatever it is nested in."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *here]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {there} there, {here} here"
