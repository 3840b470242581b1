"""A page that needs nothing else: what the reports of demo and evaluation share, made to be read and printed."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template


def page(title: str, body: str, style: str = "") -> str:
    """HTML. `style`: CSS beside that of all pages."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body, style=style)
