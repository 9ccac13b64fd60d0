"""README as the page of a package index shows it, which has neither the other pages nor the pictures."""

from __future__ import annotations

import re


def for_index(text: str) -> str:
    """Returns ``text``, Markdown, with its links into the project's folder replaced by their words."""
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)[^)]*\)", r"*Picture: \1.*", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
