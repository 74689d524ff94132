"""Which languages are kin: one family (in the sense of a close group) for each language we know.

Membership follows Glottolog 5 (Hammarström, Forkel, Haspelmath & Bank, https://glottolog.org), cut where relatives
still share sounds and words: Germanic, Romance and Slavic, not Indo-European. The names are the codes that ISO 639-5
has for these groups (https://www.loc.gov/standards/iso639-5/), which never are codes of languages. A language without
a near relative in the table (Albanian, Armenian, Basque, Esperanto, Georgian, Japanese, Kabyle, Korean) stands alone.

`branch_of` is the coarser cut, for many languages: seventeen groups, Indo-European by its branches and every other
stock as a whole. Slavic has Baltic with it (Glottolog's Balto-Slavic, for which ISO has no code). Two of the groups are
no branches but what is left over: `ine` the branches of Indo-European with one language each (Greek, Albanian,
Armenian), and `qis` (from ISO's codes for private use) languages of a stock that no other language here is of (Basque,
Georgian, Japanese, Korean), and Esperanto. There is no Altaic: Turkic and Mongolian stand apart.
"""

from difflib import get_close_matches

from mole_asr.errors import MoleError

_MEMBERS = {
    "gem": "af da de en fy is lb nb nl nn no sv yi",  # Germanic
    "roa": "ca es fr gl it oc pt rm ro",  # Romance
    "sla": "be bg bs cs hr mk pl ru sk sl sr uk",  # Slavic
    "bat": "lt lv",  # Baltic
    "cel": "br cy ga gd",  # Celtic
    "grk": "el",  # Greek
    "inc": "as bn gu hi mr ne or pa sd si ur",  # Indic
    "ira": "fa ku ps tg",  # Iranian
    "fiu": "et fi hu",  # Finno-Ugrian
    "trk": "az ba kk ky tk tr tt ug uz",  # Turkic
    "sem": "am ar he mt",  # Semitic
    "cus": "so",  # Cushitic
    "bnt": "rw sn sw xh zu",  # Bantu
    "nic": "ig wo yo",  # Atlantic-Congo languages that are not Bantu
    "cdc": "ha",  # Chadic
    "dra": "kn ml ta te",  # Dravidian
    "map": "id jv mg mi ms su tl",  # Austronesian
    "mkh": "km vi",  # Mon-Khmer
    "tai": "lo th",  # Tai
    "tbq": "my",  # Tibeto-Burman
    "zhx": "yue zh",  # Chinese
    "xgn": "mn",  # Mongolian
}
_FAMILY = {code: family for family, codes in _MEMBERS.items() for code in codes.split()}
_BRANCHES = {
    "gem": "gem",
    "roa": "roa",
    "cel": "cel",
    "sla": "sla bat",  # Balto-Slavic
    "iir": "inc ira",  # Indo-Iranian
    "ine": "grk hy sq",  # other Indo-European
    "urj": "fiu",  # Uralic
    "trk": "trk",
    "xgn": "xgn",
    "afa": "cdc cus kab sem",  # Afro-Asiatic
    "nic": "bnt nic",  # Atlantic-Congo
    "dra": "dra",
    "map": "map",
    "aav": "mkh",  # Austroasiatic
    "tai": "tai",
    "sit": "tbq zhx",  # Sino-Tibetan
    "qis": "eo eu ja ka ko",  # none of these
}
_BRANCH = {family: branch for branch, families in _BRANCHES.items() for family in families.split()}


def family_of(language: str) -> str:
    """ISO 639-5 code of a language's family; its own code where it has no near relative, or we do not know it.

    Args:
        language: a code; only what stands before the first hyphen is looked at (`pt-BR`).
    """
    base = language.partition("-")[0]
    return _FAMILY.get(base, base)


def branch_of(language: str) -> str:
    """Code of the branch or stock that a language is of, the coarser cut; its own code where we do not know it.

    Args:
        language: a code; only what stands before the first hyphen is looked at (`pt-BR`).
    """
    family = family_of(language)
    return _BRANCH.get(family, family)


KIN = {"family": family_of, "branch": branch_of}
"""Groups of languages that may share an expert, by the words of a config's `expert_of`."""


def expert_names(expert_of: str | dict[str, str], languages: list[str]) -> list[str]:
    """The name of each language's expert; languages of one name share it.

    Args:
        expert_of: "language", a word of `KIN`, or names by language; a language without one has an expert of its own.
        languages: codes.

    Raises:
        MoleError: a name is given to what is none of these, and no language of the table here either.
    """
    if isinstance(expert_of, str):
        return [KIN[expert_of](code) for code in languages] if expert_of in KIN else list(languages)
    for code in expert_of:
        base = code.partition("-")[0]
        if code not in languages and base not in _FAMILY and base not in _BRANCH:
            close = get_close_matches(code, languages, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(languages)}"
            raise MoleError(f"expert_of: {code!r} is no language of the model; {hint}")
    return [expert_of.get(code, code) for code in languages]
