import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prompt_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Debian packages of the prompt corpus: MOLE_ASR_PROMPTS, or fetched with apt."""
    folder = os.environ.get("MOLE_ASR_PROMPTS")
    if folder:
        return Path(folder)
    from mole_asr.data_prep.prompts import LANGUAGES, fetch_packages
    from mole_asr.errors import MoleError

    folder = tmp_path_factory.mktemp("packages")
    try:
        fetch_packages(LANGUAGES, folder)
    except (MoleError, subprocess.SubprocessError) as error:
        pytest.skip(f"the prompt packages cannot be fetched here: {error}")
    return folder
