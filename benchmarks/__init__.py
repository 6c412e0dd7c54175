"""What the toolkit costs and reaches, beside its peers. RESULTS.md tells what was measured; each script, how."""

from pathlib import Path

MEASURED = Path(__file__).parent / "measured"  # where the scripts write; what is published is copied to results/
