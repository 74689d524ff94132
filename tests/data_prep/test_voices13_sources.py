"""Each source against files that are put together here, byte by byte, after the description of their formats."""

import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.data_prep import drascula, festvox_ru, fillets, queen, tuxpaint
from mole_asr.errors import MoleError

Package = Callable[[Mapping[str, bytes]], bytes]


def sound(samples: int, file_format: str = "OGG", rate_hz: int = 22050) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, samples, dtype=np.float32), rate_hz, format=file_format)
    return buffer.getvalue()


def write(folder: Path, content: Mapping[str, bytes], deb: Package) -> Path:
    path = folder / "x.deb"
    path.write_bytes(deb(content))
    return path


def archive(files: Mapping[str, bytes]) -> bytes:
    """A `queen.1c`."""
    head = b"QTBLCEM10\0\0\0\1" + len(files).to_bytes(2, "big")
    offset = len(head) + 21 * len(files)
    entries, contents = b"", b""
    for name, content in files.items():
        entries += name.encode().ljust(12, b"\0") + b"\1"
        entries += (offset + len(contents)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        contents += content
    return head + entries + contents


def record(number: int, line: bytes, at: int) -> bytes:
    content = b"\0\0" + number.to_bytes(2, "big") + bytes([len(line)]) + line
    return content + bytes(-(at + len(content)) % 4)


def dialogue(talk_key: int, joe: Mapping[int, bytes], person: Mapping[int, bytes], levels: int) -> bytes:
    """A `.DOG`; all positions count from behind its header of 20 bytes."""
    strings = b""
    start = 32 + 96 * abs(levels)
    for number, line in joe.items():
        strings += record(number, line, start + len(strings))
    person_at = start + len(strings)
    for number, line in person.items():
        strings += record(number, line, start + len(strings))
    numbers = [levels, 7, talk_key, len(joe), len(person)]
    head = b"".join(number.to_bytes(2, "big", signed=True) for number in numbers).ljust(22, b"\0")
    head += person_at.to_bytes(2, "big") + (start + len(strings)).to_bytes(2, "big") * 2
    return b"AmBk".ljust(20, b"\0") + head.ljust(start, b"\0") + strings


def queen_files() -> dict[str, bytes]:
    lines = [f"line {number}" for number in range(1300)]
    lines[1186 + 3] = "Why?*03 Because*14"
    lines[41 - 41] = "I caf\x82"
    lines[100 - 41] = "*FRHello"
    return {
        "BOB1.DOG": dialogue(
            6, {1: b"Excuse me*03", 0xFFE: b"Odd"}, {1: b"Howdy Bob.*02 What?*FLYes", 0xCE: b"*FR*FLLast"}, -3
        ),
        "BIG.DOG": dialogue(57, {10: b"abc"}, {}, 0),
        "QUEEN2.JAS": "\r\n".join(lines).encode("latin-1"),
        "060001J1.SB": sound(900, "MP3", 11025),
        "060001P2.SB": b"",
        "060001P9.SB": b"",
        "PICTURE.PCX": b"",
    }


def test_queen_names_its_clips() -> None:
    files = queen.unpack(archive(queen_files()))
    assert files == queen_files()
    assert queen.dialogue(files["BOB1.DOG"]) == {
        "060001J1": "Excuse me",
        "060FFEJ1": "Odd",
        "060001P1": "Howdy Bob.",
        "060001P2": " What?",
        "060001P3": "Yes",
        "0600CEP3": "Last",
    }
    assert queen.dialogue(files["BIG.DOG"]) == {"57000AJ1": "abc"}
    sixteen = queen.segments("X", "*01".join("abcdefghijklmnopq"))
    assert (sixteen["X9"], sixteen["XA"], sixteen["X10"], len(sixteen)) == ("i", "j", "p", 17)


def test_queen_clips(deb: Package, tmp_path: Path) -> None:
    content = {"usr/share/doc/a": b"", "usr/share/scummvm/flight/queen.1c": archive(queen_files())}
    path = write(tmp_path, content, deb)
    found = {clip.key: clip for clip in queen.clips(dict.fromkeys(queen.PACKAGES, path))}
    assert {key: clip.text for key, clip in found.items()} == {
        "060001J1": "Excuse me",
        "060001P2": " What?",
        "060001P9": None,
    }
    audio_S, rate_hz = found["060001J1"].read()
    assert rate_hz == 11025 and len(audio_S) >= 900
    texts = queen._texts(queen_files())
    expected = {"JOE00031": "Why?", "JOE00032": " Because", "JOE00411": "I café", "JOE01002": "Hello"}
    assert {key: texts[key] for key in expected} == expected


@pytest.mark.parametrize("cut", [14, 60, 900])
def test_a_damaged_queen_archive_is_named(deb: Package, tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, {"usr/queen.1c": archive(queen_files())[:cut]}, deb)
    with pytest.raises(MoleError, match=r"x\.deb: its queen\.1c is damaged"):
        list(queen.clips(dict.fromkeys(queen.PACKAGES, path)))


def table(*strings: str) -> bytes:
    """A table of `drascula.dat`: two languages, of which the second has other texts."""
    result = len(strings).to_bytes(2, "big")
    for language in (0, 1):
        content = b"\0\0"
        for text in strings:
            padded = text[:: 1 - 2 * language].encode("cp437") + b"\0"
            padded += bytes(-(len(padded) + 2) % 4)
            content += (len(padded) + 2).to_bytes(2, "big") + padded
        result += len(content).to_bytes(2, "big") + content
    return result


def test_drascula(deb: Package, tmp_path: Path) -> None:
    tables = [table("", f"ONE {i}", "TWO (WHISTLE) THREE") for i in range(12)]
    dat = b"DRASCULA\x06" + bytes(range(1, 99)) + struct.pack(">H", 2) + b"".join(tables)
    raw = bytes(32) + bytes([0, 128, 255, 192])
    names = ("1", "2", "BJ1", "VB1", "F1", "VB9")
    content = {f"usr/share/scummvm/drascula/en/{name}.ALS": raw for name in names}
    path = write(tmp_path, content | {"usr/share/scummvm/drascula/en/drascula.dat": dat, "usr/x.ALD": b""}, deb)
    found = {clip.key: clip for clip in drascula.clips({"drascula": path})}
    assert {key: clip.spoken for key, clip in found.items()} == {
        "1": "one zero",
        "2": "two three",
        "BJ1": "one three",
        "VB1": "one nine",
        "F1": "",
        "VB9": "",
    }
    assert found["F1"].text is None
    audio_S, rate_hz = found["1"].read()
    assert rate_hz == 11025
    np.testing.assert_allclose(audio_S, [-1, 0, 127 / 128, 0.5])
    for broken in (dat[:-1], dat + b"\0", b"DRASCULA"):
        path = write(tmp_path, {"usr/drascula.dat": broken}, deb)
        with pytest.raises(MoleError, match=r"x\.deb: it holds no texts"):
            list(drascula.clips({"drascula": path}))


CZECH = r"""
dialogId("let-m-divna", "font_small", "What kind of \"strange\" ship?")
dialogStr("Co je \"to\" za C:\\loď?")

  dialogId("dlouhy", "font_big",
    "Two
lines")
dialogStr("Dva
řádky")
-- dialogId("ne", "font_big", "No")
dialogId("bez", "font_big", "Without")
"""


def test_fillets_scripts() -> None:
    assert fillets.read_script(CZECH, "cs") == {"let-m-divna": 'Co je "to" za C:\\loď?', "dlouhy": "Dva\nřádky"}
    english = {"let-m-divna": 'What kind of "strange" ship?', "dlouhy": "Two\nlines", "bez": "Without"}
    assert fillets.read_script(CZECH, "en") == english


def test_fillets_clips(deb: Package, tmp_path: Path) -> None:
    game = "usr/share/games/fillets-ng"
    base = {
        f"{game}/sound/airplane/en/dlouhy.ogg": sound(800),
        f"{game}/script/airplane/dialogs_cs.lua": CZECH.encode(),
        f"{game}/script/airplane/dialogs_en.lua": CZECH.encode(),
        f"{game}/script/airplane/dialogs_de.lua": CZECH.encode(),
        f"{game}/script/share/bore_dialogs_cs.lua": b'dialogId("ob", "font_both", "a")\ndialogStr("Nuda")',
        f"{game}/sound/share/sp-bubles.ogg": b"",
        f"{game}/music/rybky.ogg": b"",
    }
    czech = {
        f"{game}/sound/airplane/cs/let-m-divna.ogg": sound(700),
        f"{game}/sound/share/borejokes/cs/ob.ogg": sound(700),
        f"{game}/sound/other/cs/let-m-divna.ogg": sound(700),
    }
    packages = {}
    for name, content in zip(fillets.PACKAGES, (base, czech, {}), strict=True):
        packages[name] = tmp_path / f"{name}.deb"
        packages[name].write_bytes(deb(content))
    found = {(clip.language, clip.key): clip for clip in fillets.clips(packages)}
    assert {place: clip.spoken for place, clip in found.items()} == {
        ("en", "airplane/dlouhy"): "two lines",
        ("cs", "airplane/let-m-divna"): "co je to za c loď",
        ("cs", "share/borejokes/ob"): "nuda",
        ("cs", "other/let-m-divna"): "",
    }
    assert len(found["en", "airplane/dlouhy"].read()[0]) == 800


def test_festvox_ru(deb: Package, tmp_path: Path) -> None:
    voice = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    lines = '( ru_0001 "+Окна, - \\"глаз+а\\" вол+ос." )\n( ru_0002 "Сон." )\n'
    content = {f"{voice}/wav/ru_{n:04d}.wav": sound(400, "WAV", 16000) for n in (1, 3)}
    path = write(tmp_path, content | {f"{voice}/etc/txt.done.data": lines.encode()}, deb)
    found = {clip.key: clip for clip in festvox_ru.clips({"festvox-ru": path})}
    assert {key: clip.spoken for key, clip in found.items()} == {"ru_0001": "окна глаза волос", "ru_0003": ""}
    audio_S, rate_hz = found["ru_0001"].read()
    assert (rate_hz, len(audio_S)) == (16000, 400)
    with pytest.raises(MoleError, match=r"txt\.done\.data"):
        list(festvox_ru.clips({"festvox-ru": write(tmp_path, content, deb)}))


def test_tuxpaint(deb: Package, tmp_path: Path) -> None:
    stamps = "usr/share/tuxpaint/stamps"
    texts = "A 1 cent coin ($0.01).\nca.utf8=Un euro (1 €).\nca@valencia.utf8=no\nes.utf8=Una oveja (un cordero) = be\n"
    names = ("money/coin_desc.ogg", "money/coin_desc_ca.ogg", "money/coin_desc_es.ogg", "money/coin_desc_lt.ogg")
    content = {f"{stamps}/{name}": sound(300) for name in names}
    content |= {f"{stamps}/money/coin.txt": texts.encode(), f"{stamps}/money/coin.ogg": b"", f"{stamps}/a.txt": b""}
    found = {clip.language: clip for clip in tuxpaint.clips({"tuxpaint-stamps-default": write(tmp_path, content, deb)})}
    assert {language: (clip.key, clip.spoken) for language, clip in found.items()} == {
        "en": ("money/coin", "a one cent coin"),
        "ca": ("money/coin", "un euro"),
        "es": ("money/coin", "una oveja un cordero be"),
        "lt": ("money/coin", ""),
    }
    assert len(found["ca"].read()[0]) == 300
