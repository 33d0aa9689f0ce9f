"""A caption as the text encoder gets it, and the id under which its embedding is cached."""

from __future__ import annotations

import hashlib
import html
import re

import ftfy


def clean_caption(text: str) -> str:
    """Applies the official rules (`prompt_clean` in longcat_video/pipeline_longcat_video.py):
    broken encodings fixed, HTML entities undone twice, runs of white space made one blank."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def caption_id(cleaned: str) -> str:
    """Hashes a caption: equal ones share an embedding; the empty one, for dropout, has its own."""
    return hashlib.sha256(cleaned.encode()).hexdigest()[:32]


EMPTY_CAPTION = caption_id("")
