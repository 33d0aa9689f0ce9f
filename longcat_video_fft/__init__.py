"""Full fine-tuning of LongCat-Video: start reading at README.md, then precompute/__main__.py."""
