import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a failure elsewhere can be seen here. `--hypothesis-profile default` draws new
# ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Where there is no GPU, Triton's kernels run in its interpreter. Triton asks for this when it is first imported, and
# Lightning imports it, so it is decided here, before any test is read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where several processes share the work (`make test`), they share the cores too, and so do commands that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prompt_packages() -> Path:
    """A folder with the Debian packages of the prompt corpus: MOLE_ASR_PROMPTS, or fetched with apt and kept."""
    folder = os.environ.get("MOLE_ASR_PROMPTS")
    if folder:
        return Path(folder)
    from mole_asr.data_prep.prompts import LANGUAGES, fetch_packages
    from mole_asr.errors import MoleError

    packages = Path(__file__).parents[1] / "data" / "prompts5" / "packages"
    try:
        fetch_packages(LANGUAGES, packages)
    except (MoleError, subprocess.SubprocessError) as error:
        pytest.skip(f"the prompt packages cannot be fetched here: {error}")
    return packages
