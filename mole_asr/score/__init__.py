"""Error rates with intervals, language identification, and the report of a run.

`mole_asr.score` is at once the function users call and, once imported, this package: Python binds a package's name
in its parent and so hides the lazy function of the same name. Making the package callable lets both spellings work.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls `mole_asr.score.score.score`."""
        from mole_asr.score.score import score

        return score(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
