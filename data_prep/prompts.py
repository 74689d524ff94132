"""The prompt corpus: five languages, two hours of studio speech, one professional speaker a language.

The voice prompts of the Asterisk telephone exchange, from Debian's packages `asterisk-core-sounds-{en,es,fr,it,ru}`
(transcripts) and `asterisk-core-sounds-{...}-g722` (16 kHz audio). Licences: English, Spanish and French CC BY-SA 3.0,
Italian and Russian CC BY 3.0; authors and terms stand in /usr/share/doc/<package>/copyright of each package.

Splits go by prompt, the same in every language, near-duplicates together: a prompt in the test split is trained on
in no language.
"""

import gzip
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import av
import numpy as np

from mole_asr.corpus.manifest import Utterance
from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip, store
from mole_asr.data_prep.output import SPLITS, audio_since, code_recipe, is_done, print_summary, write_corpus
from mole_asr.errors import MoleError
from mole_asr.files import check_folder

LANGUAGES = ("en", "es", "fr", "it", "ru")
UNACCENTED = ("es",)
"""Of these, and of the other sources of `voices13`, some texts are written without accents: `score --fold-accents`."""
LICENCES = dict.fromkeys(("en", "es", "fr"), "CC BY-SA 3.0") | dict.fromkeys(("it", "ru"), "CC BY 3.0")
LICENCE = "CC BY-SA 3.0 (en, es, fr), CC BY 3.0 (it, ru)"

# SHA-256 of version 1.6.1-1.
PACKAGES = {
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk-core-sounds-es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-es-g722": "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    "asterisk-core-sounds-fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-fr-g722": "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    "asterisk-core-sounds-it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-it-g722": "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    "asterisk-core-sounds-ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "asterisk-core-sounds-ru-g722": "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
}

_NOT_SPEECH = re.compile(r"silence/.*|beep|beeperr|(a|de)scending-2tone|confbridge-(join|leave)|tt-monkeys")
# Remarks stand in brackets, except these three, which are spoken.
_SPOKEN = ("ne m'appelez plus, jamais", "IAX", "статус")
_REMARK = re.compile(r"\[[^]]*\]|<[^>]*>|\((?!(?:" + "|".join(map(re.escape, _SPOKEN)) + r")\))[^)]*\)")
# Three lines run on into the lines of other prompts, which the recording does not hold.
_RUN_ON = re.compile(r"\s*\b(vm|confbridge)-[a-z-]+: .*")
# Letters that the Italian file lost, and a Latin o and e among Russian letters.
_MISTAKES = {
    "it": {"sar? ": "sarà ", "pu? ": "può ", "cos? ": "così ", "pi? ": "più ", " ? ": " è "},
    "ru": {"первoe": "первое"},
}


def prepare(output: str | Path, languages: Sequence[str] = LANGUAGES, source: str | Path | None = None) -> None:
    """Fetches the prompt corpus and writes its manifests.

    Writes `cuts_train.jsonl`, `cuts_dev.jsonl`, `cuts_test.jsonl`, the decoded audio (`audio/`), the fetched packages
    (`packages/`) and the list of what was left out (`left_out.tsv`). A second run does only what is missing.

    Args:
        output: folder to write.
        languages: which of en, es, fr, it, ru.
        source: folder with the .deb files, where they are already fetched; they are then read in place.

    Raises:
        MoleError: an unknown language, packages that cannot be had, or a package with a wrong checksum.
    """
    output = Path(output)
    check_folder(output)
    _check_languages(languages)
    folder = Path(source) if source is not None else output / "packages"
    groups = Path(__file__).with_name("prompts_groups.tsv")
    recipe = code_recipe({"languages": list(languages)}, __file__, debian.__file__, groups)
    if not is_done(output, recipe):
        if source is None:
            fetch_packages(languages, folder)
        packages = debian.verified(_sums(languages), folder)
        since = audio_since(output, recipe)
        utterances: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
        left_out: list[tuple[str, str, str]] = []
        for language in languages:
            _prepare_language(language, packages, output, since, utterances, left_out)
        write_corpus(output, utterances, left_out, recipe)
    print("licences: " + ", ".join(f"{language} {LICENCES[language]}" for language in languages))
    print_summary(output)


def fetch_packages(languages: Iterable[str], folder: str | Path) -> None:
    """Downloads the packages of `languages` to `folder` with apt (no root needed); those already there are kept.

    Raises:
        MoleError: apt is missing or fails, or a file there has a wrong checksum.
    """
    debian.fetch(_sums(languages), Path(folder))


