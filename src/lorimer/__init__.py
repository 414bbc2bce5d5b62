"""lorimer: fine-tune open language models with LoRA, prove the result, use it."""
