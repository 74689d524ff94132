"""Multilingual speech recognition with mixtures of language experts.

The public names are imported when first used, so that `import mole_asr` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "mole_asr.transcribe.transcriber",
    "Transcriber": "mole_asr.transcribe.transcriber",
    "score": "mole_asr.score.score",
    "MoleError": "mole_asr.errors",
}
__all__ = ["MoleError", "Transcriber", "__version__", "load", "score"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mole_asr' has no attribute {name!r}")
