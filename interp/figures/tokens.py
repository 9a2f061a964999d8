"""Tokens as text that a figure may show: line breaks visible, nothing read as HTML."""

import html


def visible(token: str) -> str:
    """A token with its line breaks shown, and safe where plotly reads HTML or a template.

    >>> visible("<b>")
    '&lt;b&gt;'
    """
    shown = token.replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
    return html.escape(shown, quote=False).replace("$", "&#36;")