def clean(key: str, line: str) -> str:
    """Returns what is spoken in a line of a transcript file: without remarks and without its own key repeated."""
    text = _REMARK.sub(" ", line.removeprefix(f"{key}: "))
    return " ".join(text.replace("(", "").replace(")", "").split())


def repair(text: str, language: str) -> str:
    """Mends the known defects of the transcript files: run-on lines, and lost or foreign letters."""
    text = _RUN_ON.sub("", text)
    for broken, mended in _MISTAKES.get(language, {}).items():
        text = text.replace(broken, mended)
    return text


@cache
def _groups() -> dict[str, str]:
    lines = files("mole_asr.data_prep").joinpath("prompts_groups.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines[1:])


def split_of(key: str) -> str:
    """Returns the split of a prompt: by a hash of the first key of its group of near-duplicates."""
    bucket = int(hashlib.sha1(f"ast1:{_groups().get(key, key)}".encode()).hexdigest(), 16) % 100
    return "test" if bucket < 12 else "dev" if bucket < 20 else "train"


def clips(packages: Mapping[str, Path], languages: Iterable[str] = LANGUAGES) -> Iterator[Clip]:
    """Yields every recording; its text is None where the transcripts lack it.

    Args:
        packages: package name -> its .deb file.
        languages: which of en, es, fr, it, ru.

    Raises:
        MoleError: a package cannot be unpacked or lacks its transcripts.
    """
    for language in languages:
        transcripts, audio = _package_names(language)
        texts = _read_transcripts(packages[transcripts], language)
        for name, content in debian.members(packages[audio]):
            # usr/share/asterisk/sounds/<speaker>/<key>.g722
            speaker, _, key = name.partition("/sounds/")[2].removesuffix(".g722").partition("/")
            if name.endswith(".g722") and key:
                text = repair(texts[key], language) if key in texts else None
                yield Clip(language, key, text, partial(_decode, content), speaker, fold_accents=language in UNACCENTED)


def _prepare_language(
    language: str,
    packages: Mapping[str, Path],
    output: Path,
    since: float,
    utterances: Mapping[str, list[Utterance]],
    left_out: list[tuple[str, str, str]],
) -> None:
    """Adds the utterances of a language to `utterances` and what is left out of it to `left_out`."""
    print(f"{language}: unpacking and decoding ...", flush=True)
    without_audio = _read_transcripts(packages[_package_names(language)[0]], language)
    for clip in clips(packages, [language]):
        without_audio.pop(clip.key, None)
        if _NOT_SPEECH.fullmatch(clip.key):
            left_out.append((language, clip.key, "not speech"))
        elif not clip.spoken:
            reason = "audio without transcript" if clip.text is None else "empty transcript"
            left_out.append((language, clip.key, reason))
        else:
            path = output.absolute() / "audio" / language / f"{clip.key.replace('/', '-')}.wav"
            utterance_id = f"{language}-{clip.key.replace('/', '_')}"
            utterances[split_of(clip.key)].append(store(clip, path, utterance_id, since))
    left_out.extend((language, key, "transcript without audio") for key in without_audio)


def _read_transcripts(package: Path, language: str) -> dict[str, str]:
    """Returns key -> cleaned text. Where a key stands twice, the first line counts: the second has a mistaken key."""
    for name, content in debian.members(package):
        if name.endswith(f"/core-sounds-{language}.txt.gz"):
            texts: dict[str, str] = {}
            for line in gzip.decompress(content).decode("utf-8-sig").splitlines():
                key, colon, text = line.partition(":")
                if colon and not line.startswith(";"):
                    texts.setdefault(key.strip(), clean(key.strip(), text.strip()))
            return texts
    raise MoleError(f"{package}: it holds no core-sounds-{language}.txt.gz; fetch version 1.6.1-1")


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    """Decodes raw G.722 (64 kbit/s) to float32 samples at 16 kHz."""
    with av.open(io.BytesIO(content), mode="r", format="g722") as container:
        audio_S = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    return audio_S.astype(np.float32) / 32768, 16000


def _package_names(language: str) -> tuple[str, str]:
    """Returns the names of a language's transcript package and audio package."""
    return f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"


def _sums(languages: Iterable[str]) -> dict[str, str]:
    return {name: PACKAGES[name] for language in languages for name in _package_names(language)}


def _check_languages(languages: Sequence[str]) -> None:
    for language in languages:
        if language not in LANGUAGES:
            raise MoleError(f"the prompt corpus has no language {language!r}; choose from {', '.join(LANGUAGES)}")
    if not languages or len(set(languages)) < len(languages):
        raise MoleError(f"languages: give some of {', '.join(LANGUAGES)}, each once")
