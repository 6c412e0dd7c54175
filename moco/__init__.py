"""Stage 1: where the backbone comes from (MoCo v1/v2, arXiv 1911.05722 and 2003.04297; v3, arXiv 2104.02057)."""
