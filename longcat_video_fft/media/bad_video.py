"""Why a video is left out: every reason, in one place, with its text for the report."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "missing_caption": "no .txt of the same name, or an empty one",
    "bad_caption": "caption not UTF-8, or over 64 KiB",
    "bad_name": "name of the file or of a folder not UTF-8",
    "same_name": "shares its name, and so its caption, with another video",
    "empty": "zero bytes",
    "truncated": "cut off: its boxes end beyond the file",
    "not_mp4": "no mp4 or mov",
    "no_video": "no video track",
    "damaged": "header or pictures make no sense",
    "too_large": "its header alone takes megabytes",
    "codec": "no decoder for its codec",
    "hdr": "high dynamic range, which would need tone mapping",
    "too_small": "shorter side below minimum_image_size",
    "too_short": "too few frames for the shortest of frame_buckets",
    "min_frames": "fewer frames than min_frames",
    "max_frames": "more frames than max_frames",
    "vanished": "listed, or in the table, but not there any more",
    "not_in_table": "there, but not in the parquet table",
    "unreadable": "could not be read after all retries; tried again by the next run",
}


class BadVideoError(ValueError):
    """One video cannot be used; `reason` is a key of REASONS."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
