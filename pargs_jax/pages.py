"""Self-contained HTML pages: one text with style, script and data, and a policy that allows nothing else.

A page's own parts are `page.html`, `page.css` and `page.js` in a folder of `pargs_jax/assets`. All pages share
`assets/tokens`, which shows texts token by token.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any, NamedTuple


class Page(NamedTuple):
    """A page, and the content security policy that it needs."""

    html: str
    policy: str


def make_page(folder: str, data: Any, *, policy: str = "") -> Page:
    """The page of a folder of assets.

    Args:
        folder: its name.
        data: what the page shows: JSON values.
        policy: directives that the page needs beyond its own style and script, such as "connect-src 'self'; ".
    """
    style, script = (_asset("tokens", f"tokens.{kind}") + _asset(folder, f"page.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; {policy}base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    filled = {"policy": policy, "style": style, "data": _json_in_html(data), "script": script}
    # One pass, so that a text that spells a placeholder stays as it is.
    html = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _asset(folder, "page.html"))
    return Page(html, policy)


def _asset(folder: str, name: str) -> str:
    return (files("pargs_jax") / "assets" / folder / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """How a content security policy names the one script or style that it lets in."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _json_in_html(value: Any) -> str:
    """JSON in which HTML finds neither the end of its element nor a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Surrogates without a partner, which bytes that are not text become, have no UTF-8.
    text = re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("<", "\\u003c")
