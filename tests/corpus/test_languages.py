import pytest

from mole_asr.corpus.languages import check_language, is_known_language
from mole_asr.errors import MoleError


@pytest.mark.parametrize("code", ["en", "yue", "pt-BR", "zh-Hant"])
def test_well_formed_codes_pass(code: str) -> None:
    assert check_language(code) == code


@pytest.mark.parametrize("code", ["", "e", "english", "EN", "e1", "en_US", "en-", "en\n"])
def test_malformed_code_is_named(code: str) -> None:
    with pytest.raises(MoleError, match="no language code"):
        check_language(code)


def test_a_folder_name_is_not_taken_for_a_language() -> None:
    assert all(map(is_known_language, ("cs", "nb", "jv", "lg", "yue")))
    assert not any(map(is_known_language, ("wav", "cv", "av", "to")))
