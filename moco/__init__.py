"""Stage 1: where the backbone comes from (MoCo v2, arXiv 2003.04297; v3, arXiv 2104.02057)."""

import moco_lora  # noqa: F401 - it says if a folder is in the way of a package of the toolkit
