"""Language codes."""

import re

from mole_asr.errors import MoleError

# The twelve that Post-MoE (Zheng et al., arXiv 2410.10626) calls major, by speakers and texts; all others are minor.
MAJOR_LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "zh")

_CODE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")

# ISO 639-1 codes of languages that recordings are likely to be in (and yue, which has none), but for those that folders
# are likely to be called for other reasons (av, cv, na, to).
_KNOWN = frozenset(
    """
    af ak am ar as az ba be bg bm bn bo br bs ca ce cs cy da de dv ee el en eo es et eu fa ff fi fo fr fy ga gd gl gn
    gu ha he hi hr ht hu hy id ig is it ja jv ka kg ki kk km kn ko ku ky lb lg ln lo lt lv mg mi mk ml mn mr ms mt my
    nb ne nl nn no nv ny oc or pa pl ps pt qu rm ro ru rw sd si sk sl sn so sq sr ss st su sv sw ta te tg th ti tk tl
    tn tr ts tt tw ug uk ur uz ve vi wo xh yi yo yue zh zu
    """.split()  # noqa: SIM905 (a hundred lines otherwise)
)


def check_language(code: str) -> str:
    """Returns `code` if it looks like a language code: `en`, `yue`, `pt-BR`.

    Any well-formed code is accepted, known to us or not: a community may train on a language that is not listed here.

    Raises:
        MoleError: it is no code of two or three small letters (with optional parts after hyphens).
    """
    if not _CODE.fullmatch(code):
        raise MoleError(f"{code!r} is no language code; give two or three small letters (ISO 639), such as en or yue")
    return code


def is_known_language(code: str) -> bool:
    """Whether we know the language of a code; unlike `check_language` it is not fooled by `wav` or `dev`."""
    return code in _KNOWN
