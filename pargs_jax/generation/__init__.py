"""Text prompts in, text answers out: combines models, tokenizer and decode loop."""
