"""What a worker wrote of its cases: a JSON line each. Imports no torch."""

import json
from typing import Any, Dict, List

Event = Dict[str, Any]


def read_events(path: str) -> List[Event]:
    """Reads the lines of a record, of which there may be none yet; one that a killed process left half is left out."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
