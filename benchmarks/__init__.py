"""Training steps of LoRA here, beside full fine-tuning and other LoRA libraries: see `compare_peers` and RESULTS.md."""
