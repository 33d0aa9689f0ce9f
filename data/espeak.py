"""Text to speech with espeak-ng, called through ctypes; first step of `data/make_speech.py`.

The library comes from the `espeakng-loader` wheel (espeak-ng is GPL-3.0, so nothing outside `data/`
imports it). Linux and macOS. No command of its own:

    samples = synthesize("What is two plus three?", voice="en-gb+f2", speed=160, pitch=50)
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
from pathlib import Path

import numpy as np

SAMPLE_RATE = 22050  # espeak-ng's own rate, Hz
SPEED_RANGE = (80, 450)  # words a minute, the limits of espeak-ng
PITCH_RANGE = (0, 99)  # 50 is the voice's own pitch

# Language tag -> voice file inside espeak-ng-data/lang.
ACCENTS = {
    "en-us": "gmw/en-US",
    "en-us-nyc": "gmw/en-US-nyc",
    "en-gb": "gmw/en",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-x-gbclan": "gmw/en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-029": "gmw/en-029",
}

_OUTPUT_SYNCHRONOUS = 2  # speak within the call: no thread is left when the library is unloaded
_DONT_EXIT = 1 << 15  # report a missing data folder instead of ending the process
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_EDGE_SECONDS = 0.05  # silence before and after; espeak-ng itself starts and stops abruptly

_SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def validate_voice(voice: str) -> None:
    """Raise ValueError unless `voice` is ACCENT or ACCENT+VARIANT and espeak-ng has both.

    Needed because espeak-ng itself speaks with the plain accent when the variant does not exist.
    """
    accent, plus, variant = voice.partition("+")
    if accent not in ACCENTS:
        raise ValueError(f"voice {voice!r}: unknown accent {accent!r}; known: {', '.join(ACCENTS)}")
    variants = sorted(file.name for file in (_data_path() / "voices" / "!v").iterdir())
    if plus and variant not in variants:
        raise ValueError(
            f"voice {voice!r}: unknown variant {variant!r}; known: {', '.join(variants)}"
        )


def synthesize(text: str, *, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Speak one text. Returns int16 mono at SAMPLE_RATE, shape (num_samples,).

    The samples depend on the arguments alone. espeak-ng keeps state from one utterance to the next
    (its place in the flutter table, wave phases) that neither espeak_Initialize nor
    espeak_Terminate resets, and breathy voices draw random noise. So each call loads the library
    afresh, seeds both generators, and unloads it again: about 5 ms with the speech. Not
    thread-safe; use processes.

    speed: words a minute. pitch: 0 to 99. Raises ValueError for a voice that does not exist and
    RuntimeError when espeak-ng fails.
    """
    validate_voice(voice)
    accent, plus, variant = voice.partition("+")
    chunks: list[bytes] = []

    @_SynthCallback
    def keep(samples: ctypes._Pointer, num_samples: int, _events: int | None) -> int:
        if samples and num_samples:
            chunks.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    library = _load_fresh()
    try:
        library.espeak_SetSynthCallback(keep)
        _check(library.espeak_SetVoiceByName((ACCENTS[accent] + plus + variant).encode()), voice)
        _check(library.espeak_SetParameter(_PARAMETER_RATE, speed, 0), f"speed {speed}")
        _check(library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0), f"pitch {pitch}")
        encoded = text.encode() + b"\0"
        size = ctypes.c_size_t(len(encoded))
        status = library.espeak_Synth(
            encoded, size, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        _check(status, f"text {text!r}")
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    speech = np.frombuffer(b"".join(chunks), dtype=np.int16)
    if not speech.any():
        raise RuntimeError(f"espeak-ng said nothing for {text!r} with voice {voice}")
    return np.pad(speech, round(_EDGE_SECONDS * SAMPLE_RATE))


def _load_fresh() -> ctypes.CDLL:
    """Load the library in its initial state; RuntimeError when another copy is still loaded."""
    import espeakng_loader

    path = espeakng_loader.get_library_path()
    try:
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    except OSError:
        pass  # not loaded: as it must be
    else:
        raise RuntimeError(
            f"{path} is already loaded in this process, so its speech would depend on what was "
            "said before; do not use another espeak-ng package in the same process"
        )
    library = ctypes.CDLL(path)
    rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(_data_path()), _DONT_EXIT)
    if rate != SAMPLE_RATE:
        _ctypes.dlclose(library._handle)
        raise RuntimeError(
            f"espeak-ng cannot start with its data in {_data_path()} (it allows about 150 "
            "characters of path): reinstall espeakng-loader, under a shorter path if need be"
        )
    library.espeak_ng_SetRandSeed(1)  # else the time of day seeds the noise of breathy voices
    ctypes.CDLL(None).srand(1)  # a few other voices draw from the C library
    return library


def _data_path() -> Path:
    """Folder espeak-ng-data of the installed wheel."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "espeak-ng is missing: install the extra 'data' (pip install 'espeakng-loader')"
        ) from error
    return Path(espeakng_loader.get_data_path())


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"espeak-ng rejected {what} (status {status})")
