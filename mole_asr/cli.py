"""The command line: a table from verb to function. Nothing is imported before its verb is called."""

import sys
from collections.abc import Sequence
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
    "prepare folder": Verb("mole_asr.data_prep.folder:prepare", "prepare your own recordings"),
    "tokenizer train": Verb("mole_asr.corpus.text_tokenizer:train_tokenizer", "train a text tokenizer on a manifest"),
    "tokenizer extend": Verb("mole_asr.corpus.text_tokenizer:extend_tokenizer", "add the pieces of a new language"),
    "fit": Verb("mole_asr.asr.fit:fit", "train a model, or go on with an interrupted training"),
    "transcribe": Verb(
        "mole_asr.transcribe.command:transcribe", "audio files, folders, manifests to text", "files", prints=False
    ),
    "score": Verb("mole_asr.score.score:score", "word and character error rates with confidence intervals"),
    "report": Verb("mole_asr.score.report:report", "table, report.json and report.html of a trained model"),
    "doctor": Verb("mole_asr.doctor:doctor", "check the installation"),
}


def usage() -> str:
    """The text of `mole-asr --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
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
        0, or 1 where something failed, or 2 where the command line is wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from mole_asr import __version__

        print(__version__)
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
        result = function(words) if function_name == "fit" else _call(function, verb, words, program)
    except MoleError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    if result is not None and verb.prints:
        print(result)
    return 1 if getattr(result, "failures", None) else 0


def _call(function: Any, verb: Verb, words: list[str], program: str) -> Any:
    """Parses words by the function's signature and calls it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=verb.help)
    if verb.several:
        parser.add_argument(verb.several, nargs="+", type=str)
    skip: set[str | int] = {verb.several} if verb.several else set()
    parser.add_function_arguments(function, as_group=False, as_positional=not verb.several, skip=skip)
    options = parser.parse_args([_dashes(word) for word in words])
    return function(**options.as_dict())


def _dashes(word: str) -> str:
    """`--vocab-size 500` means `--vocab_size 500`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
