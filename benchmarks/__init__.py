"""What the toolkit costs and reaches, beside its peers. RESULTS.md tells what was measured; each script, how."""

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"  # where the scripts write; what is published is copied to results/


def finished_runs(path: Path, options: list[str]) -> list[dict[str, Any]]:
    """The runs with these options in a file of JSON lines; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [run for run in map(json.loads, lines) if run["options"] == options]
