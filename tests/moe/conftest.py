from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the Triton backend can run: a GPU, or the CPU with Triton's interpreter (made faster)."""
    pytest.importorskip("triton")
    from mole_asr.moe.backends.triton_parts import INTERPRETED

    if torch.cuda.is_available() and not INTERPRETED:
        return "cuda"
    assert INTERPRETED, "tests/conftest.py sets TRITON_INTERPRET=1 before anything imports Triton"
    _speed_up(monkeypatch)
    return "cpu"


def _speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve the interpreter's time.

    It prepares triton.language for each launch and again for each call inside a kernel; the first time is enough. And
    it checks every sum of integers for an overflow.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare: Callable = interpreter._patch_lang
    prepared = False

    class Everything:
        __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012

    def prepare_once(function: object) -> object:
        nonlocal prepared
        if prepared:
            return interpreter._LangPatchScope()
        prepared, scope = True, prepare(Everything)
        undo = scope.restore

        def restore() -> None:
            nonlocal prepared
            prepared = False
            undo()

        scope.restore = restore
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
