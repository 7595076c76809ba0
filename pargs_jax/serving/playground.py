"""The page that tries guidance out: self-contained, and served at `/`."""

from pargs_jax.serving.service import Service


def playground_page(service: Service) -> tuple[str, str]:
    """The page and its content security policy."""
    return f"<!doctype html><title>{service.name}</title>", "default-src 'none'"
