"""Named sizes of vision transformers: those of the parents, and vit_tiny for tests and demonstrations."""

SIZES: dict[str, dict[str, int | float]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 18, "mlp_ratio": 3.777777778},
    "vit_huge2": {"embed_dim": 1280, "depth": 32, "num_heads": 20},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
    "vit_7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32, "mlp_ratio": 3.0},
}
