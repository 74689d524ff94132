"""The command line: a table from verb to function. Nothing is imported before its verb is called."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        function: "module:function"; its docstring and signature make the command's help and options.
        help: one line.
        several: name of the one parameter that is positional and takes one or more values; else all required ones are.
        prints: whether the result is to be printed; some verbs print while they work.
    """

    function: str
    help: str
    several: str | None = None
    prints: bool = True


VERBS = {
    "prepare prompts": Verb("mole_asr.data_prep.prompts:prepare", "fetch and prepare the five-language prompt corpus"),
    "prepare folder": Verb("mole_asr.data_prep.folder:prepare", "prepare your own recordings", prints=False),
    "prepare voices13": Verb("mole_asr.data_prep.voices13:prepare", "fetch and prepare the thirteen-language corpus"),
    "prepare degraded": Verb(
        "mole_asr.data_prep.degraded:prepare", "a noisy or telephone-band copy of a test set", prints=False
    ),
    "prepare synthetic": Verb(
        "mole_asr.data_prep.synthetic:prepare", "train texts read by synthetic voices", prints=False
    ),
    "prepare words": Verb("mole_asr.data_prep.words:prepare", "lists of usual words, for a text decoder"),
    "prepare texts": Verb("mole_asr.data_prep.texts:prepare", "fetch and prepare texts in 78 languages"),
    "tokenizer train": Verb("mole_asr.corpus.text_tokenizer:train_tokenizer", "train a text tokenizer on a manifest"),
    "tokenizer extend": Verb("mole_asr.corpus.text_tokenizer:extend_tokenizer", "add the pieces of a new language"),
    "fit": Verb("mole_asr.fit:fit", "train a model, or go on with an interrupted training", prints=False),
    "extend": Verb("mole_asr.asr.extend:extend", "make room for new languages in a trained model"),
    "prune": Verb("mole_asr.asr.prune:prune", "a smaller model of some of the languages"),
    "convert moefy": Verb("mole_asr.convert.moefy:moefy", "a trained model that computes some of its neurons"),
    "convert factor": Verb("mole_asr.convert.factor:factor", "a trained model in few slices, trained for a short time"),
    "convert dense": Verb("mole_asr.convert.dense:dense", "a model of slices, dense again"),
    "generate": Verb("mole_asr.text.generate:generate", "text that a language model writes on behind a prompt"),
    "perplexity": Verb("mole_asr.text.perplexity:perplexity", "bits a byte of texts by a language model"),
    "transcribe": Verb(
        "mole_asr.transcribe.command:transcribe", "audio files, folders, manifests to text", "files", prints=False
    ),
    "score": Verb("mole_asr.score.score:score", "word and character error rates with confidence intervals"),
    "report": Verb("mole_asr.score.report:report", "table, report.json and report.html of a trained model"),
    "bench moe": Verb(
        "mole_asr.bench.moe:moe", "what each way of computing a mixture of experts costs here", prints=False
    ),
    "bench whisper": Verb(
        "mole_asr.bench.whisper:whisper", "a manifest transcribed by Whisper, the peer to beat", prints=False
    ),
    "bench routing": Verb("mole_asr.bench.routing:routing", "who computes what in a trained model: load and purity"),
    "doctor": Verb("mole_asr.doctor:doctor", "check the installation"),
}


# What `fit` itself cannot spell; its other options are Lightning's.
_FIT = {"--data.languages": Sequence[str], "--data.major_languages": Sequence[str]}
_TRUTH_VALUES = ("true", "false", "yes", "no")


class _WrongWordsError(Exception):
    """The command line of a verb is wrong."""


def usage(group: str = "") -> str:
    """The text of `mole-asr --help`, or of `mole-asr prepare --help` and the like."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items() if name.startswith(group)]
    return "\n".join(
        [
            "usage: mole-asr VERB [options]",
            "",
            "Multilingual speech recognition with mixtures of language experts.",
            "",
            *lines,
            "",
            "`mole-asr VERB --help` lists the options of a verb.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where something failed; 2 where the command line is wrong (of `fit`, which has configs too: 1); 130 after
        Ctrl-C; 141 where nobody reads on.
    """
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:  # closed: `mole-asr ... >&-`
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # `mole-asr ... | head`
        _silence()
        return 141
    except OSError as error:
        print(f"mole-asr: {_said(error)}", file=sys.stderr)
        _silence()
        return 1


