"""One line for what is wrong with a command line."""

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from mole_asr.errors import MoleError

if TYPE_CHECKING:
    import torch


def explain(message: str, keys: Iterable[str], dashes: str = "") -> str:
    """A complaint of jsonargparse in one line; for an unknown key, with the valid one that is most like it.

    Args:
        message: of an `ArgumentError`.
        keys: that are valid, by their full names.
        dashes: what stands before a key where the user writes it.
    """
    key = found[1] if (found := re.search(r'Parser key "(.+?)"', message)) else ""
    if extra := re.search(r"unrecognized arguments: ([^-\s].*?)(?= --|\n|$)", message):  # a file name may have blanks
        return f"{extra[1]}: is too much; `--help` lists what is expected"
    if unknown := re.search(r"accept option '(.+)'|unrecognized arguments: ([^ =]+)|Option '(.+)' is", message):
        name = (unknown[1] or unknown[2] or f"{key}.{unknown[3]}").lstrip("-")
        close = get_close_matches(name, list(keys), n=1)
        hint = f"did you mean {dashes}{close[0]}?" if close else "`--help` lists them"
        return f"unknown key {dashes}{name}; {hint}"
    expected = re.findall(r"Expected an? (?:<class '|typing\.)?(.+?)(?:'>)?(?:\. Got|\n|$)", message)
    if expected and (value := re.search(r"(?:Given|Got) value: (.*)", message)):
        kinds = [each for each in expected if each != "NoneType"]
        choices = " or ".join(re.sub(r"Literal\[(.+)\]", r"one of \1", each).replace("'", "") for each in kinds)
        return f"{dashes}{key}: {value[1]} is not what is expected there: {choices}"
    if missing := re.search(r"the following arguments are required: (.*)", message):
        return f"{missing[1]}: must be given; `--help` lists what is expected"
    return " ".join(message.split())


def check_seed(seed: int, key: str = "--seed", most: int = 2**63 - 1) -> None:
    """Refuses what no generator of random numbers takes.

    Args:
        seed: to check.
        key: where the user gave it.
        most: that the generator takes.

    Raises:
        MoleError: it is none of 0 to `most`.
    """
    if not 0 <= seed <= most:
        raise MoleError(f"{key} {seed}: must be from 0 to {most}")


def check_range(section: str, least: float, most: float, **values: float) -> None:
    """Refuses numbers out of range, infinite ones, and what is no number.

    Args:
        section: where the user writes these keys.
        least: that is allowed.
        most: that is allowed.
        **values: by key.

    Raises:
        MoleError: one is wrong; the message names it.
    """
    for key, value in values.items():
        if not (least <= value <= most and math.isfinite(value)):
            finite = "must be finite" + (" and not negative" if least == 0 else "")
            limits = finite if most == math.inf else f"must be from {least:g} to {most:g}"
            raise MoleError(f"{section}.{key}: {value:g} {limits}")


def check_device(device: "str | torch.device") -> None:
    """Refuses a device that torch cannot use here.

    Raises:
        MoleError: naming it.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoleError(f"--device {device}: cannot be used here ({str(error).splitlines()[0]})") from None


def check_at_least(least: int, **options: float) -> None:
    """Refuses too small numbers, by the names of the options.

    Raises:
        MoleError: naming the first such option.
    """
    for name, value in options.items():
        if not value >= least:  # it may be no number
            raise MoleError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_once(languages: Sequence[str]) -> None:
    """Refuses codes of languages that stand twice.

    Raises:
        MoleError: one does.
    """
    if twice := next((code for code in languages if languages.count(code) > 1), None):
        raise MoleError(f"data.languages: {twice} stands twice; keep one")
