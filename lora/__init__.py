"""LoRA below the layers: tensor functions, fused blocks, which layers are adapted and how adapters start."""
