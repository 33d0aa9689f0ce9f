"""LoRA fine-tuning of LongCat-Flash-Omni: video and speech in, speech out."""
