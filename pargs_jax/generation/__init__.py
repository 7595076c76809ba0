"""Prompts as text in, answers as text out: models, tokenizer and decode loop put together."""