def _silence() -> None:
    """Sends nowhere what Python flushes when it ends."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError):  # it is closed, or no file
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), number)


def _main(words: list[str]) -> int:
    """`main` without what can happen to the streams."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from mole_asr import __version__

        print(__version__)
        return 0
    if words[0] in {name.split()[0] for name in VERBS if " " in name} and words[1:2] in (["-h"], ["--help"]):
        print(usage(f"{words[0]} "))
        return 0
    name = words[0] if words[0] in VERBS else " ".join(words[:2])
    if name not in VERBS:
        print(f"mole-asr: {_unknown(words)}", file=sys.stderr)
        return 2
    return _run(VERBS[name], words[len(name.split()) :], f"mole-asr {name}")


def _unknown(words: list[str]) -> str:
    """What to say of a verb that does not exist."""
    from difflib import get_close_matches

    below = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    if below:
        return f"give one of: {', '.join(below)}"
    close = get_close_matches(words[0], VERBS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`mole-asr --help` lists the verbs"
    return f"unknown verb {words[0]!r}; {hint}"


def _run(verb: Verb, words: list[str], program: str) -> int:
    """Calls a verb; a problem that the user can solve becomes one line."""
    from mole_asr.errors import MoleError

    module, function_name = verb.function.split(":")
    try:
        function = getattr(import_module(module), function_name)
        # `fit` parses its own words: Lightning's command line does.
        result = function(_spell(words, _FIT)) if function_name == "fit" else _call(function, verb, words, program)
        if result is not None and verb.prints:
            print(result)
    except (MoleError, _WrongWordsError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, _WrongWordsError) else 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{program}: {_said(error)}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        said = f"{error.object[error.start]!a} cannot be written as {error.encoding}"
        print(f"{program}: {said}; with PYTHONIOENCODING=utf-8, standard output takes all", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 1 if getattr(result, "failures", None) else 0


def _said(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _call(function: Any, verb: Verb, words: list[str], program: str) -> Any:
    """Parses words by the function's signature and calls it."""
    from argparse import ArgumentError
    from inspect import signature

    from jsonargparse import ArgumentParser

    from mole_asr.arguments import explain

    parser = ArgumentParser(prog=program, description=verb.help, exit_on_error=False)
    if verb.several:
        parser.add_argument(verb.several, nargs="+", type=str)
    skip: set[str | int] = {verb.several} if verb.several else set()
    parser.add_function_arguments(function, as_group=False, as_positional=not verb.several, skip=skip)
    parameters = signature(function).parameters
    kinds = {f"--{name}": parameter.annotation for name, parameter in parameters.items()}
    try:
        behind = words.index("--") if "--" in words else len(words)  # what stands there is no option
        options = parser.parse_args(_spell([_dashes(word) for word in words[:behind]], kinds) + words[behind:])
    except ArgumentError as error:
        raise _WrongWordsError(explain(str(error), parameters, "--")) from None
    return function(**options.as_dict())


def _spell(words: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Spells flags and lists as the parser takes them, so that one can write them as one writes them elsewhere.

    `--flag` alone means true. `--names a b`, `--names a,b` and `--names '[a, b]'` mean `--names=["a", "b"]`, in which
    the language `no` is no truth value.

    Args:
        words: of the command line.
        kinds: option with its dashes -> bool, Sequence[str], Sequence[int], or what else it may be.
    """
    spelled: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        kind = kinds.get(name)
        if kind is bool and not equals and (not rest or rest[0].lower() not in _TRUTH_VALUES):
            word = f"{name}=true"
        elif kind in (Sequence[str], Sequence[int]):
            values = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            items = [item.strip(" []'\"") for item in ",".join(values).split(",")]
            spelled_items = (json.dumps(item) if kind == Sequence[str] else item for item in items if item)
            word = f"{name}=[{', '.join(spelled_items)}]"
        spelled.append(word)
    return spelled


def _dashes(word: str) -> str:
    """`--vocab-size 500` means `--vocab_size 500`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
