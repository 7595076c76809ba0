"""Guided decoding as a service: an HTTP interface, in the form of OpenAI's, over the scheduler's running batch."""
